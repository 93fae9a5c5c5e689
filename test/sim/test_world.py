import pickle

import numpy as np
import pytest
from driving import follow

from vla_edge.robots.g1 import DRIVEN_JOINTS, g1
from vla_edge.sim.world import HOME, SimulationError, TabletopWorld
from vla_edge.types import JointCommand


def command(position, names=DRIVEN_JOINTS):
    zeros = np.zeros(len(names))
    return JointCommand(0, tuple(names), np.asarray(position, float), zeros, zeros)


def test_joints_and_limits_are_those_of_the_robot_table(world):
    world.reset(0)
    robot = {joint.name: joint for joint in g1().joints}
    assert world.joint_names == DRIVEN_JOINTS
    for i, name in enumerate(DRIVEN_JOINTS):
        assert world.physics.lower[i] == pytest.approx(robot[name].lower, abs=1e-3)
        assert world.physics.upper[i] == pytest.approx(robot[name].upper, abs=1e-3)


def test_gravity_is_compensated_so_home_is_held(world):
    world.reset(3, start_sigma=0.0)
    world.step(2.0)
    assert np.abs(world.joint_state().position - HOME).max() < 0.01


@pytest.mark.parametrize("tier", ["touch", "hard"])
def test_same_seed_and_commands_give_the_same_bits_however_time_is_cut(world, tier):
    target = HOME + 0.3 * np.sin(np.arange(15))
    results = []
    for pieces in ([0.5], [0.002] * 250, [0.004, 0.496]):
        world.reset(11, tier)
        world.apply(command(target))
        for piece in pieces:
            world.step(piece)
        results.append((world.joint_state().position, world.physics.data.qpos.copy(), world.outcome()))
    for position, qpos, outcome in results[1:]:
        assert np.array_equal(position, results[0][0]) and np.array_equal(qpos, results[0][1])
        assert outcome == results[0][2]


def test_drawing_does_not_change_what_happens(world):
    ends = []
    for draws in (False, True):
        world.reset(4, "hard")
        world.apply(command(HOME + 0.2))
        for _ in range(20):
            world.step(0.02)
            if draws:
                world.render(96, 96)
                world.project(np.array((0.4, 0.0, 0.75)), 96, 96)
        ends.append(world.physics.data.qpos.copy())
    assert np.array_equal(*ends)


def test_time_grows_by_what_was_stepped_and_survives_a_reset(world):
    world.reset(0)
    before = world.time_ns
    world.step(0.03)
    assert world.time_ns - before == 30_000_000 and world.elapsed_s == pytest.approx(0.03)
    assert world.joint_state().stamp_ns == world.time_ns
    world.reset(1)
    assert world.time_ns - before == 30_000_000 and world.elapsed_s == 0


def test_commands_follow_names_not_order(world):
    world.reset(0, start_sigma=0.0)
    names = tuple(reversed(DRIVEN_JOINTS))
    target = HOME + np.linspace(-0.1, 0.1, 15)
    world.apply(command(target[::-1], names))
    world.step(1.5)
    assert np.abs(world.joint_state().position - target).max() < 0.02


def test_a_part_of_the_joints_can_be_driven(world):
    world.reset(0, start_sigma=0.0)
    world.apply(command([0.4], ["waist_yaw_joint"]))
    world.step(1.0)
    position = world.joint_state().position
    assert position[-1] == pytest.approx(0.4, abs=0.01)
    assert np.abs(position[:-1] - HOME[:-1]).max() < 0.02


def test_targets_beyond_the_limits_are_held_at_them(world):
    world.reset(0)
    world.apply(command(np.full(15, 9.0)))
    world.step(1.5)
    assert (world.joint_state().position <= world.physics.upper + 0.02).all()


def test_feed_forward_velocity_takes_the_lag_out_of_tracking(world):
    lags = []
    for feed in (0.0, 1.0):
        world.reset(0, start_sigma=0.0)
        for k in range(300):
            target = HOME.copy()
            target[3] += 1.5 * (k + 1) * 0.002
            velocity = np.zeros(15)
            velocity[3] = 1.5 * feed
            world.apply(JointCommand(0, DRIVEN_JOINTS, target, velocity, np.zeros(15)))
            world.step(0.002)
        lags.append(abs(world.joint_state().position[3] - target[3]))
    assert lags[1] < 0.01 < lags[0]


def test_bad_commands_are_named_errors_and_change_nothing(world):
    world.reset(0)
    before = world.physics.data.ctrl.copy()
    with pytest.raises(SimulationError, match="not finite"):
        world.apply(command(np.full(15, np.nan)))
    with pytest.raises(SimulationError, match="left_knee_joint"):
        world.apply(command([0.0], ["left_knee_joint"]))
    with pytest.raises(SimulationError, match="multiples of 0.002"):
        world.step(0.0015)
    assert np.array_equal(world.physics.data.ctrl, before)


def test_a_world_without_a_scene_says_so():
    with pytest.raises(SimulationError, match="call reset"):
        TabletopWorld().joint_state()
    with pytest.raises(SimulationError, match="call reset"):
        TabletopWorld().outcome()


@pytest.mark.parametrize("tier", ["touch", "hard"])
def test_a_snapshot_sent_elsewhere_draws_and_continues_the_same(world, tier):
    world.reset(21, tier)
    world.apply(command(HOME + 0.15))
    world.step(0.2)
    snapshot = pickle.loads(pickle.dumps(world.snapshot()))
    picture = world.render(96, 96)
    other = TabletopWorld()
    other.reset(5, tier)
    other.restore(snapshot)
    assert other.time_ns == world.time_ns
    assert np.array_equal(other.render(96, 96), picture)
    assert np.array_equal(other.joint_state().position, world.joint_state().position)
    for each in (world, other):
        each.step(0.2)
    assert np.allclose(other.joint_state().position, world.joint_state().position, atol=1e-6)
    with pytest.raises(SimulationError, match="no episode"):
        other.outcome()
    other.close()


def test_success_comes_from_the_physics_not_from_the_command(world):
    episode = world.reset(2)
    assert not world.finished()
    # Told to be there, but not there yet: commands alone decide nothing.
    world.apply(command(world.physics.upper))
    assert not world.outcome().success
    follow(world, HOME, HOME)
    assert world.outcome(episode.goals[0]).min_distance_m > 0.05


def test_asking_for_something_else_keeps_the_scene(world):
    episode = world.reset(6)
    other = next(goal for goal in episode.goals if goal != episode.goal)
    asked = world.ask(other, "do the other thing")
    assert asked.objects == episode.objects and world.episode.goal == other
    assert world.episode.instruction == "do the other thing"


def test_objects_of_the_hard_tier_lie_still_until_touched(world):
    world.reset(9, "hard")
    before = world.physics.centres().copy()
    world.step(3.0)
    assert np.abs(world.physics.centres() - before).max() < 0.002


def test_a_torque_pushes_its_joint_away_until_it_is_taken_off(world):
    world.reset(3, start_sigma=0.0)
    elbow = DRIVEN_JOINTS.index("right_elbow_joint")
    for torque, pushed in ((3.0, True), (0.0, False)):
        world.disturb("right_elbow_joint", torque)
        world.step(1.5)
        away = np.abs(world.joint_state().position - HOME)
        assert (away[elbow] > 0.02) == pushed and np.delete(away, elbow).max() < 0.02
    with pytest.raises(SimulationError, match="tail_joint"):
        world.disturb("tail_joint", 1.0)
