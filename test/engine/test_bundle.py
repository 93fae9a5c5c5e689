"""There is never half a bundle, and a bundle that is not exactly what was built is refused with one sentence."""

from __future__ import annotations

import os
import shutil

import pytest
import yaml
from tiny import JOINTS

from vla_edge.cli import main
from vla_edge.engine.bundle import Bundle, BundleError, writing
from vla_edge.engine.busy import caution
from vla_edge.engine.manifest import MANIFEST, digest, write_manifest


@pytest.fixture
def copy(bundle, tmp_path):
    """A bundle that may be damaged."""
    return shutil.copytree(bundle, tmp_path / "copy")


def rewrite(directory, change) -> None:
    """Alter the manifest and seal it again, as a tool of another version might."""
    manifest = yaml.safe_load((directory / MANIFEST).read_text())
    change(manifest)
    manifest["digest"] = digest(manifest)
    (directory / MANIFEST).write_text(yaml.safe_dump(manifest, sort_keys=False))


def refused(directory, pattern: str, **kwargs) -> None:
    with pytest.raises(BundleError, match=pattern) as caught:
        Bundle.load(directory, **kwargs)
    assert "\n" not in str(caught.value)


def test_a_whole_bundle_loads(bundle):
    loaded = Bundle.load(bundle, JOINTS)
    assert [entry.interface.name for entry in loaded.stages] == ["vision", "prefix", "time", "denoise"]
    assert loaded.spec.joint_names == JOINTS
    assert loaded.bytes == sum(file.stat().st_size for file in bundle.iterdir())


def test_the_manifest_says_what_was_built_of_what(bundle):
    manifest = Bundle.load(bundle).manifest
    assert manifest["joint_names"] == list(JOINTS) and manifest["dt"] == 0.05
    assert manifest["policy"]["state"]["statistics"]["mean"] == pytest.approx([0.1, -0.2, 0.0])
    assert len(manifest["checkpoint"]["fingerprint"]) == 64 and len(manifest["calibration"]["identity"]) == 64
    assert {"torch", "onnx", "onnxruntime", "python"} <= set(manifest["versions"])
    assert manifest["recipe"]["steps"][1]["quantize"]["weights"] == "int8"
    vision = manifest["stages"]["vision"]
    assert vision["backend"] == "onnxruntime" and vision["precision"] == {"int8": 1.0}
    assert vision["inputs"] == [{"name": "image", "shape": [1, 3, 32, 32], "dtype": "float32"}]
    connector = vision["layers"]["connector"]
    assert (connector["shape"], connector["weights"], connector["activations"]) == ([32, 128], "int8", "int8-dynamic")
    assert set(manifest["files"]) == {file.name for file in bundle.iterdir()} - {MANIFEST}


@pytest.mark.parametrize(("processors", "said"), [(0.0, False), (0.2, False), (0.3, True), (1.7, True)])
def test_it_says_when_it_was_built_on_a_busy_computer(copy, processors, said, capsys):
    built = Bundle.load(copy).manifest["machine"]["taken_by_others"]
    assert built is None or 0 <= built < os.cpu_count()
    rewrite(copy, lambda manifest: manifest["machine"].update(taken_by_others=processors))
    assert main(["inspect", str(copy)]) == 0
    printed = capsys.readouterr().out
    assert (f"other programs kept {processors:.1f} processors busy" in printed) is said
    words = caution(Bundle.load(copy).manifest)
    assert words in printed and bool(words) is said


def test_nothing_in_a_bundle_is_code(bundle):
    assert {file.suffix for file in bundle.iterdir()} == {".onnx", ".json", ".yaml"}


@pytest.mark.parametrize("name", ["vision.onnx", "denoise.onnx", "tokenizer.json"])
def test_one_altered_byte_is_refused(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    refused(copy, f"{name} is not the file that was built")


def test_a_truncated_file_is_refused(copy):
    content = (copy / "prefix.onnx").read_bytes()
    (copy / "prefix.onnx").write_bytes(content[:-100])
    refused(copy, "prefix.onnx is not the file that was built")


def test_a_missing_file_is_refused(copy):
    (copy / "time.onnx").unlink()
    refused(copy, "lacks its file 'time.onnx'")


@pytest.mark.parametrize("key", ["policy", "stages", "joint_names", "files", "digest", "recipe"])
def test_a_manifest_without_a_key_is_refused(copy, key):
    manifest = yaml.safe_load((copy / MANIFEST).read_text())
    del manifest[key]
    (copy / MANIFEST).write_text(yaml.safe_dump(manifest))
    refused(copy, f"lacks {key}")


def test_an_edited_manifest_is_refused(copy):
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text.replace("dt: 0.05", "dt: 0.06", 1))
    refused(copy, "was altered after it was built")


def test_a_truncated_manifest_is_refused(copy):
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text[: len(text) // 3])
    refused(copy, "manifest.yaml (lacks|cannot be read)")


def test_a_newer_schema_is_refused(copy):
    rewrite(copy, lambda manifest: manifest.update(schema=99))
    refused(copy, "of schema 99, newer than 1.*update vla_edge")


def test_joints_in_another_order_are_refused(copy):
    refused(copy, "another order than expected .joint 0 is b_joint, expected a_joint.", joint_names=sorted(JOINTS))
    rewrite(copy, lambda manifest: manifest["joint_names"].reverse())
    refused(copy, "another order than its policy")


def test_a_stage_with_a_malformed_entry_is_refused(copy):
    rewrite(copy, lambda manifest: manifest["stages"]["vision"].pop("inputs"))
    refused(copy, "malformed")


def test_files_outside_the_bundle_are_refused(copy):
    (copy.parent / "outside").write_text("x")
    rewrite(copy, lambda manifest: manifest["files"].update({"../outside": "0"}))
    refused(copy, "lacks its file '../outside'")


def test_what_is_no_bundle_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "there is no bundle")
    refused(tmp_path, "has no manifest.yaml")
    (tmp_path / MANIFEST).write_text("- a list")
    refused(tmp_path, "holds no manifest")


def test_no_code_hides_in_a_manifest(copy):
    (copy / MANIFEST).write_text("!!python/object/apply:os.system ['true']")
    refused(copy, "cannot be read")


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), writing(tmp_path / "engine") as directory:
        (directory / "vision.onnx").write_bytes(b"half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_an_interrupted_rewrite_leaves_the_old_bundle(copy):
    before = (copy / MANIFEST).read_bytes()
    with pytest.raises(KeyboardInterrupt), writing(copy) as directory:
        (directory / "vision.onnx").write_bytes(b"half")
        raise KeyboardInterrupt
    assert (copy / MANIFEST).read_bytes() == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]
    Bundle.load(copy)


def test_a_bundle_takes_the_place_of_an_older_one(copy):
    with writing(copy) as directory:
        (directory / "new").write_text("file")
        write_manifest(directory, {"name": "new"})
    assert sorted(path.name for path in copy.iterdir()) == [MANIFEST, "new"]
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_something_else_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    with pytest.raises(BundleError, match="is no engine bundle, so it is not replaced"), writing(tmp_path / "home"):
        pass
    assert (tmp_path / "home" / "letters.txt").exists()
