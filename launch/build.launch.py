"""Builds an engine bundle: ros2 launch vla_edge build.launch.py checkpoint:=... recipe:=int8 backend:=auto."""

from vla_edge.nodes.build_node import PARAMETERS
from vla_edge.nodes.launching import arguments, description, ends_with, node, values
from vla_edge.resources import shipped_checkpoint


def actions(context):
    build = node("build_node", "build", [values(PARAMETERS, context)])
    return [ends_with(build), build]


def generate_launch_description():
    return description(arguments(PARAMETERS, {"checkpoint": shipped_checkpoint()}), actions)
