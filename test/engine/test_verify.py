"""The comparison with full precision measures what it says, and its gate holds."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from tiny import JOINTS, make_observations

from vla_edge.compress.recipe import Accept
from vla_edge.engine.runner import Inference, Runner
from vla_edge.engine.verify import VerifyError, check, compare, compare_stages
from vla_edge.policy.preprocess import positions_by_name
from vla_edge.types import ActionChunk, InferenceTiming


@pytest.fixture(scope="module")
def reference(checkpoint):
    return Runner.from_checkpoint(checkpoint)


class Off:
    """An engine that is off by a known amount in one joint."""

    def __init__(self, reference, joint: int, amount: float):
        self._reference, self._joint, self._amount = reference, joint, amount
        self.stages = reference.stages

    def infer(self, observation, seed):
        chunk = self._reference.infer(observation, seed=seed).chunk
        positions = chunk.positions.copy()
        positions[:, self._joint] += self._amount
        return Inference(ActionChunk(chunk.stamp_ns, JOINTS, positions, chunk.dt), InferenceTiming(0.0))


def test_full_precision_is_equal_to_itself(reference):
    found = compare(reference, reference, make_observations(4))
    assert found.action_error_rad == found.relative_l2 == 0 and found.cosine_min == pytest.approx(1)
    assert found.frames == 4 and set(found.stages) == {"vision", "prefix", "time", "denoise"}
    check(found, Accept(action_error_rel=0.0, cosine=0.999999, relative_l2=0.0, joint_error_rad=0.0))


def test_a_known_error_is_found_in_radians_and_relative_to_the_motion(reference):
    observations = make_observations(5)
    found = compare(Off(reference, 1, 0.03), reference, observations, seed=2)
    motions = [reference.infer(o, seed=2).chunk.positions - o.joints.position for o in observations]
    assert found.per_joint == pytest.approx({"b_joint": 0, "a_joint": 0.03, "c_joint": 0}, abs=1e-12)
    assert found.per_step == pytest.approx([0.01] * 8)
    assert found.action_error_rad == pytest.approx(0.01)
    assert found.motion_std_rad == pytest.approx(np.std(motions))
    assert found.action_error_rel == pytest.approx(0.01 / np.std(motions))
    assert found.relative_l2 == pytest.approx(np.sqrt(5 * 8 * 0.03**2 / np.square(motions).sum()))


class Moving:
    """A policy that moves joint 0 by the amount an observation's stamp stands for; `error` more in joint 1."""

    stages: dict = {}
    spec = SimpleNamespace(joint_names=JOINTS)

    def __init__(self, amounts, error: float = 0.0):
        self._amounts, self._error = amounts, error

    def infer(self, observation, seed):
        motion = np.zeros((8, 3))
        motion[:, 0], motion[:, 1] = self._amounts[observation.stamp_ns], self._error
        positions = positions_by_name(observation.joints, JOINTS) + motion
        return Inference(ActionChunk(observation.stamp_ns, JOINTS, positions, 0.05), InferenceTiming(0.0))

    def stage_inputs(self, observation, seed):
        return ()


def test_a_robot_at_rest_does_not_fail_an_engine_and_a_wrong_direction_does():
    observations = make_observations(8)
    stamps = [o.stamp_ns for o in observations]
    at_rest = dict.fromkeys(stamps, 0.2) | {stamps[-1]: 0.001}
    found = compare(Moving(at_rest, 0.002), Moving(at_rest), observations)
    assert found.cosine_min < 0.5 and found.cosine > 0.999
    check(found, Accept(cosine=0.995))
    backwards = at_rest | {stamps[3]: -0.2}
    found = compare(Moving(backwards), Moving(at_rest), observations)
    assert found.cosine == pytest.approx(5 / 7, abs=1e-4)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"action_error_rel": 1e-4}, "action_error_rel is .*, above the recipe's 0.0001 .3 observations"),
        ({"joint_error_rad": 0.02}, "joint_error_rad of a_joint is 0.03, above"),
        ({"cosine": 0.99999999}, "cosine is .*, below"),
        ({"relative_l2": 1e-4}, "relative_l2 is .*, above"),
    ],
)
def test_each_limit_refuses(reference, limit, message):
    found = compare(Off(reference, 1, 0.03), reference, make_observations(3))
    check(found, Accept())
    with pytest.raises(VerifyError, match=message):
        check(found, Accept(**limit))


def test_an_error_that_is_no_number_never_passes(reference):
    found = compare(Off(reference, 1, np.nan), reference, make_observations(2))
    with pytest.raises(VerifyError, match="action_error_rel is nan"):
        check(found, Accept(action_error_rel=10.0))


def test_the_stage_that_errs_is_named(reference, bundle):
    engine = Runner.from_bundle(bundle)
    engine.stages = {**reference.stages, "prefix": engine.stages["prefix"]}
    worst = compare_stages(engine, reference, make_observations(2))
    assert worst["prefix"]["prefix_keys"]["relative_l2"] > 1e-4
    for name in ("vision", "time", "denoise"):
        assert all(row["relative_l2"] == 0 for row in worst[name].values())
