"""Joint positions out of serialized sensor_msgs/JointState messages, fast enough for an hour of them at 500 Hz.

A robot's joint states differ from one to the next in their numbers only. So the layout of the first is learned, and
wherever the bytes before the numbers are the same the numbers are read in place; anything else is decoded in full.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np

from vla_edge.evaluate.storage import RawMessage, Storage
from vla_edge.types import JointState

# CDR encapsulation, or ROS 1's sequence number, (4 bytes) and the header's stamp (8 bytes)
_STAMP_END = 12


class JointReader:
    """Reads the joints of one topic.

    Args:
        storage: the bag.
        names: the J joints wanted, in this order.
        aliases: name in the bag -> name in `names`.

    Attributes:
        lacking: joints of `names` that the last unusable message did not have.
    """

    def __init__(self, storage: Storage, names: tuple[str, ...], aliases: Mapping[str, str]):
        self._storage, self._names, self._aliases = storage, names, aliases
        self._layout: tuple[bytes, int, np.ndarray] | None = None
        self.lacking: tuple[str, ...] = ()

    def positions(self, raw: RawMessage) -> np.ndarray | None:
        """(J,) rad, or None when the message lacks joints (see `lacking`) or positions.

        Raises:
            BagError: the message does not decode.
        """
        if self._layout is not None:
            before, count, order = self._layout
            end = _STAMP_END + len(before)
            if raw.data[_STAMP_END:end] == before and len(raw.data) >= end + 8 * count:
                return np.frombuffer(raw.data, "<f8", count, end)[order]
        message = self._storage.deserialize(raw)
        order = self._order(message)
        if order is None or len(message.position) != len(message.name):
            return None
        positions = np.asarray(message.position, np.float64)
        start = _positions_offset(raw.data, self._storage.ros1)
        # The bag may define the message in another way than the standard does: only what reads the same is learned.
        if start is not None and len(self._names) and len(raw.data) >= start + positions.nbytes:
            if raw.data[start : start + positions.nbytes] == positions.astype("<f8").tobytes():
                self._layout = (bytes(raw.data[_STAMP_END:start]), len(positions), order)
        return positions[order]

    def state(self, raw: RawMessage, stamp_ns: int) -> JointState:
        """The whole state of a message that `positions` was read from.

        Raises:
            BagError: the message does not decode.
        """
        message = self._storage.deserialize(raw)
        order = self._order(message)
        fields = [np.asarray(getattr(message, name), np.float64) for name in ("position", "velocity", "effort")]
        fields = [values[order] if len(values) == len(message.name) else None for values in fields]
        return JointState(stamp_ns, self._names, *fields)

    def _order(self, message) -> np.ndarray | None:
        index = {self._aliases.get(name, name): i for i, name in enumerate(message.name)}
        self.lacking = tuple(name for name in self._names if name not in index)
        return None if self.lacking else np.array([index[name] for name in self._names], np.intp)


def _positions_offset(data: bytes, ros1: bool) -> int | None:
    """Where the position array of a little-endian JointState begins, CDR or of ROS 1; None when it is not one."""

    def aligned(offset: int, size: int) -> int:
        return offset if ros1 else 4 + -(-(offset - 4) // size) * size

    def string_end(offset: int) -> int:
        offset = aligned(offset, 4)
        return offset + 4 + struct.unpack_from("<I", data, offset)[0]

    try:
        if not ros1 and (data[0] != 0 or data[1] != 1):
            return None
        offset = aligned(string_end(_STAMP_END), 4)
        (count,) = struct.unpack_from("<I", data, offset)
        offset += 4
        for _ in range(count):
            offset = string_end(offset)
        offset = aligned(offset, 4)
        (positions,) = struct.unpack_from("<I", data, offset)
        return aligned(offset + 4, 8) if positions == count else None
    except (struct.error, IndexError):
        return None
