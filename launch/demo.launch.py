"""The whole way, and back by itself: build the engine, bring robot, policy and controller up, carry instructions out,
record, evaluate, report. Its exit code is 0 when the demonstration passed.

ros2 launch vla_edge demo.launch.py
"""

from pathlib import Path

from launch.actions import DeclareLaunchArgument

from vla_edge.nodes.build_node import PARAMETERS as BUILD
from vla_edge.nodes.launching import (
    arguments,
    description,
    ends_with,
    flag,
    managed,
    node,
    parameter_file,
    recorder,
    values,
)
from vla_edge.resources import shipped_checkpoint


def actions(context):
    from vla_edge.engine.build import default_output

    said = context.launch_configurations
    build = values(BUILD, context)
    bundle = build["output"] or str(default_output(Path(build["checkpoint"]), build["recipe"], build["backend"]))
    build_node = node("build_node", "build", [{**build, "output": bundle}])
    file, out = said["params"], Path(said["out"])
    bag = str(out / "demo")
    record = flag(context, "record")

    def robot():
        demo = {"output": str(out), "bundle": bundle, "bag": bag if record else ""}
        if flag(context, "compare"):
            demo["checkpoint"] = build["checkpoint"]
        conductor = node("demo_node", "demo", [file, demo])
        return [
            node("sim_node", "sim", [file, {"tier": said["tier"]}]),
            *managed("controller_node", "controller", [file]),
            *managed("vla_node", "vla", [file, {"bundle": bundle}]),
            *([recorder(bag, file, bundle)] if record else []),
            ends_with(conductor),
            conductor,
        ]

    return [ends_with(build_node, robot), build_node]


def generate_launch_description():
    return description(
        [
            *arguments(BUILD, {"checkpoint": shipped_checkpoint()}),
            DeclareLaunchArgument("out", default_value="out/demo", description="directory of report, bag and film"),
            DeclareLaunchArgument("tier", default_value="touch", description="difficulty of the scenes"),
            DeclareLaunchArgument("params", default_value=parameter_file("demo.yaml"), description="node parameters"),
            DeclareLaunchArgument("record", default_value="true", description="record, and evaluate the recording"),
            DeclareLaunchArgument("compare", default_value="false",
                                  description="evaluate against full precision too (needs torch, takes longer)"),
        ],
        actions,
    )
