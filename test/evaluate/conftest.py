"""A small recording whose every number is known, and a policy that knows the future."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from vla_edge.evaluate.bag_writer import write_bag
from vla_edge.policy.spec import CameraSpec, Normalization, NormalizationMode, PolicySpec
from vla_edge.types import ActionChunk, InferenceTiming, JointState

START_NS = 1_700_000_000_123_456_789
JOINTS = ("left_elbow_joint", "right_elbow_joint", "waist_yaw_joint")
JOINT_HZ, CAMERA_HZ = 200, 20


def truth(seconds):
    """(..., 3) rad: where the robot of the recording is."""
    seconds = np.asarray(seconds, np.float64)[..., None]
    return 0.3 * np.sin(2.0 * seconds + np.array([0.0, 1.0, 2.0])) * np.array([1.0, 0.5, 0.0])


def picture(index: int) -> np.ndarray:
    """(48, 64, 3) uint8: a different one for every index."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[:, index % 64, 2] = index % 256, np.arange(48)[:, None] * 5, 255
    return pixels


def recording(seconds: float = 6.0, instructions=((0.0, "touch the red cube"),), joints=JOINTS, positions=truth):
    """Items for `write_bag`, in time order: joints listed backwards, and one the policy does not know."""
    names = (*reversed(joints), "neck_joint")
    items = [((t, 0), ("instruction", START_NS + round(t * 1e9), text)) for t, text in instructions]
    for k in range(int(seconds * JOINT_HZ)):
        t = k / JOINT_HZ
        values = np.append(positions(t)[::-1], 0.1)
        items.append(((t, 1), ("joints", JointState(START_NS + round(t * 1e9), names, values))))
        if k % (JOINT_HZ // CAMERA_HZ) == 0:
            items.append(((t, 2), ("image", START_NS + round(t * 1e9), "head", picture(k))))
    return [item for _, item in sorted(items, key=lambda pair: pair[0])]


@pytest.fixture
def make_bag(tmp_path):
    """make_bag(name="bag", items=recording(), **options of BagWriter) -> path of the bag."""

    def make(name="bag", items=None, **options):
        return write_bag(tmp_path / name, recording() if items is None else items, **options)

    return make


IDENTITY = Normalization(NormalizationMode.IDENTITY)
HEAD = CameraSpec("head", "observation.images.head", 48, 64, (0, 8, 48, 48), 48, 48)
SPEC = PolicySpec("smolvla", JOINTS, (HEAD,), 16, 0.05, 10, 8, 8, 16, "{instruction}", True, IDENTITY, IDENTITY)


@pytest.fixture
def spec() -> PolicySpec:
    return SPEC


@dataclass(frozen=True)
class Inference:
    chunk: ActionChunk
    timing: InferenceTiming


@dataclass
class Oracle:
    """Predicts what the recording does, plus `offset` rad and noise of `sigma` drawn from the stamp."""

    spec: PolicySpec
    offset: float = 0.0
    sigma: float = 0.0
    description: dict = field(default_factory=lambda: {"name": "oracle"})
    seen: list = field(default_factory=list)

    def infer(self, observation, seed=0, noise=None):
        self.seen.append(observation)
        stamps = observation.stamp_ns - START_NS + (np.arange(self.spec.chunk_size) + 1) * self.spec.dt * 1e9
        targets = truth(stamps / 1e9) + self.offset
        rng = np.random.default_rng([seed, observation.stamp_ns % 2**63])
        targets = targets + self.sigma * rng.standard_normal(targets.shape)
        chunk = ActionChunk(observation.stamp_ns, self.spec.joint_names, targets, self.spec.dt)
        return Inference(chunk, InferenceTiming(0.001, {"vision": 0.002}, 0.0005, 0.0035))


@pytest.fixture
def oracle(spec):
    """oracle(offset=..., sigma=...) -> a policy."""
    return lambda **options: Oracle(spec, **options)
