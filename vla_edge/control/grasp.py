"""Fingers close until they meet something: then they stay, instead of pushing on to where they were sent.

A joint that closes stops where its measured torque reaches its grasp torque in the closing direction. It stays there
until it is told to open; a policy that says "close" for ever holds what it has without crushing it.
"""

from __future__ import annotations

import numpy as np

_OPENING = 0.02
"""rad towards open from which the hold ends."""


class Grasp:
    """Limits the reference of J joints.

    Args:
        torque: (J,) N.m, its sign the direction in which the joint closes; 0 for a joint that is no finger.
    """

    def __init__(self, torque: np.ndarray):
        self._fingers = np.flatnonzero(torque)
        self._sign = np.sign(torque[self._fingers])
        self._torque = np.abs(torque[self._fingers])
        self._held_at = np.full(len(self._fingers), np.inf)

    @property
    def fingers(self) -> int:
        """How many joints are fingers."""
        return len(self._fingers)

    @property
    def holding(self) -> int:
        """How many fingers hold something."""
        return int(np.isfinite(self._held_at).sum())

    def release(self) -> None:
        """Forget what is held."""
        self._held_at[:] = np.inf

    def limit(self, reference: np.ndarray, command: np.ndarray, torque: np.ndarray) -> None:
        """Keep a reference (J,) rad, in place, from closing further than fingers that hold something.

        Args:
            command: (J,) rad, running. torque: (J,) N.m, measured.
        """
        fingers, sign = self._fingers, self._sign
        wanted, now = sign * reference[fingers], sign * command[fingers]
        meets = (sign * torque[fingers] >= self._torque) & (wanted > now) & np.isinf(self._held_at)
        np.copyto(self._held_at, now, where=meets)
        np.copyto(self._held_at, np.inf, where=wanted < self._held_at - _OPENING)
        reference[fingers] = sign * np.minimum(wanted, self._held_at)
