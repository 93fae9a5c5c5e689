"""What is wrong with a GR00T directory is one sentence; what it says becomes the spec and one embodiment's networks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from edited import edit, refused
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.policy.groot import Groot, GrootConfig
from vla_edge.policy.groot_checkpoint import OWN
from vla_edge.policy.groot_layout import EMBODIMENTS, INSTRUCTION_TOKENS
from vla_edge.policy.spec import Normalization, NormalizationMode, PolicySpec
from vla_edge.policy.tokenize import InstructionError, InstructionTokenizer

SAVED = Path(__file__).parents[1] / "parity" / "groot"


@pytest.fixture
def isaac(tmp_path) -> Path:
    return Path(shutil.copytree(SAVED / "isaac" / "checkpoint", tmp_path / "isaac"))


@pytest.fixture
def lerobot(tmp_path, monkeypatch) -> Path:
    for name in ("HF_HOME", "HF_LEROBOT_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    return Path(shutil.copytree(SAVED / "lerobot" / "checkpoint", tmp_path / "lerobot"))


def test_both_layouts_become_a_spec():
    spec = load_checkpoint(SAVED / "isaac" / "checkpoint").spec
    assert (spec.family, spec.chunk_size, spec.num_steps, spec.max_action_dim) == ("groot", 6, 5, 8)
    assert len(spec.read_names) == 7 and len(spec.joint_names) == 5 and spec.cameras[0].fit == "stretch_linear"
    other = load_checkpoint(SAVED / "lerobot" / "checkpoint").spec
    # LeRobot gives pictures in the order of the alphabet, whatever config.json says
    assert [camera.name for camera in other.cameras] == ["head", "wrist"] and other.num_steps == 4
    for each in (spec, other):
        assert PolicySpec.from_dict(json.loads(json.dumps(each.to_dict()))) == each
        assert each.state.mode is NormalizationMode.MIN_MAX and each.state.fixed and each.text.listed


def test_keys_are_joined_in_the_order_of_the_data_configuration(isaac):
    entry = json.loads((isaac / "experiment_cfg" / "metadata.json").read_text())["new_embodiment"]["statistics"]["state"]
    assert load_checkpoint(isaac).spec.state.statistics["min"] == (*entry["left_arm"]["min"], *entry["waist"]["min"])
    edit(isaac / "vla_edge.json", state_keys=["waist", "left_arm"])
    assert load_checkpoint(isaac).spec.state.statistics["min"] == (*entry["waist"]["min"], *entry["left_arm"]["min"])


def test_a_joint_that_never_moved_is_nothing_to_the_network_and_stays_where_it_was():
    fixed = Normalization(NormalizationMode.MIN_MAX, {"min": (-1.0, 0.25), "max": (3.0, 0.25)}, fixed=True)
    np.testing.assert_array_equal(fixed.normalize([[3.0, 0.25], [1.0, 7.0]]), [[1, 0], [0, 0]])
    np.testing.assert_array_equal(fixed.unnormalize([[1.0, -0.9], [0.0, 5.0]]), [[3, 0.25], [1, 0.25]])
    with pytest.raises(ValueError, match="IDENTITY has no bounds"):
        Normalization(NormalizationMode.IDENTITY, fixed=True)


def test_the_embodiment_chooses_the_networks_for_state_and_actions(isaac):
    tensors = {}
    for shard in isaac.glob("*.safetensors"):
        tensors |= load_file(shard)
    for tag in ("new_embodiment", "gr1"):
        edit(isaac / "vla_edge.json", embodiment_tag=tag)
        policy, number = load_policy(load_checkpoint(isaac)), EMBODIMENTS[tag]
        assert policy.prefix.state_in.weight.T.equal(tensors["action_head.state_encoder.layer1.W"][number])
        assert policy.denoise.action_out.bias.equal(tensors["action_head.action_decoder.layer2.b"][number])
        both = tensors["action_head.action_encoder.W2.W"][number]
        assert policy.denoise.mlp_in.weight.T.equal(both[:24]) and policy.time.action.weight.T.equal(both[24:])
    (isaac / "embodiment_id.json").write_text(json.dumps({"gr1": 7}))
    number = 7
    policy = load_policy(load_checkpoint(isaac))
    assert policy.prefix.state_in.weight.T.equal(tensors["action_head.state_encoder.layer1.W"][number])


def test_an_embodiment_that_is_not_said_or_not_known_is_asked_for(isaac):
    edit(isaac / "vla_edge.json", embodiment_tag=None)
    assert "statistics of gr1, new_embodiment, and vla_edge.json says embodiment_tag = None" in refused(isaac)
    edit(isaac / "vla_edge.json", embodiment_tag="so100")
    assert "says embodiment_tag = 'so100'; name the embodiment" in refused(isaac)
    edit(isaac / "vla_edge.json", embodiment_tag="gr1")
    (isaac / "embodiment_id.json").write_text(json.dumps({"new_embodiment": 31}))
    assert "the embodiment tag 'gr1' has no number among new_embodiment" in refused(isaac)
    (isaac / "embodiment_id.json").write_text(json.dumps({"gr1": 32}))
    assert "embodiment 32 was asked for, and" in refused(isaac)


def test_an_embodiment_lerobot_does_not_know_is_the_first_as_there(lerobot):
    tensors = load_file(lerobot / "model.safetensors")
    edit(lerobot / "vla_edge.json", embodiment_tag="so101")
    policy = load_policy(load_checkpoint(lerobot))
    assert policy.prefix.state_in.weight.T.equal(tensors["_groot_model.action_head.state_encoder.layer1.W"][0])


def test_absent_statistics_are_asked_for_and_never_assumed(isaac):
    metadata = isaac / "experiment_cfg" / "metadata.json"
    edit(metadata, new_embodiment__statistics__action__hand__max=None)
    assert "has no entry 'max'" in refused(isaac)
    metadata.unlink()
    assert "no experiment_cfg/metadata.json, and without its statistics no action has a scale" in refused(isaac)


def test_absent_statistics_of_lerobots_are_asked_for_too(lerobot):
    path = lerobot / "policy_postprocessor_step_0_groot_action_unpack_unnormalize_v1.safetensors"
    save_arrays({name: values for name, values in load_arrays(path).items() if name != "action.max"}, path)
    assert "no max of action, so it cannot be scaled; give the statistics" in refused(lerobot)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"state_keys": None}, "state_keys = None; name those of waist, left_arm that"),
        ({"action_keys": ["left_arm", "tail"]}, "action_keys = ['left_arm', 'tail']; name those of hand, left_arm"),
        ({"joint_names": ["a", "b"]}, "statistics of action are not of 2 joints"),
        ({"state_names": ["a", "b"]}, "statistics of observation.state are not of the 2 joints that are read"),
        ({"trained_prefix": 2}, "of a policy that continues nothing"),
        ({"cameras": {}}, "there is no camera"),
    ],
    ids=["no keys", "unknown key", "joints", "state", "prefix", "camera"],
)
def test_what_the_robot_file_lacks_is_told(isaac, entries, told):
    edit(isaac / "vla_edge.json", **entries)
    assert told in refused(isaac)


def test_rotations_are_refused(isaac):
    metadata = isaac / "experiment_cfg" / "metadata.json"
    edit(metadata, new_embodiment__modalities__action__hand__rotation_type="quaternion")
    assert "action.hand is a rotation; this version takes joint positions" in refused(isaac)


@pytest.mark.parametrize(
    ("name", "version"), [("Gr00tN1d6", "N1.6"), ("gr00t_n1", "N1")]
)
def test_other_generations_are_named_and_refused(isaac, name, version):
    edit(isaac / "config.json", model_type=name)
    message = refused(isaac)
    assert f"{name!r}, a GR00T {version}, which this version does not load" in message and "a GR00T N1.5 and a GR00T N1.7" in message


def test_other_generations_of_lerobots_are_refused_too(lerobot):
    edit(lerobot / "config.json", model_version="n1.7")
    assert "is of GR00T n1.7; this version loads N1.5" in refused(lerobot)


@pytest.mark.parametrize(
    ("file", "entry", "value", "told"),
    [
        ("config.json", "action_head_cfg__use_vlln", False, "sets use_vlln to False"),
        ("config.json", "action_head_cfg__diffusion_model_cfg__norm_type", "layer_norm", "sets norm_type to 'layer_norm'"),
        ("config.json", "action_head_cfg__diffusion_model_cfg__positional_embeddings", None, "sets positional_embeddings"),
        ("config.json", "action_head_cfg__vl_self_attention_cfg__positional_embeddings", "sinusoidal", "'sinusoidal'"),
        ("config.json", "backbone_cfg__project_to_dim", 1536, "sets project_to_dim to 1536"),
        ("config.json", "backbone_cfg__select_layer", 12, "layer 12 of the language model gives, and"),
        ("backbone/config.json", "text_config__architectures", ["LlamaForCausalLM"], "loads Qwen3ForCausalLM"),
        ("backbone/config.json", "text_config__rope_scaling", {"type": "yarn"}, "sets rope_scaling"),
        ("backbone/config.json", "image_token_index", 3, "has not the token <IMG_CONTEXT>"),
    ],
)
def test_options_that_change_the_arithmetic_are_refused_by_name(isaac, file, entry, value, told):
    edit(isaac / file, **{entry: value})
    assert told in refused(isaac)


def test_files_that_lie_elsewhere_are_asked_for(lerobot):
    shutil.move(lerobot / "base", lerobot / "kept")
    assert "the base model './base' is not a directory inside" in refused(lerobot)
    shutil.move(lerobot / "kept", lerobot / "base")
    shutil.move(lerobot / "backbone" / "tokenizer.json", lerobot / "backbone" / "vocab.json")
    assert "has vocab.json and no tokenizer.json; have transformers write it: AutoTokenizer" in refused(lerobot)
    shutil.move(lerobot / "backbone", lerobot / "kept")
    assert "nor is lerobot/eagle2hg-processor-groot-n1p5 in LeRobot's or Hugging Face's cache" in refused(lerobot)


def test_the_backbones_files_are_found_in_lerobots_cache(lerobot, tmp_path):
    cache = tmp_path / "nowhere" / "lerobot" / "eagle2hg-processor-groot-n1p5"
    cache.parent.mkdir(parents=True)
    shutil.move(lerobot / "backbone", cache)
    assert load_checkpoint(lerobot).tokenizer_path == cache / "tokenizer.json"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in %}", "is no chat template that can be filled"),
        ("{{ messages[0]['content'][-1]['text'] }}", "has no place for picture 1"),
        ("{{ messages[0]['content'][-1]['text'] }}<image-1>", "does not put the instruction behind the pictures"),
    ],
    ids=["damaged", "no picture", "other order"],
)
def test_a_chat_template_of_another_model_is_told(isaac, template, told):
    edit(isaac / "backbone" / "chat_template.json", chat_template=template)
    assert told in refused(isaac)
    (isaac / "backbone" / "chat_template.json").unlink()
    assert "has no chat_template.json; copy the backbone's there" in refused(isaac)


def test_a_missing_shard_and_missing_tensors_are_listed(isaac):
    index = json.loads((isaac / "model.safetensors.index.json").read_text())["weight_map"]
    shard = isaac / index["action_head.model.transformer_blocks.1.attn1.to_q.weight"]
    kept = load_file(shard)
    save_file({name: tensor for name, tensor in kept.items() if "attn1.to_q" not in name}, shard)
    assert "lacks 'action_head.model.transformer_blocks" in refused(isaac)
    save_file(kept | {"backbone.model.model.visual.blocks.0.x": kept[sorted(kept)[0]].clone()}, shard)
    assert "holds 'backbone.model.model.visual.blocks.0.x', which nothing reads; it is a GR00T N1.7" in refused(isaac)
    shard.unlink()
    assert f"lacks {shard.name!r} of the 4 shards" in refused(isaac)


def test_an_instruction_stands_as_python_writes_a_list_of_it(isaac):
    checkpoint = load_checkpoint(isaac)
    tokenizer = InstructionTokenizer.of(checkpoint.spec, checkpoint.tokenizer_path)
    for instruction, said in (("touch the cube", "['touch the cube']"), ("don't push", '["don\'t push"]')):
        tokens, mask = tokenizer(instruction)
        whole = checkpoint.spec.prompt.format(instruction=said)
        assert tokens[mask].tolist() == tokenizer._tokenizer.encode(whole).ids
    with pytest.raises(InstructionError, match="shorten it"):
        tokenizer("touch " * (INSTRUCTION_TOKENS + 2))


def test_at_the_published_shapes_it_has_the_published_parameters_and_every_stage_runs():
    # sizes of huggingface.co/nvidia/GR00T-N1.5-3B: 2,724,163,520 parameters
    config = GrootConfig(
        cameras=2, image_size=224, patch_size=14, shuffle=1, vision_width=1152, vision_hidden=4304, vision_layers=27,
        vision_heads=16, vision_eps=1e-6, connector=((1152, 2048),), vocabulary=151680, text_width=2048, text_hidden=6144,
        text_layers=12, heads=16, kv_heads=8, head_dim=128, text_eps=1e-6, wavelength=1e6, image_places=(22, 31),
        language_length=90, adapter_layers=4, adapter_hidden=8192, adapter_heads=32, width=1536, layers=16,
        layers_hidden=6144, layers_heads=32, output_width=1024, state_hidden=1024, decoder_hidden=1024, future_tokens=32,
        positions=True, time_buckets=1000, chunk_size=16, max_state_dim=64, max_action_dim=32,
    )  # fmt: skip
    with torch.device("meta"):
        policy = Groot(config)
        for stage in policy.stages():
            given = (torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in stage.inputs)
            assert [tuple(tensor.shape) for tensor in stage.module(*given)] == [spec.shape for spec in stage.outputs]
    own = sum(value.numel() for name, value in policy.named_parameters() if name.rpartition(".")[0] in OWN)
    pooling = 1152 + 3 * 1152 * 1153 + 1152 * 1153 + 2 * 1152 + 4304 * 1153 + 1152 * 4305
    unused = 31 * own + (1024 - 16) * 1536 + 151680 * 2048 + pooling  # embodiments, places, words, SigLIP's head
    assert sum(parameter.numel() for parameter in policy.parameters()) + unused == 2_724_163_520
