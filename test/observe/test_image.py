"""Image payloads become the right pixels, or a named error."""

from __future__ import annotations

import numpy as np
import pytest

from vla_edge.observe.image import (
    ENCODINGS,
    ImageDataError,
    ImageEncodingError,
    ImageError,
    ImageSizeError,
    check_image,
    decode_compressed,
    decode_image,
)
from vla_edge.types import VlaEdgeError

HEIGHT, WIDTH = 24, 32
_CHANNELS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1}


def payload(encoding: str, padding: int = 0) -> tuple[int, bytes]:
    """(step, bytes) of a random picture."""
    row = WIDTH * _CHANNELS.get(encoding, 2)
    data = np.random.default_rng(3).integers(0, 256, (HEIGHT, row + padding), dtype=np.uint8)
    return row + padding, data.tobytes()


@pytest.mark.parametrize("padding", (0, 5))
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pixels_are_those_of_an_independent_decoder(encoding, padding):
    from rosbags.image import message_to_cvimage
    from rosbags.typesys import Stores, get_typestore

    types = get_typestore(Stores.ROS2_JAZZY).types
    step, data = payload(encoding, padding)
    header = types["std_msgs/msg/Header"](types["builtin_interfaces/msg/Time"](0, 0), "")
    # The peer knows no padding: it gets the rows without.
    rows = np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(HEIGHT, step)[:, : step - padding])
    message = types["sensor_msgs/msg/Image"](header, HEIGHT, WIDTH, encoding, 0, step - padding, rows.ravel())
    expected = message_to_cvimage(message, "rgb8")
    got = decode_image(encoding, HEIGHT, WIDTH, step, data)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, expected)


def test_the_last_row_may_come_without_its_padding():
    step, data = payload("rgb8", padding=7)
    np.testing.assert_array_equal(
        decode_image("rgb8", HEIGHT, WIDTH, step, data[:-7]), decode_image("rgb8", HEIGHT, WIDTH, step, data)
    )


def test_a_lossless_picture_comes_back_unchanged():
    import cv2

    pixels = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    data = cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes()
    np.testing.assert_array_equal(decode_compressed(data, (HEIGHT, WIDTH)), pixels)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("bayer_rggb8", 24, 32, 32, 768), ImageEncodingError),
        (("", 24, 32, 96, 2304), ImageEncodingError),
        (("rgb8", 24, 31, 96, 2304), ImageSizeError),
        (("rgb8", 48, 64, 192, 9216), ImageSizeError),
        (("rgb8", 24, 32, 96, 2303), ImageSizeError),
        (("rgb8", 24, 32, 95, 2304), ImageSizeError),
        (("rgb8", 24, 32, 96, 0), ImageSizeError),
    ],
)
def test_a_wrong_image_is_named_before_a_pixel_is_touched(arguments, error):
    with pytest.raises(error) as caught:
        check_image(*arguments, expected=(24, 32))
    assert isinstance(caught.value, VlaEdgeError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("height", "width"), [(0, 0), (0, 4), (4, 0), (-1, 4)])
def test_an_image_without_pixels_is_refused(height, width):
    with pytest.raises(ImageSizeError):
        decode_image("rgb8", height, width, 3 * max(width, 0), b"")


@pytest.mark.parametrize("data", (b"", b"\xff\xd8\xff", b"not a picture at all"))
def test_compressed_data_without_a_picture_are_refused(data):
    with pytest.raises(ImageDataError):
        decode_compressed(data, (HEIGHT, WIDTH), "jpeg")


def test_a_compressed_picture_of_another_size_is_refused():
    import cv2

    data = cv2.imencode(".jpg", np.zeros((10, 10, 3), np.uint8))[1].tobytes()
    with pytest.raises(ImageError, match="10x10"):
        decode_compressed(data, (HEIGHT, WIDTH))
