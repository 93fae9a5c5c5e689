"""The shipped policy before two cameras: the same weights shown a second picture, to time what that costs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from live_nodes import CHECKPOINT

from vla_edge.types import JointState, Observation

SECOND = "wrist"
FRAMES = 24


def two_camera_engine(directory: Path, checkpoint: Path = CHECKPOINT) -> Path:
    """Bundle in full precision under `directory`; built when it is not there."""
    from vla_edge.engine.build import build
    from vla_edge.policy.checkpoint import load_checkpoint

    bundle, source = directory / "two_cameras" / "fp32", directory / "two_cameras" / "checkpoint"
    if bundle.is_dir():
        return bundle
    if not source.is_dir():
        partial = source.with_name("checkpoint.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(checkpoint, partial)
        _edit(partial / "config.json", lambda config: _add_camera(config["input_features"]))
        _edit(partial / "vla_edge.json", lambda ours: ours["cameras"].update({SECOND: ours["cameras"]["head"]}))
        partial.rename(source)
    spec = load_checkpoint(source).spec
    rng, joints = np.random.default_rng(0), spec.joint_names
    seen = [
        Observation(
            200_000_000 * i,
            {
                camera.name: rng.integers(0, 256, (camera.source_height, camera.source_width, 3), dtype=np.uint8)
                for camera in spec.cameras
            },
            JointState(0, joints, rng.normal(0, 0.3, len(joints))),
            "touch the red cube with your left hand",
        )
        for i in range(FRAMES)
    ]
    return build(source, "fp32", "onnxruntime", bundle, calibration=seen)


def _add_camera(features: dict) -> None:
    features[f"observation.images.{SECOND}"] = features["observation.images.head"]


def _edit(path: Path, change) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
