"""What a policy of the saved references is shown: noise."""

from __future__ import annotations

import numpy as np

from vla_edge.types import JointState, Observation


def observations(spec, count: int, seed: int = 11) -> list[Observation]:
    """Noise for every camera and joint, with two instructions in turn."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        sizes = {c.name: (c.source_height, c.source_width, 3) for c in spec.cameras}
        images = {name: rng.integers(0, 256, size, dtype=np.uint8) for name, size in sizes.items()}
        joints = JointState(index, spec.read_names, rng.normal(0, 0.3, len(spec.read_names)))
        found.append(Observation(index * 200_000_000, images, joints, ("touch the red cube", "push the ball")[index % 2]))
    return found
