import pytest

from vla_edge.sim.tasks import (
    COLOURS,
    Goal,
    TaskError,
    goal_id,
    goals,
    parse_instruction,
    vocabulary,
)


def test_touch_tier_has_at_least_twelve_goals_with_four_wordings_each():
    assert len(goals("touch")) == 16
    assert all(len(set(goal.wordings)) >= 4 for goal in goals())


def test_vocabulary_covers_every_word_of_every_instruction_of_both_tiers():
    words = set(vocabulary())
    assert list(vocabulary()) == sorted(words)
    for goal in goals("touch") + goals("hard"):
        for text in goal.wordings:
            assert words.issuperset(text.split()), text


def test_no_two_goals_share_an_instruction():
    texts = [text for goal in goals() for text in goal.wordings]
    assert len(texts) == len(set(texts))


def test_an_instruction_names_colour_shape_hand_and_place():
    for goal in goals():
        for text in goal.wordings:
            assert {goal.colour, goal.shape, goal.hand}.issubset(text.split())
            assert goal.place is None or text.split().count(goal.place) >= 1


def test_every_instruction_is_understood_as_its_own_goal():
    for goal in goals():
        for text in goal.wordings:
            assert parse_instruction(f"  {text.capitalize()}. ") == goal


def test_goal_ids_are_stable_positions_and_touch_comes_first():
    assert [goal_id(goal) for goal in goals("touch")] == list(range(16))
    assert goals()[goal_id(Goal("purple", "ball", "left", "right"))].name == "purple ball to the right, left hand"


def test_unknown_tier_and_unknown_wording_are_named_errors():
    with pytest.raises(TaskError, match="no tier 'easy'"):
        goals("easy")
    with pytest.raises(TaskError, match="make coffee"):
        parse_instruction("make coffee")


def test_hard_colours_hold_the_touch_colours():
    assert set(COLOURS["touch"]) < set(COLOURS["hard"])
