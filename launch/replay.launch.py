"""Plays a bag into topics, or evaluates an engine on it.

ros2 launch vla_edge replay.launch.py bag:=... mode:=evaluate
"""

from vla_edge.nodes.launching import (
    arguments,
    description,
    ends_with,
    flag,
    node,
    record_arguments,
    recorder,
    values,
)
from vla_edge.nodes.replay_node import PARAMETERS


def actions(context):
    said = values(PARAMETERS, context)
    replay = node("replay_node", "replay", [said])
    made = [ends_with(replay), replay]
    if flag(context, "record"):
        made.insert(1, recorder(context.launch_configurations["recording"], bundle=said["engine"]))
    return made


def generate_launch_description():
    return description([*arguments(PARAMETERS), *record_arguments()], actions)
