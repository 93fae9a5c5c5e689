"""Two policies on the same seeds, in turn, until it is certain whether the second loses more than a margin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vla_edge.evaluate.closed_loop import ClosedLoopError, LoopOptions, closed_loop_rows
from vla_edge.evaluate.closed_loop_result import ClosedLoopResult
from vla_edge.evaluate.metrics import PairedTest
from vla_edge.evaluate.sequential import Answer, SequentialMean


@dataclass(frozen=True)
class PairedRun:
    """What was found.

    Attributes:
        first, second: both runs, over the same seeds.
        margin: of success rate that the second may lose.
        holds: whether it loses less; None while the seeds did not suffice to tell.
        confidence: with which.
    """

    first: ClosedLoopResult
    second: ClosedLoopResult
    margin: float
    holds: bool | None
    confidence: float

    @property
    def test(self) -> PairedTest:
        """Pair by pair; its p-value is that of a run of fixed length."""
        return self.first.against(self.second)

    def one_line(self) -> str:
        """For the end of a run."""
        found, points = self.test, 100 * self.margin
        told = {
            True: f"it is certain at {100 * self.confidence:g} % that less than {points:g} points are lost",
            False: f"it is certain at {100 * self.confidence:g} % that more than {points:g} points are lost",
            None: f"whether {points:g} points are lost is not certain yet",
        }[self.holds]
        return (
            f"{self.second.successes} of {self.second.n} against {self.first.successes} on the same seeds, "
            f"{found.only_first} lost and {found.only_second} won; {told}"
        )


def run_paired(
    first,
    second,
    seeds: Sequence[int],
    margin: float = 0.01,
    confidence: float = 0.95,
    workers: int = 1,
    rig=None,
    progress: Callable[[int, int], None] | None = None,
    **options,
) -> PairedRun:
    """Runs pairs of episodes in the order of `seeds`, at most all of them.

    Args:
        first, second: policies as of `run_closed_loop`; the first is what the second is held to.
        progress: called with pairs done and the second's successes.
        options: those of `LoopOptions`.

    Raises:
        ClosedLoopError: an option is out of range, or there are no seeds.
    """
    chosen, seeds = LoopOptions(**options), [int(seed) for seed in seeds]
    if not seeds or not 0.0 < margin < 1.0:
        raise ClosedLoopError("a paired run needs seeds, and a margin between 0 and 1")
    # (1 + difference) / 2 lies between 0 and 1
    certain, answer, pairs = SequentialMean((1.0 - margin) / 2.0, confidence), None, []
    runs = [closed_loop_rows(policy, seeds, chosen, workers, rig) for policy in (first, second)]
    try:
        for a, b in zip(*runs):
            pairs.append((a, b))
            answer = certain.add((1.0 + b.success - a.success) / 2.0)
            if progress is not None:
                progress(len(pairs), sum(row.success for _, row in pairs))
            if answer is not None:
                break
    finally:
        for run in runs:
            run.close()
    ours, theirs = (ClosedLoopResult.of([pair[side] for pair in pairs], chosen) for side in (0, 1))
    holds = None if answer is None else answer is Answer.ABOVE
    return PairedRun(ours, theirs, margin, holds, confidence)
