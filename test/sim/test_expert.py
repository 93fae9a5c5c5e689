import numpy as np
import pytest

from vla_edge.sim.expert import DT, PEAK_SPEED
from vla_edge.sim.world import HOME


@pytest.mark.parametrize("tier", ["touch", "hard"])
def test_expert_reaches_its_goal_on_twenty_seeds(world, carry_out, tier):
    outcomes = []
    for seed in range(20):
        world.reset(seed, tier)
        outcomes.append(carry_out())
    assert sum(outcome.success for outcome in outcomes) >= 19, [o for o in outcomes if not o.success]


@pytest.mark.parametrize("hand", ["left", "right"])
def test_either_hand_reaches_every_slot_of_the_touch_tier(world, expert, hand):
    for seed in range(5):
        episode = world.reset(seed)
        for goal in (goal for goal in episode.goals if goal.hand == hand):
            end = expert.plan(48, goal)[-1]
            tip = expert.fingertip(end, goal)
            assert np.linalg.norm(tip - world.touch_point(goal)) < 0.022


def test_plans_are_within_limits_speed_limited_and_begin_here(world, expert):
    for seed in range(10):
        world.reset(seed, "hard" if seed % 2 else "touch")
        plan = expert.plan(32)
        assert plan.shape == (32, 15)
        assert (plan >= world.physics.lower).all() and (plan <= world.physics.upper).all()
        speed = np.abs(np.diff(np.vstack((world.joint_state().position, plan)), axis=0)) / DT
        assert speed.max() <= PEAK_SPEED + 1e-9


def test_the_expert_has_no_memory_and_leaves_the_world_alone(world, expert):
    world.reset(4)
    before = (world.physics.data.qpos.copy(), world.physics.data.ctrl.copy(), world.time_ns)
    first = expert.plan(32)
    expert.plan(32, world.episode.goals[0])
    assert np.array_equal(expert.plan(32), first)
    # The plan from its own tenth row goes on as the plan did.
    assert np.allclose(expert.plan(22, start=first[9]), first[10:], atol=1e-3)
    after = (world.physics.data.qpos.copy(), world.physics.data.ctrl.copy(), world.time_ns)
    assert all(np.array_equal(a, b) for a, b in zip(before, after))


def test_plans_in_a_batch_are_the_plans_one_by_one(world, expert):
    for tier in ("touch", "hard"):
        world.reset(8, tier)
        starts = HOME + np.random.default_rng(0).normal(0, 0.1, (6, 15))
        batch = expert.plan_batch(starts, [expert.situation()] * 6, 20)
        for start, plan in zip(starts, batch):
            assert np.allclose(expert.plan(20, start=start), plan, atol=2e-3)


def test_it_holds_still_once_it_is_there(world, expert, carry_out):
    world.reset(3)
    carry_out(3.0)
    before = world.joint_state().position
    carry_out(1.0)
    assert np.abs(world.joint_state().position - before).max() < 0.02
    hand = ("left", "right").index(world.episode.goal.hand)
    assert np.linalg.norm(world.fingertips()[hand] - world.touch_point()) < 0.03


def test_the_idle_arm_eases_home(world, expert):
    world.reset(3)
    goal = next(goal for goal in world.episode.goals if goal.hand == "left")
    start = HOME.copy()
    start[7:14] += 0.3
    plan = expert.plan(48, goal, start)
    assert np.abs(plan[-1, 7:14] - HOME[7:14]).max() < 0.01


def test_same_picture_other_instruction_other_motion(world, expert):
    episode = world.reset(12)
    ends = np.array([expert.plan(32, goal)[-1] for goal in episode.goals])
    apart = np.abs(ends[:, None] - ends[None]).max(-1) + np.eye(len(ends))
    assert apart.min() > 0.1
