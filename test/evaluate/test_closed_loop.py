from __future__ import annotations

import functools
import json

import numpy as np
import pytest

from vla_edge.engine.runner import Inference
from vla_edge.evaluate.closed_loop import ClosedLoopError, run_closed_loop
from vla_edge.evaluate.closed_loop_report import judge_closed_loop, write_closed_loop_report
from vla_edge.evaluate.closed_loop_result import EpisodeRow
from vla_edge.types import ActionChunk, InferenceTiming, JointState, Observation

NAMES = ("slider",)


class SliderRig:
    """One joint that goes where the newest chunk says; the goal is +1 or -1, told by the instruction."""

    def begin(self, seed, options):
        self.options, self.seed = options, seed
        self.goal = 1.0 if seed % 2 else -1.0
        self.given = -self.goal if options.instruction_override == "shuffled" else self.goal
        self._now, self.position, self.chunk = seed * 10**9 + 7, 0.0, None
        self.log = []
        return f"go to {self.given:+g}"

    @property
    def now_ns(self):
        return self._now

    def observe(self, instruction):
        self.log.append(("observe", self._now))
        return Observation(self._now, {}, JointState(self._now, NAMES, [self.position]), instruction)

    def tick(self, seconds):
        self._now += round(seconds * 1e9)
        if self.chunk is not None:
            at = (self._now - self.chunk.stamp_ns) / 1e9 / self.chunk.dt - 1
            self.position = float(np.interp(at, np.arange(len(self.chunk.positions)), self.chunk.positions[:, 0]))

    def accept(self, chunk):
        self.log.append(("accept", self._now))
        if not np.isfinite(chunk.positions).all():
            return False
        self.chunk = chunk
        return True

    def commanded(self):
        return np.array([self.position])

    def finished(self):
        return abs(self.position) >= 1.0 or self._now >= self.seed * 10**9 + 7 + 3 * 10**9

    def row(self, seed):
        at, want = np.sign(round(self.position, 6)) * (abs(self.position) >= 1.0), (self.goal, self.given)
        seconds = (self._now - seed * 10**9 - 7) / 1e9
        return EpisodeRow(
            seed, f"{want[0]:+g}", f"go to {want[1]:+g}", f"{want[1]:+g}",
            bool(at == want[0]), bool(at == want[1]), bool(at not in (0, want[1])), 0.5, seconds,
        )  # fmt: skip


def obedient(observation, seed, error=0.0):
    """Goes where it is told at 1 rad/s; drunk on odd hundreds of seeds by `error`."""
    goal = float(observation.instruction.split()[-1])
    rng = np.random.default_rng([seed, observation.stamp_ns])
    steps = observation.joints.position[0] + goal * 0.05 * np.arange(1, 21) + error * rng.standard_normal(20)
    return ActionChunk(observation.stamp_ns, NAMES, steps[:, None], 0.05)


def stubborn(observation, seed):
    """Goes to +1 whatever it is told."""
    return obedient(Observation(observation.stamp_ns, {}, observation.joints, "go to +1"), seed)


def test_a_policy_that_obeys_reaches_what_it_is_told():
    found = run_closed_loop(obedient, range(10), rig=SliderRig)
    assert (found.n, found.successes, found.given_successes, found.wrong_first) == (10, 10, 10, 0)
    assert [row.seed for row in found.rows] == list(range(10))
    assert found.by_goal() == {"+1": (5, 5), "-1": (5, 5)}
    assert found.wilson.low > 0.7 and found.wilson.high == 1.0


def test_shuffled_instructions_tell_obedience_from_habit():
    obeys = run_closed_loop(obedient, range(10), instruction_override="shuffled", rig=SliderRig)
    assert (obeys.successes, obeys.given_successes, obeys.chance) == (0, 10, 0.5)
    habit = run_closed_loop(stubborn, range(10), instruction_override="shuffled", rig=SliderRig)
    assert (habit.successes, habit.given_successes, habit.wrong_first) == (5, 5, 5)
    assert "given goal reached in 5" in habit.one_line()


@pytest.mark.parametrize(
    ("delay_s", "rate_hz", "observed_every"),
    [(0.0, 5.0, 0.2), (0.1, 5.0, 0.2), (0.2, 5.0, 0.2), (0.3, 5.0, 0.3), (0.05, 3.0, 1 / 3)],
)
def test_chunks_arrive_after_the_delay_and_one_inference_runs_at_a_time(delay_s, rate_hz, observed_every):
    rigs = []

    def make():
        rigs.append(SliderRig())
        return rigs[-1]

    run_closed_loop(stubborn, [0], delay_s=delay_s, rate_hz=rate_hz, rig=make, instruction_override="none")
    log = rigs[0].log
    observed = np.array([at for kind, at in log if kind == "observe"])
    accepted = np.array([at for kind, at in log if kind == "accept"])
    tick = 2_000_000
    assert np.all(np.abs(accepted - observed[: len(accepted)] - delay_s * 1e9) <= tick)
    grid = 7 + np.ceil(np.arange(len(observed)) * observed_every * 1e9 / tick - 1e-6) * tick
    np.testing.assert_array_equal(observed, grid)


def test_an_episode_is_the_same_on_every_run_and_in_every_process():
    noisy = functools.partial(obedient, error=0.2)
    one = run_closed_loop(noisy, range(6), rig=SliderRig)
    assert run_closed_loop(noisy, range(6), rig=SliderRig) == one
    assert run_closed_loop(noisy, range(6), rig=SliderRig, workers=2) == one
    assert run_closed_loop(noisy, [5], rig=SliderRig).rows[0] == one.rows[5]


def test_rejected_chunks_are_counted_and_the_episode_goes_on():
    def broken(observation, seed):
        return ActionChunk(observation.stamp_ns, NAMES, np.full((20, 1), np.nan), 0.05)

    row = run_closed_loop(broken, [0], rig=SliderRig).rows[0]
    assert not row.success and row.rejected == row.chunks == 15


def fails(observation, seed):
    raise ClosedLoopError("the engine is gone")


def test_what_goes_wrong_in_a_process_is_told_as_it_is():
    with pytest.raises(ClosedLoopError, match="the engine is gone"):
        run_closed_loop(fails, range(2), rig=SliderRig, workers=2)
    with pytest.raises(ClosedLoopError, match="cannot be sent to 2 processes .*; give the path"):
        run_closed_loop(lambda observation, seed: None, range(2), rig=SliderRig, workers=2)


def test_two_runs_are_compared_pair_by_pair():
    good, bad = (run_closed_loop(policy, range(8), rig=SliderRig) for policy in (obedient, stubborn))
    paired = good.against(bad)
    assert (paired.only_first, paired.only_second, paired.both, paired.difference) == (4, 0, 4, -0.5)
    with pytest.raises(ValueError, match="not over the same seeds"):
        good.against(run_closed_loop(obedient, range(7), rig=SliderRig))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instruction_override": "upside down"}, "must be none or shuffled"),
        ({"delay_s": -0.1}, "delay_s is -0.1; it must be between 0 and 10"),
        ({"rate_hz": 0.0}, "rate_hz"),
        ({"control_hz": 1e6}, "control_hz"),
        ({"inference": "sinchronous"}, "did you mean 'synchronous'"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ClosedLoopError, match=message):
        run_closed_loop(obedient, [0], rig=SliderRig, **options)


class Planner:
    """`obedient` as an engine that can be asked to continue a plan; it remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def infer(self, observation, seed=0, continuation=None):
        self.asked.append(continuation)
        return Inference(obedient(observation, seed), InferenceTiming(0.0))


def test_an_inference_policy_reckons_with_the_delay_of_the_loop_once_it_was_measured():
    planner = Planner()
    row = run_closed_loop(planner, [1], delay_s=0.24, rig=SliderRig, inference="real_time_chunking").rows[0]
    first, *others = planner.asked
    assert row.success and first is None and len(others) >= 2
    assert {int(np.count_nonzero(asked.weights == 1.0)) for asked in others} == {5}


def test_a_synchronous_robot_stands_while_it_thinks_and_takes_longer():
    found = [
        run_closed_loop(Planner(), [1], delay_s=0.3, rig=SliderRig, inference=inference).rows[0]
        for inference in ("asynchronous", "synchronous: {execute: 0.4, settle: 0.0}")
    ]
    assert found[0].success and found[1].success and found[1].seconds > found[0].seconds + 0.5
    # This rig jumps where a chunk tells it to; a synchronous one begins where the robot stands.
    assert max(found[1].smoothness.command_steps) < 0.01 < max(found[0].smoothness.command_steps)


def test_a_function_cannot_continue_a_plan():
    with pytest.raises(ClosedLoopError, match="cannot continue a plan"):
        run_closed_loop(obedient, [1], rig=SliderRig, inference="real_time_chunking")


def test_no_seeds_and_no_policy_are_refused():
    with pytest.raises(ClosedLoopError, match="no seeds"):
        run_closed_loop(obedient, [], rig=SliderRig)
    with pytest.raises(ClosedLoopError, match="int is no policy"):
        run_closed_loop(3, [0], rig=SliderRig)


def test_acceptance_asks_for_success_for_the_right_object_and_for_listening():
    good = run_closed_loop(obedient, range(40), rig=SliderRig)
    shuffled = run_closed_loop(obedient, range(40), instruction_override="shuffled", rig=SliderRig)
    assert judge_closed_loop(good, shuffled).passed
    deaf = run_closed_loop(stubborn, range(40), instruction_override="shuffled", rig=SliderRig)
    failed = {check.name for check in judge_closed_loop(good, deaf, max_over_chance=-0.1).checks if not check.passed}
    assert failed == {"shuffled_true_goal_rate", "shuffled_given_goal_rate"}
    bad = run_closed_loop(stubborn, range(40), rig=SliderRig)
    failed = {check.name for check in judge_closed_loop(bad).checks if not check.passed}
    assert failed == {"success_rate", "wrong_first_rate"}


def test_the_closed_loop_report_shows_every_failure_and_its_json_every_episode(tmp_path):
    result = run_closed_loop(stubborn, range(6), rig=SliderRig)
    html, path = write_closed_loop_report(result, tmp_path / "closed_loop.html", "stubborn", result)
    text = html.read_text(encoding="utf-8")
    assert text.count("wrong first</td>") == 3 + 3 + 3
    assert "inference asynchronous" in text and "Between plans" in text
    found = json.loads(path.read_text())
    assert (found["successes"], found["episodes"], len(found["rows"]), found["passed"]) == (3, 6, 6, False)
    assert found["goals"] == {"+1": {"successes": 3, "episodes": 3}, "-1": {"successes": 0, "episodes": 3}}
