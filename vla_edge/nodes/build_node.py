"""Builds an engine bundle as its parameters say, by a recipe or towards a target, then ends: code 0, or one sentence on
what to change and code 1.
"""

from __future__ import annotations

import time

from rclpy.node import Node

from vla_edge.nodes.params import Parameter, ParameterError, Parameters
from vla_edge.nodes.run import run_once

# What a build can be told; build.launch.py declares one launch argument for each row.
PARAMETERS = (
    Parameter("checkpoint", "", "directory of the checkpoint"),
    Parameter("recipe", "int8", "name of a shipped recipe, or a recipe file"),
    Parameter("backend", "auto", "runtime the engine is built for; auto measures which is fastest, stage by stage"),
    Parameter("output", "", "directory of the bundle; empty puts it beside the checkpoint or into the user's cache"),
    Parameter("calibration", "", "bag the activation ranges come from; empty takes the checkpoint's own"),
    Parameter("demonstrations", "", "recording that recipes with training train on; empty takes the calibration bag"),
    Parameter("compute_capability", "", "of the GPU to build for where it is not here, as 8.6 (backend tensorrt_rtx)"),
    Parameter("target_hz", 0.0, "build engines until one keeps so many chunks a second; 0 builds the recipe", 0.0, 1e4),
    Parameter("max_memory_mb", 0.0, "that a process with the engine may take, as target_hz; 0: any", 0.0, 1e9),
    Parameter("max_error", 0.03, "of the motion, that reaching the target may cost", 0.0, 10.0),
    Parameter("build_memory_mb", 0.0, "that the build may take; a policy that does not fit is built piece by piece; 0: what is free",
              0.0, 1e9),
    Parameter("force", False, "build even when the same bundle is there"),
)


class Progress:
    """A bar that stays readable in a log: it is printed when a step begins and at each tenth."""

    def __init__(self):
        self._step, self._shown = "", -1
        self._begin = time.monotonic()

    def __call__(self, fraction: float, step: str = "") -> None:
        tenth = int(10 * min(max(fraction, 0.0), 1.0))
        if step == self._step and tenth == self._shown:
            return
        self._step, self._shown = step, tenth
        bar = "#" * (2 * tenth) + "." * (20 - 2 * tenth)
        print(f"[{bar}] {100 * fraction:3.0f} %  {time.monotonic() - self._begin:5.1f} s  {step}", flush=True)


def build(node: Node) -> int:
    """One build from the parameters of `node`."""
    values = Parameters(node, PARAMETERS).read()
    if not values.checkpoint:
        raise ParameterError("parameter checkpoint is '', allowed is the directory of a checkpoint")
    demonstrations = [values.demonstrations] if values.demonstrations else []
    if values.target_hz or values.max_memory_mb:
        return _build_to(node, values, demonstrations)
    from vla_edge.engine.build import build as build_engine

    bundle = build_engine(
        values.checkpoint,
        recipe=values.recipe,
        backend=values.backend,
        output=values.output or None,
        calibration=values.calibration or None,
        force=values.force,
        demonstrations=demonstrations,
        compute_capability=values.compute_capability or None,
        build_memory_mb=values.build_memory_mb or None,
        progress=Progress(),
    )
    return _ready(node, bundle)


def _build_to(node: Node, values, demonstrations) -> int:
    """Towards a target in the place of a recipe."""
    from vla_edge.engine.build_to import build_to
    from vla_edge.engine.target import Target
    from vla_edge.evaluate.target_report import summary

    memory = 1e6 * values.max_memory_mb
    outcome, bundle = build_to(
        values.checkpoint,
        Target(values.target_hz or None, memory or None, values.max_error),
        backend=values.backend,
        output=values.output or None,
        calibration=values.calibration or None,
        demonstrations=demonstrations,
        progress=Progress(),
    )
    for line in summary(outcome).splitlines():
        node.get_logger().info(line)
    if bundle is None:
        return 1
    return _ready(node, bundle)


def _ready(node: Node, path) -> int:
    from vla_edge.engine.busy import caution
    from vla_edge.engine.manifest import read_manifest

    node.get_logger().info(f"engine bundle ready: {path}")
    if words := caution(read_manifest(path)):
        node.get_logger().warning(words)
    return 0


def main(args=None) -> None:
    """Runs the node."""
    run_once("build", build, args)
