"""The judge is held to hand-made positions; the world's own physics comes in test_world.py."""

import numpy as np
import pytest

from vla_edge.sim.episode import draw_episode
from vla_edge.sim.judge import Judge
from vla_edge.sim.tasks import Goal

FAR = np.array((0.0, 0.0, 2.0))


class Table:
    def __init__(self, tier="touch", seed=5):
        self.episode = draw_episode(seed, tier)
        self.judge = Judge(self.episode)
        self.centres = np.array([item.position for item in self.episode.objects])
        self.time = 0.0

    def top(self, index):
        return self.centres[index] + (0, 0, self.episode.objects[index].half_height)

    def goal(self, index, hand, place=None):
        item = self.episode.objects[index]
        return Goal(item.colour, item.shape, hand, place)

    def watch(self, left=FAR, right=FAR, contact=None, seconds=0.1):
        self.time += seconds
        contacts = np.zeros((2, len(self.centres)), bool)
        if contact is not None:
            contacts[contact] = True
        self.judge.watch(self.time, np.array((left, right)), self.centres, contacts)


@pytest.fixture
def table():
    return Table()


def test_nothing_touched_is_neither_success_nor_wrong(table):
    table.watch()
    outcome = table.judge.outcome()
    assert (outcome.success, outcome.wrong_first, outcome.touched) == (False, False, None)


@pytest.mark.parametrize("distance, success", [(0.039, True), (0.041, False)])
def test_success_is_the_named_fingertip_within_four_centimetres_of_the_top(table, distance, success):
    table.watch(left=table.top(1) + (0, 0, distance))
    outcome = table.judge.outcome(table.goal(1, "left"))
    assert outcome.success is success
    assert outcome.min_distance_m == pytest.approx(distance)


def test_the_other_hand_does_not_count_and_is_wrong(table):
    table.watch(right=table.top(1))
    outcome = table.judge.outcome(table.goal(1, "left"))
    assert not outcome.success and outcome.wrong_first
    assert table.judge.outcome(table.goal(1, "right")).success


def test_touching_something_else_first_spoils_it(table):
    table.watch(left=table.top(0))
    table.watch(left=table.top(1))
    assert table.judge.outcome(table.goal(1, "left")).wrong_first
    assert not table.judge.outcome(table.goal(1, "left")).success
    assert table.judge.outcome(table.goal(0, "left")).success


def test_touching_something_else_afterwards_does_not(table):
    table.watch(left=table.top(1))
    table.watch(left=table.top(0))
    assert table.judge.outcome(table.goal(1, "left")).success


def test_contact_of_the_hand_with_another_object_is_a_touch(table):
    table.watch(left=table.top(1) + (0, 0, 0.2), contact=(0, 3))
    table.watch(left=table.top(1))
    outcome = table.judge.outcome(table.goal(1, "left"))
    assert outcome.wrong_first and outcome.touched == f"left hand: {table.episode.objects[3].name}"


def test_too_late_is_no_success(table):
    table.watch(seconds=table.episode.time_limit_s)
    table.watch(left=table.top(1))
    assert not table.judge.outcome(table.goal(1, "left")).success


def test_the_hard_tier_wants_two_and_a_half_centimetres():
    table = Table("hard")
    table.watch(left=table.top(1) + (0, 0, 0.03))
    assert not table.judge.outcome(table.goal(1, "left")).success
    table.watch(left=table.top(1) + (0, 0, 0.024))
    assert table.judge.outcome(table.goal(1, "left")).success


@pytest.mark.parametrize("place, sign", [("left", 1), ("right", -1)])
def test_a_push_succeeds_when_the_object_went_five_centimetres_to_the_named_side(place, sign):
    table = Table("hard")
    goal = table.goal(1, "left", place)
    table.watch(contact=(0, 1))
    table.centres[1, 1] += sign * 0.049
    table.watch()
    assert not table.judge.outcome(goal).success
    assert table.judge.outcome(goal).min_distance_m == pytest.approx(0.001)
    table.centres[1, 1] += sign * 0.002
    table.watch()
    assert table.judge.outcome(goal).success
    assert not table.judge.outcome(table.goal(1, "right", place)).success


def test_an_object_that_another_one_moved_was_not_pushed_by_the_hand():
    table = Table("hard")
    table.watch(contact=(0, 0))
    table.centres[1, 1] -= 0.06
    table.watch()
    outcome = table.judge.outcome(table.goal(1, "left", "right"))
    assert not outcome.success and outcome.wrong_first
