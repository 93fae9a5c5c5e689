"""TensorRT Edge-LLM's own exporter takes what we write for it, and the graph that it makes computes what the policy does.

The graph's operators are plugins that run on NVIDIA's GPUs alone. Here they are imitated: products by the weights that its
own packing gives for our codes, attention by what its documentation says of a prompt without a past.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from language_subject import FIRST, Subject
from safetensors.numpy import load_file

from vla_edge.engine.llama_directory import write_action_tokens
from vla_edge.policy.bins import BINS

pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]
pytest.importorskip("tensorrt_edgellm", reason="tensorrt-edgellm is not installed")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32


@pytest.fixture(scope="module", params=["as quantized", "with scaled inputs"])
def exported(request, tmp_path_factory):
    """(the policy, the directory that its command has written)."""
    from dataclasses import replace

    subject, place = Subject("int4 weights", 128), tmp_path_factory.mktemp("edge")
    if request.param == "with scaled inputs":
        rng = np.random.default_rng(1)
        for name in ("layers.0.mlp.down", "layers.1.out"):
            layer = subject.layers[name]
            scale = rng.uniform(0.5, 2, layer.shape[1]).astype(np.float16).astype(np.float32)
            subject.layers[name] = replace(layer, input_scale=scale)
    language = subject.write(place / "language", "edge_llm")
    write_action_tokens(place / "tokens", FIRST)
    command = [sys.executable, "-m", "tensorrt_edgellm.scripts.export", language, place / "onnx"]
    made = subprocess.run(
        [*map(str, command), "--reduced-vocab-dir", str(place / "tokens")], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    return subject, place / "onnx" / "llm"


def imitated(subject: Subject):
    """The graph's operators that are no standard, in numpy."""
    from onnx.reference.op_run import OpRun
    from tensorrt_edgellm.checkpoint.repacking import repack_to_cutedsl_fragment

    codes = {
        repack_to_cutedsl_fragment(layer.weight.values.astype(np.int16) + 8).tobytes(): layer.weight.values
        for layer in subject.layers.values()
    }  # fmt: skip
    assert len(codes) == len(subject.layers)

    class Int4GroupwiseGemmPluginV2(OpRun):
        op_domain = "trt_edgellm"

        def _run(self, x, weight, scales, gemm_n=None, gemm_k=None, group_size=None, **_):
            values = codes[weight.tobytes()]  # every code, or none
            assert values.shape == (gemm_n, gemm_k)
            dense = values * np.repeat(scales.T.astype(np.float32), group_size, 1)
            return ((x.astype(np.float32) @ dense.T).astype(np.float16),)

    class QkvConcatPlugin(OpRun):
        op_domain = "trt_edgellm"

        def _run(self, q, k, v, **_):
            return (np.concatenate([q, k, v], -1),)

    class AttentionPlugin(OpRun):
        op_domain = "trt_edgellm"

        def _run(self, qkv, cache, lengths, rope, past, *_, num_q_heads=None, num_kv_heads=None, head_size=None,
                 attention_scale=None, **options):  # fmt: skip
            assert (num_q_heads, num_kv_heads, head_size) == (HEADS, KV_HEADS, HEAD_DIM) and not past.any()
            parts = qkv.reshape(-1, HEADS + 2 * KV_HEADS, HEAD_DIM).astype(np.float32)
            cos, sin = (np.concatenate([half, half], -1)[:, None] for half in np.split(rope, 2, -1))
            first, second = np.split(parts, 2, -1)
            turned = parts * cos + np.concatenate([-second, first], -1) * sin
            q, k = turned[:, :HEADS], np.repeat(turned[:, HEADS : HEADS + KV_HEADS], HEADS // KV_HEADS, 1)
            v = np.repeat(parts[:, HEADS + KV_HEADS :], HEADS // KV_HEADS, 1)
            scores = np.einsum("qhd,khd->hqk", q, k) * attention_scale + np.triu(np.full((len(q), len(q)), -1e9), 1)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
            return out.astype(np.float16).reshape(*qkv.shape[:-1], -1), cache

    return [Int4GroupwiseGemmPluginV2, QkvConcatPlugin, AttentionPlugin]


def feeds(places: np.ndarray) -> dict[str, np.ndarray]:
    """One sequence without a past."""
    count = len(places)
    angles = np.arange(count)[:, None] / 10_000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    one = {name: np.full(1, count, np.int32) for name in ("query_lengths", "attention_sequence_lengths")}
    none = {
        name: np.zeros(1, np.int32)
        for name in ("past_lengths", "state_indices", "execution_phase_marker", "context_sequence_count_carrier")
    }  # fmt: skip
    caches = {f"past_key_values_{i}": np.zeros((2, 1, 128, KV_HEADS, HEAD_DIM), np.float16) for i in range(2)}
    return {
        "inputs_embeds": places.astype(np.float16), "positions": np.arange(count, dtype=np.int32), **one, **none, **caches,
        "rope_rotary_cos_sin": np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32),
        "query_start_offsets": np.array([0, count], np.int32), "kv_page_table": np.zeros((1, 2, 1), np.int32),
        "logits_indices": np.array([count - 1]),
    }  # fmt: skip


def test_every_layer_is_one_of_its_products(exported):
    import onnx

    subject, directory = exported
    graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node if node.domain == "trt_edgellm")
    assert kinds == {"Int4GroupwiseGemmPluginV2": 14, "AttentionPlugin": 2, "QkvConcatPlugin": 2}
    assert len(subject.layers) == 14
    (logits,) = (value for value in graph.output if value.name == "logits")
    assert logits.type.tensor_type.shape.dim[1].dim_value == BINS


def test_the_scores_of_all_tokens_are_the_policys(exported):
    from onnx.reference import ReferenceEvaluator

    subject, directory = exported
    session = ReferenceEvaluator(str(directory / "model.onnx"), new_ops=imitated(subject))
    table = load_file(directory / "embedding.safetensors")["embedding"]
    ids = load_file(directory / "vocab_map.safetensors")["vocab_map"]
    expected = subject.scores()
    tokens = expected.argmax(-1)
    for number, scores in enumerate(expected):
        given = feeds(subject.prompt(ids[tokens[:number]] - FIRST, table))
        found = session.run(["logits"], {name: given[name] for name in session.input_names})[0][0]
        assert np.linalg.norm(found - scores) / np.linalg.norm(scores) < 2e-3  # float16
