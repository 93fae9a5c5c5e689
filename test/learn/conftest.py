import json
from dataclasses import replace

import numpy as np
import pytest

from vla_edge.learn.train import TrainConfig, Trainer, reference_shapes
from vla_edge.robots.g1 import DRIVEN_JOINTS
from vla_edge.sim.expert import DT
from vla_edge.sim.tabletop_demonstrations import IMAGE_SIZE
from vla_edge.sim.worlds import world

FRAMES = 40


@pytest.fixture(scope="session")
def recording(tmp_path_factory):
    """A recording of invented frames: a bright square where the object is, offsets that point at it."""
    rng = np.random.default_rng(0)
    directory = tmp_path_factory.mktemp("demonstrations")
    for shard in range(2):
        pointer = rng.uniform(8, IMAGE_SIZE - 8, (FRAMES, 2)).astype(np.float32)
        images = np.full((FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3), 40, np.uint8)
        for image, (x, y) in zip(images, pointer.astype(int)):
            image[y - 4 : y + 4, x - 4 : x + 4] = (220, 30, 30)
        state = rng.normal(0, 0.3, (FRAMES, 15)).astype(np.float32)
        offset = (pointer.mean(1) / IMAGE_SIZE - 0.5)[:, None, None] * np.linspace(0, 1, 32)[None, :, None]
        np.savez_compressed(
            directory / f"shard-{shard:04d}.npz",
            images=images, state=state, action=(state[:, None] + offset).astype(np.float32), pointer=pointer,
            instruction=np.array(["touch the red cube with your left hand"] * FRAMES),
            episode=np.arange(FRAMES), step=np.zeros(FRAMES, np.int32), goal=np.zeros(FRAMES, np.int32),
        )  # fmt: skip
    mark = {"joint_names": DRIVEN_JOINTS, "dt": DT}
    (directory / "recording.json").write_text(json.dumps(mark), encoding="utf-8")
    return directory


@pytest.fixture
def make_trainer(recording):
    """(config, out) -> a trainer of a narrow policy on the recording."""
    shapes = replace(
        reference_shapes(world("tabletop")), vision_width=32, vision_hidden=64, vision_layers=1, text_width=64, text_hidden=64, heads=2,
        kv_heads=1, expert_width=48, expert_hidden=256,
    )  # fmt: skip
    return lambda config, out: Trainer(config, [recording], out, shapes)


@pytest.fixture
def short():
    """A run of four steps of eight frames."""
    return TrainConfig(steps=4, batch=8, draws=1, warmup=2)
