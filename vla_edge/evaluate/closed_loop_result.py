"""What a closed-loop run found."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from vla_edge.evaluate.evaluation import plain
from vla_edge.evaluate.metrics import Interval, PairedTest, mcnemar, wilson_interval
from vla_edge.evaluate.smoothness import EpisodeSmoothness, SmoothnessSummary
from vla_edge.sim.worlds import world


@dataclass(frozen=True)
class EpisodeRow:
    """One episode.

    Attributes:
        seed: of scene and noise.
        goal: name of the goal the scene was set up for.
        instruction: what the policy was given.
        given_goal: name of the goal it was given; differs from `goal` only when instructions are shuffled.
        success: the goal of the scene was reached, and nothing else first.
        given_success: the goal that was given was reached, and nothing else first.
        wrong_first: something other than what was asked for (`given_goal`) was touched first.
        chance: probability that a policy that picks one of the scene's goals at random reaches `goal`.
        seconds: world time the episode took.
        chunks: that reached the controller.
        rejected: of them, refused by it.
        jump: mean over chunk boundaries of the largest joint step, in the unit of the world.
        limit_hits, holds: counted by the controller.
        rejections: reason -> chunks, as the controller gives them.
        smoothness: of the command, None where nothing was commanded.
    """

    seed: int
    goal: str
    instruction: str
    given_goal: str
    success: bool
    given_success: bool
    wrong_first: bool
    chance: float
    seconds: float
    chunks: int = 0
    rejected: int = 0
    jump: float = math.nan
    limit_hits: int = 0
    holds: int = 0
    rejections: Mapping[str, int] = field(default_factory=dict)
    smoothness: EpisodeSmoothness | None = None

    def with_chunks(
        self, chunks: int, rejected: int, jump: float, smoothness: EpisodeSmoothness | None = None
    ) -> EpisodeRow:
        """The same episode with what the loop itself counted."""
        return replace(self, chunks=chunks, rejected=rejected, jump=jump, smoothness=smoothness)


@dataclass(frozen=True)
class ClosedLoopResult:
    """All episodes of a run, in the order of their seeds.

    Attributes:
        n: episodes.
        successes: episodes whose own goal was reached.
        success_interval: Wilson, 95 %.
        given_successes: episodes whose given goal was reached; equals `successes` unless instructions are shuffled.
        wrong_first: episodes in which something else was touched first.
        chance: mean success of a policy that picks any goal of the scene.
        options: how the loop was closed.
        rows: the episodes.
    """

    n: int
    successes: int
    success_interval: Interval
    given_successes: int
    wrong_first: int
    chance: float
    options: Mapping[str, object]
    rows: tuple[EpisodeRow, ...]

    @classmethod
    def of(cls, rows: Sequence[EpisodeRow], options) -> ClosedLoopResult:
        """Counts the rows."""
        successes = sum(row.success for row in rows)
        return cls(
            len(rows),
            successes,
            wilson_interval(successes, len(rows)),
            sum(row.given_success for row in rows),
            sum(row.wrong_first for row in rows),
            sum(row.chance for row in rows) / len(rows),
            asdict(options),
            tuple(rows),
        )

    @property
    def success_rate(self) -> float:
        """Share of episodes whose own goal was reached."""
        return self.successes / self.n

    @property
    def given_success_rate(self) -> float:
        """Share of episodes whose given goal was reached."""
        return self.given_successes / self.n

    @property
    def wrong_first_rate(self) -> float:
        """Share of episodes in which something else was touched first."""
        return self.wrong_first / self.n

    @property
    def choice(self) -> bool:
        """Whether there was anything else to reach; where every scene has one goal, nothing can be wrong first."""
        return self.chance < 1.0

    @property
    def unit(self) -> str:
        """Of the joints' positions."""
        return world(self.options.get("world", "tabletop")).unit

    @property
    def wilson(self) -> Interval:
        """The interval of the success rate."""
        return self.success_interval

    def against(self, other: ClosedLoopResult) -> PairedTest:
        """This run against another on the same seeds: `difference` is the other's success minus this one's.

        Raises:
            ValueError: the seeds differ.
        """
        if [row.seed for row in self.rows] != [row.seed for row in other.rows]:
            raise ValueError("the two runs are not over the same seeds, so they cannot be compared pair by pair")
        return mcnemar([row.success for row in self.rows], [row.success for row in other.rows])

    def by_goal(self) -> dict[str, tuple[int, int]]:
        """Given goal -> (successes, episodes): where a weak spot is."""
        found: dict[str, list[bool]] = defaultdict(list)
        for row in self.rows:
            found[row.given_goal].append(row.given_success)
        return {goal: (sum(results), len(results)) for goal, results in sorted(found.items())}

    @property
    def smoothness(self) -> SmoothnessSummary:
        """Of the command, over all episodes."""
        return SmoothnessSummary.of([row.smoothness for row in self.rows if row.smoothness is not None])

    def summary(self) -> dict:
        """The figures without the episodes, in JSON types."""
        reached = [row.seconds for row in self.rows if row.given_success]
        return plain(
            {
                "episodes": self.n,
                "successes": self.successes,
                "success_rate": self.success_rate,
                "success_interval": [self.success_interval.low, self.success_interval.high],
                "wrong_first": self.wrong_first,
                "wrong_first_rate": self.wrong_first_rate,
                "given_successes": self.given_successes,
                "given_success_rate": self.given_success_rate,
                "chance": self.chance,
                "median_seconds": sorted(reached)[len(reached) // 2] if reached else None,
                "chunks": sum(row.chunks for row in self.rows),
                "rejected_chunks": sum(row.rejected for row in self.rows),
                "rejections": sum((Counter(row.rejections) for row in self.rows), Counter()),
                "limit_hits": sum(row.limit_hits for row in self.rows),
                "holds": sum(row.holds for row in self.rows),
                "unit": self.unit,
                "smoothness": self.smoothness,
                "options": self.options,
            }
        )

    def to_dict(self) -> dict:
        """Everything, in JSON types."""
        return {
            **self.summary(),
            "goals": {goal: {"successes": k, "episodes": n} for goal, (k, n) in self.by_goal().items()},
            "rows": plain(self.rows),
        }

    def one_line(self) -> str:
        """For the end of a run."""
        low, high = 100 * self.success_interval.low, 100 * self.success_interval.high
        return (
            f"{self.successes}/{self.n} episodes succeeded ({100 * self.success_rate:.1f} %, 95 % interval {low:.1f} "
            f"to {high:.1f})"
            + (f", wrong object first in {self.wrong_first}" if self.choice else "")
            + (
                f", given goal reached in {self.given_successes} (true goal by chance {100 * self.chance:.1f} %)"
                if self.options.get("instruction_override") == "shuffled"
                else ""
            )
        )
