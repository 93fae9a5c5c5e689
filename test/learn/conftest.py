import json
from dataclasses import replace

import numpy as np
import pytest

from vla_edge.learn.train import TrainConfig, Trainer, reference_shapes
from vla_edge.sim.worlds import world

FRAMES = 40


@pytest.fixture(scope="session")
def recording(tmp_path_factory):
    """A recording of the tabletop, of invented frames."""
    return _record(tmp_path_factory.mktemp("demonstrations"), "tabletop", "touch the red cube with your left hand")


@pytest.fixture(scope="session")
def metaworld_recording(tmp_path_factory):
    """The same of Meta-World."""
    return _record(tmp_path_factory.mktemp("metaworld"), "metaworld", "press the button")


def _record(directory, name, instruction):
    """Frames with a bright square where the object is, and offsets that point at it."""
    rng, shown = np.random.default_rng(0), world(name)
    size, joints = shown.camera.height, len(shown.joint_names)
    for shard in range(2):
        pointer = rng.uniform(8, size - 8, (FRAMES, 2)).astype(np.float32)
        images = np.full((FRAMES, size, size, 3), 40, np.uint8)
        for image, (x, y) in zip(images, pointer.astype(int)):
            image[y - 4 : y + 4, x - 4 : x + 4] = (220, 30, 30)
        state = rng.normal(0, 0.3, (FRAMES, joints)).astype(np.float32)
        offset = (pointer.mean(1) / size - 0.5)[:, None, None] * np.linspace(0, 1, shown.chunk)[None, :, None]
        np.savez_compressed(
            directory / f"shard-{shard:04d}.npz",
            images=images, state=state, action=(state[:, None] + offset).astype(np.float32), pointer=pointer,
            instruction=np.array([instruction] * FRAMES),
            episode=np.arange(FRAMES), step=np.zeros(FRAMES, np.int32), goal=np.zeros(FRAMES, np.int32),
        )  # fmt: skip
    mark = {"world": name, "joint_names": shown.joint_names, "dt": shown.dt}
    (directory / "recording.json").write_text(json.dumps(mark), encoding="utf-8")
    return directory


@pytest.fixture
def make_trainer(recording):
    """(config, out) -> a trainer of a narrow policy on the recording."""
    shapes = replace(
        reference_shapes(world("tabletop")), vision_width=32, vision_hidden=64, vision_layers=1, text_width=64,
        text_hidden=64, heads=2, kv_heads=1, expert_width=48, expert_hidden=256,
    )  # fmt: skip
    return lambda config, out: Trainer(config, [recording], out, shapes)


@pytest.fixture
def short():
    """A run of four steps of eight frames."""
    return TrainConfig(steps=4, batch=8, draws=1, warmup=2)
