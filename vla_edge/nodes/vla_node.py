"""Serves a policy: camera, joint states and instruction in, action chunks out.

A lifecycle node: configure loads and warms up the engine, activate serves, deactivate stops and lets the arms hold.
Whatever arrives damaged is refused, counted and named in the diagnostics, and the robot then holds for lack of chunks.
"""

from __future__ import annotations

import sys

from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from vla_edge.control.realtime import keep_awake
from vla_edge.nodes import convert, qos
from vla_edge.nodes.inputs import ObservationInputs
from vla_edge.nodes.open_runner import open_runner
from vla_edge.nodes.params import Parameter, Parameters
from vla_edge.nodes.run import prioritize, run_node
from vla_edge.nodes.vla_status import VlaStatus
from vla_edge.observe.align import Aligner
from vla_edge.serve.inference_loop import InferenceLoop
from vla_edge.types import ActionChunk, VlaEdgeError

PARAMETERS = (
    Parameter("bundle", "", "engine bundle, or a checkpoint to serve in full precision (needs torch)"),
    Parameter("rate", 6.0, "chunks per second", 0.1, 100.0),
    Parameter("num_steps", 0, "flow steps per chunk; 0 takes the bundle's", 0, 100),
    Parameter("threads", 1, "threads of the engine; 0 lets it choose", 0, 256),
    Parameter("seed", 0, "of the policy's noise, together with each observation's stamp", 0, 2**62),
    Parameter("image_transport", "raw", "form in which images are subscribed to", choices=("raw", "compressed")),
    Parameter("max_skew", 0.1, "s between a frame and the joint state or further frames used with it", 0.001, 10.0),
    Parameter("max_age", 0.5, "s of silence after which a source is stale", 0.01, 60.0),
    Parameter("start_on_activate", True, "serve at once; otherwise wait for ~/start"),
    Parameter("priority", 10, "SCHED_FIFO priority asked for, to be below the controller's; 0 for none", 0, 98),
    Parameter("stay_awake", True, "keep idle processors out of sleep states that are slow to leave; costs power"),
    Parameter("status_period", 1.0, "s between diagnostics", 0.1, 60.0),
)


class VlaNode(LifecycleNode):
    """See the file's first lines."""

    def __init__(self):
        super().__init__("vla")
        self._table = Parameters(self, PARAMETERS)
        self._loop: InferenceLoop | None = None
        self._inputs: ObservationInputs | None = None
        self._active = False

    def on_configure(self, state) -> TransitionCallbackReturn:
        try:
            self._configure(self._table.read())
        except VlaEdgeError as error:
            self.get_logger().error(f"configure failed: {error}")
            return TransitionCallbackReturn.FAILURE
        return TransitionCallbackReturn.SUCCESS

    def _configure(self, values) -> None:
        self._values = values
        if values.stay_awake:
            keep_awake()
        prioritize(values.priority)  # the middleware's threads, and not those the engine will make
        self._runner = open_runner(values.bundle, values.num_steps or None, values.threads or None)
        self._runner.warm_up()
        spec = self._runner.spec
        self._aligner = Aligner([camera.name for camera in spec.cameras], values.max_skew, values.max_age)
        self._loop = InferenceLoop(
            self._aligner.align, self._infer, self._publish, values.rate, self._warn,
            lambda: prioritize(values.priority, [0]),
        )
        self._chunks = self.create_publisher(
            JointTrajectory, "action_chunk", qos.chunk(1.0 / values.rate, spec.chunk_size * spec.dt)
        )
        self._write = convert.ChunkWriter(spec.joint_names, spec.chunk_size, spec.dt)
        raw = values.image_transport == "raw"
        self._inputs = ObservationInputs(
            self, spec, self._aligner, self._runner.check_instruction, self._loop.frame_arrived, raw,
            values.priority,
        )
        self._status = VlaStatus(self, self._runner, self._loop, self._inputs, self._aligner, values.rate)
        self._switches = [
            self.create_service(Trigger, "~/start", self._on_start),
            self.create_service(Trigger, "~/stop", self._on_stop),
        ]
        self._timer = self.create_timer(values.status_period, self._report)
        self.get_logger().info(f"ready: {values.bundle}, {values.rate:g} chunks/s")

    def on_activate(self, state) -> TransitionCallbackReturn:
        self._active = True
        if self._values.start_on_activate:
            self._loop.start()
        return super().on_activate(state)

    def on_deactivate(self, state) -> TransitionCallbackReturn:
        self._active = False
        self._loop.stop()
        return super().on_deactivate(state)

    def on_cleanup(self, state) -> TransitionCallbackReturn:
        self.close()
        self._status.destroy()
        for service in self._switches:
            self.destroy_service(service)
        self.destroy_timer(self._timer)
        self.destroy_publisher(self._chunks)
        self._runner = self._loop = None
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """Ends inference and inputs; no chunk is published afterwards."""
        if self._loop is not None:
            self._loop.stop()
        if self._inputs is not None:
            self._inputs.destroy()
            self._inputs = None

    def _infer(self, observation):
        inference = self._runner.infer(observation, seed=self._values.seed)
        return inference.chunk, inference.timing

    def _publish(self, chunk: ActionChunk) -> None:
        self._chunks.publish(self._write(chunk))

    def _warn(self, sentence: str) -> None:
        self.get_logger().warning(sentence, throttle_duration_sec=5.0)

    def _on_start(self, request, response):
        if self._active:
            # Frames of before would show the robot where it no longer is.
            self._aligner.forget()
            self._loop.start()
        response.success = self._active
        response.message = "serving" if self._active else "the node is not active; activate it first"
        return response

    def _on_stop(self, request, response):
        self._loop.stop()
        response.success, response.message = True, "stopped; the controller holds once its chunk has run out"
        return response

    def _report(self) -> None:
        self._status.report(self._active)


def main(args=None) -> None:
    """Runs the node."""
    # Inference gives the interpreter away at every stage, and must not wait 5 ms to have it back.
    sys.setswitchinterval(0.0002)
    run_node(VlaNode, args)
