"""Several engines on several recordings, in parallel: every pair is evaluated by itself, as it would be alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vla_edge.evaluate.contract import TopicContract
from vla_edge.evaluate.evaluation import Evaluation
from vla_edge.evaluate.limits import Limits
from vla_edge.evaluate.replay import evaluate_bag
from vla_edge.evaluate.verdict import Verdict, judge
from vla_edge.types import VlaEdgeError


class SuiteError(VlaEdgeError):
    """A comparison that cannot be set up."""


@dataclass(frozen=True)
class Job:
    """One engine on one recording; plain values, so that it can travel to another process or machine.

    Attributes:
        threads: of the engine; the backend's choice when None.
        options: of `replay.ReplayOptions`.
    """

    bag: str
    engine: str
    reference: str | None = None
    contract: TopicContract | None = None
    threads: int | None = None
    options: Mapping[str, object] = field(default_factory=dict)

    def run(self, progress: Callable[[float, int], None] | None = None) -> Evaluation:
        """Raises whatever `evaluate_bag` does."""
        return evaluate_bag(
            self.bag, self.engine, self.reference, self.contract, progress, self.threads, **self.options
        )


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        bag, engine: names, as short as they can be told apart.
        evaluation, verdict: None where it could not be evaluated. error: why, in one sentence.
    """

    bag: str
    engine: str
    evaluation: Evaluation | None
    verdict: Verdict | None
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether it was evaluated and holds every limit."""
        return self.verdict is not None and self.verdict.passed


def run_suite(
    jobs: Sequence[Job],
    limits: Limits | None = None,
    workers: int = 1,
    dask: str | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[Outcome, ...]:
    """Evaluates every job; one that fails leaves the others alone.

    Args:
        workers: processes on this machine. Each gives its engine one thread, so that they do not fight for the cores.
        dask: address of a running Dask scheduler whose machines see the same paths; instead of `workers`.
        progress: called with the fraction done and what was finished last, or how far a single job is.

    Raises:
        SuiteError: `dask` is given and cannot be used.
    """
    bags, engines = short_names([job.bag for job in jobs]), short_names([job.engine for job in jobs])
    found: dict[int, Outcome] = {}

    def finish(index: int, evaluation: Evaluation | None, error: str) -> None:
        job = jobs[index]
        verdict = judge(evaluation, limits) if evaluation is not None else None
        found[index] = Outcome(bags[job.bag], engines[job.engine], evaluation, verdict, error)
        if progress is not None:
            progress(len(found) / len(jobs), f"{found[index].engine} on {found[index].bag}")

    if workers <= 1 and dask is None:
        inner = None
        if len(jobs) == 1 and progress is not None:
            inner = lambda fraction, frames: progress(fraction, f"{frames} frames")  # noqa: E731
        for index, job in enumerate(jobs):
            finish(index, *_attempt(job, inner))
    else:
        with _executor(min(workers, len(jobs)), dask) as pool:
            underway = {pool.submit(_attempt, job): index for index, job in enumerate(jobs)}
            for future in as_completed(underway):
                finish(underway[future], *future.result())
    return tuple(found[index] for index in range(len(jobs)))


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """path -> the last parts of it that tell it from the others."""
    names: dict[str, str] = {}
    for path in dict.fromkeys(paths):
        parts = Path(path).resolve().parts
        others = [Path(other).resolve().parts for other in set(paths) if other != path]
        depth = 1
        while depth < len(parts) and any(other[-depth:] == parts[-depth:] for other in others):
            depth += 1
        names[path] = "/".join(parts[-depth:])
    return names


def _attempt(job: Job, progress: Callable[[float, int], None] | None = None) -> tuple[Evaluation | None, str]:
    try:
        return job.run(progress), ""
    except VlaEdgeError as error:
        return None, str(error)


@contextmanager
def _executor(workers: int, dask: str | None) -> Iterator[Executor]:
    if dask is None:
        import multiprocessing

        # fork would copy the locks of an engine's threads in whatever state they are
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _one_thread) as pool:
            yield pool
        return
    try:
        from distributed import Client
    except ImportError:
        raise SuiteError(
            "--dask needs the package distributed; run pip install 'vla_edge[cluster]' here and on the machines"
        ) from None
    try:
        client = Client(dask, timeout=10)
    except (OSError, TimeoutError, ValueError) as error:
        raise SuiteError(f"no Dask scheduler answers at {dask} ({error}); start one, or leave --dask out") from None
    with client, _waiting(client.get_executor()) as pool:
        yield pool


@contextmanager
def _waiting(pool: Executor) -> Iterator[Executor]:
    try:
        yield pool
    finally:
        pool.shutdown()


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
