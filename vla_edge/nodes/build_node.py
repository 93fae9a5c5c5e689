"""Builds an engine bundle as its parameters say, then ends: code 0, or one sentence on what to change and code 1."""

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
    from vla_edge.engine.build import build as build_engine

    bundle = build_engine(
        values.checkpoint,
        recipe=values.recipe,
        backend=values.backend,
        output=values.output or None,
        calibration=values.calibration or None,
        force=values.force,
        demonstrations=[values.demonstrations] if values.demonstrations else [],
        compute_capability=values.compute_capability or None,
        progress=Progress(),
    )
    node.get_logger().info(f"engine bundle ready: {bundle}")
    return 0


def main(args=None) -> None:
    """Runs the node."""
    run_once("build", build, args)
