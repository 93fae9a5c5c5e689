"""Checkpoint + recordings + a budget -> the recipe that spends it best, found by what the robot would do."""

from __future__ import annotations

from pathlib import Path

from vla_edge.compress.apply import compress_policy
from vla_edge.compress.calibrate import load_calibration
from vla_edge.compress.mixed import Choice, choose, to_recipe
from vla_edge.compress.plan import plan_layers
from vla_edge.compress.recipe import Accept, Recipe, RecipeError
from vla_edge.compress.sensitivity import OPTIONS, Sensitivity, Trial, measure
from vla_edge.engine.build import Progress, calibration_source, torch_threads
from vla_edge.engine.runner import Runner
from vla_edge.engine.trace import policy_layers
from vla_edge.policy.checkpoint import load_checkpoint


def search(
    checkpoint: str | Path,
    calibration=None,
    max_bits: float | None = None,
    max_error_rel: float | None = None,
    frames: int = 16,
    name: str = "mixed",
    progress: Progress | None = None,
    progress_file: Path | None = None,
) -> tuple[Recipe, Choice, Sensitivity, float]:
    """A checkpoint and a recording -> the recipe, why, and its measured action error relative to the motion.

    Args:
        checkpoint: directory in LeRobot's layout.
        calibration: bag or observations; `calibration` beside the checkpoint when None.
        frames: observations the error is measured on, of those calibrated on; a build verifies on others.
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
    every = -(-len(data.observations) // frames)
    observations = data.observations[::every]
    with torch_threads(loaded.weights_path.stat().st_size // 4):
        policy = load_policy(loaded)
        stages, runner = policy.stages(), Runner.from_policy(policy, loaded)
        modules = policy_layers(stages)
        found = measure(
            stages, modules, runner, data.observations, observations, OPTIONS,
            lambda f, what: tell(0.9 * f, what), progress_file,
        )  # fmt: skip
        choice = choose(found, max_bits, max_error_rel)
        tell(0.9, "measuring the whole")
        accept = Accept(action_error_rel=round(max(2 * choice.predicted_error_rel, 0.005), 4))
        bits = None if max_bits is None else f"{max_bits:g} bits per weight"
        budget = bits or f"an error of {100 * max_error_rel:g} % of the motion"
        recipe = to_recipe(choice, name, accept, f"Precisions by sensitivity of the action chunk, for {budget}.")
        plan = plan_layers(recipe, list(modules))
        layers = compress_policy(recipe, plan, modules, stages, runner, data.observations, lambda *_: None)
        trial = Trial(runner, modules, observations)
        measured = trial.error_rad(layers) / trial.motion_std_rad
    tell(1.0, "writing the recipe")
    return recipe, choice, found, measured
