"""Notices that the robot does not do as it is told: a contact, a jam, a motor at its end.

Each joint has a band of tracking error (command minus measurement) and of measured torque. A joint outside one of them
for longer than the reflex time trips; it has calmed down once it is within half of both.
"""

from __future__ import annotations

import numpy as np

_CALM = 0.5
"""Share of a band within which a tripped joint counts as calm."""


class Reflex:
    """Watches J joints, tick by tick.

    Args:
        tracking_error: rad, 0 not to watch it.
        torque: (J,) N.m, 0 for a joint whose torque is not watched.
        patience_ns: ns outside a band that trip.
    """

    def __init__(self, joint_names: tuple[str, ...], tracking_error: float, torque: np.ndarray, patience_ns: int):
        self._names, self._patience_ns = joint_names, patience_ns
        error = np.full(len(joint_names), tracking_error)
        self._bands = np.where(np.stack([error, torque]) > 0.0, np.stack([error, torque]), np.inf)
        self._values, self._out = np.zeros_like(self._bands), np.zeros(self._bands.shape, bool)
        self._since_ns: int | None = None
        self.tripped = False

    def forget(self) -> None:
        """Begin anew."""
        self._since_ns, self.tripped = None, False

    def watch(self, command: np.ndarray, measured: np.ndarray, torque: np.ndarray, now_ns: int) -> str:
        """What has just tripped, in words, or nothing; (J,) rad, rad, N.m.

        Sets `tripped`, and clears it when every joint is calm again.
        """
        values, out = self._values, self._out
        np.subtract(command, measured, values[0])
        values[1] = torque
        np.absolute(values, values)
        if self.tripped:
            np.greater(values, _CALM * self._bands, out)
            self.tripped = bool(np.count_nonzero(out))
            return ""
        np.greater(values, self._bands, out)
        if not np.count_nonzero(out):
            self._since_ns = None
            return ""
        if self._since_ns is None:
            self._since_ns = now_ns
        if now_ns - self._since_ns < self._patience_ns:
            return ""
        self._since_ns, self.tripped = None, True
        kind, joint = np.unravel_index(np.argmax(values / self._bands), values.shape)
        name, value, band = self._names[joint], values[kind, joint], self._bands[kind, joint]
        if kind == 0:
            why = "something holds it, or its commands do not arrive"
            return f"{name} is {value:.2f} rad from its command, more than {band:g}; {why}"
        return f"{name} needs {value:.1f} N.m, more than {band:g}; something holds it"
