"""What becomes of a camera's picture before a GR00T N1.7 sees it: its own processor's doing, and Qwen3-VL's."""

from __future__ import annotations

import math

from vla_edge.policy.checkpoint_files import CheckpointError, Document
from vla_edge.policy.lerobot_layout import check_options
from vla_edge.policy.robot_facts import ROBOT_FILE

_PICTURE_OPTIONS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "temporal_patch_size": 2, "merge_size": 2}
_DEFAULT_TARGET, _DEFAULT_CROP = (256, 256), (230, 230)  # of a processor that says neither


def fit_of(pictures: Document, backbone: Document, crop: tuple[int, int]) -> tuple[tuple[int, int], dict]:
    """(Height, width) of what the network sees of a picture of (height, width) `crop`, and how it comes about.

    Raises:
        CheckpointError: in a way that is not done here.
    """
    check_options(backbone, _PICTURE_OPTIONS)
    target = tuple(pictures.get("image_target_size") or ())
    height, width = target or _DEFAULT_TARGET
    side = tuple(pictures.get("image_crop_size") or ()) if target else _DEFAULT_CROP
    zoom = pictures.get("crop_fraction") if target else None
    zoom = zoom if zoom is not None else side[0] / height if side else 1.0
    zoom = zoom if 0 < zoom < 1 else 1.0
    check_options(Document(pictures.path, {"shortest_image_edge": pictures.get("shortest_image_edge") or height}),
                  {"shortest_image_edge": height})  # fmt: skip
    if pictures.get("letter_box_transform") and crop[0] != crop[1]:
        raise CheckpointError(f"{pictures.path} pads pictures to squares; crop them to squares in {ROBOT_FILE}")
    if not pictures.get("use_albumentations"):
        if in_patches(backbone, height, width) != (height, width):
            raise CheckpointError(f"{pictures.path} makes pictures of {width}x{height} px, which the backbone resizes; train "
                                  f"with a multiple of {_patch(backbone)} px")  # fmt: skip
        return (height, width), {"fit": "zoom_torch", "zoom": zoom}

    def scaled(size: tuple[int, int]) -> tuple[int, int]:
        return tuple(max(1, round(one * (height / min(size)))) for one in size)

    size = scaled(crop)
    if zoom < 1:
        size = scaled(tuple(max(1, int(one * zoom)) for one in size))
    size = in_patches(backbone, *size)
    if min(size) != height:
        raise CheckpointError(f"{pictures.path} makes pictures {height} px high, which the backbone resizes; train with a "
                              f"multiple of {_patch(backbone)} px")  # fmt: skip
    return size, {"fit": "zoom_area", "zoom": zoom}


def _patch(backbone: Document) -> int:
    """px of what becomes one token."""
    return backbone.count("patch_size") * backbone.count("merge_size")


def in_patches(backbone: Document, height: int, width: int) -> tuple[int, int]:
    """The size a picture is brought to for Qwen3-VL: whole tokens, and not fewer or more pixels than it takes."""
    step, limits = _patch(backbone), backbone["size"]
    size = tuple(round(side / step) * step for side in (height, width))
    least, most = limits["shortest_edge"], limits["longest_edge"]
    if size[0] * size[1] > most:
        ratio = math.sqrt(height * width / most)
        return tuple(max(step, math.floor(side / ratio / step) * step) for side in (height, width))
    if size[0] * size[1] < least:
        ratio = math.sqrt(least / (height * width))
        return tuple(math.ceil(side * ratio / step) * step for side in (height, width))
    return size
