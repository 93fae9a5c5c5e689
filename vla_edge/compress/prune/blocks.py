"""Whole layers taken out of a policy: those that the action chunk misses least.

Layers with a residual around them can be skipped: what goes in takes the place of what comes out. Which ones is told by
the error of the action chunk without them, or, for less work, by the cosine between what goes in and what comes out
(ShortGPT, Men et al., 2024, arXiv:2403.03853). One goes after the other, and those that are left are judged again.
What depends on a layer goes with it, see `policy.blocks.Block`: a text layer takes the action expert's layer that reads
its keys along and counts as two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vla_edge.compress.calibrate import CalibrationError
from vla_edge.policy.blocks import Block
from vla_edge.types import Observation

JUDGES = 16
"""Observations that tell what is missed."""


def skip_blocks(
    policy,
    count: int,
    candidates: Callable[[], Sequence[Block]],
    by: str,
    runner: Callable[[], object],
    observations: Sequence[Observation],
    progress: Callable[[float], None] | None = None,
) -> list[str]:
    """Skip `count` layers of `policy`, in place.

    Args:
        candidates: that may be skipped next, of the policy as it is then.
        by: "action" or "cosine". runner: makes a `Runner` in PyTorch of the policy as it is then.

    Returns:
        Their names, in the order they went; fewer where nothing was left that could go.

    Raises:
        CalibrationError: there are no observations.
    """
    if not observations:
        raise CalibrationError("there are no observations to tell which layers are missed least; give a recording")
    judges = observations[:: max(1, len(observations) // JUDGES)][:JUDGES]
    wanted = None if by == "cosine" else _chunks(runner(), judges)
    gone: list[str] = []
    while count > len(gone):
        left = [block for block in candidates() if len(block.names) <= count - len(gone)]
        if not left:
            break
        if by == "cosine":
            missed = _turned(left, runner(), judges)
        else:
            missed = []
            for number, block in enumerate(left):
                undo = policy.skip_(block)
                missed.append(float(np.abs(_chunks(runner(), judges) - wanted).mean()))
                undo()
                if progress is not None:
                    progress((len(gone) + (number + 1) / len(left)) / count)
        best = int(np.argmin([loss / len(block.names) for loss, block in zip(missed, left)]))
        policy.skip_(left[best])
        gone += left[best].names
        if progress is not None:
            progress(len(gone) / count)
    return gone


def _chunks(runner, observations: Sequence[Observation]) -> np.ndarray:
    """(n, T, J) rad."""
    return np.array([runner.infer(observation).chunk.positions for observation in observations])


def _turned(blocks: Sequence[Block], runner, observations: Sequence[Observation]) -> list[float]:
    """For each block, 1 less the mean cosine between what goes into its layers and what comes out, summed over them."""
    spans = {span for block in blocks for span in block.spans}
    seen: dict[object, object] = {}
    total = {span: np.zeros(2) for span in spans}

    def hook(norm, inputs) -> None:
        x = inputs[0].detach()
        seen[norm] = x
        for span in spans:
            if span[1] is norm and span[0] in seen:
                before = seen[span[0]]
                cosine = (before * x).sum(-1) / (before.norm(dim=-1) * x.norm(dim=-1)).clamp_min(1e-12)
                total[span] += float((1 - cosine).sum()), cosine.numel()

    handles = [norm.register_forward_pre_hook(hook) for norm in {norm for span in spans for norm in span}]
    try:
        for observation in observations:
            runner.infer(observation)
    finally:
        for handle in handles:
            handle.remove()
    return [sum(float(total[span][0] / max(total[span][1], 1)) for span in block.spans) for block in blocks]
