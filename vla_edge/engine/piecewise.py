"""A policy that does not fit into memory, from the checkpoint to its compressed layers: what can be done, what it takes.

First everything is inferred in full precision (`foreseen`), then the recipe is carried out piece by piece
(`compress.piecewise`). Both leave files, so that a build that was interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from vla_edge.compress.calibrate import CalibrationData
from vla_edge.compress.decoding import decode_
from vla_edge.compress.piecewise import compress_piecewise
from vla_edge.compress.pipeline import Compressed, check_recipe
from vla_edge.compress.quantize.formats import number_format
from vla_edge.compress.recipe import Recipe, RecipeError
from vla_edge.compress.steps import (
    STEPS,
    Decoding,
    Keep,
    LowRankStep,
    Prune,
    PruneTokens,
    Quantize,
    Smooth,
    Speculate,
    VisionCacheStep,
    factors_convolutions,
)
from vla_edge.engine.backends import BackendError, get_backend, reads
from vla_edge.engine.export import LARGEST_FILE
from vla_edge.engine.foreseen import Foreseen, foresee, is_kept
from vla_edge.policy.chain import belongs
from vla_edge.policy.checkpoint import Checkpoint, CheckpointError
from vla_edge.policy.piecewise import PiecewisePolicy
from vla_edge.policy.products import bfloat16_pays
from vla_edge.policy.weights import Weights

PIECEWISE_RECIPE = "int4-layerwise"  # the shipped one to take
CALIBRATION_TOKENS = 16_384
HELD_OUT_FRAMES, LEAST_HELD_OUT_FRAMES = 8, 4
_POSSIBLE = (Keep, Smooth, Prune, LowRankStep, Quantize, VisionCacheStep, PruneTokens, *get_args(Decoding))
_PROGRAM = 1 << 30  # bytes of PyTorch, ONNX and what else is not weights

Tell = Callable[[float, str], None]


def available_memory() -> int:
    """Bytes that a process can still have here: what the system says, or the control group it is held to."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except OSError:
        pass  # another system, or no group of its own
    return max(0, min(found))


def whole_memory(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Bytes, about, of a build with the whole policy in memory: in float32, once more where the recipe changes it, and its
    layers as integers and as they are written."""
    return round(_values(checkpoint) * (4 * (1 + recipe.changes_policy) + 2.5)) + _PROGRAM


def needs_pieces(checkpoint: Checkpoint, recipe: Recipe, memory: int, backends: Sequence[str] = ()) -> bool:
    """Whether the policy is not to be built as a whole: it does not fit beside what is made of it, and can be taken apart; or
    it does not fit at all."""
    if whole_memory(checkpoint, recipe) <= memory:
        return False
    possible = all(obstacle(step) is None for step in recipe.steps)
    possible = possible and not _writes_all(backends) and not Weights(checkpoint.weights).rounded
    return possible or 4 * _values(checkpoint) > memory


def _writes_all(backends: Sequence[str]) -> str | None:
    """The first backend that is given one stage for all tokens, which is no chain of pieces."""
    return next((name for name in backends if reads(get_backend(name)) != ".onnx"), None)


def _values(checkpoint: Checkpoint) -> int:
    weights = Weights(checkpoint.weights)
    return sum(int(np.prod(weights.shape(name))) for name in weights)


class Piecewise:
    """The build of one policy that is never in memory as a whole.

    Args:
        memory: bytes the build may take. work: directory to keep what is finished in. backends: that are to run it.

    Raises:
        CheckpointError: weights are rounded already.
        RecipeError: a step wants all of the policy at once.
        BackendError: a backend does, or not even its largest piece fits.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, memory: int, work: Path, backends: Sequence[str] = ()):
        self.checkpoint, self.recipe, self.memory, self._work = checkpoint, recipe, memory, work
        self.source = PiecewisePolicy(checkpoint)
        needed = whole_memory(checkpoint, recipe)
        told = f"{checkpoint.directory} takes about {needed / 1e9:.1f} GB to build at once and there are {memory / 1e9:.1f}"
        if Weights(checkpoint.weights).rounded:
            raise CheckpointError(
                f"{told}, and weights that are rounded already are not taken over piece by piece; give the weights they were "
                "made from, or build it on a computer with more memory and copy the bundle"
            )
        if backend := _writes_all(backends):
            raise BackendError(
                f"{told}, and what {backend} runs is not built piece by piece; choose another backend, or build it on a "
                "computer with more memory and copy the bundle"
            )
        _check_steps(recipe, told)
        self.plan = check_recipe(recipe, self.source.policy, checkpoint)
        self._draft()
        least = max(self._largest_piece(), self._writing()) + _PROGRAM
        if least > memory:
            raise BackendError(f"{told}; not even its largest piece fits, which takes {least / 1e9:.1f} GB")

    def _draft(self) -> None:
        """Has the checkpoint's draft propose as many tokens as the recipe says, from the beginning: fewer may be fewer layers.
        What else is said of decoding waits for `compressed`."""
        from vla_edge.engine.trace import policy_layers

        for step in self.recipe.steps:
            if isinstance(step, Speculate) and step.draft in ("auto", "trained") and self.source.policy.draft is not None:
                decode_(step, self.source.policy)
        there = policy_layers(self.source.policy.stages())
        self.plan = {name: step for name, step in self.plan.items() if name in there}

    @property
    def frames(self) -> dict[str, int]:
        """How many observations to calibrate on and to hold out, where a recording has more: of the latter as many as are
        inferred together, since those that are left would take the whole policy through memory again."""
        stages = self.source.policy.stages()
        reads = next(stage for stage in stages if stage.name != "vision")
        tokens = self.checkpoint.spec.tokenizer_max_length + reads.inputs[0].shape[1]
        tensors = {spec.name: spec.zeros().nbytes for stage in stages for spec in (*stage.inputs, *stage.outputs)}
        together = self._beside_a_piece // sum(tensors.values())
        held_out = min(HELD_OUT_FRAMES, max(LEAST_HELD_OUT_FRAMES, together))
        return {"frames": -(-CALIBRATION_TOKENS // tokens), "held_out": held_out}

    def run(self, data: CalibrationData, reduce_range: bool, settings: Sequence, tell: Tell) -> None:
        """Everything, or what is left of it; then `compressed`, `foreseen` and `ready` may be asked for.

        Args:
            settings: plain values that decide, with checkpoint, recipe and data, what comes of it.

        Raises:
            CheckpointError, CalibrationError, ObservationError: of values and data. BackendError: there is no room.
        """
        # what is only calibrated on is inferred as such a policy usually is; what engines are compared with is not
        bfloat16 = self.source.in_bfloat16 and bfloat16_pays()
        about = [self.checkpoint.fingerprint, self.recipe.to_dict(), data.identity, reduce_range, bfloat16]
        directory = self._directory([*settings, *about])
        calibrates = self.recipe.needs_calibration
        observations = (*data.held_out, *(data.observations if calibrates else ()))
        self._check_room(directory, len(observations))
        skipped = len(data.held_out)
        self._foreseen = foresee(
            self.source, observations, directory / "foreseen", self._beside_a_piece,
            lambda f: tell(0.35 * f, "inferring in full precision"), skipped if bfloat16 else None,
        )  # fmt: skip

        def calls(place: int, stage: str) -> Sequence:
            needed = self._foreseen.for_all.get(stage, ()) if place == 0 else ()
            return [*needed, *self._foreseen.calls(skipped + place, stage)]

        self._layers = compress_piecewise(
            self.recipe, self.plan, self.source, calls, len(observations) - skipped, directory / "layers",
            lambda f, what: tell(0.35 + 0.65 * f, what), reduce_range, bfloat16,
        )  # fmt: skip

    @property
    def foreseen(self) -> Foreseen:
        """Of the observations that are held out, then those that were calibrated on."""
        return self._foreseen

    def compressed(self) -> Compressed:
        """With layers that are read when they are asked for. From now on the policy has the stages of the engine."""
        from vla_edge.compress.prune.tokens import prune_tokens_

        vision_cache, decoding = 0.0, {}
        for step in self.recipe.steps:
            if isinstance(step, Decoding):
                decoding |= decode_(step, self.source.policy)
            elif isinstance(step, PruneTokens):
                prune_tokens_(step, self.source.policy, self.checkpoint)
            elif isinstance(step, VisionCacheStep):
                vision_cache = step.change
        spec = self.checkpoint.spec
        return Compressed(self.source.policy, self._layers, spec.num_steps, (), vision_cache, decoding)

    def ready(self, stage):
        """A context in which a stage can be traced: what is no linear layer is in memory, as compression left it."""
        import torch

        owner = stage.shares or stage.name
        names = [name for name in self.source.policy.state_dict() if name.startswith(f"{owner}.")]
        changed = {name: torch.from_numpy(array) for name, array in self._layers.parameters(names).items()}
        return self.source.holding_rest(stage.name, changed)

    @property
    def between_stages(self) -> int:
        """Bytes that tensors between stages may take, for all observations that advance together, beside a stage of the
        engine."""
        return max(0, self.memory - max(self._largest_piece(), self._largest_stage()) - _PROGRAM) // 2

    @property
    def _beside_a_piece(self) -> int:
        """The same while full precision is inferred, and nothing made of the piece. Layers give something too, and pages of
        the checkpoint are mapped."""
        return int(0.6 * max(0, self.memory - self._largest_piece(compressed=False) - _PROGRAM))

    def _largest_piece(self, compressed: bool = True) -> int:
        """Bytes of its parameters in float32, and where it is compressed what the recipe makes of its largest layer."""
        from vla_edge.engine.trace import linear_layers

        products = any(getattr(step, "needs_products", False) for step in self.recipe.steps)
        largest = 0
        for stage in (stage for stage in self.source.policy.stages() if stage.shares is None):
            for piece in stage.chain.pieces():
                size = sum(
                    4 * parameter.numel() for name, parameter in stage.module.named_parameters() if belongs(name, piece)
                )
                inside = [layer for name, layer in linear_layers(stage).items() if belongs(name, piece)]
                work = max((_work_bytes(layer, products) for layer in inside), default=0) if compressed else 0
                largest = max(largest, size + work)
        return largest

    def _largest_stage(self) -> int:
        """Bytes, about, of what an engine's stage reads."""
        return round(max(layers + self._written(rest) for rest, layers in self._stages()))

    def _writing(self) -> int:
        """Bytes while a stage is written: what of it is no linear layer, a table of words above all, in the policy, in the
        graph, and on its way into the file; in one file with the graph, twice more with what checks it."""
        largest = 0
        for rest, layers in self._stages():
            written = self._written(rest)
            largest = max(largest, rest + written * (2 if written + layers > LARGEST_FILE else 4))
        return largest

    def _stages(self) -> list[tuple[int, float]]:
        """Of each of an engine's stages, bytes in float32 of what is no linear layer, and of its layers in its file."""
        stages = self.source.policy.stages()
        layers = dict.fromkeys((stage.name for stage in stages), 0.0)
        for name, (step, layer) in self._planned().items():
            layers[name.partition(".")[0]] += _stored_bytes(step, layer)
        return [(_rest_bytes(stage), layers[stage.shares or stage.name]) for stage in stages]

    def _written(self, size: int) -> int:
        """Bytes in a file of what is no linear layer and takes `size` in float32; it is tables that count."""
        return size // 2 if self.source.in_bfloat16 else size

    def _directory(self, question: list) -> Path:
        """Where this build's files are; those of another are of no use any more."""
        name = hashlib.sha256(json.dumps(question, sort_keys=True, default=str).encode()).hexdigest()[:16]
        for other in self._work.glob("pieces-*"):
            if other.name != f"pieces-{name}":
                shutil.rmtree(other, ignore_errors=True)
        directory = self._work / f"pieces-{name}"
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def _check_room(self, directory: Path, observations: int) -> None:
        """Raises BackendError: the disk is smaller than what is to be written."""
        stages = self.source.policy.stages()
        between = [4 * int(np.prod(spec.shape)) for stage in stages for spec in stage.inputs if is_kept(spec, stage)]
        layers = sum(_stored_bytes(step, layer) for step, layer in self._planned().values())
        # what stages are given, and what two pieces hand on; layers here and in the bundle
        rest = self._written(sum(map(_rest_bytes, stages)))
        needed = round(observations * (sum(between) + 3 * max(between)) + 2 * layers + rest)
        there = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
        free = shutil.disk_usage(directory).free
        if needed - there > free:
            raise BackendError(
                f"the build writes about {(needed - there) / 1e9:.1f} GB beside {directory.parent.parent} and "
                f"{free / 1e9:.1f} GB are free there; free some, or choose another output"
            )

    def _planned(self) -> dict[str, tuple]:
        """Layer -> its step and its module."""
        from vla_edge.engine.trace import policy_layers

        modules = policy_layers(self.source.policy.stages())
        return {name: (step, modules[name]) for name, step in self.plan.items()}


def first_inputs(source: PiecewisePolicy, foreseen: Foreseen) -> dict[str, dict[str, np.ndarray]]:
    """What each stage is first given for the first observation; rows that are not kept, and what has another shape in the
    engine, are zeros, whose values cost as much time."""
    found = {}
    for stage in source.policy.stages():
        calls = [*foreseen.for_all.get(stage.name, ()), *foreseen.calls(0, stage.name)]
        if calls:
            given = ((spec, calls[0].get(spec.name)) for spec in stage.inputs)
            found[stage.name] = {
                spec.name: spec.zeros() if array is None or array.shape != spec.shape else array for spec, array in given
            }
    return found


def _check_steps(recipe: Recipe, told: str) -> None:
    """Raises RecipeError: a step looks at the whole policy at once."""
    for number, step in enumerate(recipe.steps, 1):
        reason = obstacle(step)
        if reason:
            possible = ", ".join(key for key, kind in STEPS.items() if kind in _POSSIBLE)
            raise RecipeError(
                f"recipe {recipe.name}, step {number}: {reason}; {told}. Take recipe {PIECEWISE_RECIPE}, or one of the steps "
                f"{possible} without importance and provider and with prune_tokens by attention, or build on a computer with "
                "more memory"
            )


def obstacle(step) -> str | None:
    """Why a step cannot be carried out piece by piece, None where it can."""
    if not isinstance(step, _POSSIBLE) or factors_convolutions(step):
        return f"{step.key} works on the whole policy at once"
    if isinstance(step, Quantize) and step.importance:
        return f"importance {step.importance} needs gradients through the whole policy"
    if isinstance(step, PruneTokens) and step.needs_statistics:
        return f"prune_tokens by {step.by} needs gradients through the whole policy (by attention it does not)"
    if isinstance(step, Quantize) and step.provider:
        return f"{step.provider} works on the whole policy at once"
    return None


def _work_bytes(layer, products: bool) -> int:
    """Of one layer: the weight in several forms, and of AWQ and GPTQ its second moment and the factor in float64."""
    return 16 * products * layer.in_features**2 + 16 * layer.weight.numel()


def _rest_bytes(stage) -> int:
    """Of what is no linear layer, in float32."""
    from torch import nn

    return sum(
        4 * parameter.numel() for module in stage.module.modules() if not isinstance(module, nn.Linear)
        for parameter in module.parameters(recurse=False)
    )  # fmt: skip


def _stored_bytes(step, layer) -> float:
    """Of a layer, about."""
    if isinstance(step, Quantize):
        return layer.weight.numel() * (number_format(step.weights).bits / 8 + 0.07)
    return layer.weight.numel() * (2 if getattr(step, "dtype", "float32") != "float32" else 4)
