"""What is wrong with a pi0 or pi0.5 directory is one sentence; what an openpi directory says becomes the spec."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from vla_edge.policy.checkpoint import CheckpointError, load_checkpoint, load_policy
from vla_edge.policy.spec import NormalizationMode
from vla_edge.policy.tokenize import InstructionTokenizer, state_bins

SAVED = Path(__file__).parents[1] / "parity" / "pi"
EXPERT = "model.paligemma_with_expert.gemma_expert.model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def directory(tmp_path) -> Path:
    return Path(shutil.copytree(SAVED / "pi0" / "checkpoint", tmp_path / "checkpoint"))


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def retensor(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def sharded(directory: Path, shards: int = 3) -> None:
    """The weights in shards with an index, as Hugging Face saves what is large."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    places = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, directory / file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_policy(load_checkpoint(directory))
    assert "\n" not in str(caught.value) and "; " in str(caught.value)
    return str(caught.value)


def test_shards_are_the_same_policy(directory):
    whole = load_policy(load_checkpoint(directory)).state_dict()
    sharded(directory)
    checkpoint = load_checkpoint(directory)
    assert len(checkpoint.weights) == 3
    for name, tensor in load_policy(checkpoint).state_dict().items():
        assert tensor.equal(whole[name]), name


def test_a_missing_shard_is_named(directory):
    sharded(directory)
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert "lacks 'model-00002-of-00003.safetensors' of the 3 shards" in refused(directory)


def test_shards_without_their_index_are_told(directory):
    sharded(directory)
    (directory / "model.safetensors.index.json").unlink()
    assert "no model.safetensors.index.json; copy that too" in refused(directory)


def test_missing_tensors_are_listed_with_the_likely_cause(directory):
    def older(tensors):
        for name in [name for name in tensors if ".gemma_expert." in name and ".q_proj" in name]:
            tensors[name.replace("model.paligemma_with_expert", "model.old")] = tensors.pop(name)
        tensors["normalize_inputs.buffer_observation_state.mean"] = tensors["model.state_proj.bias"].clone()

    retensor(directory, older)
    message = refused(directory)
    assert "lacks 'paligemma_with_expert.gemma_expert" in message and "holds 'normalize_inputs" in message
    assert "LeRobot before 0.4" in message and "migrate_policy_normalization" in message


def test_tensors_that_nothing_reads_are_told(directory):
    retensor(directory, lambda t: t.update({"model.vlm_with_expert.x": t["model.state_proj.bias"].clone()}))
    assert "holds 'vlm_with_expert.x', which nothing reads; it is a SmolVLA" in refused(directory)


def test_a_quantized_tensor_is_no_weight(directory):
    import torch

    retensor(directory, lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)}))
    assert "q_proj.weight' as I8, where floating point belongs" in refused(directory)


def test_half_precision_weights_are_read(directory):
    import torch

    retensor(directory, lambda t: t.update({name: tensor.to(torch.bfloat16) for name, tensor in t.items()}))
    policy = load_policy(load_checkpoint(directory))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}


def test_statistics_inside_the_model_are_told_where_there_is_no_processor(directory):
    retensor(directory, lambda t: t.update({"normalize_targets.buffer_action.mean": t["model.state_proj.bias"].clone()}))
    (directory / "policy_preprocessor.json").unlink()
    assert "its weights hold statistics; it is of LeRobot before 0.4" in refused(directory)


def test_absent_statistics_are_asked_for_and_never_assumed(directory):
    from safetensors.numpy import load_file as load, save_file as save

    path = directory / "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    save({name: values for name, values in load(path).items() if not name.startswith("action")}, path)
    assert "MEAN_STD lacks mean, std; give the statistics" in refused(directory)


def test_pickled_weights_are_refused_with_a_way_out(directory):
    (directory / "model.safetensors").rename(directory / "model.pt")
    assert "convert model.pt to safetensors with tools/convert_weights.py" in refused(directory)


def test_a_tokenizer_of_another_policy_is_told(directory):
    def more(content):
        content["model"]["vocab"] |= {f"word{i}": 1000 + i for i in range(100)}

    edit(directory / "tokenizer.json", more)
    assert "tokens and the weights 320; copy the tokenizer" in refused(directory)


def test_without_a_tokenizer_the_one_to_copy_is_named(directory, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(directory / "nowhere"))
    (directory / "tokenizer.json").rename(directory / "kept.json")
    assert "copy tokenizer.json of google/paligemma-3b-pt-224 there" in refused(directory)
    cache = directory / "nowhere" / "hub" / "models--google--paligemma-3b-pt-224" / "snapshots" / "0"
    cache.mkdir(parents=True)
    (directory / "kept.json").rename(cache / "tokenizer.json")
    assert load_checkpoint(directory).tokenizer_path == cache / "tokenizer.json"


def test_images_that_are_not_square_are_refused(directory):
    edit(directory / "config.json", lambda c: c.update(image_resolution=[16, 24]))
    assert "resizes images to 16 x 24 px" in refused(directory)


def test_a_family_that_is_not_known_is_named_beside_those_that_are(directory):
    edit(directory / "config.json", lambda c: c.update(type="vqbet"))
    assert "of type 'vqbet'; this version loads 'smolvla', 'pi0', 'pi05', 'openvla'" in refused(directory)


def test_the_state_is_said_in_256_bins(directory):
    checkpoint = load_checkpoint(SAVED / "pi05" / "checkpoint")
    assert state_bins(np.array([-1.5, -1, -0.999, 0, 0.999, 1, 7])).tolist() == [-1, 0, 0, 128, 255, 255, 255]
    tokenizer = InstructionTokenizer.of(checkpoint.spec, checkpoint.tokenizer_path)
    states = [np.full(32, value) for value in (0.0, 0.5)]
    first, second = (tokenizer("touch the_red cube", state)[0].tolist() for state in states)
    assert first != second and tokenizer("touch the red\ncube", states[1])[0].tolist() == second
    assert checkpoint.spec.text.state_dims == 32 and checkpoint.spec.state.mode is NormalizationMode.QUANTILES


def test_the_spec_survives_the_manifest():
    for name in ("pi0", "pi0_cameras", "pi05"):
        spec = load_checkpoint(SAVED / name / "checkpoint").spec
        assert type(spec).from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert [camera.name for camera in load_checkpoint(SAVED / "pi0_cameras" / "checkpoint").spec.cameras] == [
        "head", "wrist",
    ]  # fmt: skip
