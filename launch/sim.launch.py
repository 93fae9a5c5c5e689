"""The simulated G1 at its table: ros2 launch vla_edge sim.launch.py tier:=touch."""

from vla_edge.nodes.launching import arguments, description, node, values
from vla_edge.nodes.sim_node import PARAMETERS


def actions(context):
    return [node("sim_node", "sim", [values(PARAMETERS, context)])]


def generate_launch_description():
    return description(arguments(PARAMETERS), actions)
