"""Does an engine speak of the same joints, in the same units, as full precision and the recording do?

Rounding makes every joint a little wrong. Two other mistakes make some of them very wrong in a way of their own, and
are found by it: joints in another order move as other joints should, and statistics of another data set stretch and
shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla_edge.policy.spec import NormalizationMode, PolicySpec

# A joint follows another's motion when it agrees with that one and not with its own.
OWN, OTHER = 0.5, 0.7
# Joints whose motion is below this, rad, stand still, and noise agrees with anything.
STILL_RAD = 0.005
# Normalized values beyond these were hardly ever seen in training: standard deviations, or half ranges.
FAR = {NormalizationMode.MEAN_STD: 5.0}
FAR_OF_BOUNDS = 1.5
GRIPPER_WORDS = ("gripper", "finger", "thumb", "jaw")


@dataclass(frozen=True)
class Agreement:
    """What was compared by joint name.

    Attributes:
        against: "full precision", or "the recording" without a reference.
        concordance: joint -> of its motion with the same joint's (Lin, 1989): 1 when they are the same, lower when they
            differ in direction, size or offset; NaN where it stands still.
        exchanged: (joint, joint it is instead): its statistics are those of the other one in full precision, or it
            moves as that one does.
        normalization: largest difference of the engine's statistics from full precision's, in units of the latter's
            scale; NaN without a reference. normalization_at: which value of which joint that is.
        state_outside: share of the recording's joint positions that lie far outside the policy's statistics.
        state_outside_at: joint with most of them.
        grippers: gripper joint -> share of the horizon where it is open or closed as the robot then was.
    """

    against: str
    concordance: dict[str, float]
    exchanged: tuple[tuple[str, str], ...]
    normalization: float
    normalization_at: str
    state_outside: float
    state_outside_at: str
    grippers: dict[str, float]


class AgreementTally:
    """Collects an `Agreement` frame by frame.

    Args:
        spec: of the engine. reference: of full precision, None without one.
    """

    def __init__(self, spec: PolicySpec, reference: PolicySpec | None):
        joints = len(spec.joint_names)
        self._spec, self._reference = spec, reference
        self._count = 0
        self._sums, self._squares = np.zeros((2, joints)), np.zeros((2, joints))
        self._products = np.zeros((joints, joints))
        self._outside, self._states = np.zeros(joints, np.int64), 0
        self._read = _read_scaling(spec)
        named = (i for i, name in enumerate(spec.joint_names) if any(w in name for w in GRIPPER_WORDS))
        self._grippers = [i for i in named if np.isfinite(self._read[0, i])]
        self._same, self._compared = np.zeros(joints), np.zeros(joints)

    def add(self, current: np.ndarray, motion: np.ndarray, expected: np.ndarray, truth: np.ndarray) -> None:
        """One frame.

        Args:
            current: (J,) rad, measured at the observation.
            motion: (T, J) rad of the engine, from `current`.
            expected: the same of what it is held to; rows with NaN are left out.
            truth: (T, J) rad that the robot then reached, NaN where unknown.
        """
        known = np.isfinite(expected).all(axis=1)
        ours, theirs = motion[known], expected[known]
        self._count += len(ours)
        for side, values in enumerate((ours, theirs)):
            self._sums[side] += values.sum(axis=0)
            self._squares[side] += (values**2).sum(axis=0)
        self._products += ours.T @ theirs
        state = self._spec.state
        offset, scale = self._read
        if state.mode is not NormalizationMode.IDENTITY:
            self._outside += np.abs((current - offset) / scale) > FAR.get(state.mode, FAR_OF_BOUNDS)
        self._states += 1
        if self._grippers:
            seen = np.isfinite(truth)
            self._same += (seen & ((current + motion > offset) == (truth > offset))).sum(axis=0)
            self._compared += seen.sum(axis=0)

    def result(self) -> Agreement:
        """Everything so far."""
        names, matrix = self._spec.joint_names, self._concordance()
        renamed, difference, at = compare_normalization(self._spec, self._reference)
        worst = int(np.argmax(self._outside)) if len(names) else 0
        return Agreement(
            "full precision" if self._reference is not None else "the recording",
            {name: float(matrix[i, i]) for i, name in enumerate(names)},
            renamed or exchanged_joints(matrix, names),
            difference,
            at,
            float(self._outside.sum() / max(self._states * len(names), 1)),
            names[worst] if self._outside.any() else "",
            {names[i]: float(self._same[i] / self._compared[i]) for i in self._grippers if self._compared[i]},
        )

    def _concordance(self) -> np.ndarray:
        """(J, J): of the engine's joint i with the expected joint j."""
        count = max(self._count, 1)
        means = self._sums / count
        variances = np.maximum(self._squares / count - means**2, 0.0)
        variances[variances < STILL_RAD**2] = np.nan
        apart = means[0][:, None] - means[1]
        return 2 * (self._products / count - np.outer(*means)) / (variances[0][:, None] + variances[1] + apart**2)


def _read_scaling(spec: PolicySpec) -> np.ndarray:
    """Offset and scale, (2, J), of the joints that are moved, as the state has them; NaN where it has not."""
    read = [np.broadcast_to(part, len(spec.read_names)) for part in spec.state.affine()]
    columns = {name: i for i, name in enumerate(spec.read_names)}
    return np.array([[part[columns[name]] if name in columns else np.nan for name in spec.joint_names] for part in read])


def exchanged_joints(concordance: np.ndarray, names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(joint, joint it moves like), for joints that do not move as themselves but as another such one.

    Args:
        concordance: (J, J), of joint i of the engine with joint j of what it is held to.
    """
    strange = [i for i in range(len(names)) if concordance[i, i] < OWN]
    found = []
    for i in strange:
        others = [j for j in strange if j != i and np.isfinite(concordance[i, j])]
        best = max(others, key=lambda j: concordance[i, j], default=i)
        if best != i and concordance[i, best] > OTHER:
            found.append((names[i], names[best]))
    return tuple(found)


def compare_normalization(
    spec: PolicySpec, reference: PolicySpec | None
) -> tuple[tuple[tuple[str, str], ...], float, str]:
    """(Joints with another's statistics, largest difference otherwise in units of the reference's scale, where).

    Joints are matched by name. Where that does not fit and their positions do, the list of names is in the wrong order.
    """
    if reference is None:
        return (), float("nan"), ""
    named = [spec.joint_names.index(name) for name in reference.joint_names]
    by_name, by_position = (_difference(spec, reference, order) for order in (named, list(range(len(named)))))
    if by_position[0] >= by_name[0]:
        return (), *by_name
    pairs = zip(spec.joint_names, reference.joint_names)
    return tuple((ours, theirs) for ours, theirs in pairs if ours != theirs), *by_position


def _difference(spec: PolicySpec, reference: PolicySpec, order: list[int]) -> tuple[float, str]:
    worst, where = 0.0, ""
    for feature in ("state", "action"):
        ours, theirs = (
            _read_scaling(s)[:, None] if feature == "state" else np.array(s.chunk_affine()) for s in (spec, reference)
        )
        points = min(ours.shape[1], theirs.shape[1])
        for kind, a, b in zip(("offset", "scale"), ours[:, :points, order], theirs[:, :points]):
            difference = np.nan_to_num(np.abs(a - b) / np.abs(theirs[1, :points])).max(0)
            joint = int(np.argmax(difference))
            if difference[joint] > worst:
                worst, where = float(difference[joint]), f"{feature} {kind} of {reference.joint_names[joint]}"
    return worst, where
