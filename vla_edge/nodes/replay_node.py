"""A bag, played into the topics in real time, or evaluated as fast as the engine runs."""

from __future__ import annotations

import struct
import time
from pathlib import Path

from rclpy.node import Node
from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock

from vla_edge.nodes import qos
from vla_edge.nodes.build_node import Progress
from vla_edge.nodes.convert import to_time
from vla_edge.nodes.params import Parameter, ParameterError, Parameters
from vla_edge.nodes.recorder_node import message_class
from vla_edge.nodes.run import run_once
from vla_edge.serve.policies import make_policy
from vla_edge.types import NANOSECONDS

CLOCK_PERIOD_NS = 10_000_000
PLAYED = ["head/image", "head/image/compressed", "joint_states", "instruction"]
PARAMETERS = (
    Parameter("bag", "", "rosbag2 directory or single file"),
    Parameter("mode", "publish", "play the bag into topics, or evaluate an engine on it", choices=("publish", "evaluate")),
    Parameter("rate", 1.0, "speed of playing; evaluation does not wait", 0.01, 100.0),
    Parameter("restamp", True, "give played messages the present time instead of the recorded one"),
    Parameter("clock", False, "publish the recorded time on /clock and keep recorded stamps, for use_sim_time"),
    Parameter("topics", PLAYED, "topics played, as they are called in the bag"),
    Parameter("engine", "", "evaluate: engine bundle, or checkpoint directory for full precision"),
    Parameter("inference", "asynchronous", "evaluate: inference policy whose chunks are evaluated; see doc/serving.md",
              validate=make_policy),
    Parameter("reference", "", "evaluate: checkpoint directory to compare with in full precision; empty for none"),
    Parameter("frame_rate", 5.0, "evaluate: frames taken per second of bag; 0 takes every frame", 0.0, 1000.0),
    Parameter("max_frames", 0, "evaluate: stop after this many; 0 for all", 0, 10**9),
    Parameter("seed", 0, "evaluate: of the policy's noise", 0, 2**62),
    Parameter("accept", "", "evaluate: YAML file of limits; the shipped config/accept.yaml by default"),
    Parameter("report", "out/replay/report.html", "evaluate: HTML to write, with a JSON file beside it"),
)


def replay(node: Node) -> int:
    """Does what the parameters of `node` say."""
    values = Parameters(node, PARAMETERS).read()
    if not values.bag:
        raise ParameterError("parameter bag is '', allowed is the path of a recording")
    return evaluate(node, values) if values.mode == "evaluate" else publish(node, values)


def evaluate(node: Node, values) -> int:
    """Writes the report of an engine on the bag; 1 when it fails its limits."""
    from vla_edge.evaluate.limits import Limits
    from vla_edge.evaluate.replay import evaluate_bag, open_policy
    from vla_edge.evaluate.report import write_report
    from vla_edge.evaluate.verdict import judge
    from vla_edge.serve.served import ServedEngine

    if not values.engine:
        raise ParameterError("parameter engine is '', allowed is an engine bundle or a checkpoint directory")
    show = Progress()
    evaluation = evaluate_bag(
        values.bag,
        ServedEngine(open_policy(values.engine), values.inference),
        reference=values.reference or None,
        rate_hz=values.frame_rate or None,
        seed=values.seed,
        max_frames=values.max_frames or None,
        progress=lambda fraction, frames: show(fraction, "evaluating"),
    )
    verdict = judge(evaluation, Limits.load(values.accept) if values.accept else None)
    html, json, _ = write_report(evaluation, Path(values.report), verdict)
    node.get_logger().info(
        f"{evaluation.frames} frames: action error {1e3 * evaluation.action.mean:.2f} mrad "
        f"(standing still {1e3 * evaluation.hold.mean:.2f}), inference p50 {evaluation.latency_ms.p50:.1f} ms, "
        f"p99 {evaluation.latency_ms.p99:.1f} ms; {html}, {json}"
    )
    return 0 if verdict.passed else 1


def publish(node: Node, values) -> int:
    """Plays the bag once."""
    from vla_edge.evaluate.contract import find_topic
    from vla_edge.evaluate.storage import BagError, Storage

    with Storage(values.bag) as storage:
        found = {find_topic(name, storage.topics): name for name in values.topics}
        topics = {topic: name for topic, name in found.items() if topic is not None}
        if not topics:
            raise BagError(f"bag {values.bag} has none of {', '.join(values.topics)}; name its own topics to play")
        publishers, stamped = {}, set()
        for topic, name in topics.items():
            cls = message_class(storage.topics[topic])
            publishers[topic] = node.create_publisher(cls, name, _profile(storage.topics[topic]))
            # A leading Header lies at a fixed place of the serialized message, so that it can be stamped unread.
            if next(iter(cls.get_fields_and_field_types().values())) == "std_msgs/Header":
                stamped.add(topic)
        clock = node.create_publisher(Clock, "/clock", qos.CLOCK) if values.clock else None
        begin_ns, sent, told_ns = time.monotonic_ns(), 0, 0
        for raw in storage.messages(set(topics)):
            due_ns = begin_ns + round((raw.log_ns - storage.start_ns) / values.rate)
            time.sleep(max(0.0, (due_ns - time.monotonic_ns()) / NANOSECONDS))
            if clock is not None and raw.log_ns - told_ns >= CLOCK_PERIOD_NS:
                told_ns = raw.log_ns
                clock.publish(Clock(clock=to_time(told_ns)))
            data = bytearray(raw.data)
            if values.restamp and clock is None and raw.topic in stamped:
                _restamp(data, round((storage.header_stamp(raw) - raw.log_ns) / values.rate) + time.time_ns())
            publishers[raw.topic].publish(bytes(data))
            sent += 1
    node.get_logger().info(f"{sent} messages of {len(topics)} topics played")
    return 0


def _profile(msgtype: str) -> QoSProfile:
    return qos.LATCHED if msgtype == "std_msgs/msg/String" else qos.SENSOR_OUT


def _restamp(data: bytearray, stamp_ns: int) -> None:
    order = "<" if data[1] & 1 else ">"
    struct.pack_into(order + "iI", data, 4, stamp_ns // NANOSECONDS, stamp_ns % NANOSECONDS)


def main(args=None) -> None:
    """Runs the node."""
    run_once("replay", replay, args)
