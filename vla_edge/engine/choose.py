"""Which runtime, and which of its ways, is fastest for one stage on this computer: found by running all of them.

Every contender is built, held to the most exact one on the same inputs, and timed in turn with the others. No runtime
wins everywhere: one is faster for single rows, another for a whole image, and a stage that is small enough is fastest
on one thread.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from vla_edge.engine.backends import BackendError, BuiltStage, LoadedStage, StageInterface, get_backend, share
from vla_edge.engine.race import take_turns
from vla_edge.evaluate.metrics import likeness

# The controller needs a core too: twice the threads are worth it when they save at least this share of the time.
SAVING_PER_DOUBLING = 0.2
# Rounding more than the file asks for, unless it is finer than what it asks for elsewhere (`finer`), is worth it when it
# saves at least this share.
SAVING_BY_ROUNDING = 0.1
# How far a contender may be from the most exact one: bfloat16 passes, a wrong kernel does not.
LEAST_COSINE, MOST_RELATIVE_L2 = 0.999, 0.05
FEWEST, ROUNDS, SECONDS, HEAT_SECONDS = 3, 40, 20.0, 0.3
# A call that takes longer tells enough when it is timed once.
LONG = 2.0
# Those that cost more than the best by this factor in the heats are not in the final. Heats are not in turn: a moment in
# which a shared machine is busy lengthens a short call as a whole, and the final is cheap for it.
CUT, CUT_SHORT, SHORT = 1.5, 2.5, 0.1


@dataclass(frozen=True)
class Choice:
    """The fastest contender, compiled.

    Attributes:
        backend: its runtime. built: its file, and what `load` has to be told.
        tried: contender -> ms, of all that were timed. refused: contender -> why it was not.
    """

    backend: str
    built: BuiltStage
    tried: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Contender:
    backend: str
    options: Mapping
    built: BuiltStage
    directory: Path
    stage: LoadedStage | None = None
    seconds: float = np.inf

    @property
    def cost(self) -> float:
        """Seconds, as they weigh on a computer that has more to do."""
        share = (1 - SAVING_PER_DOUBLING) ** np.log2(self.options.get("threads", 1))
        as_good = self.options.get("exact", True) or self.options.get("finer", False)
        return self.seconds / share / (1 if as_good else 1 - SAVING_BY_ROUNDING)


def choose(
    onnx: str | Path,
    directory: str | Path,
    stage: StageInterface,
    backends: Sequence[str],
    inputs: Mapping[str, np.ndarray] | None = None,
    only_exact: bool = False,
    in_turn: bool = False,
) -> Choice:
    """Build `stage` with what is fastest here.

    Args:
        onnx: the stage's file. directory: where the compiled file goes.
        backends: names of those to choose from, the one to trust first.
        inputs: what the stage is run on; zeros when None.
        only_exact: leave out ways that round more than the file asks for.
        in_turn: have one contender in memory at a time, and if there is a choice none whose weights take more room than
            in the file; they are timed one after the other then.

    Raises:
        BackendError: nothing can run the stage; why the first could not.
    """
    inputs = inputs or {spec.name: spec.zeros() for spec in stage.inputs}
    contenders: dict[str, _Contender] = {}
    refused: dict[str, str] = {}
    yardstick: dict[str, np.ndarray] | None = None
    made: dict[tuple, tuple[BuiltStage, Path]] = {}
    with tempfile.TemporaryDirectory(prefix=".choosing-", dir=directory) as scratch:
        for backend in backends:
            runtime = get_backend(backend)
            ways = [way for way in runtime.candidates(onnx) if way.get("exact", True) or not only_exact]
            for options in _smallest(ways) if in_turn else ways:
                name = label(backend, options)
                place = Path(scratch) / str(len(contenders) + len(refused))
                place.mkdir()
                try:
                    built = _build(runtime, onnx, place, stage, options, made)
                    loaded = runtime.load(place / built.file, stage, built.options)
                    found = loaded.run(inputs)
                    _check(found, yardstick)
                    if yardstick is not None:
                        found = None  # a large stage's outputs are not held twice while it is timed
                    contender = _Contender(backend, options, built, place, loaded)
                    once = _run_in_turn({name: contender}, stage, inputs, 1)[name][0]
                    contender.seconds = once
                    if once < LONG:
                        rounds = int(np.clip(HEAT_SECONDS / (2 * once), FEWEST, ROUNDS))
                        contender.seconds = min(_run_in_turn({name: contender}, stage, inputs, rounds)[name])
                except BackendError as error:
                    refused[name] = str(error)
                    continue
                yardstick = found if yardstick is None else yardstick
                contenders[name] = contender
                if in_turn:
                    contender.stage = loaded = None
                _forget_slow(contenders)
        if not contenders:
            raise BackendError(next(iter(refused.values())))
        final = {name: c for name, c in contenders.items() if c.stage is not None} or contenders
        if len(final) > 1 and not in_turn:
            once = 2 * sum(c.seconds for c in final.values())
            rounds = int(np.clip(SECONDS / once, FEWEST, ROUNDS))
            for name, seconds in _run_in_turn(final, stage, inputs, rounds).items():
                final[name].seconds = float(np.percentile(seconds, 25))
        best = min(final.values(), key=lambda c: c.cost)
        for file in best.directory.iterdir():  # what was built, and large constants that it reads
            share(file, Path(directory) / file.name)
    tried = {name: round(1e3 * c.seconds, 3) for name, c in contenders.items()}
    return Choice(best.backend, best.built, tried, refused)


def _build(runtime, onnx, place: Path, stage: StageInterface, options: Mapping, made: dict) -> BuiltStage:
    """`options` in `place`; where they differ from earlier ones, which are in `made`, by threads alone and the runtime
    asks for those when it loads a file, the file of before."""
    key = (runtime, *sorted((name, str(value)) for name, value in options.items() if name != "threads"))
    if key not in made or not getattr(runtime, "THREADS_AT_LOAD", False):
        made[key] = runtime.build(onnx, place, stage, options), place
        return made[key][0]
    built, before = made[key]
    for file in before.iterdir():
        share(file, place / file.name)
    return replace(built, options={**built.options, "threads": options["threads"]})


def _smallest(ways: Sequence[Mapping]) -> list[Mapping]:
    """Those that take least memory. Our kernels read weights where the file is mapped; others lay them out anew, which
    takes as much again and more (of a 7B policy's 3.5 GB in 4 bits 9 GB in ONNX Runtime), and most who unpack them."""
    ours = [way for way in ways if way.get("own_kernels")]
    return ours or [way for way in ways if not way.get("fold_weights")]


def label(backend: str, options: Mapping) -> str:
    """A way of running a stage, in words."""
    threads = options.get("threads", 1)
    words = [f"{backend} on {options.get('device') or options.get('provider') or 'cpu'}"]
    words += [str(options["precision"])] if options.get("precision", "f32") != "f32" else []
    words += ["compiled"] if options.get("compile") else []
    words += ["unpacked weights"] if options.get("fold_weights") else []
    words += ["inputs in int8"] if options.get("dynamic") else []
    words += ["own kernels"] if options.get("own_kernels") else []
    words += [f"keys and values in {options['cache']}"] if options.get("cache") else []
    return ", ".join([*words, f"{threads} thread{'s' if threads > 1 else ''}"])


def _forget_slow(contenders: Mapping[str, _Contender]) -> None:
    """Unload those that cannot win any more: a large stage is not in memory once for each of them."""
    least = min(contender.cost for contender in contenders.values())
    factor = CUT_SHORT if least < SHORT else CUT
    for contender in contenders.values():
        if contender.cost > factor * least:
            contender.stage = None


def _run_in_turn(contenders, stage: StageInterface, inputs, rounds: int) -> dict[str, list[float]]:
    """Contender -> seconds of each round."""

    def timed(contender: _Contender):
        step = contender.stage.bind(inputs, {spec.name: spec.zeros() for spec in stage.outputs})

        def lap(index: int) -> float:
            begin = time.perf_counter()
            step()
            return time.perf_counter() - begin

        return lap

    return take_turns({name: timed(contender) for name, contender in contenders.items()}, rounds)


def _check(found: Mapping[str, np.ndarray], yardstick: Mapping[str, np.ndarray] | None) -> None:
    for name, value in found.items():
        if not np.isfinite(value).all():
            raise BackendError(f"output {name} is not finite")
        if yardstick is None:
            continue
        alike, distance = likeness(value, yardstick[name])
        if not (alike >= LEAST_COSINE and distance <= MOST_RELATIVE_L2):
            raise BackendError(
                f"output {name} differs from the most exact contender's: cosine {alike:.5f}, relative L2 {distance:.3g}"
            )
