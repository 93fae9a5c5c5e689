"""Values <-> bytes: msgpack, with arrays as openpi's clients write them."""

from __future__ import annotations

import math

import numpy as np

from vla_edge.engine.remote import MOST_BYTES, RemoteError

_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
# booleans, integers, floating point; never objects, which would be code
_KINDS = "biuf"


def pack(value) -> bytes:
    """Plain values, and arrays of numbers, as one message.

    Raises:
        RemoteError: something in it is neither.
    """
    import msgpack

    try:
        return msgpack.packb(value, default=_plain)
    except (TypeError, ValueError, OverflowError) as error:
        raise RemoteError(f"this cannot be sent to another computer: {error}") from error


def unpack(data: bytes, most_bytes: int = MOST_BYTES):
    """The value of a message.

    Raises:
        RemoteError: it is too large, is not whole, or holds an array that does not fit its bytes.
    """
    import msgpack

    if len(data) > most_bytes:
        raise RemoteError(f"a message of {len(data)} bytes came, {most_bytes} are allowed; send smaller images")
    try:
        return msgpack.unpackb(data, object_hook=_array, strict_map_key=False, max_ext_len=0)
    except RemoteError:
        raise
    except Exception as error:  # msgpack raises its own types and several of Python's
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise RemoteError(f"a message came that is not whole msgpack ({reason}); use an openpi client") from error


def _plain(value):
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in _KINDS:
        if isinstance(value, np.ndarray):
            return {_ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
        return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} is neither a plain value nor an array of numbers")


def _array(mapping: dict):
    if _ARRAY not in mapping and _SCALAR not in mapping:
        return mapping
    try:
        kind, data = np.dtype(mapping[b"dtype"]), mapping[b"data"]
        if kind.kind not in _KINDS or kind.shape:
            raise RemoteError(f"a message holds an array of {kind}, only numbers are taken")
        if _SCALAR in mapping:
            return kind.type(data)
        shape = tuple(mapping[b"shape"])
        if not all(isinstance(size, int) and size >= 0 for size in shape) or len(shape) > 8:
            raise RemoteError(f"a message holds an array of shape {shape}")
        if not isinstance(data, bytes) or math.prod(shape) * kind.itemsize != len(data):
            raise RemoteError(f"a message holds an array of shape {shape} and {kind} that does not fit its bytes")
        return np.frombuffer(data, kind).reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise RemoteError(f"a message holds an array that is not described as openpi does: {error!r}") from error
