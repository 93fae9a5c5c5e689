"""The kernel follows, degrades and recovers as the ladder says, and never leaves the limits."""

import numpy as np
import pytest
from rig import MS, START, Rig, sine

from vla_edge.control.config import ControlConfig
from vla_edge.control.kernel import ControlError, ControlKernel
from vla_edge.control.modes import Mode
from vla_edge.control.screening import RejectedChunk
from vla_edge.robots.g1 import DRIVEN_JOINTS, g1
from vla_edge.robots.robot import RobotError
from vla_edge.types import ActionChunk, JointState

POINTS = 32


def wave(rig, age, noise=0.0, rng=None, points=POINTS):
    """The absolute motion `sine` as a chunk observed `age` s ago."""
    since = (rig.now - START) * 1e-9 - age
    positions = sine(rig, since + 0.05 * np.arange(1, points + 1))
    return positions if rng is None else positions + rng.normal(0, noise, (1, len(rig.names)))


def follow(rig, seconds, every=0.2, age=0.1, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(round(seconds / every)):
        rig.send(wave(rig, age, noise, rng), age=age)
        rig.run(every)


def test_before_arming_there_is_no_command():
    rig = Rig(armed=False)
    assert rig.kernel.tick(rig.now + MS) is None
    assert rig.kernel.mode is Mode.INIT


def test_after_arming_it_holds_the_measured_position():
    start = np.linspace(-0.3, 0.3, 15)
    rig = Rig(start=start)
    rig.run(0.5)
    assert rig.kernel.mode is Mode.HOLD
    np.testing.assert_array_equal(rig.path, np.tile(start, (501, 1)))


def test_consistent_chunks_are_followed_to_the_place_and_time_they_name():
    rig = Rig()
    follow(rig, 3.0, age=0.13)
    rig.judge()
    seconds = (np.array(rig.times) - START) * 1e-9
    error = np.abs(rig.path - sine(rig, seconds))[1000:]
    assert error.max() < 2e-4  # what a 20 Hz spline misses of this wave
    assert rig.kernel.counters.limit_hits == 0


@pytest.mark.parametrize("age", [0.02, 0.1, 0.3, 0.5])
def test_a_late_chunk_is_entered_where_the_clock_is_not_at_its_beginning(age):
    rig = Rig()
    follow(rig, 2.4, age=age)
    seconds = (rig.times[-1] - START) * 1e-9
    np.testing.assert_allclose(rig.path[-1], sine(rig, [seconds])[0], atol=3e-4)


@pytest.mark.parametrize("age", [0.1, 0.5])
def test_a_standing_robot_enters_a_late_chunk_at_its_beginning(age):
    # Chunks of a policy that predicts from the measured position: entered at their age, they would jump ahead of a
    # robot that has not moved since, be refused for it, and leave it standing for ever.
    rig = Rig()
    rig.run(age)
    moves = np.minimum(np.cumsum(np.full((POINTS, 15), 0.08), axis=0), 1.2)
    rig.send(moves, age=age)
    rig.run(0.05)
    assert np.abs(rig.path[-1]).max() < 0.05
    rig.run(0.4)
    rig.judge()
    np.testing.assert_allclose(rig.path[-1], 0.08 / 0.05 * 0.45, atol=0.01)


def test_noise_from_point_to_point_does_not_reach_the_limits():
    rig, rng = Rig(), np.random.default_rng(0)
    for _ in range(15):
        rig.send(wave(rig, 0.1) + rng.normal(0, 0.01, (POINTS, 15)), age=0.1)
        rig.run(0.2)
    rig.judge()
    assert rig.kernel.counters.limit_hits < 0.05 * rig.kernel.counters.steps


def test_disagreeing_chunks_at_5_hz_with_100_ms_delay_give_a_smooth_command():
    rig = Rig()
    follow(rig, 4.0, noise=0.02)
    rig.judge()
    velocity, acceleration, jerk = rig.derivatives()
    # The same disagreements, spliced in raw, would step by 60 mrad; here the largest step is the motion itself.
    assert np.abs(np.diff(rig.path, axis=0)).max() < 1.5e-3
    assert np.abs(acceleration).max() < 25.0
    # No corner: acceleration changes from tick to tick by a small part of its limit, chunk boundaries included.
    assert np.abs(np.diff(acceleration, axis=0)).max() < 1.5
    assert np.abs(jerk).max() < 1500.0


def test_the_same_inputs_give_the_same_bits():
    first, second = Rig(), Rig()
    for rig in (first, second):
        follow(rig, 2.0, noise=0.02, seed=5)
        rig.run(2.0)
    assert first.path.tobytes() == second.path.tobytes()
    assert np.array(first.velocities).tobytes() == np.array(second.velocities).tobytes()


def test_feed_forward_velocity_is_the_slope_of_the_command():
    rig = Rig()
    follow(rig, 1.0)
    np.testing.assert_allclose(np.diff(rig.path, axis=0) * 1000, np.array(rig.velocities)[1:], atol=1e-6)


def test_ticking_at_other_rates_gives_the_same_motion():
    ends = []
    for rate in (500, 1000, 2000):
        rig = Rig(ControlConfig(tick_rate=rate, start_ramp=0.0))
        follow(rig, 2.0)
        rig.judge()
        ends.append(rig.path[-1])
    np.testing.assert_allclose(ends[0], ends[1], atol=5e-4)
    np.testing.assert_allclose(ends[2], ends[1], atol=5e-4)


# The ladder -------------------------------------------------------------------------------------------------------


def test_a_chunk_that_runs_out_ends_in_a_tail_then_hold_then_rest():
    rig = Rig()
    rig.send(np.cumsum(np.full((POINTS, 15), 0.02), axis=0), age=0.0)
    rig.run(1.59)
    assert rig.kernel.mode is Mode.FOLLOW
    rig.run(0.05)
    assert rig.kernel.mode is Mode.SLOWDOWN
    rig.run(0.08)
    assert rig.kernel.mode is Mode.HOLD
    rig.run(0.5)
    rig.judge()
    assert np.abs(rig.velocities[-1]).max() == 0.0 or np.abs(rig.velocities[-1]).max() < 1e-9
    assert rig.kernel.counters.holds == 1


def test_a_chunk_does_not_outlive_its_horizon_because_the_robot_is_slowed():
    rig = Rig()
    rig.kernel.set_speed_scale(0.1)
    rig.run(1.0)
    rig.send(np.cumsum(np.full((POINTS, 15), 0.02), axis=0), age=0.0)
    rig.run(1.65)
    assert rig.kernel.mode is Mode.SLOWDOWN
    rig.run(0.1)
    assert rig.kernel.mode is Mode.HOLD
    rig.judge()


def test_rearming_takes_a_source_whose_clock_began_anew():
    rig = Rig()
    rig.joints_every = 0
    rig.run(0.1)
    assert rig.kernel.mode is Mode.FAULT
    rig.now -= 3_600_000 * MS
    rig.rearm()
    rig.joints_every = 2
    rig.run(0.2)
    assert rig.kernel.mode is Mode.HOLD


def test_hold_is_left_by_itself_blended_when_a_fresh_chunk_arrives():
    rig = Rig()
    rig.send(wave(rig, 0.1), age=0.1)
    rig.run(2.5)
    assert rig.kernel.mode is Mode.HOLD
    where = rig.path[-1]
    rig.send(np.tile(where + 0.05, (POINTS, 1)), age=0.1)
    assert rig.kernel.mode is Mode.FOLLOW
    rig.run(1.0)
    rig.judge()
    np.testing.assert_allclose(rig.path[-1], where + 0.05, atol=1e-6)
    _, acceleration, _ = rig.derivatives()
    assert np.abs(np.diff(acceleration, axis=0)).max() < 2.0


def test_a_stale_joint_state_freezes_into_fault_which_only_rearming_ends():
    rig = Rig()
    follow(rig, 1.0)
    rig.joints_every = 0
    rig.run(0.049)
    assert rig.kernel.mode is Mode.FOLLOW
    rig.run(0.004)
    assert rig.kernel.mode is Mode.FAULT
    assert "ms old" in rig.kernel.reason
    rig.run(0.3)
    rig.judge()
    assert np.abs(rig.velocities[-1]).max() < 1e-9
    rig.joints_every = 2
    rig.run(0.2)
    with pytest.raises(RejectedChunk) as refused:
        rig.send(wave(rig, 0.1), age=0.1)
    assert refused.value.reason == "mode"
    assert rig.kernel.mode is Mode.FAULT
    rig.rearm()
    rig.run(0.01)
    rig.send(np.tile(rig.measured, (POINTS, 1)), age=0.0)
    assert rig.kernel.mode is Mode.FOLLOW


def test_a_frozen_joint_source_that_repeats_its_stamp_is_stale():
    rig = Rig(joints_every=0)
    frozen = rig.state()
    for _ in range(60):
        rig.kernel.update_joints(frozen, rig.now)
        rig.tick()
    assert rig.kernel.mode is Mode.FAULT


def test_joint_states_that_are_not_finite_or_lack_joints_are_counted_and_do_not_feed_the_watchdog():
    rig = Rig(joints_every=0)
    bad = rig.measured.copy()
    bad[3] = np.nan
    for _ in range(60):
        assert not rig.kernel.update_joints(JointState(rig.now, rig.names, bad), rig.now)
        assert not rig.kernel.update_joints(JointState(rig.now, rig.names[:3], np.zeros(3)), rig.now)
        rig.tick()
    assert rig.kernel.counters.bad_joint_states == 120
    assert rig.kernel.mode is Mode.FAULT


def test_joint_states_match_by_name_among_others():
    rig = Rig(joints_every=0)
    names = ("left_knee_joint", *reversed(rig.names))
    rig.kernel.rearm(JointState(rig.now, names, np.linspace(0, 0.3, 16)), rig.now)
    np.testing.assert_allclose(rig.kernel.position, np.linspace(0, 0.3, 16)[:0:-1])


def test_late_ticks_slow_it_down_and_it_recovers():
    rig = Rig()
    follow(rig, 1.0)
    rig.send(wave(rig, 0.1), age=0.1)
    rig.tick(late_ns=5 * MS)
    rig.run(0.01)
    assert rig.kernel.mode is Mode.SLOWDOWN
    assert rig.kernel.counters.late == 1
    rig.run(0.2)
    assert rig.kernel.speed < 0.65
    follow(rig, 0.8)
    assert rig.kernel.mode is Mode.FOLLOW
    assert rig.kernel.speed == pytest.approx(1.0)


@pytest.mark.parametrize("late, steps", [(0, 1), (1, 2), (2, 3), (3, 1), (15, 1)])
def test_a_late_tick_never_steps_further_than_the_limits_allow_for_its_steps(late, steps):
    rig = Rig()
    follow(rig, 1.0)
    before = rig.kernel.counters.steps
    rig.tick(late_ns=late * MS)
    assert rig.kernel.counters.steps - before == steps
    top = rig.kernel.limits.velocity
    assert (np.abs(rig.path[-1] - rig.path[-2]) <= steps * top * 1e-3).all()
    rig.run(0.3)
    seconds = (rig.times[-1] - START) * 1e-9
    # What was lost along this chunk, the next one brings back.
    follow(rig, 1.0)
    seconds = (rig.times[-1] - START) * 1e-9
    np.testing.assert_allclose(rig.path[-1], sine(rig, [seconds])[0], atol=5e-3)


def test_a_kernel_ticked_at_half_its_rate_still_keeps_to_the_clock():
    rig = Rig()
    for _ in range(5):
        rig.send(wave(rig, 0.1), age=0.1)
        for _ in range(100):
            rig.tick(late_ns=MS)
    seconds = (rig.times[-1] - START) * 1e-9
    np.testing.assert_allclose(rig.path[-1], sine(rig, [seconds])[0], atol=3e-4)


def test_after_a_long_pause_of_its_own_it_goes_on_from_rest_and_not_into_fault():
    rig = Rig()
    follow(rig, 1.0)
    where = rig.path[-1]
    rig.tick(late_ns=300 * MS)
    assert rig.kernel.counters.gaps == 1
    np.testing.assert_array_equal(rig.path[-1], where)
    rig.run(0.1)
    assert rig.kernel.mode is Mode.HOLD


def test_a_joint_state_that_was_on_its_way_during_a_pause_is_no_fault():
    rig = Rig()
    rig.joints_every = 0
    rig.tick()
    sent = rig.state()
    rig.tick(late_ns=60 * MS)
    assert rig.kernel.update_joints(sent, rig.now)
    rig.run(0.04)
    assert rig.kernel.mode is not Mode.FAULT
    rig.run(0.02)
    assert rig.kernel.mode is Mode.FAULT


def test_a_pause_does_not_excuse_a_source_that_stays_silent_afterwards():
    rig = Rig()
    rig.joints_every = 0
    rig.tick(late_ns=300 * MS)
    rig.run(0.045)
    assert rig.kernel.mode is Mode.HOLD
    rig.run(0.01)
    assert rig.kernel.mode is Mode.FAULT


# What the operator asks ----------------------------------------------------------------------------------------------


def test_emergency_stop_freezes_and_has_to_be_released_and_rearmed():
    rig = Rig()
    follow(rig, 1.0)
    rig.kernel.emergency_stop(True)
    assert rig.kernel.mode is Mode.FAULT
    rig.run(0.4)
    rig.judge()
    assert np.abs(rig.velocities[-1]).max() < 1e-9
    with pytest.raises(ControlError, match="emergency stop"):
        rig.rearm()
    rig.kernel.emergency_stop(False)
    rig.run(0.1)
    assert rig.kernel.mode is Mode.FAULT
    rig.rearm()
    assert rig.kernel.mode is Mode.HOLD


def test_emergency_stop_may_ask_for_damping():
    rig = Rig(ControlConfig(emergency_stop_damps=True))
    rig.kernel.emergency_stop(True)
    assert rig.kernel.mode is Mode.DAMP


def test_a_requested_hold_stays_until_resumed():
    rig = Rig()
    follow(rig, 0.6)
    rig.kernel.hold()
    rig.run(0.3)
    with pytest.raises(RejectedChunk) as refused:
        rig.send(wave(rig, 0.1), age=0.1)
    assert refused.value.reason == "held"
    assert np.abs(rig.velocities[-1]).max() < 1e-9
    rig.kernel.resume()
    rig.send(np.tile(rig.measured, (POINTS, 1)), age=0.0)
    assert rig.kernel.mode is Mode.FOLLOW
    rig.judge()


def test_half_speed_takes_twice_the_time_along_the_same_path():
    rig = Rig()
    rig.kernel.set_speed_scale(0.5)
    rig.run(1.0)
    rig.send(np.cumsum(np.full((POINTS, 15), 0.01), axis=0), age=0.0)
    rig.run(1.0)
    rig.judge()
    # 0.5 s along a chunk that moves 0.2 rad/s, less its first point's 0.05 s offset
    assert rig.path[-1, 0] == pytest.approx(0.2 * 0.5, abs=0.003)
    assert rig.velocities[-1][0] == pytest.approx(0.1, abs=1e-3)


def test_speed_zero_stops_on_the_path_and_one_goes_on():
    rig = Rig()
    follow(rig, 1.0)
    rig.kernel.set_speed_scale(0.0)
    rig.run(1.0)
    assert rig.kernel.mode is Mode.HOLD
    assert np.abs(rig.velocities[-1]).max() < 1e-9
    with pytest.raises(RejectedChunk):
        rig.send(wave(rig, 0.1), age=0.1)
    rig.kernel.set_speed_scale(1.0)
    rig.send(np.tile(rig.measured, (POINTS, 1)), age=0.1)
    rig.run(0.6)
    rig.judge()
    assert rig.kernel.mode is Mode.FOLLOW


@pytest.mark.parametrize("scale", [-0.1, 1.1, float("nan"), float("inf")])
def test_an_impossible_speed_scale_is_refused(scale):
    with pytest.raises(ControlError, match="0 to 1"):
        Rig().kernel.set_speed_scale(scale)


def test_the_start_ramp_moves_off_gently_from_the_measured_position():
    rig = Rig(ControlConfig(start_ramp=2.0), start=np.full(15, 0.1), settle=0.0)
    target = np.full((POINTS, 15), 0.5)
    for _ in range(20):
        rig.send(target, age=0.0)
        rig.run(0.2)
    rig.judge()
    np.testing.assert_allclose(rig.path[0], 0.1)
    early = np.abs(np.array(rig.velocities)[:350]).max()
    assert early <= 0.3 * (1 + 1e-9)  # a tenth of the limit while the ramp begins
    np.testing.assert_allclose(rig.path[-1], 0.5, atol=1e-3)


def test_rearming_far_outside_a_limit_or_on_an_old_state_is_refused():
    rig = Rig(armed=False)
    rig.measured = np.zeros(15)
    rig.measured[3] = 3.0
    with pytest.raises(ControlError, match="left_elbow_joint"):
        rig.kernel.rearm(rig.state(), rig.now)
    rig = Rig(armed=False)
    with pytest.raises(ControlError, match="old"):
        rig.kernel.rearm(rig.state(rig.now - 200 * MS), rig.now)


def test_a_margin_that_leaves_a_joint_no_room_is_refused():
    from vla_edge.robots.robot import Joint, Robot

    robot = Robot("tiny", (Joint("a", -0.1, 0.1, 1.0, 1.0),))
    with pytest.raises(RobotError, match="no room"):
        ControlKernel(robot, ("a",), ControlConfig(position_margin=0.2))


def test_an_unknown_joint_is_named_with_the_nearest():
    with pytest.raises(RobotError, match="left_elbow_joint"):
        ControlKernel(g1(), ("left_elbow", *DRIVEN_JOINTS[1:]))


# Whole-chunk check --------------------------------------------------------------------------------------------------


def _bad_chunks(rig):
    good = np.tile(rig.measured, (POINTS, 1))
    nan, inf, far, fast, step = good.copy(), good.copy(), good.copy(), good.copy(), good + 0.6
    nan[7, 2], inf[0, 0] = np.nan, np.inf
    far[:, 3] = np.linspace(0, 2.5, POINTS)
    fast[10:, 4] = 0.4
    return {
        "finite": [dict(positions=nan), dict(positions=inf)],
        "position": [dict(positions=far)],
        "velocity": [dict(positions=fast)],
        "first_step": [dict(positions=step)],
        "joints": [
            dict(positions=good, names=("elbow", *rig.names[1:])),
            dict(positions=good[:, :3], names=rig.names[:3]),
            dict(positions=good, names=(rig.names[1], *rig.names[1:])),
        ],
        "shape": [dict(positions=good[:1]), dict(positions=good[:0]), dict(positions=np.tile(good, (10, 1)))],
        "dt": [dict(positions=good, dt=value) for value in (0.0, -0.05, float("nan"), 1e-9, 1e9)],
        "future": [dict(positions=good, age=-0.2)],
        "stale": [dict(positions=good, age=1.5), dict(positions=good[:4], age=0.21)],
    }


@pytest.mark.parametrize("reason", list(_bad_chunks(Rig())))
def test_an_impossible_chunk_is_rejected_whole_counted_and_the_old_one_kept(reason):
    rig, undisturbed = Rig(), Rig()
    for one in (rig, undisturbed):
        one.send(np.tile(one.measured + 0.05, (POINTS, 1)), age=0.1)
        one.run(0.2)
    rig.measured, keep = np.zeros(15), rig.measured
    cases = _bad_chunks(rig)[reason]
    rig.measured = keep
    for case in cases:
        with pytest.raises(RejectedChunk) as refused:
            rig.send(**case)
        assert refused.value.reason == reason
        rig.run(0.05)
        undisturbed.run(0.05)
    assert rig.kernel.counters.rejected[reason] == len(cases)
    assert rig.kernel.counters.accepted == 1
    assert rig.path.tobytes() == undisturbed.path.tobytes()


def test_a_reordered_chunk_is_rejected():
    rig = Rig()
    rig.run(0.5)
    good = np.tile(rig.measured, (POINTS, 1))
    rig.send(good, age=0.1)
    for age in (0.1, 0.2):
        with pytest.raises(RejectedChunk) as refused:
            rig.send(good, age=age)
        assert refused.value.reason == "order"


def test_a_chunk_that_answers_an_observation_from_before_arming_is_rejected():
    rig = Rig()
    rig.rearm()
    rig.run(0.05)
    good = np.tile(rig.measured, (POINTS, 1))
    with pytest.raises(RejectedChunk, match="before the controller was armed"):
        rig.send(good, age=0.06)
    rig.send(good, age=0.05)


def test_chunk_joints_are_matched_by_name():
    rig = Rig()
    target = np.linspace(-0.05, 0.05, 15)
    order = np.random.default_rng(0).permutation(15)
    rig.send(np.tile(target[order], (POINTS, 1)), names=tuple(rig.names[i] for i in order))
    rig.run(1.0)
    np.testing.assert_allclose(rig.path[-1], target, atol=1e-9)


def test_a_chunk_slightly_beyond_a_limit_is_clipped_to_it():
    start = np.zeros(15)
    start[3] = 2.0
    rig = Rig(start=start)
    target = start.copy()
    target[3] = 2.15
    rig.send(np.tile(target, (POINTS, 1)))
    rig.run(1.0)
    rig.judge()
    assert rig.path[-1, 3] == pytest.approx(2.0944 - 0.02, abs=1e-3)


def test_chunk_object_is_not_kept():
    rig = Rig()
    chunk = rig.chunk(np.tile(rig.measured + 0.05, (POINTS, 1)))
    assert isinstance(chunk, ActionChunk)
    rig.kernel.accept_chunk(chunk, rig.now)
    chunk.positions.setflags(write=True)
    np.asarray(chunk.positions)[:] = np.nan
    rig.run(0.5)
    rig.judge()
