import numpy as np
import pytest

from vla_edge.sim.episode import JITTER, NEAR_COLOURS, SLOTS, draw_episode
from vla_edge.sim.tasks import TaskError, Goal

SEEDS = range(200)


@pytest.mark.parametrize("tier", ["touch", "hard"])
def test_same_seed_same_episode_and_seeds_differ(tier):
    assert draw_episode(7, tier) == draw_episode(7, tier)
    assert len({draw_episode(seed, tier).objects for seed in SEEDS}) == len(SEEDS)


def test_touch_scenes_hold_each_colour_once_and_both_shapes():
    for seed in SEEDS:
        objects = draw_episode(seed).objects
        assert sorted(item.colour for item in objects) == ["blue", "green", "red", "yellow"]
        assert {item.shape for item in objects} == {"cube", "ball"}


def test_the_same_picture_can_be_asked_for_eight_things():
    episode = draw_episode(3)
    assert len(set(episode.goals)) == 8 and episode.goal in episode.goals
    assert episode.chance == 1 / 8


def test_every_touch_goal_is_asked_for():
    assert len({draw_episode(seed).goal for seed in range(400)}) == 16


@pytest.mark.parametrize("tier", ["touch", "hard"])
def test_objects_stand_in_their_slots_and_apart(tier):
    for seed in SEEDS:
        centres = np.array([item.position[:2] for item in draw_episode(seed, tier).objects])
        assert np.abs(centres - np.array(SLOTS[tier])).max() <= JITTER[tier]
        gaps = np.linalg.norm(centres[:, None] - centres[None], axis=-1) + np.eye(len(centres))
        assert gaps.min() > 0.08


def test_every_hard_object_has_a_look_alike_beside_it():
    near = {frozenset(pair) for pair in NEAR_COLOURS}
    for seed in SEEDS:
        objects = draw_episode(seed, "hard").objects
        assert len({(item.colour, item.shape) for item in objects}) == 6
        for slot, item in enumerate(objects):
            row, column = divmod(slot, 3)
            beside = [o for s, o in enumerate(objects) if abs(s // 3 - row) + abs(s % 3 - column) == 1]
            assert any(
                (other.colour == item.colour and other.shape != item.shape)
                or (other.shape == item.shape and frozenset((other.colour, item.colour)) in near)
                for other in beside
            )


def test_a_goal_about_an_absent_object_is_a_named_error():
    episode = draw_episode(0)
    absent = next(Goal("red", shape, "left") for shape in ("cube", "ball") if f"red {shape}" not in
                  {item.name for item in episode.objects})
    with pytest.raises(TaskError, match=f"no red {absent.shape} on the table"):
        episode.object_index(absent)
    with pytest.raises(TaskError, match="no tier"):
        draw_episode(0, "extreme")
