"""Chunks that nodes gave, against those the library gives on the recording they were played: the same, or a bug."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_edge.evaluate.bag import Bag, BagError
from vla_edge.evaluate.contract import TopicContract
from vla_edge.evaluate.replay import Policy, open_policy
from vla_edge.evaluate.tally import in_order
from vla_edge.types import ActionChunk


@dataclass(frozen=True)
class ChunkParity:
    """How alike they are.

    Attributes:
        chunks: compared.
        max_difference: largest of any joint at any point, rad.
    """

    chunks: int
    max_difference: float


def compare_chunks(
    bag: str | Path,
    engine: Policy | str | Path,
    chunks: Iterable[ActionChunk],
    seed: int = 0,
    contract: TopicContract | None = None,
    threads: int | None = None,
) -> ChunkParity:
    """Infers on the observations that `chunks` answer, and compares.

    Raises:
        BagError: a chunk answers no observation of the bag.
    """
    given = {chunk.stamp_ns: chunk for chunk in chunks}
    policy = open_policy(engine, threads)
    spec, largest, compared = policy.spec, 0.0, 0
    with Bag(bag, contract) as opened:
        cameras = tuple(camera.name for camera in spec.cameras)
        for frame in opened.frames(cameras, spec.measured_names, lags=spec.lags, instructed=spec.reads_instruction):
            chunk = given.pop(frame.observation.stamp_ns, None)
            if chunk is not None:
                expected = policy.infer(frame.observation, seed=seed).chunk
                largest = max(largest, float(np.abs(in_order(chunk, spec.joint_names) - expected.positions).max()))
                compared += 1
    if given:
        raise BagError(
            f"{len(given)} chunks answer observations that bag {bag} does not hold, the first at {min(given)} ns; "
            "compare them with the recording they were made of"
        )
    return ChunkParity(compared, largest)
