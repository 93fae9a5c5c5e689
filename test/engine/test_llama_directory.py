"""The language model of a policy as a directory: complete, and what other libraries load it as is the policy's own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from language_subject import FIRST, Subject
from safetensors.numpy import load_file

from vla_edge.engine import llama_directory
from vla_edge.engine.llama_directory import llama_name, write_action_tokens
from vla_edge.policy.bins import BINS
from vla_edge.policy.weights import Weights, find_weights


@pytest.mark.parametrize(("layout", "precision"), [
    ("edge_llm", "int4 weights"), ("compressed_tensors", "int4 weights"), ("compressed_tensors", "int8 weights"),
    ("modelopt", "float16"), ("awq", "int4 weights"),
])  # fmt: skip
def test_our_own_loader_finds_every_weight_in_it(tmp_path, layout, precision):
    subject = Subject(precision, 128)
    weights = Weights(find_weights(subject.write(tmp_path / "language", layout)))
    for name, layer in subject.layers.items():
        # scales of whole channels are float32 here and float16 there, floating point is float16 there
        exact = precision == "int4 weights"
        np.testing.assert_allclose(
            weights[f"{llama_name(name)}.weight"], layer.effective_weight(), rtol=0 if exact else 2.0**-11, atol=0
        )
    reader = subject.policy.prefill
    for name, norm in (("norm", reader.norm), ("layers.1.mlp_norm", reader.layers[1].mlp_norm)):
        np.testing.assert_array_equal(weights[f"{llama_name(name)}.weight"], norm.weight.half())
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], reader.embedding.weight.half())
    head = weights["lm_head.weight"]
    np.testing.assert_array_equal(head[FIRST : FIRST + BINS], reader.head.weight.half())
    assert not head[:FIRST].any() and not head[FIRST + BINS :].any()


def test_what_stays_in_floating_point_is_left_out_by_name(tmp_path):
    subject = Subject("int4 weights", 128)
    subject.layers.pop("layers.0.mlp.down")
    directory = subject.write(tmp_path / "language", "modelopt")
    said = json.loads((directory / "hf_quant_config.json").read_text())["quantization"]
    assert said["quant_algo"] == "W4A16_AWQ" and said["group_size"] == 128
    assert said["exclude_modules"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    config = json.loads((directory / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == said["exclude_modules"]
    assert config["vocab_size"] == FIRST + BINS + 64 and config["num_key_value_heads"] == 2 and config["head_dim"] == 32
    assert (directory / "tokenizer.json").is_file() and (directory / "chat_template.jinja").is_file()


def test_large_ones_are_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_directory, "SHARD", 100_000)
    directory = Subject("int4 weights", 128).write(tmp_path / "language", "modelopt")
    shards = sorted(directory.glob("model-*.safetensors"))
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and shards[-1].name.endswith(f"of-{len(shards):05}.safetensors")
    stored = {name: shard.name for shard in shards for name in load_file(shard)}
    assert stored == index["weight_map"] and not list(directory.glob("*.partial"))
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards for t in load_file(shard).values())


def test_action_tokens_are_the_last_256_words_before_the_padding(tmp_path):
    write_action_tokens(tmp_path / "tokens", FIRST)
    np.testing.assert_array_equal(load_file(tmp_path / "tokens/vocab_map.safetensors")["vocab_map"], FIRST + np.arange(BINS))


@pytest.mark.peers
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["int4 weights", "int8 weights", "float16"])
def test_transformers_gives_the_policys_scores(tmp_path, precision):
    """By compressed-tensors' own loading within transformers; it computes in float32 here."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    subject = Subject(precision, 32)
    directory = subject.write(tmp_path / "language", "compressed_tensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    expected = subject.scores()
    tokens = expected.argmax(-1)[:-1]
    places = subject.prompt(tokens, model.get_input_embeddings().weight.detach().numpy())
    with torch.no_grad():
        logits = model(inputs_embeds=torch.from_numpy(places)[None]).logits[0, -len(expected) :, FIRST : FIRST + BINS].numpy()
    assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 1e-3  # words and head are float16


@pytest.mark.peers
@pytest.mark.parametrize(("precision", "group"), [("int4 weights", 32), ("int4 weights", 128), ("float16", 32)])
def test_mlx_lm_gives_the_policys_scores(tmp_path, precision, group):
    """A runtime that multiplies with the rounded weights as they are; here on a processor."""
    mx = pytest.importorskip("mlx.core")
    utilities = pytest.importorskip("mlx_lm.utils")
    subject = Subject(precision, group)
    model, _ = utilities.load_model(subject.write(tmp_path / "language", "awq"))
    expected = subject.scores()
    places = subject.prompt(expected.argmax(-1)[:-1], subject.policy.prefill.embedding.weight.numpy())
    found = model(mx.zeros((1, len(places)), dtype=mx.int32), input_embeddings=mx.array(places)[None].astype(mx.float16))
    scores = np.array(found.astype(mx.float32))[0, -len(expected) :, FIRST : FIRST + BINS]
    assert np.linalg.norm(scores - expected) / np.linalg.norm(expected) < 3e-3  # float16
