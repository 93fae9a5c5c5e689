"""The stage contract: a policy is a short chain of pure functions with named tensors.

A backend sees one stage and nothing else, so every family runs on every runtime, and the stages of one engine may use
different runtimes and precisions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor with a static shape; `dtype` is numpy's name for it."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    def zeros(self) -> np.ndarray:
        return np.zeros(self.shape, self.dtype)


@dataclass(frozen=True)
class Stage:
    """One pure function of a policy.

    Attributes:
        name: "vision", "prefix", "time" or "denoise" for flow and diffusion policies; "vision", "prefill", and
            "decode", "revise", or "verify" with or without "draft" for policies that write their actions as tokens, or
            "generate" in the place of all of them; "vision" or "act" for those that give a chunk at once.
        module: torch module whose forward takes the inputs in order and returns the outputs in order (a tuple). Its
            large products are all `torch.nn.Linear`, so that a compressor finds every weight by name.
        inputs, outputs: names, shapes and types, in order.
        shares: name of another stage whose layers, under the same names, are the very ones of this. They are planned,
            calibrated and compressed there.
    """

    name: str
    module: object
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    shares: str | None = None

    @property
    def chain(self):
        """Its module in pieces, a `policy.chain.Chain`."""
        from vla_edge.policy.chain import chain_of

        return chain_of(self.module)


class StagedPolicy(Protocol):
    """A policy that can be taken apart into stages.

    Attributes:
        matched: what a student is trained to have in common with it (`learn.outputs`): the "velocity" of a flow, the
            "scores" of tokens, or "actions" that come at once; None where it is not trained.
    """

    matched: str | None

    def stages(self) -> tuple[Stage, ...]: ...
