"""Robot data -> what reaches each layer: the policy is run end to end on recorded observations and watched.

Observations are streamed; what stays in memory is an observer per layer and a bounded sample of observations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vla_edge.types import NANOSECONDS, Observation, VlaEdgeError

if TYPE_CHECKING:
    from vla_edge.evaluate.recording import Moment

CALIBRATION_FRAMES, HELD_OUT_FRAMES = 192, 32
# every fourth episode is kept for verification
HELD_OUT_EVERY = 4
EPISODE_GAP_NS = 2 * NANOSECONDS


class Observer(Protocol):
    """Takes in what reaches a layer."""

    def update(self, values: np.ndarray) -> None: ...


class CalibrationError(VlaEdgeError):
    """Calibration data that are missing, too few, or not what the policy takes."""


@dataclass(frozen=True)
class CalibrationData:
    """Recorded observations, apart from those that judge the result.

    Attributes:
        observations: to calibrate on. held_out: of other episodes, to verify on.
        source: where they are from, for people.
        identity: SHA-256 over all of them, hexadecimal.
    """

    observations: tuple[Observation, ...]
    held_out: tuple[Observation, ...]
    source: str
    identity: str

    def to_dict(self) -> dict:
        """Plain types for the manifest."""
        return {
            "source": self.source,
            "frames": len(self.observations),
            "held_out_frames": len(self.held_out),
            "identity": self.identity,
        }


class Sample:
    """At most `size` items spread evenly over a stream whose length is not known beforehand; no randomness.

    Every n-th item is kept, n doubling whenever twice too many have come together.
    """

    def __init__(self, size: int):
        self._size, self._stride, self._seen = size, 1, 0
        self._items: list = []

    def add(self, item) -> None:
        if self._seen % self._stride == 0:
            self._items.append(item)
            if len(self._items) >= 2 * self._size:
                del self._items[1::2]
                self._stride *= 2
        self._seen += 1

    def items(self) -> list:
        picks = np.linspace(0, len(self._items) - 1, min(self._size, len(self._items))).round().astype(int)
        return [self._items[i] for i in picks]


def collect(
    observations: Iterable[Observation | Moment],
    source: str = "observations",
    frames: int = CALIBRATION_FRAMES,
    held_out: int = HELD_OUT_FRAMES,
) -> CalibrationData:
    """Sample a stream evenly, keeping whole episodes apart for verification; of moments, those that are kept are read.

    An episode ends where the instruction changes or the stamps jump by more than two seconds. A single episode is cut
    in two: what comes last is held out.

    Raises:
        CalibrationError: fewer than two observations.
    """
    used, kept = Sample(frames), Sample(held_out)
    last: Observation | None = None
    episode, whole = 0, Sample(frames + held_out)
    for observation in observations:
        if last is not None and (
            observation.instruction != last.instruction
            or not 0 <= observation.stamp_ns - last.stamp_ns <= EPISODE_GAP_NS
        ):
            episode += 1
        (kept if episode % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else used).add(observation)
        if episode < HELD_OUT_EVERY:
            whole.add(observation)
        last = observation
    calibration, verification = used.items(), kept.items()
    if not verification:
        everything = whole.items()
        cut = max(1, round(len(everything) * (1 - 1 / HELD_OUT_EVERY)))
        calibration, verification = everything[:cut], everything[cut:]
    if not calibration or not verification:
        raise CalibrationError(
            f"{source} holds {len(calibration)} usable observations; record at least a whole episode"
        )
    calibration, verification = (
        [item if isinstance(item, Observation) else item.read() for item in items]
        for items in (calibration, verification)
    )
    digest = hashlib.sha256()
    for observation in (*calibration, *verification):
        _hash(digest, observation)
    return CalibrationData(tuple(calibration), tuple(verification), source, digest.hexdigest())


def load_calibration(source, spec, **limits) -> CalibrationData:
    """Calibration data from whatever holds observations.

    Args:
        source: a bag, a LeRobot dataset or a directory of demonstrations; `CalibrationData`; or an iterable of
            `Observation`.
        spec: of the policy; its cameras and joints are taken from a recording.

    Raises:
        CalibrationError, BagError, DatasetError, DemonstrationError, ObservationError: nothing usable is there.
    """
    if isinstance(source, CalibrationData):
        return source
    if isinstance(source, (str, Path)):
        from vla_edge.evaluate.recording import open_recording

        with open_recording(source) as recording:
            return collect(recording.moments(spec), Path(source).name, **limits)
    return collect(source, **limits)


def watch_inputs(
    runner,
    modules: Mapping[str, object],
    observer: Callable[[str], Observer],
    observations: Sequence[Observation],
    progress: Callable[[float], None] | None = None,
) -> dict[str, Observer]:
    """What reaches the input of each layer while the policy acts on `observations`, all flow steps included.

    Args:
        runner: a `Runner` in PyTorch whose stages contain `modules`.
        modules: "stage.path" -> `nn.Linear`.
        observer: makes what watches the layer of that name; its `update` takes each input (..., in) and may raise
            ValueError.

    Raises:
        CalibrationError: a layer's input is not finite.
    """
    with watching(modules, observer) as observers:
        # what is computed when the number of steps is chosen has to be seen too
        runner.set_num_steps(runner.num_steps)
        for index, observation in enumerate(observations):
            runner.infer(observation)
            if progress is not None:
                progress((index + 1) / len(observations))
    return observers


@contextmanager
def watching(modules: Mapping[str, object], observer: Callable[[str], Observer]) -> Iterator[dict[str, Observer]]:
    """A context in which whatever reaches the input of each layer is shown to its observer; arguments of `watch_inputs`.

    Raises:
        CalibrationError: a layer's input is not finite.
    """
    observers = {name: observer(name) for name in modules}

    def watch(name: str):
        def hook(_module, inputs) -> None:
            try:
                observers[name].update(inputs[0].detach().numpy())
            except ValueError as error:
                raise CalibrationError(f"the input of layer {name} has {error}; check the recording") from None

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        yield observers
    finally:
        for handle in handles:
            handle.remove()


def never_reached(name: str) -> CalibrationError:
    """For a layer that needs data and saw none."""
    return CalibrationError(f"calibration never reached layer {name}; give observations that make the policy use it")


def _hash(digest, observation: Observation) -> None:
    digest.update(observation.stamp_ns.to_bytes(8, "little", signed=True))
    digest.update(observation.instruction.encode())
    for name in sorted(observation.images):
        digest.update(name.encode() + np.ascontiguousarray(observation.images[name]).tobytes())
    digest.update("".join(observation.joints.names).encode() + observation.joints.position.tobytes())
    for earlier in observation.before:
        _hash(digest, earlier)
