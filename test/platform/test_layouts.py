"""The layouts for Foxglove and PlotJuggler show topics that are recorded, and fields that their messages have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

from rosbags.typesys import Stores, get_typestore

from vla_edge.robots.g1 import DRIVEN_JOINTS

LAYOUTS = Path(__file__).resolve().parents[2] / "config" / "layouts"
# As the recorder names them; raw pictures become compressed ones.
TYPES = {
    "/head/image/compressed": "sensor_msgs/msg/CompressedImage", "/joint_states": "sensor_msgs/msg/JointState",
    "/joint_command": "sensor_msgs/msg/JointState", "/action_chunk": "trajectory_msgs/msg/JointTrajectory",
    "/instruction": "std_msgs/msg/String", "/diagnostics": "diagnostic_msgs/msg/DiagnosticArray",
}  # fmt: skip


def fields(msgtype):
    return {name: description for name, description in get_typestore(Stores.ROS2_JAZZY).fielddefs[msgtype][1]}


def test_every_topic_is_one_the_recorder_writes():
    source = (LAYOUTS.parents[1] / "vla_edge/nodes/recorder_node.py").read_text()
    for topic in TYPES:
        assert f'"{topic}"' in source or f'"{topic.lstrip("/")}"' in source


def test_foxglove_plots_fields_that_exist_and_lays_out_every_panel():
    layout = json.loads((LAYOUTS / "foxglove.json").read_text())
    panels = layout["configById"]
    assert panels["Image!camera"]["imageMode"]["imageTopic"] in TYPES
    paths = [path["value"] for panel in panels.values() for path in panel.get("paths", ())]
    assert len(paths) > 2 * len(DRIVEN_JOINTS)
    for path in paths:
        topic, _, rest = path.partition(".")
        msgtype = TYPES[topic]
        for part in rest.split("."):
            name, index = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", part).groups()
            description = fields(msgtype)[name]
            assert (index is not None) == (int(description[0]) in (3, 4))
            if name in ("position", "positions"):
                assert int(index) < len(DRIVEN_JOINTS)
            msgtype = description[1][0][1] if index is not None else description[1]

    def placed(node):
        return {node} if isinstance(node, str) else placed(node["first"]) | placed(node["second"])

    assert placed(layout["layout"]) == set(panels)


def test_plotjuggler_plots_joints_of_the_robot_by_name():
    root = ElementTree.parse(LAYOUTS / "plotjuggler.xml").getroot()
    curves = {curve.get("name") for curve in root.iter("curve")}
    arms = [name for name in DRIVEN_JOINTS if "waist" not in name]
    assert {f"/{topic}/{name}/position" for topic in ("joint_states", "joint_command") for name in arms} <= curves
    for curve in curves:
        _, topic, joint, field = curve.split("/")
        assert f"/{topic}" in TYPES and joint in DRIVEN_JOINTS and field in fields("sensor_msgs/msg/JointState")
