"""An adapter is merged as peft merges it, onto the same bytes; one that does not fit leaves nothing behind."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vla_edge.cli import main
from vla_edge.policy.adapter import AdapterError, load_adapter
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.policy.checkpoint_files import CheckpointError
from vla_edge.policy.merge import merge_adapter
from vla_edge.policy.nf4 import BLOCK, CODES, nf4_rounded

TEXT = "model.vlm_with_expert.vlm.model.text_model."
EXPERT = "model.vlm_with_expert.lm_expert.layers.0."
Q, DOWN, STATE = EXPERT + "self_attn.q_proj", EXPERT + "mlp.down_proj", "model.state_proj"
PATCH = "model.vlm_with_expert.vlm.model.vision_model.embeddings.patch_embedding"
EMBEDDING = TEXT + "embed_tokens"


class Tree(nn.Module):
    """The modules of a checkpoint by their names, with weights and biases in the types they are stored in."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            *path, last, kind = name.split(".")
            node = self
            for part in path:
                if part not in dict(node.named_children()):
                    node.add_module(part, nn.Module())
                node = node.get_submodule(part)
            if kind == "weight":
                node.add_module(last, self._layer(last, tensor, f"{'.'.join([*path, last])}.bias" in tensors))
        self.load_state_dict(tensors)

    @staticmethod
    def _layer(name: str, weight, bias: bool) -> nn.Module:
        if name in ("embed_tokens", "position_embedding"):
            return nn.Embedding(*weight.shape, dtype=weight.dtype)
        if weight.ndim == 4:
            return nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=bias, dtype=weight.dtype)
        if weight.ndim == 2:
            return nn.Linear(*reversed(weight.shape), bias=bias, dtype=weight.dtype)
        return nn.LayerNorm(weight.shape, bias=bias, dtype=weight.dtype)


def base_tensors(directory):
    return load_file(directory / "model.safetensors")


def write_adapter(path, tensors, **config):
    path.mkdir()
    entries = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"} | config
    (path / "adapter_config.json").write_text(json.dumps(entries))
    save_file({f"base_model.model.{name}": t for name, t in tensors.items()}, path / "adapter_model.safetensors")
    return path


def factors(base, module, rank=2, seed=0):
    """Random A and B for a linear layer."""
    rows, columns = base[f"{module}.weight"].shape
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def in_float64(base, tensors, module, scale, magnitude=None):
    """W + s B A and, by DoRA, its rows at their lengths; NumPy alone."""
    weight, a, b = (
        np.float64(t.float().numpy())
        for t in (base[f"{module}.weight"], tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"])
    )
    total = weight + scale * b @ a
    return total if magnitude is None else total * (magnitude / np.linalg.norm(total, axis=1))[:, None]


def test_the_product_is_added_and_everything_else_keeps_its_bytes(directory, tmp_path):
    base = base_tensors(directory)
    tensors = factors(base, Q) | factors(base, DOWN, seed=1)
    done = merge_adapter(directory, write_adapter(tmp_path / "adapter", tensors), tmp_path / "out")
    merged = base_tensors(tmp_path / "out")
    assert (done.factored, done.replaced, done.adopted) == (2, 0, ())
    for module in (Q, DOWN):
        np.testing.assert_allclose(
            merged[f"{module}.weight"], in_float64(base, tensors, module, 4.0), rtol=1e-6, atol=1e-6
        )
    for name in base.keys() - {f"{Q}.weight", f"{DOWN}.weight"}:
        assert torch.equal(merged[name], base[name]), name
    changed = load_policy(load_checkpoint(tmp_path / "out")).denoise.layers[0].q.weight
    np.testing.assert_array_equal(changed.detach(), merged[f"{Q}.weight"])
    assert load_checkpoint(tmp_path / "out").fingerprint != load_checkpoint(directory).fingerprint


def test_rank_and_alpha_by_pattern_and_rank_stabilization(directory, tmp_path):
    base = base_tensors(directory)
    tensors = factors(base, Q, 4) | factors(base, DOWN, seed=1)
    config = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"layers\.0\.mlp\.down_proj": 3}, "use_rslora": True}
    merge_adapter(directory, write_adapter(tmp_path / "adapter", tensors, **config), tmp_path / "out")
    merged = base_tensors(tmp_path / "out")
    for module, scale in ((Q, 8 / 4**0.5), (DOWN, 3 / 2**0.5)):
        np.testing.assert_allclose(
            merged[f"{module}.weight"], in_float64(base, tensors, module, scale), rtol=0, atol=4e-6
        )


def test_magnitudes_set_the_lengths_of_rows(directory, tmp_path):
    base, tensors = base_tensors(directory), factors(base_tensors(directory), Q)
    lengths = torch.rand(len(base[f"{Q}.weight"])) + 0.5
    adapter = write_adapter(tmp_path / "a", tensors | {f"{Q}.lora_magnitude_vector": lengths}, use_dora=True)
    merge_adapter(directory, adapter, tmp_path / "out")
    merged = base_tensors(tmp_path / "out")[f"{Q}.weight"]
    np.testing.assert_allclose(merged, in_float64(base, tensors, Q, 4.0, np.float64(lengths)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(merged.norm(dim=1), lengths, rtol=1e-6)


def test_half_precision_is_rounded_once_from_float32(directory, tmp_path):
    weights = directory / "model.safetensors"
    base = {name: t.bfloat16() if name == f"{Q}.weight" else t for name, t in base_tensors(directory).items()}
    save_file(base, weights)
    tensors = factors(base, Q)
    merge_adapter(directory, write_adapter(tmp_path / "adapter", tensors), tmp_path / "out")
    merged = base_tensors(tmp_path / "out")[f"{Q}.weight"]
    assert merged.dtype == torch.bfloat16
    expected = torch.from_numpy(in_float64(base, tensors, Q, 4.0)).float().bfloat16()
    assert (merged == expected).float().mean() > 0.99  # all but ties broken by the last bit of float32


def test_trained_modules_and_biases_replace_the_bases(directory, tmp_path):
    base = base_tensors(directory)
    bias = torch.randn_like(base[f"{STATE}.bias"])
    whole = {
        f"{STATE}.base_layer.bias": bias,
        "model.action_out_proj.weight": torch.randn_like(base["model.action_out_proj.weight"]).half(),
    }
    done = merge_adapter(directory, write_adapter(tmp_path / "a", factors(base, STATE) | whole), tmp_path / "out")
    merged = base_tensors(tmp_path / "out")
    assert (done.factored, done.replaced) == (1, 2)
    assert torch.equal(merged[f"{STATE}.bias"], bias)
    assert torch.equal(merged["model.action_out_proj.weight"], whole["model.action_out_proj.weight"].float())


def test_what_lerobot_saved_beside_the_adapter_is_taken(directory, tmp_path):
    base = base_tensors(directory)
    adapter = write_adapter(tmp_path / "adapter", factors(base, Q))
    for path in directory.glob("policy_*"):
        shutil.copyfile(path, adapter / path.name)
    statistics = next(adapter.glob("policy_preprocessor_step_*.safetensors"))
    save_file({name: t + 1 for name, t in load_file(statistics).items()}, statistics)
    config = json.loads((directory / "config.json").read_text())
    config |= {"use_peft": True, "pretrained_path": "/somewhere", "vlm_model_name": "hub/name", "num_steps": 7}
    (adapter / "config.json").write_text(json.dumps(config))
    done = merge_adapter(directory, adapter, tmp_path / "out")
    before, after = load_checkpoint(directory).spec, load_checkpoint(tmp_path / "out").spec
    assert "config.json" in done.adopted and statistics.name in done.adopted
    assert after.num_steps == 7 and before.num_steps == 3
    np.testing.assert_allclose(after.state.statistics["mean"], np.add(before.state.statistics["mean"], 1), rtol=1e-6)
    load_policy(load_checkpoint(tmp_path / "out"))


def test_nf4_is_the_papers(directory, tmp_path):
    scipy = pytest.importorskip("scipy.stats")
    # half a step beyond the outermost quantile, as the authors' code has it
    outermost = 0.9677083
    above = scipy.norm.ppf(np.linspace(outermost, 0.5, 9)[:-1])
    below = -scipy.norm.ppf(np.linspace(outermost, 0.5, 8)[:-1])
    codes = np.sort(np.concatenate([above, [0.0], below])) / above.max()
    np.testing.assert_allclose(CODES, codes, atol=2e-7)
    weight = torch.randn(7, 30, generator=torch.Generator().manual_seed(0))
    blocks = np.pad(weight.numpy().ravel(), (0, -weight.numel() % BLOCK)).reshape(-1, BLOCK)
    scales = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs((blocks / scales)[..., None] - np.array(CODES)).argmin(-1)
    expected = (np.array(CODES)[nearest] * scales).ravel()[: weight.numel()].reshape(7, 30)
    np.testing.assert_allclose(nf4_rounded(weight), expected, atol=1e-6)
    assert torch.equal(nf4_rounded(torch.zeros(3, 64)), torch.zeros(3, 64))

    base = base_tensors(directory)
    tensors = factors(base, Q)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    merge_adapter(directory, adapter, tmp_path / "out", nf4_base=True)
    rounded = base | {f"{Q}.weight": nf4_rounded(base[f"{Q}.weight"])}
    merged = base_tensors(tmp_path / "out")
    np.testing.assert_allclose(merged[f"{Q}.weight"], in_float64(rounded, tensors, Q, 4.0), atol=2e-6)
    assert torch.equal(merged[f"{DOWN}.weight"], base[f"{DOWN}.weight"])


@pytest.mark.peers
def test_nf4_is_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4", blocksize=BLOCK))
    np.testing.assert_allclose(nf4_rounded(weight), theirs, atol=1e-6)


LINEAR = [Q, DOWN, STATE]
CASES = {
    "lora": {"target_modules": LINEAR},
    "rank-stabilized": {"target_modules": LINEAR, "use_rslora": True},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "patterns": {"target_modules": LINEAR, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {r"mlp\.down_proj": 1}},
    "convolution": {"target_modules": [PATCH]},
    "convolution by dora": {"target_modules": [PATCH], "use_dora": True},
    "embedding": {"target_modules": [EMBEDDING]},
    "embedding by dora": {"target_modules": [EMBEDDING], "use_dora": True},
    "all biases": {"target_modules": LINEAR, "bias": "all"},
    "biases of adapted layers": {"target_modules": LINEAR, "bias": "lora_only"},
    "bias of the product": {"target_modules": [STATE], "lora_bias": True},
    "modules to save": {"target_modules": [Q], "modules_to_save": ["state_proj", "action_out_proj"]},
}


@pytest.mark.peers
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_peft_merges_to_the_same_weights(directory, tmp_path, config):
    peft = pytest.importorskip("peft")
    base = base_tensors(directory)
    torch.manual_seed(0)
    model = peft.get_peft_model(Tree(base), peft.LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.rand_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(directory, tmp_path / "adapter", tmp_path / "out")
    merged, theirs = base_tensors(tmp_path / "out"), model.merge_and_unload().state_dict()
    assert merged.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(merged[name], tensor.detach(), rtol=1e-5, atol=2e-6, err_msg=name)
    assert any(not torch.equal(merged[name], base[name]) for name in base)


def broken(directory, tmp_path, damage):
    base = base_tensors(directory)
    tensors = factors(base, Q)
    config = {}
    if damage == "nan":
        tensors[f"{Q}.lora_A.weight"][0, 0] = float("nan")
    elif damage == "no such layer":
        tensors = {name.replace("layers.0", "layers.40"): t for name, t in tensors.items()}
    elif damage == "wrong shape":
        tensors[f"{Q}.lora_A.weight"] = tensors[f"{Q}.lora_A.weight"][:, :-1].contiguous()
    elif damage == "half a pair":
        del tensors[f"{Q}.lora_B.weight"]
    elif damage == "another rank":
        config["r"] = 3
    elif damage == "another type":
        config["peft_type"] = "IA3"
    elif damage == "a later invention":
        config["layer_replication"] = [[0, 4], [2, 5]]
    elif damage == "base changed":
        config["init_lora_weights"] = "pissa"
    elif damage == "magnitudes missing":
        config["use_dora"] = True
    elif damage == "unknown tensor":
        tensors[f"{EMBEDDING}.token_adapter.trainable_tokens_delta"] = torch.zeros(1, 16)
    elif damage == "overflow":
        tensors = {name: 1e30 * t for name, t in tensors.items()}
    adapter = write_adapter(tmp_path / "adapter", tensors, **config)
    file = adapter / "adapter_model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "pickled":
        file.rename(adapter / "adapter_model.bin")
    elif damage == "no configuration":
        (adapter / "adapter_config.json").unlink()
    return adapter


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("nan", "not finite, first in base_model.model.model.vlm"),
        (
            "no such layer",
            "changes .*lm_expert.layers.40.self_attn.q_proj.weight, which .* has not",
        ),
        ("wrong shape", r"is of shape \(2, 11\), but .* asks for \(2, 12\); give the base"),
        ("half a pair", "lacks lora_B"),
        ("another rank", "has rank 2, but adapter_config.json says 3"),
        ("another type", "type 'IA3'"),
        ("a later invention", "sets layer_replication"),
        ("base changed", "init_lora_weights = 'pissa'"),
        ("magnitudes missing", "lacks its magnitudes"),
        ("unknown tensor", "token_adapter.* does not know"),
        ("overflow", "leaves the range of torch.float32"),
        ("truncated", "cannot be read"),
        ("pickled", "convert adapter_model.bin"),
        ("no configuration", "has no adapter_config.json"),
    ],
)
def test_a_damaged_adapter_is_named_and_nothing_is_left(directory, tmp_path, damage, message):
    adapter = broken(directory, tmp_path, damage)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        merge_adapter(directory, adapter, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_an_adapter_of_another_robot_leaves_nothing(directory, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", factors(base_tensors(directory), Q))
    (adapter / "vla_edge.json").write_text('{"joint_names": ["one"], "dt": 0.05, "cameras": {}}')
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AdapterError, match="does not go with"):
        merge_adapter(directory, adapter, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_the_output_is_never_something_that_is_there(directory, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", factors(base_tensors(directory), Q))
    with pytest.raises(CheckpointError, match="exists and is not replaced"):
        merge_adapter(directory, adapter, directory)
    with pytest.raises(CheckpointError, match="lies in the base"):
        merge_adapter(directory, adapter, directory / "merged")


def test_the_command_says_what_it_did(directory, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "adapter", factors(base_tensors(directory), Q))
    assert main(["merge", str(directory), str(adapter), str(tmp_path / "out")]) == 0
    assert "1 layers merged" in capsys.readouterr().out
    assert main(["merge", str(directory), str(adapter), str(tmp_path / "out"), "--json"]) == 2
    assert load_adapter(adapter).changes.keys() == {f"{Q}.weight"}
