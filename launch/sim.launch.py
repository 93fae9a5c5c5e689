"""The simulated G1 at its table: ros2 launch vla_edge sim.launch.py tier:=touch."""

from vla_edge.nodes.launching import arguments, description, flag, node, record_arguments, recorder, values
from vla_edge.nodes.sim_node import PARAMETERS


def actions(context):
    made = [node("sim_node", "sim", [values(PARAMETERS, context)])]
    if flag(context, "record"):
        made.append(recorder(context.launch_configurations["recording"]))
    return made


def generate_launch_description():
    return description([*arguments(PARAMETERS), *record_arguments()], actions)
