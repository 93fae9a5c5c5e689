"""A recipe on a policy larger than memory: piece by piece, what a piece hands on kept on disk for each observation.

A piece is read, shown what the pieces before hand on in full precision, compressed as a whole policy would be, written and
forgotten. So each layer sees exactly what it would see if the policy were in memory as a whole. Beside the layers' file of
a piece lies what it hands on, until the next piece has one too: an interrupted run goes on with the first piece without,
and comes to the same.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_edge.compress.apply import Tell, compress_layers, products_bytes
from vla_edge.compress.calibrate import Observer, watching
from vla_edge.compress.fold import input_groups
from vla_edge.compress.layer_files import LayerFiles, write_layers
from vla_edge.compress.plan import plan_pruning, plan_smoothing
from vla_edge.compress.recipe import Recipe
from vla_edge.compress.statistics import products_size
from vla_edge.compress.steps import Storage
from vla_edge.policy.chain import belongs, has_rows
from vla_edge.policy.piecewise import PiecewisePolicy
from vla_edge.policy.products import in_bfloat16
from vla_edge.policy.stages import Stage

_FEW_PRODUCTS = 1 << 29

Calls = Callable[[int, str], Sequence[Mapping[str, np.ndarray]]]
"""Place of an observation, and stage -> what its calls were given, see `engine.foreseen.Foreseen.calls`."""


def compress_piecewise(
    recipe: Recipe,
    plan: Mapping[str, Storage],
    source: PiecewisePolicy,
    calls: Calls,
    observations: int,
    directory: Path,
    tell: Tell,
    reduce_range: bool = False,
    bfloat16: bool = False,
) -> LayerFiles:
    """What becomes of every layer, in files in `directory`, where a run that was interrupted goes on.

    Args:
        plan: result of `plan_layers`. calls: of so many `observations`.
        tell: called with the fraction done and what is being done.
        bfloat16: what reaches the layers is inferred with products in bfloat16 (`policy.products`), and so are errors
            that are only compared.

    Raises:
        RecipeError, CalibrationError: as `compress_policy`. CheckpointError: of the values of `source`.
        OSError: the disk is full; what is whole stays.
    """
    from vla_edge.engine.trace import policy_layers

    stages = source.policy.stages()
    modules = policy_layers(stages)
    smoothing = plan_smoothing(recipe, plan)
    pruning = plan_pruning(recipe, plan, {name: module.in_features for name, module in modules.items()})
    prepared = {
        name: [step for part in (plan, smoothing, pruning) if (step := part.get(name)) is not None] for name in modules
    }
    everything = sum(module.weight.numel() for module in modules.values())
    files, done = [], 0.0
    for stage in (stage for stage in stages if stage.shares is None):
        others = [other for other in stages if other.shares == stage.name]
        work = _Work(source, stage, others, calls, observations, directory, bfloat16)
        wanted = [any(_looks_at_data(step) for name in work.layers(n) for step in prepared[name]) for n in work.numbers]
        for number in work.numbers:
            mine = {name: modules[name] for name in work.layers(number)}
            share = sum(module.weight.numel() for module in mine.values()) / everything
            if not work.file(number).is_file():
                with work.piece(number) as piece:
                    hands_on, before = any(wanted[number + 1 :]), done
                    if hands_on and not any(step.needs_statistics for name in mine for step in prepared[name]):
                        piece.record({}, lambda name: None, lambda f: None, hands_on)  # before anything is changed

                    def record(watched, observer, progress, piece=piece, hands_on=hands_on):
                        return piece.record(watched, observer, progress, hands_on)

                    layers = compress_layers(
                        plan, smoothing, pruning, mine, input_groups(mine, [stage]), record,
                        lambda f, what, share=share, before=before, number=number: tell(
                            before + share * f, f"{stage.name}, piece {number + 1} of {len(work.numbers)}: {what}"
                        ),
                        reduce_range, most_products=_products_held(mine), bfloat16=bfloat16,
                    )  # fmt: skip
                    piece.finish(layers)
            work.forget(number)
            files.append(work.file(number))
            done += share
    return LayerFiles(files, modules)


def _products_held(modules: Mapping[str, object]) -> int:
    """Bytes of products of a piece's channels that are held at once: all of them where they are few, so that what reaches the
    piece is inferred once."""
    everything = sum(products_size(module.in_features) for module in modules.values())
    return max(min(everything, _FEW_PRODUCTS), products_bytes(modules))


def _looks_at_data(step) -> bool:
    return step.needs_statistics or getattr(step, "static_activations", False)


@dataclass(frozen=True)
class _Work:
    """One stage, with those that share its layers."""

    source: PiecewisePolicy
    stage: Stage
    others: Sequence[Stage]
    calls: Calls
    observations: int
    directory: Path
    bfloat16: bool

    @property
    def numbers(self) -> range:
        return range(len(self.stage.chain.pieces()))

    def layers(self, number: int) -> list[str]:
        """Of a piece, as "stage.path"."""
        from vla_edge.engine.trace import linear_layers

        parts = self.stage.chain.pieces()[number]
        return [f"{self.stage.name}.{name}" for name in linear_layers(self.stage) if belongs(name, parts)]

    def file(self, number: int) -> Path:
        return self.directory / f"{self.stage.name}-{number:03}.safetensors"

    def handed(self, number: int) -> Path:
        """Directory with what the pieces before hand to `number`."""
        return self.directory / f"{self.stage.name}-{number:03}.handed"

    def forget(self, number: int) -> None:
        """What was handed to a piece that is finished."""
        shutil.rmtree(self.handed(number), ignore_errors=True)

    def piece(self, number: int) -> _Piece:
        return _Piece(self, number)


class _Piece:
    """One piece in memory: a context."""

    def __init__(self, work: _Work, number: int):
        self.work, self.number, self._stack, self._handed_on = work, number, ExitStack(), False

    def __enter__(self) -> _Piece:
        for stage in (self.work.stage, *self.work.others):
            self._stack.enter_context(self.work.source.holding(stage.name, stage.chain.pieces()[self.number]))
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()
        give_back()

    def record(
        self, watched: Mapping[str, object], observer: Callable[[str], Observer], progress, hands_on: bool
    ) -> dict[str, Observer]:
        """`apply.Record`. The first time, when nothing is changed yet, what is handed on is kept."""
        import torch

        target = self.work.handed(self.number + 1)
        partial = target.with_name(f".{target.name}.partial")
        keeps = hands_on and not self._handed_on
        if keeps:
            for stale in (partial, target):
                shutil.rmtree(stale, ignore_errors=True)
            partial.mkdir(parents=True)
        rounding = in_bfloat16 if self.work.bfloat16 else nullcontext
        with rounding(self.work.stage.module), watching(watched, observer) as observers, torch.inference_mode():
            for place in range(self.work.observations):
                handed = [() for _ in self._calls(place)] if self.number == 0 else _read(self._given(place))
                handed = list(self._run(place, handed))
                if keeps:
                    _write(partial / f"{place:05}.npy", handed)
                progress((place + 1) / self.work.observations)
        if keeps:
            os.replace(partial, target)
            self._handed_on = True
        return observers

    def finish(self, layers) -> None:
        """Write the layers, and norms that may have been rescaled."""
        from vla_edge.engine.trace import rescalable_norms

        stage, parts = self.work.stage, self.work.stage.chain.pieces()[self.number]
        parameters = {
            f"{stage.name}.{name}.{key}": value.detach().numpy()
            for name, norm in rescalable_norms(stage.module).items()
            if belongs(name, parts)
            for key, value in norm.named_parameters(recurse=False)
        }
        self.work.directory.mkdir(parents=True, exist_ok=True)
        write_layers(self.work.file(self.number), layers, parameters)

    def _given(self, place: int) -> Path:
        return self.work.handed(self.number) / f"{place:05}.npy"

    def _calls(self, place: int) -> list[tuple[Stage, Mapping[str, np.ndarray]]]:
        stages = (self.work.stage, *self.work.others)
        return [(stage, call) for stage in stages for call in self.work.calls(place, stage.name)]

    def _run(self, place: int, handed: Sequence[tuple]) -> Iterator[tuple]:
        """What each call hands on. Stages that share the layers read the rows of the first one's call, and those of their own
        calls before, each at its step in the tail, as `token_loop` puts them between whole calls."""
        import torch

        rows: dict[str, object] = {}
        for (stage, call), before in zip(self._calls(place), handed, strict=True):
            for spec in stage.inputs:
                if spec.name not in call and spec.name not in rows:
                    rows[spec.name] = torch.zeros(spec.shape[1:])
            given = [
                torch.from_numpy(call[spec.name]) if spec.name in call else {self.number - 1: rows[spec.name]}
                for spec in stage.inputs
            ]
            after, own = stage.chain.piece(self.number, before, given)
            rows |= zip((spec.name for spec in stage.outputs if has_rows(spec.name)), own)
            if own and stage is not self.work.stage:
                for kind in ("keys", "values"):
                    tail = rows[f"tail_{kind}"][..., int(call["step"][0]) :, :]
                    count = min(tail.shape[-2], rows[f"new_{kind}"].shape[-2])
                    tail[..., :count, :] = rows[f"new_{kind}"][..., :count, :]
            yield after


def give_back() -> None:
    """What was freed goes back to the system, where the C library can: it keeps it in pieces, and the largest matrices of
    what is next fit into none of them."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _write(path: Path, handed: Sequence[tuple]) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([len(parts) for parts in handed], np.int64))
        for parts in handed:
            for part in parts:
                np.save(file, part.numpy())


def _read(path: Path) -> list[tuple]:
    import torch

    with path.open("rb") as file:
        return [tuple(torch.from_numpy(np.load(file)) for _ in range(count)) for count in np.load(file)]
