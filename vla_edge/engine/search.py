"""Checkpoint + recordings + a budget -> the recipe that spends it best, found by what the robot would do."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from vla_edge.compress.apply import compress_policy
from vla_edge.compress.calibrate import load_calibration
from vla_edge.compress.fold import input_groups
from vla_edge.compress.importance import weighed_inputs
from vla_edge.compress.mixed import Choice, Measured, choose, to_recipe
from vla_edge.compress.plan import plan_layers
from vla_edge.compress.recipe import Accept, Recipe, RecipeError, load_recipe
from vla_edge.compress.sensitivity import FAST_OPTIONS, OPTIONS, Sensitivity, Trial, measure
from vla_edge.engine.backends import chosen_backends, gain_by_reduced_range
from vla_edge.engine.build import Progress, build, calibration_source, torch_threads
from vla_edge.engine.bundle import Bundle
from vla_edge.engine.layer_latency import measure_layers
from vla_edge.engine.runner import Runner
from vla_edge.engine.trace import policy_layers
from vla_edge.policy.checkpoint import load_checkpoint

RUNTIME = "onnxruntime"
"""What layers are timed on under a budget of time: all on one, since a stage runs on one."""


def search(
    checkpoint: str | Path,
    calibration=None,
    max_bits: float | None = None,
    max_error_rel: float | None = None,
    max_ms: float | None = None,
    frames: int = 16,
    name: str = "mixed",
    progress: Progress | None = None,
    progress_file: Path | None = None,
) -> tuple[Recipe, Choice, Sensitivity, Measured]:
    """A checkpoint and a recording -> the recipe, why, and what it does as a whole.

    Args:
        checkpoint: directory in LeRobot's layout.
        calibration: bag, LeRobot dataset, demonstrations, or observations; `calibration` beside the checkpoint when
            None.
        max_bits, max_error_rel, max_ms: the budget, one of them: bits per weight, action error relative to the motion,
            or milliseconds of a chunk on this machine.
        frames: observations of the calibration that the error is measured on, and that nothing is fitted to; a build
            fits to all of them and verifies on others.
        progress_file: see `sensitivity.measure`.

    Raises:
        CheckpointError, CalibrationError, BagError, RecipeError: what is wrong, before or instead of a result.
    """
    from vla_edge.policy.checkpoint import load_policy

    tell = progress or (lambda fraction, step: None)
    loaded = load_checkpoint(checkpoint)
    if frames < 1:
        raise RecipeError(f"frames is {frames}; the error has to be measured on at least one observation")
    data = load_calibration(calibration_source(calibration, loaded.directory), loaded.spec)
    # What a precision costs shows on observations that nothing was fitted to.
    every = max(2, -(-len(data.observations) // frames))
    observations = data.observations[::every]
    fitted = [observation for i, observation in enumerate(data.observations) if i % every]
    if not fitted:
        raise RecipeError(f"{data.source} has {len(data.observations)} observations; a search needs at least two")
    with torch_threads(loaded.bytes // 4):
        policy = load_policy(loaded)
        stages, runner = policy.stages(), Runner.from_policy(policy, loaded)
        modules = policy_layers(stages)
        options = OPTIONS if max_ms is None else FAST_OPTIONS
        reduce_range = gain_by_reduced_range(chosen_backends(RUNTIME))
        groups = {group.names[0]: [modules[name] for name in group.names] for group in input_groups(modules, stages)}
        seen = weighed_inputs(
            policy, loaded, groups, fitted, lambda f: tell(0.1 * f, "recording what reaches the layers")
        )

        def weighed(wanted, _progress):
            return {name: seen[name] for name in wanted}

        found = measure(
            stages, modules, runner, weighed, observations, options,
            lambda f, what: tell(0.1 + 0.6 * f, what), progress_file, reduce_range,
        )  # fmt: skip
        if max_ms is not None:
            whole = _milliseconds(loaded, load_recipe("fp32"), data)
            timed = measure_layers(
                modules, runner, observations[0], whole, options, RUNTIME, lambda f, what: tell(0.7 + 0.2 * f, what)
            )
            found = replace(found, milliseconds=timed.milliseconds, rest_ms=timed.rest_ms)
        choice = choose(found, max_bits, max_error_rel, max_ms)
        tell(0.9, "measuring the whole")
        if max_bits is not None:
            budget = f"{max_bits:g} bits per weight"
        elif max_ms is not None:
            budget = f"{max_ms:g} ms a chunk"
        else:
            budget = f"an error of {100 * max_error_rel:g} % of the motion"
        about = f"Precisions by sensitivity of the action chunk, for {budget}."
        recipe = to_recipe(choice, name, Accept(), about, options)
        plan = plan_layers(recipe, list(modules))
        layers = compress_policy(
            recipe, plan, modules, stages, runner, fitted, lambda *_: None, reduce_range, weighed=weighed
        )
        trial = Trial(runner, modules, observations)
        error = trial.error_rad(layers) / trial.motion_std_rad
        # the build judges by other episodes
        limit = round(max(2 * choice.predicted_error_rel, 2 * error, 0.005), 4)
        recipe = replace(recipe, accept=Accept(action_error_rel=limit))
        ms = None if max_ms is None else _milliseconds(loaded, recipe, data)
    tell(1.0, "writing the recipe")
    return recipe, choice, found, Measured(error, ms)


def _milliseconds(loaded, recipe: Recipe, data) -> float:
    """Of a chunk, in an engine of its own."""
    with tempfile.TemporaryDirectory() as directory:
        path = build(loaded.directory, replace(recipe, accept=Accept()), RUNTIME, Path(directory) / "engine", data)
        return Bundle.load(path).manifest["profile"]["total"]["p50"]
