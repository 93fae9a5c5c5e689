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

        module, interface = self._stages[stage].module, self.interfaces[stage]
        inputs = [[torch.from_numpy(call.inputs[spec.name]) for spec in interface.inputs] for call in calls]
        results, given = (
            [[torch.from_numpy(call.outputs[spec.name]) for spec in interface.outputs if has_rows(spec.name) == rows]
             for call in calls]
            for rows in (False, True)
        )  # fmt: skip
        handed: list[tuple] = [()] * len(calls)
        for number, piece in enumerate(module.pieces()):
            rounding = in_bfloat16 if self._bfloat16 else nullcontext
            with self.source.holding(stage, piece, self._bfloat16), rounding(module), torch.inference_mode():
                for place in range(len(calls)):
                    handed[place], rows = module.piece(number, handed[place], inputs[place])
                    for row, output in zip(rows, given[place]):
                        output[number - 1].copy_(row)
        for values, outputs in zip(handed, results):
            for value, output in zip(values, outputs, strict=True):
                output.copy_(value)


class Foreseen:
    """The files of some observations.

    Args:
        directory: of the files. observations: in their order.
    """

    def __init__(self, directory: Path, observations: Sequence[Observation]):
        self._directory, self.observations = directory, tuple(observations)
        self._places = {id(observation): place for place, observation in enumerate(self.observations)}

    def __len__(self) -> int:
        return len(self.observations)

    def path(self, place: int) -> Path:
        return self._directory / f"{place:05}.npz"

    def calls(self, place: int) -> dict[str, list[dict[str, np.ndarray]]]:
        """Of the observation at `place`: stage -> what each of its calls was given, but for the rows of pieces, which the
        pieces themselves make again."""
        with np.load(self.path(place)) as file:
            found: dict[str, dict[int, dict[str, np.ndarray]]] = {}
            for key in file.files:
                if key != "positions":
                    stage, number, tensor = key.split("/")
                    found.setdefault(stage, {}).setdefault(int(number), {})[tensor] = file[key]
        return {stage: [calls[number] for number in sorted(calls)] for stage, calls in found.items()}

    def positions(self, place: int) -> np.ndarray:
        """(T, J) the chunk, rad."""
        with np.load(self.path(place)) as file:
            return file["positions"]

    def reference(self, spec) -> Chunks:
        """What stands for the policy in full precision where engines are compared with it."""
        chunks = [
            ActionChunk(observation.stamp_ns, spec.joint_names, self.positions(place), spec.dt)
            for place, observation in enumerate(self.observations)
        ]
        return Chunks(spec, self.observations, chunks)


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
        exact: how many from the first on are inferred in float32; the products of the others are of bfloat16. All when
            None.

    Raises:
        CheckpointError: values that are damaged or not finite. ObservationError: the policy cannot be shown one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    foreseen = Foreseen(directory, observations)
    exact = len(foreseen) if exact is None else exact
    missing = [place for place in range(len(foreseen)) if not foreseen.path(place).is_file()]
    done = 0
    for bfloat16 in (False, True):
        places = [place for place in missing if bfloat16 == (place >= exact)]
        for count in _infer(PiecewiseStages(source, bfloat16), foreseen, places, most_bytes):
            done += count
            tell(done / len(missing))
    return foreseen


def _infer(performer: PiecewiseStages, foreseen: Foreseen, places: Sequence[int], most_bytes: int) -> Iterator[int]:
    """Leaves the files of the observations at `places`; gives how many there are more, as many at a time as advance
    together."""
    given: dict[int, dict[str, np.ndarray]] = {}
    checkpoint = performer.source.checkpoint

    def seen(place: int, stage: str, call: Call) -> None:
        told = given.setdefault(places[place], {})
        number = sum(key.startswith(f"{stage}/") for key in told)  # unique, and in order
        for spec in performer.interfaces[stage].inputs:
            if not has_rows(spec.name):
                told[f"{stage}/{number}/{spec.name}"] = call.inputs[spec.name].copy()

    def make(stages: Mapping) -> Runner:
        return Runner(checkpoint.spec, checkpoint.tokenizer_path, stages)

    done = 0
    observations = [foreseen.observations[place] for place in places]
    for chunks in infer_together(make, performer, observations, 0, most_bytes, seen):
        for place, chunk in zip(places[done:], chunks):
            _write(foreseen.path(place), {**given.pop(place), "positions": chunk.positions})
        done += len(chunks)
        yield len(chunks)


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getbuffer())
