"""The payload of an image message -> (H, W, 3) uint8 RGB, as plain data: no ROS in here.

Layouts and conversions are those of `sensor_msgs/image_encodings` and cv_bridge; test/observe holds both to the same
pixels.
"""

from __future__ import annotations

import numpy as np

from vla_edge.types import VlaEdgeError

# encoding -> (bytes per pixel, which of them are red, green and blue)
_LAYOUTS = {
    "rgb8": (3, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
}
# Packed 4:2:2, what USB cameras send: encoding -> OpenCV conversion
_PACKED = {
    "yuv422": "COLOR_YUV2RGB_UYVY",
    "uyvy": "COLOR_YUV2RGB_UYVY",
    "yuv422_yuy2": "COLOR_YUV2RGB_YUYV",
    "yuyv": "COLOR_YUV2RGB_YUYV",
}
ENCODINGS = (*_LAYOUTS, *_PACKED)


class ImageError(VlaEdgeError):
    """A picture that cannot be shown to the policy."""


class ImageEncodingError(ImageError):
    """A pixel layout that is not read."""


class ImageSizeError(ImageError):
    """Another size than expected, or fewer or more bytes than the size announces."""


class ImageDataError(ImageError):
    """Compressed data that hold no picture."""


def check_image(
    encoding: str, height: int, width: int, step: int, size: int, expected: tuple[int, int] | None = None
) -> None:
    """Judges a raw image by what it says of itself, without touching a pixel.

    Args:
        step: bytes from one row to the next.
        size: bytes of pixel data.
        expected: (height, width) the policy was trained on.

    Raises:
        ImageEncodingError: the encoding is not one of `ENCODINGS`.
        ImageSizeError: height and width differ from `expected`, or the data do not fill them.
    """
    if encoding not in ENCODINGS:
        raise ImageEncodingError(f"image encoding {encoding!r} is not read; publish one of {', '.join(ENCODINGS)}")
    if expected is not None and (height, width) != tuple(expected):
        raise ImageSizeError(
            f"image of {width}x{height} pixels, but the policy was trained on {expected[1]}x{expected[0]}; "
            "set the camera to that size"
        )
    row = width * (_LAYOUTS[encoding][0] if encoding in _LAYOUTS else 2)
    if height < 1 or width < 1 or step < row or size < step * (height - 1) + row:
        raise ImageSizeError(
            f"{size} bytes in rows of {step} are not {width}x{height} pixels of {encoding}; check the camera driver"
        )
    if encoding in _PACKED and width % 2:
        raise ImageSizeError(f"{encoding} stores pixels in pairs, but the image is {width} wide; crop it to even width")


def decode_image(encoding: str, height: int, width: int, step: int, data) -> np.ndarray:
    """Raw image -> (height, width, 3) uint8 RGB; a view of `data` where its layout allows that.

    Args:
        data: bytes, array('B') or uint8 array; rows of `step` bytes, padding at their end.

    Raises:
        ImageEncodingError, ImageSizeError: see `check_image`.
    """
    data = np.frombuffer(data, np.uint8)
    check_image(encoding, height, width, step, data.size)
    channels = _LAYOUTS[encoding][0] if encoding in _LAYOUTS else 2
    # The last row may come without its padding.
    pixels = np.lib.stride_tricks.as_strided(data, (height, width, channels), (step, channels, 1), writeable=False)
    if encoding in _PACKED:
        import cv2

        return cv2.cvtColor(np.ascontiguousarray(pixels), getattr(cv2, _PACKED[encoding]))
    order = _LAYOUTS[encoding][1]
    return pixels if encoding == "rgb8" else np.ascontiguousarray(pixels[:, :, order])


def decode_compressed(data, expected: tuple[int, int] | None = None, format: str = "") -> np.ndarray:
    """JPEG, PNG and whatever else OpenCV reads -> (H, W, 3) uint8 RGB.

    Args:
        data: bytes, array('B') or uint8 array.
        expected: (height, width) the policy was trained on.
        format: as in the message, for the error only.

    Raises:
        ImageDataError: the data hold no picture.
        ImageSizeError: the picture has another size than `expected`.
    """
    import cv2

    data = np.frombuffer(data, np.uint8)
    try:
        # Orientation tags are ignored: a robot's camera says how it is mounted elsewhere.
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(data, flags) if data.size else None
    except cv2.error:
        pixels = None
    if pixels is None:
        raise ImageDataError(
            f"{data.size} bytes of format {format or 'unknown'!r} hold no picture; check the camera's compression"
        )
    if expected is not None and pixels.shape[:2] != tuple(expected):
        raise ImageSizeError(
            f"compressed image of {pixels.shape[1]}x{pixels.shape[0]} pixels, but the policy was trained on "
            f"{expected[1]}x{expected[0]}; set the camera to that size"
        )
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
