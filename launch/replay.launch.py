"""Plays a bag into topics, or evaluates an engine on it: ros2 launch vla_edge replay.launch.py bag:=... mode:=evaluate."""

from vla_edge.nodes.launching import arguments, description, ends_with, node, values
from vla_edge.nodes.replay_node import PARAMETERS


def actions(context):
    replay = node("replay_node", "replay", [values(PARAMETERS, context)])
    return [ends_with(replay), replay]


def generate_launch_description():
    return description(arguments(PARAMETERS), actions)
