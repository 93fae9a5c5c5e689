"""The plan that a robot is following, looked up at any moment: what a new chunk has to join."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vla_edge.types import NANOSECONDS, ActionChunk, JointState


def row_stamps(chunk: ActionChunk) -> np.ndarray:
    """(T,) int64 ns: the moment each row of a chunk is for."""
    return chunk.stamp_ns + (np.arange(1, len(chunk.positions) + 1) * chunk.dt * NANOSECONDS).astype(np.int64)


def end_ns(chunk: ActionChunk) -> int:
    """The moment of a chunk's last row, ns."""
    return chunk.stamp_ns + round(chunk.horizon * NANOSECONDS)


def positions_at(chunk: ActionChunk, stamps_ns: np.ndarray, names: tuple[str, ...] | None = None) -> np.ndarray:
    """(N, J) rad: a chunk between its rows, linearly; before the first row on the line through the first two, after
    the last row standing at it.

    Args:
        stamps_ns: (N,) ns.
        names: order of the joints; the chunk's own when None.
    """
    positions = chunk.positions
    if names is not None and tuple(names) != chunk.joint_names:
        positions = positions[:, [chunk.joint_names.index(name) for name in names]]
    # Differences of stamps are exact in int64; seconds since 1970 in a float would not be.
    rows = (np.asarray(stamps_ns, np.int64) - chunk.stamp_ns) / (chunk.dt * NANOSECONDS) - 1.0
    last = len(positions) - 1
    if not last:
        return np.repeat(positions, len(rows), axis=0)
    rows = np.minimum(rows, last)
    low = np.clip(np.floor(rows).astype(int), 0, last - 1)
    share = (rows - low)[:, None]
    return positions[low] * (1.0 - share) + positions[low + 1] * share


def rows_from(chunk: ActionChunk, stamp_ns: int) -> tuple[np.ndarray, int]:
    """A plan at the rows of a chunk that answers an observation of `stamp_ns`.

    Returns:
        ((T, J) rad, rows before the plan's end).
    """
    stamps = row_stamps(replace(chunk, stamp_ns=stamp_ns))
    return positions_at(chunk, stamps), int(np.count_nonzero(stamps <= end_ns(chunk)))


def strayed(chunk: ActionChunk, joints: JointState, stamp_ns: int) -> float:
    """rad: how far the measured joints are from where a chunk has them at `stamp_ns`, the worst joint."""
    index = {name: i for i, name in enumerate(joints.names)}
    measured = joints.position[[index[name] for name in chunk.joint_names]]
    return float(np.abs(positions_at(chunk, np.array([stamp_ns]))[0] - measured).max())
