"""Is the engine still the policy? Its chunks against full precision: same observations, same noise.

End to end in radians and relative to the motion, per joint and per step of the chunk; and stage by stage, each stage
given the inputs that full precision gave it, so that an error is found where it arises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from vla_edge.compress.recipe import Accept
from vla_edge.engine.backends import LoadedStage
from vla_edge.evaluate.metrics import MotionScale, cosine, likeness
from vla_edge.policy.preprocess import positions_by_name
from vla_edge.types import Observation, VlaEdgeError

STAGE_FRAMES = 8
# relative L2 of a stage's output, given full precision's inputs: what others allow for 8 bits
STAGE_LIMIT = 0.1


class VerifyError(VlaEdgeError):
    """An engine that strays further from full precision than its recipe accepts."""


@dataclass(frozen=True)
class Verification:
    """How far an engine is from full precision.

    Attributes:
        frames: observations compared.
        action_error_rad: mean absolute difference of the chunks over frames, steps and joints, rad.
        motion_std_rad: standard deviation of the reference's motion (targets minus current positions), rad.
        action_error_rel: the first over the second.
        frame_error_rel: 5th and 95th percentile over frames of the same ratio.
        cosine: between the two motions, all frames together.
        cosine_min, cosine_mean: the same of single frames. At rest there is hardly a motion and so no direction to
            keep: a frame there can have a low cosine at an error that no joint shows.
        relative_l2: norm of the difference over the norm of the motion, all frames together.
        per_joint: joint -> mean absolute difference, rad.
        per_step: (T,) mean absolute difference at each point of the chunk, rad.
        stages: stage -> output -> {"cosine", "relative_l2"} on the inputs of full precision, worst over frames.
    """

    frames: int
    action_error_rad: float
    motion_std_rad: float
    action_error_rel: float
    frame_error_rel: tuple[float, float]
    cosine: float
    cosine_min: float
    cosine_mean: float
    relative_l2: float
    per_joint: Mapping[str, float]
    per_step: tuple[float, ...]
    stages: Mapping[str, Mapping[str, Mapping[str, float]]]

    def to_dict(self) -> dict:
        """Plain types, figures rounded to what they are worth."""
        plain = asdict(self)
        for key in ("frame_error_rel", "per_step"):
            plain[key] = list(plain[key])
        return _rounded(plain)


def compare(
    engine,
    reference,
    observations: Sequence[Observation],
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Verification:
    """Run both `Runner`s on `observations`.

    Raises:
        VlaEdgeError: one of them refuses an observation.
    """
    errors, motions, cosines, scale, squares = [], [], [], MotionScale(), np.zeros(2)
    for index, observation in enumerate(observations):
        ours = engine.infer(observation, seed=seed).chunk.positions
        theirs = reference.infer(observation, seed=seed).chunk.positions
        current = positions_by_name(observation.joints, reference.spec.joint_names)
        scale.add(theirs, current)
        errors.append(np.abs(ours - theirs))
        motions.append((ours - current, theirs - current))
        cosines.append(cosine(*motions[-1]))
        squares += ((ours - theirs) ** 2).sum(), ((theirs - current) ** 2).sum()
        if progress is not None:
            progress((index + 1) / len(observations))
    error, motion = np.stack(errors), scale.std()
    per_frame = error.mean(axis=(1, 2)) / motion
    return Verification(
        frames=len(observations),
        action_error_rad=float(error.mean()),
        motion_std_rad=float(motion),
        action_error_rel=float(error.mean() / motion),
        frame_error_rel=(float(np.percentile(per_frame, 5)), float(np.percentile(per_frame, 95))),
        cosine=cosine(*map(np.stack, zip(*motions))),
        cosine_min=float(min(cosines)),
        cosine_mean=float(np.mean(cosines)),
        relative_l2=float(np.sqrt(squares[0] / squares[1])),
        per_joint=dict(zip(reference.spec.joint_names, error.mean(axis=(0, 1)).tolist())),
        per_step=tuple(error.mean(axis=(0, 2)).tolist()),
        stages=compare_stages(engine, reference, observations[:STAGE_FRAMES], seed),
    )


def compare_stages(engine, reference, observations: Sequence[Observation], seed: int = 0) -> dict:
    """Stage -> output -> worst cosine and relative L2, each stage on the reference's own inputs.

    Stages that the reference does not have, or that pass other tensors than its own, because heads were taken out, are
    left out.
    """
    worst: dict[str, dict[str, dict[str, float]]] = {}
    alike = {
        name for name, stage in engine.stages.items()
        if name in reference.stages
        and (stage.interface.inputs, stage.interface.outputs)
        == (reference.stages[name].interface.inputs, reference.stages[name].interface.outputs)
    }  # fmt: skip
    for observation in observations:
        for name, inputs in reference.stage_inputs(observation, seed):
            if name not in alike:
                continue
            expected = _run(reference.stages[name], inputs)
            for output, value in _run(engine.stages[name], inputs).items():
                row = worst.setdefault(name, {}).setdefault(output, {"cosine": 1.0, "relative_l2": 0.0})
                angle, distance = likeness(value, expected[output])
                row["cosine"] = min(row["cosine"], angle)
                row["relative_l2"] = max(row["relative_l2"], distance)
    return worst


def check(
    result: Verification, accept: Accept, locate: Callable[[str], tuple[str, float] | None] | None = None
) -> None:
    """Nothing, when `result` is within the limits.

    Args:
        locate: stage -> the layer in which it diverges first, and by how much (see `diverge`); asked on failure only.

    Raises:
        VerifyError: by which figure it is not, and where the engine leaves the policy first.
    """
    joint, joint_error = max(result.per_joint.items(), key=lambda entry: entry[1])
    figures = (
        ("action_error_rel", result.action_error_rel, accept.action_error_rel, "above"),
        ("relative_l2", result.relative_l2, accept.relative_l2, "above"),
        (f"joint_error_rad of {joint}", joint_error, accept.joint_error_rad, "above"),
        ("cosine", result.cosine, accept.cosine, "below"),
    )
    for name, value, limit, side in figures:
        # written so that NaN fails
        if limit is not None and not (value <= limit if side == "above" else value >= limit):
            stage = first_diverging_stage(result)
            layer = None if locate is None or stage is None else locate(stage)
            where = "" if stage is None else f"; it diverges first, or most, in stage {stage}"
            where += "" if layer is None else f", there in layer {layer[0]} by {100 * layer[1]:.1f} %"
            raise VerifyError(
                f"the engine is too far from full precision: {name} is {value:.4g}, {side} the recipe's {limit:g} "
                f"({result.frames} observations, action error {100 * result.action_error_rel:.2f} % of the motion"
                f"{where}); keep more layers in higher precision or change accept"
            )


def first_diverging_stage(result: Verification) -> str | None:
    """The first stage, in the order of computation, with an output beyond STAGE_LIMIT; where none is, the one that errs
    most. None when no stage can be compared."""
    worst = {name: max(row["relative_l2"] for row in outputs.values()) for name, outputs in result.stages.items()}
    beyond = [name for name, error in worst.items() if not error <= STAGE_LIMIT]
    return beyond[0] if beyond else max(worst, key=worst.__getitem__, default=None)


def _run(stage: LoadedStage, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float64) for name, value in stage.run(inputs).items()}


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
