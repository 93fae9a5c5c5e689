"""What the robot's joints were last measured to do, and how long ago."""

from __future__ import annotations

import numpy as np

from vla_edge.control.watchdog import Watchdog
from vla_edge.types import JointState


class Measurement:
    """The newest joint state in command order.

    Args:
        joint_names: J names.
        timeout_ns: age that means a measurement is stale. future_ns: how far in the future a stamp may lie.

    Attributes:
        position: (J,) rad. torque: (J,) N.m, zero where it was never measured. Both change in place.
        freshness: fed by stamps that are newer than the last one's.
    """

    def __init__(self, joint_names: tuple[str, ...], timeout_ns: int, future_ns: int):
        joints = len(joint_names)
        self._names, self._future_ns = joint_names, future_ns
        self._order_of: tuple[str, ...] = ()
        self._order = np.arange(joints)
        self._finite = np.zeros(joints, bool)
        self.position, self.torque = np.zeros(joints), np.zeros(joints)
        self.freshness = Watchdog(timeout_ns)

    def update(self, state: JointState, now_ns: int) -> bool | None:
        """`take` for a state that names its joints, which may be more and in another order."""
        names = state.names
        if names is not self._order_of and names != self._order_of:
            index = {name: i for i, name in enumerate(names)}
            order = [index.get(name, -1) for name in self._names]
            if min(order) < 0:
                return None
            self._order, self._order_of = np.array(order), names
        return self.take(state.position[self._order], state.effort[self._order], state.stamp_ns, now_ns)

    def take(self, position: np.ndarray, torque: np.ndarray, stamp_ns: int, now_ns: int) -> bool | None:
        """Take (J,) rad and N.m; a stamp of 0 counts as now.

        Returns whether it is fresh, None when it is refused: not finite, or from the future. A torque that is not
        finite counts as not measured.
        """
        stamp_ns = stamp_ns or now_ns
        if not np.isfinite(position, self._finite).all() or stamp_ns > now_ns + self._future_ns:
            return None
        fed = self.freshness.fed_ns
        if fed is not None and stamp_ns < fed:
            return False
        self.position[:] = position
        np.copyto(self.torque, torque, where=np.isfinite(torque, self._finite))
        if stamp_ns == fed:
            return False
        self.freshness.feed(stamp_ns)
        return True
