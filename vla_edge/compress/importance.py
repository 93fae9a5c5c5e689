"""What reaches a layer, each vector counted by how far it moves the action chunk.

A policy reads far more than it uses: most patches of a picture, and most words, hardly change what the robot does,
and a layer rounded to fit them all alike fits the few that matter badly. Counted by the gradient of the chunk at the
layer's output, the second moment that AWQ and GPTQ minimize becomes a local model of the action error itself, as
GuidedQuant (Kim et al., 2025, arXiv:2505.07004) has it for the loss of a language model and RSQ (Sung et al., 2025,
arXiv:2503.01820) for tokens. Two departures: magnitudes of gradients and not their squares, which would leave too few
of the few thousand vectors of a calibration; and every observation counts the same, however steep the policy is
there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vla_edge.compress.calibrate import CalibrationError
from vla_edge.compress.statistics import InputStatistics
from vla_edge.types import Observation

SEED = 0


def weighed_inputs(
    policy,
    checkpoint,
    groups: Mapping[str, Sequence],
    observations: Sequence[Observation],
    progress: Callable[[float], None] | None = None,
) -> dict[str, InputStatistics]:
    """Statistics of what reaches each group of layers, products of channels weighed by the action chunk's gradient.

    The gradient is that of the chunk in radians after all flow steps, along one random direction for each observation:
    its square is, on average, the squared norm of the whole Jacobian (Hutchinson, 1989).

    Args:
        policy: in PyTorch, with the stages of a flow or a differentiable `chunk`; left as it is.
        checkpoint: that it was loaded from.
        groups: name -> the `nn.Linear`s of `policy` that read one tensor. Memory holds the inputs and outputs of all
            of them for one observation.

    Raises:
        CalibrationError: an input or a gradient is not finite.
    """
    import torch

    from vla_edge.learn.frames import from_observations

    frames = from_observations(observations, checkpoint.spec, checkpoint.tokenizer_path)
    generator = torch.Generator().manual_seed(SEED)
    statistics = {name: InputStatistics() for name in groups}
    calls: dict[object, list] = {}

    def remember(module, inputs, output) -> None:
        if output.requires_grad:
            output.retain_grad()
        else:
            output.requires_grad_()
        calls.setdefault(module, []).append((inputs[0].detach(), output))

    handles = [module.register_forward_hook(remember) for modules in groups.values() for module in modules]
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        for index in range(len(frames)):
            calls.clear()
            chunk_along(policy, checkpoint.spec, frames.take([index]), generator).backward()
            for name, modules in groups.items():
                _count(name, statistics[name], [calls.get(module, []) for module in modules])
            if progress is not None:
                progress((index + 1) / len(frames))
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_()
    return statistics


def chunk_along(policy, spec, frames, generator):
    """The action chunk of some frames in radians, after all flow steps, along one random direction: a scalar to
    differentiate."""
    import torch

    shape = (len(frames), policy.config.chunk_size, spec.max_action_dim)
    radians = torch.zeros(shape[1:])
    radians[: spec.chunk_size, : len(spec.joint_names)] = torch.tensor(spec.chunk_affine()[1])
    noise = torch.randn(shape, generator=generator)
    direction = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0
    with torch.enable_grad():
        return (frames.chunk_of(policy, noise, spec.num_steps) * direction * radians).sum()


def _count(name: str, statistics: InputStatistics, readers: Sequence[Sequence]) -> None:
    """One observation: for each layer of a group its calls, (input, output with its gradient)."""
    inputs, weights = [], []
    for same in zip(*readers, strict=True):
        x = same[0][0]
        squares = [0.0 if out.grad is None else out.grad.square().sum(-1) for _, out in same]
        weights.append((sum(squares) + x.new_zeros(x.shape[:-1])).sqrt().flatten())
        inputs.append(x.flatten(0, -2))
    if not inputs:
        return
    weight = np.concatenate([w.numpy() for w in weights])
    total = weight.sum(dtype=np.float64)
    if not np.isfinite(total):
        raise CalibrationError(f"the action chunk's gradient at layer {name} is not finite; check the recording")
    weight = weight * (len(weight) / total) if total > 0 else np.zeros_like(weight)
    try:
        statistics.update(np.concatenate([x.numpy() for x in inputs]), weight)
    except ValueError as error:
        raise CalibrationError(f"the input of layer {name} has {error}; check the recording") from None
