"""Who touched what first: success and failure, from the state of the physics and nothing else.

A hand touches an object when its geometry is in contact with it, or its fingertip is within reach of the object's
touch point: the middle of the top, where a hand coming from above arrives. An object is at the named side when its
centre went far enough to that side of where it stood, and what touched anything first was the named hand, that object.
"""

from __future__ import annotations

import numpy as np

from vla_edge.sim.episode import Episode
from vla_edge.sim.tasks import HANDS, PLACES, Goal, Outcome

TOLERANCE_M = {"touch": 0.04, "hard": 0.025}
"""Fingertip to touch point for success, by tier."""
NEAR_M = 0.04
"""Fingertip to the touch point of another object, from where on that one counts as touched."""
PUSH_M = 0.05
"""How far to the side an object has to go."""
SIDES = {"left": 1.0, "right": -1.0}
"""Sense of y, in the world, of the places."""


class Judge:
    """Watches one episode.

    Args:
        episode: what stands on the table.
    """

    def __init__(self, episode: Episode):
        self._episode = episode
        count = len(episode.objects)
        self._touch_height = np.array([item.half_height for item in episode.objects])
        self._tolerance = TOLERANCE_M[episode.tier]
        self._contact_time = np.full((2, count), np.inf)
        self._reach_time = np.full((2, count), np.inf)
        self._least = np.full((2, count), np.inf)
        self._start_y = np.array([item.position[1] for item in episode.objects])
        self._push_time = np.full((len(PLACES), count), np.inf)
        self._way_left = np.full((len(PLACES), count), PUSH_M)
        self._time = 0.0

    def watch(self, time_s: float, tips: np.ndarray, centres: np.ndarray, contacts: np.ndarray) -> None:
        """One moment.

        Args:
            time_s: since the reset.
            tips: (2, 3) m, left and right fingertip.
            centres: (N, 3) m, of the objects.
            contacts: (2, N) bool, hand in contact with object.
        """
        points = centres.copy()
        points[:, 2] += self._touch_height
        distance = np.sqrt(((tips[:, None] - points[None]) ** 2).sum(-1))
        self._time = time_s
        np.minimum(self._least, distance, out=self._least)
        touching = contacts | (distance < NEAR_M)
        if touching.any():
            self._contact_time[touching] = np.minimum(self._contact_time[touching], time_s)
            reached = distance < self._tolerance
            self._reach_time[reached] = np.minimum(self._reach_time[reached], time_s)
        moved = centres[:, 1] - self._start_y
        way_left = PUSH_M - np.outer([SIDES[place] for place in PLACES], moved)
        np.minimum(self._way_left, way_left, out=self._way_left)
        if way_left.min() <= 0:
            there = way_left <= 0
            self._push_time[there] = np.minimum(self._push_time[there], time_s)

    def outcome(self, goal: Goal | None = None) -> Outcome:
        """How `goal`, the episode's own by default, stands.

        Raises:
            TaskError: the goal speaks of an object that is not there.
        """
        goal = goal or self._episode.goal
        hand, item = HANDS.index(goal.hand), self._episode.object_index(goal)
        first = self._first_touch()
        wrong = self._contact_time.copy()
        wrong[hand, item] = np.inf
        wrong_time, right_time = wrong.min(), self._contact_time[hand, item]
        # Touches of the same moment go to the named pair: nothing else was touched before it.
        wrong_first = bool(np.isfinite(wrong_time) and wrong_time < right_time)
        if goal.place is None:
            reached, least = self._reach_time[hand, item], self._least[hand, item]
        else:
            place = PLACES.index(goal.place)
            reached, least = self._push_time[place, item], max(self._way_left[place, item], 0.0)
            wrong_first = wrong_first or bool(np.isfinite(reached) and right_time > reached)
        success = bool(reached <= self._episode.time_limit_s and not wrong_first)
        return Outcome(goal, success, wrong_first, first, float(reached if success else self._time), float(least))

    def _first_touch(self) -> str | None:
        if not np.isfinite(self._contact_time).any():
            return None
        hand, item = np.unravel_index(int(self._contact_time.argmin()), self._contact_time.shape)
        return f"{HANDS[hand]} hand: {self._episode.objects[item].name}"
