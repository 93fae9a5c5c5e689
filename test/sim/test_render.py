import colorsys
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from vla_edge.sim.render import RenderError

HUES = {"red": 0.0, "orange": 0.075, "yellow": 0.14, "green": 0.36, "blue": 0.65, "purple": 0.77}


def hue_of(pixel):
    """Name of the colour, None for grey, black or white."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(np.asarray(pixel) / 255))
    if saturation < 0.5 or value < 0.15:
        return None
    return min(HUES, key=lambda name: abs((hue - HUES[name] + 0.5) % 1 - 0.5))


def test_a_small_picture_is_a_sampling_of_the_camera_picture(world):
    """What a policy trained on 96x96 sees on the robot: the central square of 640x480, pixels 5 i + 2."""
    differing = []
    for seed in range(8):
        world.reset(seed, "touch" if seed % 2 else "hard")
        large, small = world.render(480, 640), world.render(96, 96)
        sampled = large[2::5, 80:560][:, 2::5]
        differing.append((sampled != small).any(-1).mean())
    assert np.mean(differing) < 0.001 and max(differing) < 0.003


def test_drawing_is_repeatable(world):
    world.reset(1)
    assert np.array_equal(world.render(96, 96), world.render(96, 96))


@pytest.mark.parametrize("tier", ["touch", "hard"])
def test_pointer_falls_on_the_colour_of_the_object(world, tier):
    hits = total = 0
    for seed in range(12):
        episode = world.reset(seed, tier)
        picture = world.render(96, 96)
        for goal in {(goal.colour, goal.shape): goal for goal in episode.goals}.values():
            x, y = world.project(world.object_centre(goal), 96, 96)
            assert 3 < x < 93 and 3 < y < 93
            total += 1
            hits += hue_of(picture[int(y), int(x)]) == goal.colour
    # A fingertip may hang over an object of the front row.
    assert hits == total if tier == "touch" else hits / total > 0.9


def test_both_fingertips_are_in_the_square_picture_at_the_start(world):
    world.reset(0)
    for tip in world.fingertips():
        x, y = world.project(tip, 96, 96)
        assert 4 < x < 92 and 4 < y < 92


def test_cubes_and_balls_look_different_at_96_pixels(world):
    """A cube shows a bright top and a dark side; a ball changes evenly."""
    steps = {"cube": [], "ball": []}
    for seed in range(10):
        episode = world.reset(seed)
        picture = world.render(96, 96).astype(int)
        for goal in episode.goals[::2]:
            x, y = world.project(world.object_centre(goal), 96, 96)
            column = picture[int(y) - 5 : int(y) + 6, int(x)].max(-1)
            steps[goal.shape].append(np.abs(np.diff(column))[2:-2].max())
    assert np.median(steps["cube"]) > 1.5 * np.median(steps["ball"])


def test_bad_requests_are_named_errors(world):
    world.reset(0)
    with pytest.raises(RenderError, match="no camera 'wrist'"):
        world.render(96, 96, "wrist")
    with pytest.raises(RenderError, match="largest is 1280x960"):
        world.render(5000, 96)


def test_drawing_from_another_thread_is_refused_with_a_reason(world):
    world.reset(0)
    world.render(96, 96)
    caught = []

    def draw():
        try:
            world.render(96, 96)
        except RenderError as error:
            caught.append(str(error))

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    assert caught and "world of its own" in caught[0]


def test_a_machine_that_cannot_draw_is_told_what_to_install():
    code = (
        "import importlib\n"
        "from vla_edge.sim.render import RenderError, _gl_context\n"
        "importlib.import_module = lambda name: (_ for _ in ()).throw(ImportError(f'no {name}'))\n"
        "try:\n    _gl_context(64, 64)\nexcept RenderError as error:\n    print(error)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    ).stdout
    assert "egl: no" in output and "osmesa: no" in output and "install libegl1" in output
