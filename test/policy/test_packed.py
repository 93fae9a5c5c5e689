"""Checkpoints that were rounded elsewhere are loaded as they are stored: every value and every scale, none rounded twice."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vla_edge.compress.calibrate import collect
from vla_edge.compress.pipeline import carry_out
from vla_edge.compress.recipe import RecipeError, load_recipe
from vla_edge.compress.stored import stored_layers
from vla_edge.policy.checkpoint import CheckpointError, load_checkpoint, load_policy
from vla_edge.policy.packed import find_packed
from vla_edge.types import JointState, Observation

SAVED = Path(__file__).parents[1] / "parity" / "openvla" / "openvla" / "checkpoint"
LINEAR = re.compile(r"(language_model\.model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj)\.weight")
GROUP = 8


def rounded(weight: torch.Tensor, bits: int = 4, asymmetric: bool = False, group: int | None = GROUP):
    """(q from 0 up, zero points, scales) of a matrix, groups of inputs."""
    groups = weight.float().unflatten(1, (-1, group or weight.shape[1]))
    most = (1 << bits) - 1
    low, high = groups.amin(-1), groups.amax(-1)
    if asymmetric:
        scales = ((high - low) / most).half().float()
        zeros = (-low / scales).round().clamp(0, most)
    else:
        scales = (torch.maximum(high, -low) / (most // 2)).half().float()
        zeros = torch.full_like(scales, most // 2 + 1)
    q = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, most)
    return q.flatten(1).long(), zeros.long(), scales


def words(values: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """(rows, n) -> int32 (rows, n * bits / 32), the lowest bits first."""
    parts = values.unflatten(1, (-1, 32 // bits)) << torch.arange(0, 32, bits)
    return torch.from_numpy(parts.sum(-1).numpy().astype(np.uint32).view(np.int32))


def as_compressed(weight, bits=4, **options):
    q, zeros, scales = rounded(weight, bits, **options)
    tensors = {"weight_packed": words(q, bits), "weight_scale": scales.half(), "weight_shape": torch.tensor(weight.shape)}
    if options.get("asymmetric"):
        tensors["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
    return tensors, (q, zeros, scales)


def as_gptq(weight, **options):
    q, zeros, scales = rounded(weight, **options)
    index = torch.arange(weight.shape[1], dtype=torch.int32) // GROUP
    tensors = {
        "qweight": words(q).T.contiguous(), "qzeros": words((zeros - 1).clamp(0).T), "scales": scales.T.half().contiguous(),
        "g_idx": index,
    }  # fmt: skip
    return tensors, (q, zeros.clamp(1), scales)


def as_awq(weight, **options):
    q, zeros, scales = rounded(weight, **options)

    def interleaved(values):  # which of eight outputs each nibble is of, from the lowest
        return words(values.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1))

    tensors = {"qweight": interleaved(q.T), "qzeros": interleaved(zeros.T), "scales": scales.T.half().contiguous()}
    return tensors, (q, zeros, scales)


def as_int8(weight):
    q, zeros, scales = rounded(weight, 8, group=None)
    return {"weight": (q - 128).to(torch.int8), "weight_scale": scales.half()}, (q, zeros, scales)


def as_modelopt(weight):
    q, zeros, scales = rounded(weight)
    codes = ((q - 8) & 15).to(torch.uint8)  # two's complements
    return {"weight": codes[0::2] | codes[1::2] << 4, "weight_scale": scales}, (q, zeros, scales)


def as_fp8(weight):
    scales = (weight.float().abs().amax() / 448).reshape(())
    return {"weight": (weight.float() / scales).to(torch.float8_e4m3fn), "weight_scale": scales}, None


LAYOUTS = {
    "compressed": (as_compressed, {}, "int4"),
    "compressed int8": (as_compressed, {"bits": 8}, "int8"),
    "compressed asymmetric": (as_compressed, {"asymmetric": True}, "int8"),
    "gptq": (as_gptq, {}, "int4"),
    "gptq asymmetric": (as_gptq, {"asymmetric": True}, "int8"),
    "awq asymmetric": (as_awq, {"asymmetric": True}, "int8"),
    "awq": (as_awq, {}, "int4"),
    "int8": (as_int8, {}, "int8"),
    "modelopt": (as_modelopt, {}, "int4"),
    "fp8": (as_fp8, {}, "fp8"),
}


def packed(directory: Path, pack, **options) -> dict:
    """The language model's linear layers of a checkpoint as `pack` stores them; what they were made of by name."""
    made = {}
    for file in directory.glob("model-*.safetensors"):
        tensors = load_file(file)
        for name in list(tensors):
            if match := LINEAR.fullmatch(name):
                parts, made[match[1]] = pack(tensors.pop(name), **options)
                tensors |= {f"{match[1]}.{part}": tensor for part, tensor in parts.items()}
        save_file(tensors, file)
    assert len(made) > 10
    return made


@pytest.fixture
def directory(tmp_path) -> Path:
    return Path(shutil.copytree(SAVED, tmp_path / "checkpoint"))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_values_and_scales_are_those_that_are_stored(directory, layout):
    pack, options, name = layout
    made = packed(directory, pack, **options)
    checkpoint = load_checkpoint(directory)
    policy = load_policy(checkpoint)
    layers = stored_layers(policy, checkpoint)
    assert len(layers) == len(made) and all(layer.precision in ("int4", "int8", "fp8") for layer in layers.values())
    assert name in {layer.precision for layer in layers.values()}
    for ours, layer in layers.items():
        weight = policy.get_submodule(ours).weight.detach().numpy()
        np.testing.assert_allclose(layer.effective_weight(), weight, rtol=1e-6, atol=1e-7)
    # one of them, by hand
    mine, theirs = "prefill.layers.0.q", made["language_model.model.layers.0.self_attn.q_proj"]
    if theirs is not None:
        q, zeros, scales = (part.numpy() for part in theirs)
        values = q - np.repeat(zeros, q.shape[1] // zeros.shape[1], 1)
        np.testing.assert_array_equal(layers[mine].weight.values, values)
        np.testing.assert_array_equal(layers[mine].weight.steps.reshape(scales.shape), scales)


def test_a_recipe_leaves_them_as_they_are_and_rounds_the_rest(directory):
    packed(directory, as_gptq)
    checkpoint = load_checkpoint(directory)
    policy = load_policy(checkpoint)
    spec, rng = checkpoint.spec, np.random.default_rng(0)

    def observation(index: int) -> Observation:
        images = {c.name: rng.integers(0, 256, (c.source_height, c.source_width, 3), np.uint8) for c in spec.cameras}
        joints = JointState(0, spec.joint_names, rng.normal(0, 0.3, len(spec.joint_names)))
        return Observation(200_000_000 * index, images, joints, "touch the red cube")

    data = collect(map(observation, range(4)), frames=2, held_out=1)
    stored = stored_layers(policy, checkpoint)
    found = carry_out(load_recipe("int8-weight-only"), policy, checkpoint, data, lambda *_: None).layers
    assert {name for name, layer in found.items() if layer.precision == "int4"} == set(stored)
    assert {layer.precision for name, layer in found.items() if name not in stored} == {"int8"}
    for name, layer in stored.items():
        np.testing.assert_array_equal(found[name].weight.values, layer.weight.values)
    with pytest.raises(RecipeError, match="changes weights, and those of .* are rounded already"):
        carry_out(load_recipe("prune-2-4"), policy, checkpoint, data, lambda *_: None)


def test_what_is_not_understood_is_named(directory):
    def shuffled(weight):
        tensors, made = as_gptq(weight)
        return tensors | {"g_idx": tensors["g_idx"].flip(0).contiguous()}, made

    packed(directory, shuffled)
    with pytest.raises(CheckpointError, match="inputs were put in another order, desc_act or actorder.*; give the weights"):
        load_policy(load_checkpoint(directory))


def test_weights_of_scaled_inputs_are_what_they_stand_for(directory):
    def pack(weight):
        tensors, made = as_modelopt(weight)
        gain = torch.linspace(0.5, 2, weight.shape[1]).half()
        return tensors | {"pre_quant_scale": gain}, (*made, gain)

    made = packed(directory, pack)
    policy = load_policy(load_checkpoint(directory))
    q, zeros, scales, gain = made["language_model.model.layers.0.self_attn.q_proj"]
    expected = (q - 8) * scales.repeat_interleave(GROUP, 1) * gain.float()
    np.testing.assert_allclose(policy.prefill.layers[0].q.weight.detach(), expected, rtol=1e-6)
    assert not stored_layers(policy, load_checkpoint(directory))  # a recipe decides how they are stored


@pytest.mark.parametrize(("extra", "kind", "told"), [
    (["weight_scale_2"], torch.uint8, "scales of scales, as NVFP4 has"),
    ([], torch.int16, "values of type torch.int16"),
])  # fmt: skip
def test_nvfp4_and_other_codes_are_refused(directory, extra, kind, told):
    def pack(weight):
        tensors = {name: torch.ones(4) for name in ("weight_scale", *extra)}
        return {"weight": torch.zeros(4, 4, dtype=kind), **tensors}, None

    packed(directory, pack)
    with pytest.raises(CheckpointError, match=told):
        load_policy(load_checkpoint(directory))


def as_nf4(weight, nested: bool) -> dict:
    """By bitsandbytes itself, as transformers saves it."""
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(weight.float(), quant_type="nf4", blocksize=64, compress_statistics=nested)
    tensors = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {"weight": codes, **tensors}, functional.dequantize_4bit(codes, state)


@pytest.mark.peers
@pytest.mark.parametrize("nested", [False, True])
def test_nf4_is_what_bitsandbytes_makes_of_it(nested):
    # whole blocks in a row: with others bitsandbytes 0.50.2 undoes on the CPU something else than it did
    tensors, theirs = as_nf4(torch.randn(48, 128, generator=torch.Generator().manual_seed(0)), nested)
    (found,) = find_packed([f"layer.{name}" for name in tensors]).values()
    unpacked = found.unpack(lambda name: tensors[name.removeprefix("layer.")], Path("x"))
    np.testing.assert_allclose(unpacked.weight, theirs, atol=1e-6)
    assert unpacked.steps is None and torch.isnan(unpacked.steps_of_each()).all()


@pytest.mark.peers
@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_those_of_compressed_tensors(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    q, *_ = rounded(torch.randn(16, 32), bits)
    signed = (q - (1 << (bits - 1))).to(torch.int8)
    np.testing.assert_array_equal(helpers.pack_to_int32(signed, bits), words(q, bits))
