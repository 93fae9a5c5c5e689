"""The language model of a policy that writes its actions as tokens, by itself: what files of other runtimes are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vla_edge.compress.quantize.weights import CompressedLinear
from vla_edge.policy.weights import OnDemand


@dataclass(frozen=True)
class Language:
    """A Llama that writes actions.

    Attributes:
        heads, kv_heads: of each layer. eps: of its norms. wavelength: of its rotary embedding. context: most tokens.
        linear: "layers.<i>.<name>" and "head" -> what became of it.
        norms: "layers.<i>.<name>" and "norm" -> (width,) float32.
        words: (256, width) float32, embeddings of the tokens of actions.
        embedding: (vocabulary, width) float32, of the words of prompts.
    """

    heads: int
    kv_heads: int
    eps: float
    wavelength: float
    context: int
    linear: Mapping[str, CompressedLinear]
    norms: Mapping[str, np.ndarray]
    words: np.ndarray
    embedding: np.ndarray

    @property
    def layers(self) -> int:
        return sum(name.endswith(".q") for name in self.linear)


def language_of(reader, words, layers: Mapping[str, CompressedLinear]) -> Language:
    """Args:
        reader: `policy.openvla.Prefill`. words: embedding of the tokens of actions, of what decodes.
        layers: linear layers by their name in `reader`; those not named stay in float32.
    """
    from torch import nn

    from vla_edge.engine.export import as_it_is

    c = reader.config
    found = {name: module for name, module in reader.named_modules() if isinstance(module, nn.Linear)}
    norms = {name: module for name, module in reader.named_modules() if name.endswith("norm")}
    return Language(
        c.heads, c.kv_heads, c.eps, c.wavelength, c.prompt_length + c.tokens,
        OnDemand(found, lambda name: layers[name] if name in layers else as_it_is(found[name])),
        {name: _numpy(module.weight) for name, module in norms.items()},
        _numpy(words.weight), _numpy(reader.embedding.weight),
    )  # fmt: skip


def _numpy(tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy()
