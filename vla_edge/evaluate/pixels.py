"""Recorded image messages -> RGB pixels."""

from __future__ import annotations

import numpy as np

from vla_edge.evaluate.storage import BagError

# encoding -> (bytes per pixel, which bytes are red, green, blue)
_LAYOUTS = {
    "rgb8": (3, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)),
    "8UC3": (3, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
    "8UC1": (1, (0, 0, 0)),
}


class ImageError(BagError):
    """A recorded image that is no picture, or in an encoding that is not read."""


def decode_image(message) -> np.ndarray:
    """sensor_msgs Image or CompressedImage -> (H, W, 3) uint8 RGB.

    Raises:
        ImageError: the encoding is unknown, or the data do not hold the picture they announce.
    """
    return _compressed(message) if hasattr(message, "format") else _raw(message)


def _raw(message) -> np.ndarray:
    if message.encoding not in _LAYOUTS:
        raise ImageError(f"encoding {message.encoding!r} is not one of {', '.join(_LAYOUTS)}")
    channels, order = _LAYOUTS[message.encoding]
    height, width, step = int(message.height), int(message.width), int(message.step)
    data = np.asarray(message.data, np.uint8)
    if height == 0 or width == 0 or step < width * channels or len(data) != height * step:
        raise ImageError(f"{len(data)} bytes are not {width}x{height} pixels of {message.encoding}")
    pixels = data.reshape(height, step)[:, : width * channels].reshape(height, width, channels)
    return np.ascontiguousarray(pixels[:, :, order])


def _compressed(message) -> np.ndarray:
    import cv2

    data = np.asarray(message.data, np.uint8)
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION) if len(data) else None
    except cv2.error:
        pixels = None
    if pixels is None:
        raise ImageError(f"{len(data)} bytes of {message.format or 'unknown format'!r} are not a picture")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
