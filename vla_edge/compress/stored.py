"""Layers that a checkpoint holds rounded already -> our representation, value by value: nothing is rounded again.

The family's own way from the file to the policy is gone twice, with the weights and with the sizes of their steps
(`policy.weights`), so that whatever it splits, joins or multiplies, each value finds its step.
"""

from __future__ import annotations

import numpy as np

from vla_edge.compress.quantize.formats import FP8, INT4
from vla_edge.compress.quantize.weights import CompressedLinear, QuantizedWeight
from vla_edge.policy.checkpoint_files import CheckpointError
from vla_edge.policy.weights import Weights

NEAR = 1e-3  # of a step


def stored_layers(policy, checkpoint) -> dict[str, CompressedLinear]:
    """ "stage.path" -> the layer as it is stored; empty where nothing is stored rounded.

    Args:
        policy: loaded from `checkpoint`, not changed since.

    Raises:
        CheckpointError: a weight lies between its steps.
    """
    from vla_edge.engine.trace import policy_layers

    weights = Weights(checkpoint.weights, steps=True)
    if not weights.rounded:
        return {}
    steps = checkpoint.family.module.tensors(policy, checkpoint, weights)
    found = {}
    for name, module in policy_layers(policy.stages()).items():
        step = steps[f"{name}.weight"].float().numpy()
        if np.isnan(step).any():
            continue
        bias = None if module.bias is None else module.bias.detach().numpy()
        stored = _stored(module.weight.detach().numpy(), step)
        if stored is None:
            raise CheckpointError(
                f"layer {name} of {checkpoint.directory} is not made of whole steps; give the weights it was quantized from"
            )
        found[name] = CompressedLinear(stored, bias)
    return found


def _stored(weight: np.ndarray, step: np.ndarray) -> QuantizedWeight | None:
    """(out, in) values and steps of each; None where they do not fit."""
    group = _group(step)
    values = np.divide(weight, step, out=np.zeros_like(weight), where=step != 0)
    whole = np.rint(values)
    if np.abs(values - whole).max(initial=0) < NEAR and np.abs(whole + 0.5).max(initial=0) <= 127.5:
        name = "int4" if np.abs(whole + 0.5).max(initial=0) <= INT4.largest + 0.5 else "int8"
        points = whole.astype(np.int8)
    else:
        name, points = "fp8", values.astype(FP8.dtype)
        if group or np.abs(points.astype(np.float32) - values).max() > NEAR * np.abs(values).max():
            return None
    scales = step[:, :: group or step.shape[1]]
    return QuantizedWeight(points, scales if group else scales[:, 0], name, group)


def _group(step: np.ndarray) -> int | None:
    """Consecutive inputs that share their step in all rows; None where all of a row do."""
    changes = np.flatnonzero((np.diff(step, axis=1) != 0).any(0)) + 1
    return int(np.gcd.reduce([*changes.tolist(), step.shape[1]])) if len(changes) else None
