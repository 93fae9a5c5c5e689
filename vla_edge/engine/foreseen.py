"""What full precision does with each observation, of a policy that is in memory a piece at a time.

The pieces' parameters are read from the checkpoint once for many observations. Of each observation a file is left: what its
stages were given, which tokens were chosen, and the chunk. It tells what to calibrate on, and what to compare an engine
with; an interrupted run goes on with the observations that have none.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from vla_edge.engine.backends import StageInterface
from vla_edge.engine.lockstep import Call, infer_together
from vla_edge.engine.runner import Runner
from vla_edge.files import write_whole
from vla_edge.policy.chain import has_rows
from vla_edge.policy.piecewise import PiecewisePolicy
from vla_edge.policy.products import in_bfloat16
from vla_edge.policy.stages import Stage, TensorSpec
from vla_edge.types import ActionChunk, Observation


class PiecewiseStages:
    """Makes calls of a policy's stages in full precision, piece by piece. A `lockstep.Performer`.

    Args:
        bfloat16: linear layers multiply in bfloat16 (`policy.products`).
    """

    def __init__(self, source: PiecewisePolicy, bfloat16: bool = False):
        self.source, self._bfloat16 = source, bfloat16
        self._stages = {stage.name: stage for stage in source.policy.stages()}
        self.interfaces = {
            name: StageInterface(name, stage.inputs, stage.outputs) for name, stage in self._stages.items()
        }

    def perform(self, stage: str, calls: Sequence[Call]) -> None:
        import torch

        chain, interface = self._stages[stage].chain, self.interfaces[stage]
        module = self._stages[stage].module
        inputs = [[torch.from_numpy(call.inputs[spec.name]) for spec in interface.inputs] for call in calls]
        results, given = (
            [[torch.from_numpy(call.outputs[spec.name]) for spec in interface.outputs if has_rows(spec.name) == rows]
             for call in calls]
            for rows in (False, True)
        )  # fmt: skip
        handed: list[tuple] = [()] * len(calls)
        place_of_row = 0
        for number, piece in enumerate(chain.pieces()):
            rounding = in_bfloat16 if self._bfloat16 else nullcontext
            with self.source.holding(stage, piece, self._bfloat16), rounding(module), torch.inference_mode():
                for place in range(len(calls)):
                    handed[place], rows = chain.piece(number, handed[place], inputs[place])
                    for row, output in zip(rows, given[place]):
                        output[place_of_row].copy_(row)
            place_of_row += bool(rows)
        for values, outputs in zip(handed, results):
            for value, output in zip(values, outputs, strict=True):
                output.copy_(value)


class Foreseen:
    """The files of some observations.

    Args:
        directory: of the files. observations: in their order.

    Attributes:
        for_all: stage -> what its calls were given that all observations need: those of flow times.
    """

    def __init__(self, directory: Path, observations: Sequence[Observation]):
        self._directory, self.observations = directory, tuple(observations)
        self.for_all: dict[str, list[dict[str, np.ndarray]]] = {}
        self._places = {id(observation): place for place, observation in enumerate(self.observations)}

    def __len__(self) -> int:
        return len(self.observations)

    def path(self, place: int) -> Path:
        return self._directory / f"{place:05}.npz"

    def calls(self, place: int, stage: str) -> list[dict[str, np.ndarray]]:
        """What each call of a stage was given for the observation at `place`, but for rows that its own layers make (see
        `is_kept`)."""
        with np.load(self.path(place)) as file:
            if f"{stage}/calls" not in file:
                return []
            found: list[dict[str, np.ndarray]] = [{} for _ in range(int(file[f"{stage}/calls"]))]
            for key in file.files:
                owner, _, rest = key.partition("/")
                number, _, tensor = rest.partition("/")
                if owner == stage and tensor:
                    found[int(number)][tensor] = file[key]
        for before, call in zip(found, found[1:]):
            call |= {name: array for name, array in before.items() if name not in call}
        return found

    def has_chunk(self, place: int) -> bool:
        """Whether an observation was inferred to the end."""
        with np.load(self.path(place)) as file:
            return "positions" in file

    def positions(self, place: int) -> np.ndarray:
        """(T, J) the chunk, rad, of an observation that was inferred to the end."""
        with np.load(self.path(place)) as file:
            return file["positions"]

    def reference(self, spec) -> Chunks:
        """What stands for the policy in full precision where engines are compared with it: the observations that were
        inferred to the end."""
        whole = [place for place in range(len(self)) if self.has_chunk(place)]
        observations = [self.observations[place] for place in whole]
        chunks = [
            ActionChunk(observation.stamp_ns, spec.joint_names, self.positions(place), spec.dt)
            for place, observation in zip(whole, observations)
        ]
        return Chunks(spec, observations, chunks)


class Chunks:
    """Inferences that were made before, as `engine.verify.compare` asks for them; of single stages nothing is known."""

    def __init__(self, spec, observations: Sequence[Observation], chunks: Sequence[ActionChunk]):
        self.spec, self.stages = spec, {}
        self._chunks = {id(observation): chunk for observation, chunk in zip(observations, chunks)}

    def infer(self, observation: Observation, seed: int = 0):
        """The chunk of one of the observations; `seed` is what they were inferred with."""
        return SimpleNamespace(chunk=self._chunks[id(observation)])

    def stage_inputs(self, observation: Observation, seed: int = 0):
        return ()


def foresee(
    source: PiecewisePolicy,
    observations: Sequence[Observation],
    directory: Path,
    most_bytes: int,
    tell: Callable[[float], None],
    exact: int | None = None,
) -> Foreseen:
    """Infer all `observations` that have no file in `directory` yet.

    Args:
        most_bytes: of tensors that go between stages, of all observations that advance together.
        exact: how many from the first on are inferred in float32. Of the others, which are only calibrated on, products
            are of bfloat16, and inference ends where nothing new would be calibrated (`enough`). All when None.

    Raises:
        CheckpointError: values that are damaged or not finite. ObservationError: the policy cannot be shown one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    foreseen = Foreseen(directory, observations)
    exact = len(foreseen) if exact is None else exact
    missing = [place for place in range(len(foreseen)) if not foreseen.path(place).is_file()]
    done, for_all = 0, foreseen.for_all
    for bfloat16 in (False, True):
        places = [place for place in missing if bfloat16 == (place >= exact)]
        performer, until = PiecewiseStages(source, bfloat16), enough(source.policy.stages()) if bfloat16 else None
        for count in _infer(performer, foreseen, places, most_bytes, {} if bfloat16 else for_all, until):
            done += count
            tell(done / len(missing))
    return foreseen


def _infer(
    performer: PiecewiseStages, foreseen: Foreseen, places: Sequence[int], most_bytes: int, for_all: dict,
    until: str | None,
) -> Iterator[int]:  # fmt: skip
    """Leaves the files of the observations at `places`; gives how many there are more, as many at a time as advance
    together.

    Args:
        for_all: where calls that all observations need are put. until: as of `infer_together`.
    """
    checkpoint, stages = performer.source.checkpoint, performer.source.policy.stages()
    kept = {stage.name: [spec.name for spec in stage.inputs if is_kept(spec, stage)] for stage in stages}
    given: dict[int, dict[str, list[dict[str, np.ndarray]]]] = {}

    def seen(place: int | None, stage: str, call: Call) -> None:
        told = for_all if place is None else given.setdefault(places[place], {})
        calls = told.setdefault(stage, [])
        before = calls[-1] if calls else {}
        calls.append({name: _copy(call.inputs[name], before.get(name)) for name in kept[stage]})

    def make(stages: Mapping) -> Runner:
        return Runner(checkpoint.spec, checkpoint.tokenizer_path, stages)

    done = 0
    observations = [foreseen.observations[place] for place in places]
    for chunks in infer_together(make, performer, observations, 0, most_bytes, seen, until):
        for place, chunk in zip(places[done:], chunks):
            _write(foreseen.path(place), given.pop(place), None if chunk is None else chunk.positions)
        done += len(chunks)
        yield len(chunks)


def enough(stages: Sequence[Stage]) -> str | None:
    """The stage whose first call tells all that a policy's layers are to be calibrated on, None where inference has to
    be whole: only stages follow that share its layers, as behind the prompt of a policy that writes tokens. Each token
    would take all layers through memory again, and is one row beside the prompt's hundreds.
    """
    own = [number for number, stage in enumerate(stages) if stage.shares is None]
    return stages[own[-1]].name if own[-1] + 1 < len(stages) else None


def is_kept(spec: TensorSpec, stage: Stage) -> bool:
    """Whether what a stage is given has to be kept: all but the rows of layers that it shares with another, which make
    them again."""
    return stage.shares is None or not has_rows(spec.name)


def _copy(array: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    """Of what a call is given; or that of the call before, where it says the same: every flow step reads one cache."""
    return before if before is not None and np.array_equal(array, before) else array.copy()


def _write(path: Path, given: Mapping[str, Sequence[Mapping[str, np.ndarray]]], positions: np.ndarray | None) -> None:
    """What differs from the call before, how many calls there are, and the chunk where there is one."""
    arrays: dict[str, np.ndarray] = {} if positions is None else {"positions": positions}
    for stage, calls in given.items():
        arrays[f"{stage}/calls"] = np.array(len(calls))
        for number, (before, call) in enumerate(zip(({}, *calls), calls)):
            arrays |= {f"{stage}/{number}/{name}": value for name, value in call.items() if value is not before.get(name)}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getbuffer())
