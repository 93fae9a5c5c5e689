"""Observation -> the network's tensors, and the network's actions -> joint targets; numpy only.

The arithmetic is LeRobot's (`resize_with_pad`, `NormalizerProcessorStep`), held to it by test/parity.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from vla_edge.policy.spec import CameraSpec, PolicySpec
from vla_edge.policy.tokenize import InstructionTokenizer
from vla_edge.types import JointState, Observation, VlaEdgeError


class ObservationError(VlaEdgeError):
    """An observation the policy cannot be shown: wrong camera, image size, type, joints or non-finite values."""


class Preprocessor:
    """Turns an observation into the inputs of the vision and prefix stages.

    Args:
        spec: the policy.
        tokenizer: of the same checkpoint.
    """

    def __init__(self, spec: PolicySpec, tokenizer: InstructionTokenizer):
        self._spec = spec
        self._tokenizer = tokenizer

    def __call__(self, observation: Observation) -> dict[str, np.ndarray]:
        """`image.<camera>` (S, 3, H, W), `state` (S, max_state_dim), `lang_tokens`, `lang_mask` (1, L); of the S
        observations that the policy reads the newest is the last.

        Raises:
            ObservationError, InstructionError: the observation cannot be shown to this policy.
        """
        shown = observation.last(self._spec.observation_steps)
        tensors = {
            f"image.{camera.name}": np.concatenate([self.image(each, camera) for each in shown])
            for camera in self._spec.cameras
        }
        tensors["state"] = np.concatenate([self.state(each.joints) for each in shown])
        tokens = self._tokenizer(observation.instruction, tensors["state"][-1])
        tensors["lang_tokens"], tensors["lang_mask"] = tokens
        return tensors

    def image(self, observation: Observation, camera: CameraSpec) -> np.ndarray:
        """(1, 3, height, width) float32, in [-1, 1] where the camera is not scaled otherwise."""
        seen = self._fitted(observation, camera)
        if camera.is_scaled:
            offset, scale = (np.asarray(part)[:, None, None] for part in (camera.offset, camera.scale))
            seen = ((seen * 0.5 + 0.5 - offset) / scale).astype(np.float32)
        return seen

    def _fitted(self, observation: Observation, camera: CameraSpec) -> np.ndarray:
        pixels = observation.images.get(camera.name)
        if pixels is None:
            raise ObservationError(
                f"the observation has no camera {camera.name!r}, only {sorted(observation.images)}; "
                "publish it or map the topic"
            )
        expected = (camera.source_height, camera.source_width, 3)
        if pixels.shape != expected or pixels.dtype != np.uint8:
            raise ObservationError(
                f"camera {camera.name!r} gave {pixels.dtype} of shape {pixels.shape}, "
                f"but the policy was trained on uint8 {expected}; set the camera to that size"
            )
        top, left, height, width = camera.crop
        cropped = pixels[top : top + height, left : left + width]
        if camera.fit in ZOOMS:
            return ZOOMS[camera.fit](cropped, camera.height, camera.width, camera.zoom)
        if camera.fit in FITS:
            return FITS[camera.fit](cropped, camera.height, camera.width)
        return resize_with_pad(cropped, camera.height, camera.width, camera.padding, camera.fit == "centre")

    def state(self, joints: JointState) -> np.ndarray:
        """(1, max_state_dim) float32: normalized positions in the checkpoint's joint order, zero padded."""
        padded = np.zeros((1, self._spec.max_state_dim), np.float32)
        names = self._spec.read_names
        padded[0, : len(names)] = self._spec.state.normalize(positions_by_name(joints, names))
        return padded


def as_delivered(picture: np.ndarray, camera: CameraSpec) -> np.ndarray:
    """(H, W, 3) uint8 as it was stored -> the camera's frame, of which `Preprocessor.image` makes what it made of it.

    A picture may have been stored as the camera gave it, cropped, or cropped and taken at the network's size where that
    is every third, fifth, ... pixel.

    Raises:
        ObservationError: it is of another size.
    """
    top, left, height, width = camera.crop
    size, step = picture.shape[:2], height // camera.height
    if size == (camera.source_height, camera.source_width):
        return picture
    if size == (camera.height, camera.width) and step % 2 == 1 and (size[0] * step, size[1] * step) == (height, width):
        picture = picture.repeat(step, 0).repeat(step, 1)
    if picture.shape[:2] != (height, width):
        raise ObservationError(
            f"pictures of camera {camera.name!r} were stored as {size[1]}x{size[0]} pixels, but the policy was trained "
            f"on {camera.source_width}x{camera.source_height}, cropped to {width}x{height}; record them like that"
        )
    frame = np.zeros((camera.source_height, camera.source_width, 3), np.uint8)
    frame[top : top + height, left : left + width] = picture
    return frame


class Postprocessor:
    """Turns the network's final action tensor into absolute joint targets."""

    def __init__(self, spec: PolicySpec):
        self._spec = spec

    def __call__(self, actions: np.ndarray, joints: JointState) -> np.ndarray:
        """(1, T, max_action_dim) -> (T, J) float64 rad.

        Raises:
            ObservationError: `joints` lacks a joint of the policy.
        """
        names = self._spec.joint_names
        targets = self._spec.action.unnormalize(actions[0, :, : len(names)])
        if self._spec.relative_actions:
            targets = targets + np.where(self._spec.offset_joints, positions_by_name(joints, names), 0.0)
        return targets

    def inverse(self, targets: np.ndarray, joints: JointState) -> np.ndarray:
        """(T, J) rad -> (T, J) float32 as the network would have given them.

        Raises:
            ObservationError: as for the way forth.
        """
        if self._spec.relative_actions:
            measured = positions_by_name(joints, self._spec.joint_names)
            targets = targets - np.where(self._spec.offset_joints, measured, 0.0)
        # as the network would give it, beyond what it was shown too
        return replace(self._spec.action, clip=False).normalize(targets)


def positions_by_name(joints: JointState, names: tuple[str, ...]) -> np.ndarray:
    """(len(names),) rad, in the order of `names`.

    Raises:
        ObservationError: a joint is missing or not finite.
    """
    index = {name: i for i, name in enumerate(joints.names)}
    missing = [name for name in names if name not in index]
    if missing:
        raise ObservationError(
            f"the joint state lacks {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}; "
            "the policy needs every joint it was trained on"
        )
    positions = joints.position[[index[name] for name in names]]
    if not np.isfinite(positions).all():
        bad = names[int(np.flatnonzero(~np.isfinite(positions))[0])]
        raise ObservationError(f"the joint state of {bad} is not finite; check the encoder or its driver")
    return positions


def resize_with_pad(
    image: np.ndarray, height: int, width: int, padding: float = -1.0, centred: bool = False
) -> np.ndarray:
    """(h, w, 3) uint8 -> (1, 3, height, width) float32 in [-1, 1]; aspect kept, padded at the top and left or around.

    Bilinear with half-pixel centres and no antialiasing, as LeRobot's. Where the scale is an odd whole number, each
    output pixel falls on the centre of one input pixel and sampling is exact (and a hundred times cheaper).
    """
    h, w = image.shape[:2]
    ratio = max(w / width, h / height)
    new_h, new_w = int(h / ratio), int(w / ratio)
    step = round(ratio)
    if ratio == step and step % 2 == 1 and (new_h * step, new_w * step) == (h, w):
        resized = image[step // 2 :: step, step // 2 :: step].astype(np.float32)
    else:
        import cv2

        resized = cv2.resize(image.astype(np.float32), (new_w, new_h), interpolation=cv2.INTER_LINEAR)
    top, left = height - new_h, width - new_w
    if centred:
        top, left = top // 2, left // 2
    out = np.full((1, 3, height, width), padding, np.float32)
    out[0, :, top : top + new_h, left : left + new_w] = resized.transpose(2, 0, 1) * np.float32(2 / 255) - 1
    return out


def resample(image: np.ndarray, height: int, width: int, filter: str, most: int = 2**31) -> np.ndarray:
    """(h, w, 3) uint8 -> (height, width, 3) float64 of whole pixel values, antialiased, across first and then down, as
    Pillow's 8-bit resize.

    Args:
        filter: "bilinear" or "bicubic" (Keys, 1981, a = -0.5).
        most: what a weight in fixed point stays below; 2**15 in PyTorch's resize of whole pixels.
    """
    across, down = _weights(image.shape[1], width, filter, most), _weights(image.shape[0], height, filter, most)
    wide = _whole(across @ image.astype(np.float64))
    return _whole(np.tensordot(down, wide, 1))


def stretch(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w, 3) uint8 -> (1, 3, height, width) float32 in [-1, 1], whatever the aspect; bicubic, as OpenVLA's."""
    return _seen(resample(image, height, width, "bicubic"))


def stretch_torch(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """As `stretch`, by torchvision instead of Pillow."""
    return _seen(resample(image, height, width, "bicubic", most=2**15))


def stretch_linear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w, 3) uint8 -> (1, 3, height, width) float32 in [-1, 1], whatever the aspect; bilinear and antialiased in
    floating point, and then cut off to whole pixel values, as Isaac-GR00T's transforms."""
    across, down = _shares(image.shape[1], width, "bilinear"), _shares(image.shape[0], height, "bilinear")
    pixels = np.tensordot(down, across @ image.astype(np.float64), 1)
    return _seen(np.floor(pixels + 1e-4))  # in float32, where a hair is missing, it is made up for


def zoom_torch(image: np.ndarray, height: int, width: int, zoom: float) -> np.ndarray:
    """As `stretch_torch` to a square as high, of which the middle is stretched to `height` x `width`; as LeRobot's GR00T
    N1.7."""
    square = resample(image, height, height, "bicubic", most=2**15)
    side = max(1, round(height * zoom))
    begin = (height - side) // 2
    middle = square[begin : begin + side, begin : begin + side].astype(np.uint8)
    return stretch_torch(middle, height, width) if middle.shape[:2] != (height, width) else _seen(square)


def zoom_area(image: np.ndarray, height: int, width: int, zoom: float) -> np.ndarray:
    """Scaled by areas until the shorter side has that of `height` x `width`, its middle once more, and that stretched; as
    Isaac-GR00T's N1.7 with albumentations."""
    import cv2

    def scaled(pixels: np.ndarray) -> np.ndarray:
        shorter, wanted = min(pixels.shape[:2]), min(height, width)
        size = (max(1, round(side * (wanted / shorter))) for side in pixels.shape[1::-1])
        return pixels if shorter == wanted else cv2.resize(pixels, tuple(size), interpolation=cv2.INTER_AREA)

    pixels = scaled(np.ascontiguousarray(image))
    if zoom < 1:
        sides = [max(1, int(side * zoom)) for side in pixels.shape[:2]]
        (top, left), (h, w) = ((whole - side) // 2 for whole, side in zip(pixels.shape, sides)), sides
        pixels = scaled(np.ascontiguousarray(pixels[top : top + h, left : left + w]))
    return stretch_torch(pixels, height, width) if pixels.shape[:2] != (height, width) else _seen(pixels)


def letterbox(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w, 3) uint8 -> (1, 3, height, width) float32 in [-1, 1]; aspect kept, black around it, bilinear and
    antialiased, as openpi's client."""
    h, w = image.shape[:2]
    ratio = max(w / width, h / height)
    size = int(h / ratio), int(w / ratio)
    out = np.zeros((height, width, 3))
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    out[top : top + size[0], left : left + size[1]] = resample(image, *size, "bilinear")
    return _seen(out)


def _seen(pixels: np.ndarray) -> np.ndarray:
    return pixels.transpose(2, 0, 1)[None].astype(np.float32) * np.float32(2 / 255) - 1


def _whole(pixels: np.ndarray) -> np.ndarray:
    return np.floor(pixels.clip(0, 255) + 0.5)


@lru_cache(maxsize=16)
def _weights(size: int, wanted: int, filter: str, most: int) -> np.ndarray:
    """(wanted, size) as of `_shares`, in fixed point: of Pillow's 22 bits as many as keep a weight below `most`."""
    shares, bits = _shares(size, wanted, filter), 22
    while int(shares.max() * 2**bits + 0.5) >= most:
        bits -= 1
    return np.rint(shares * 2**bits) / 2**bits


@lru_cache(maxsize=16)
def _shares(size: int, wanted: int, filter: str) -> np.ndarray:
    """(wanted, size) weights of each input pixel in each output pixel, wider where the picture shrinks."""
    scale = size / wanted
    reach, support = max(scale, 1.0), 1 if filter == "bilinear" else 2
    centre = (np.arange(wanted) + 0.5) * scale
    # what lies within the support, counted in whole pixels
    first, last = (np.floor(centre + side * support * reach + 0.5)[:, None] for side in (-1, 1))
    pixel = np.arange(size)
    x = np.abs(pixel + 0.5 - centre[:, None]) / reach
    if filter == "bilinear":
        values = np.maximum(1 - x, 0)
    else:
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        values = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights = values * ((pixel >= first) & (pixel < last))
    return weights / weights.sum(1, keepdims=True)


FITS = {"stretch": stretch, "stretch_torch": stretch_torch, "stretch_linear": stretch_linear, "letterbox": letterbox}
"""`CameraSpec.fit` -> (crop, height, width) -> what the network sees; the others are `resize_with_pad`'s."""
ZOOMS = {"zoom_torch": zoom_torch, "zoom_area": zoom_area}
"""As `FITS`, with `CameraSpec.zoom`."""
