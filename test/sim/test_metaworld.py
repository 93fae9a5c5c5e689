"""The world of Meta-World itself; needs the library (`tools/peer_environment.sh metaworld`)."""

import numpy as np
import pytest

from vla_edge.sim.metaworld import GROUPS, JOINTS, OPENING_M, STRIDE_M, TASKS, TIME_LIMIT_STEPS, MetaWorldError
from vla_edge.sim.tasks import TaskError

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def metaworld():
    pytest.importorskip("metaworld", reason="metaworld is not installed")
    from vla_edge.sim.metaworld import MetaWorld

    world = MetaWorld()
    yield world
    world.close()


def _carry_out(world, steps=TIME_LIMIT_STEPS):
    path = []
    while not world.finished and len(path) < steps:
        world.step(world.expert_target())
        path.append(world.joint_state().position)
    return np.array(path)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_done_by_its_expert_through_absolute_targets(metaworld, task):
    done = 0
    for seed in range(4):
        metaworld.reset(seed, task)
        _carry_out(metaworld)
        done += metaworld.success
    assert done >= 3


def test_an_episode_is_the_same_after_others_and_differs_from_them(metaworld):
    def begin(seed):
        return metaworld.reset(seed), metaworld.render(128, 128), metaworld.object_pixel(128, 128)

    first = begin(5)
    others = [begin(seed) for seed in range(6, 18)]
    _carry_out(metaworld, 40)
    again = begin(5)
    assert first[0] == again[0]
    np.testing.assert_array_equal(first[1], again[1])
    assert {episode.task for episode, *_ in others} == set(GROUPS["three"])
    assert len({tuple(pixel) for *_, pixel in others}) == len(others)


def test_a_task_of_a_group_is_the_episode_of_the_task_alone(metaworld):
    episode = metaworld.reset(11, "mt10")
    picture = metaworld.render(128, 128)
    metaworld.reset(11, episode.task)
    np.testing.assert_array_equal(metaworld.render(128, 128), picture)


def test_going_back_to_a_state_repeats_what_followed_it(metaworld):
    metaworld.reset(3, "drawer-open")
    _carry_out(metaworld, 40)
    state = metaworld.snapshot()
    first = _carry_out(metaworld, 30)
    metaworld.restore(state)
    assert metaworld.steps == 40
    np.testing.assert_array_equal(_carry_out(metaworld, 30), first)


def test_the_hand_goes_where_it_is_told_no_faster_than_the_environment_lets_it(metaworld):
    metaworld.reset(0, "reach")
    start = metaworld.joint_state()
    assert start.names == JOINTS and start.position[3] == pytest.approx(OPENING_M, abs=1e-3)
    far = np.array([start.position[0] + 0.1, *start.position[1:3], 0.0])
    for _ in range(5):
        metaworld.step(far)
    moved = metaworld.joint_state().position - start.position
    assert 0 < moved[0] <= 5 * STRIDE_M + 1e-3
    for _ in range(40):
        metaworld.step(far)
    reached = metaworld.joint_state().position
    np.testing.assert_allclose(reached[:3], far[:3], atol=0.01)
    assert reached[3] < 0.5 * OPENING_M


def test_the_pointer_lies_on_the_button(metaworld):
    for seed in range(4):
        metaworld.reset(seed, "button-press-topdown")
        x, y = metaworld.object_pixel(512, 512).astype(int)
        # a little below its top, which a marker may cover
        red, green, blue = metaworld.render(512, 512)[y + 6, x].astype(int)
        assert red > 60 and red > 2 * max(green, blue), (seed, red, green, blue)


def test_what_cannot_be_done_is_named(metaworld):
    with pytest.raises(TaskError, match="no tier 'hard'"):
        metaworld.reset(0, "hard")
    metaworld.reset(0)
    with pytest.raises(MetaWorldError, match="not finite"):
        metaworld.step(np.array([np.nan, 0.0, 0.0, 0.0]))
    while metaworld.steps < TIME_LIMIT_STEPS:
        metaworld.step(metaworld.joint_state().position)
    with pytest.raises(MetaWorldError, match="500 steps"):
        metaworld.step(np.zeros(4))


def test_demonstrations_teach_what_the_expert_then_did_and_most_of_them_succeed(metaworld):
    from vla_edge.sim.demonstrations import FIELDS
    from vla_edge.sim.metaworld_demonstrations import CHUNK, LAST_STEP, ROW_STEPS, record_episode

    reached, starts = 0, []
    for seed in range(1_500_000, 1_500_008):
        frames, success = record_episode(metaworld, seed, "three")
        reached += success
        arrays = {name: np.array(frames[name]) for name in FIELDS}
        count = len(arrays["step"])
        assert arrays["images"].shape == (count, 64, 64, 3) and arrays["images"].dtype == np.uint8
        assert arrays["action"].shape == (count, CHUNK, 4) and count <= LAST_STEP / ROW_STEPS + 1
        # the clean way after one frame goes on as that after the next
        np.testing.assert_array_equal(arrays["action"][:-1, 1:], arrays["action"][1:, :-1])
        lag = np.median(np.abs(arrays["action"][:-1, 0, :3] - arrays["state"][1:, :3]))
        assert lag < ROW_STEPS * STRIDE_M, "the hand follows its target, but for where it pushes"
        starts.append(arrays["state"][0, :3])
    assert reached >= 7
    assert np.std(starts, axis=0).max() > 0.02, "noise leads them to other beginnings"
