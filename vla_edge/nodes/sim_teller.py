"""What the simulated world says of its episodes: what was asked for, and how it went."""

from __future__ import annotations

import json

from std_msgs.msg import Bool, String

from vla_edge.nodes import qos


class SimTeller:
    """Publishes instruction, episode and outcome.

    Args:
        node: whose topics they are.
    """

    def __init__(self, node):
        self._instruction = node.create_publisher(String, "instruction", qos.LATCHED)
        self._episode = node.create_publisher(String, "~/episode", qos.LATCHED)
        self._outcome = node.create_publisher(String, "~/outcome", qos.LATCHED)
        self._success = node.create_publisher(Bool, "~/success", qos.LATCHED)
        self._told: dict[str, object] = {}

    def begin(self, episode) -> None:
        """A scene was set up."""
        self._told = {
            "seed": episode.seed, "tier": episode.tier, "goal": episode.goal.name, "instruction": episode.instruction,
            "time_limit_s": episode.time_limit_s,
        }  # fmt: skip
        self._episode.publish(String(data=json.dumps(self._told)))
        self._instruction.publish(String(data=episode.instruction))

    def end(self, outcome) -> None:
        """It is decided."""
        told = self._told | {
            "success": bool(outcome.success), "wrong_first": bool(outcome.wrong_first), "touched": outcome.touched,
            "seconds": float(outcome.time_s), "min_distance_m": float(outcome.min_distance_m),
        }  # fmt: skip
        self._outcome.publish(String(data=json.dumps(told)))
        self._success.publish(Bool(data=bool(outcome.success)))
