"""A random OpenVLA of which the language model is large enough for the products of TensorRT Edge-LLM, and its directory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vla_edge.compress.fake import installed
from vla_edge.engine.language import Language, language_of
from vla_edge.engine.llama_directory import write_llama
from vla_edge.engine.packed_layers import get_layout
from vla_edge.engine.product import in_precision
from vla_edge.policy.bins import BINS
from vla_edge.policy.openvla import OpenVLA, OpenVLAConfig, TowerConfig

TOKENIZER = Path(__file__).parents[1] / "parity" / "openvla" / "openvla" / "checkpoint"
FIRST = 64  # of the tokens of actions


class Subject:
    """The policy, and one of the same with the layers that its language model gets in `precision`.

    Args:
        group: inputs that share a scale in 4 bits.
    """

    def __init__(self, precision: str, group: int):
        torch.manual_seed(0)
        tower = TowerConfig(14, 32, 64, 1, 2, 0, (0.5,) * 3, (0.5,) * 3)
        self.policy = OpenVLA(
            OpenVLAConfig(
                cameras=1, image_size=42, towers=(tower,), projector=(48,), vocabulary=FIRST + BINS + 64, width=128,
                hidden=256, layers=2, heads=4, kv_heads=2, eps=1e-5, wavelength=10_000.0, language_length=12, action_dim=5,
                chunk_size=1,
            )
        ).eval().requires_grad_(False)  # fmt: skip
        reader = self.policy.prefill
        # as every checkpoint has it
        self.policy.decode.words.weight[:] = reader.embedding.weight[FIRST : FIRST + BINS]
        self.modules = {
            name: module for name, module in reader.named_modules() if isinstance(module, torch.nn.Linear) and name != "head"
        }
        self.layers = {
            name: in_precision(module.weight.numpy(), precision, group) for name, module in self.modules.items()
        }
        rng = np.random.default_rng(0)
        self.image = rng.normal(size=(1, 9, 128)).astype(np.float32)
        self.words = rng.integers(3, FIRST, (1, 12))
        self.mask = np.arange(12)[None] < 7

    @property
    def language(self) -> Language:
        return language_of(self.policy.prefill, self.policy.decode.words, self.layers)

    def write(self, directory: Path, layout: str) -> Path:
        """The language model's directory."""
        directory.mkdir()
        write_llama(directory, self.language, get_layout(layout), FIRST, TOKENIZER)
        return directory

    def scores(self) -> np.ndarray:
        """(tokens, 256) of the policy with its layers rounded."""
        with installed(self.modules, self.layers):
            given = (torch.from_numpy(array) for array in (self.image, self.words, self.mask))
            return self.policy.greedy(*given)[0].numpy()

    def prompt(self, tokens: np.ndarray, table: np.ndarray) -> np.ndarray:
        """(places, 128): the prompt and tokens of actions behind it, with a table (vocabulary, 128) of the words."""
        words = self.words[0, : self.mask.sum()]
        return np.concatenate([table[words[:1]], self.image[0], table[words[1:]], table[FIRST + tokens]]).astype(np.float32)
