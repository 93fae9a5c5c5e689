"""Serves a policy: camera, joint states and instruction in, action chunks out.

A lifecycle node: configure loads and warms up the engine, activate serves, deactivate stops and lets the arms hold.
Whatever arrives damaged is refused, counted and named in the diagnostics, and the robot then holds for lack of chunks.
Engine and inference policy are exchanged while it serves, by setting their parameters.
"""

from __future__ import annotations

import sys
import time

from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from vla_edge.control.realtime import RealtimeRequest, prioritize, request_realtime
from vla_edge.nodes import convert, qos
from vla_edge.nodes.engine_choice import EngineChoice
from vla_edge.nodes.heartbeat import Heartbeat
from vla_edge.nodes.inputs import ObservationInputs
from vla_edge.nodes.open_runner import open_runner
from vla_edge.nodes.params import Parameters
from vla_edge.nodes.run import run_node
from vla_edge.nodes.vla_params import PARAMETERS
from vla_edge.nodes.vla_status import VlaStatus
from vla_edge.observe.align import Aligner
from vla_edge.serve.derating import DeratingConfig
from vla_edge.serve.inference_loop import InferenceLoop
from vla_edge.serve.policies import make_policy
from vla_edge.serve.server import ChunkServer
from vla_edge.types import NANOSECONDS, ActionChunk, VlaEdgeError


class VlaNode(LifecycleNode):
    """See the file's first lines."""

    def __init__(self):
        super().__init__("vla")
        self._table = Parameters(self, PARAMETERS)
        self._loop: InferenceLoop | None = None
        self._inputs: ObservationInputs | None = None
        self._engines: EngineChoice | None = None
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
        granted = request_realtime(RealtimeRequest(0, None, values.lock_memory, values.stay_awake))
        if granted.recipe:
            self.get_logger().warning(granted.recipe)
        if granted.note:
            self.get_logger().info(granted.note)
        prioritize(values.priority)  # the middleware's threads, and not those the engine will make
        runner = self._open(values.bundle)
        runner.warm_up()
        spec = runner.spec
        cameras = [camera.name for camera in spec.cameras]

        def prioritized():
            return prioritize(values.priority, [0])

        self._aligner = Aligner(
            cameras, values.max_skew, values.max_age, values.frozen_after, spec.lags, spec.reads_instruction, prioritized
        )
        self._server = ChunkServer(runner, make_policy(values.inference), values.seed)
        self._loop = InferenceLoop(
            self._aligner.align, self._server.infer, self._publish, values.rate, self._warn,
            prioritized, self._due,
            lambda observation: observation.instruction == self._aligner.instruction,
            lambda: self.get_clock().now().nanoseconds,
        )
        config = DeratingConfig(
            values.hot, values.cool, down_after=values.derate_after, up_after=values.recover_after
        )
        self._engines = EngineChoice(
            self.get_logger(), self._loop, self._server, self._open, values.bundle, values.lighter_bundles, values.rate,
            config,
        )
        self._chunks = self.create_publisher(
            JointTrajectory, "action_chunk", qos.chunk(1.0 / values.rate, spec.chunk_size * spec.dt)
        )
        self._write = convert.ChunkWriter(spec.joint_names, spec.chunk_size, spec.dt)
        raw = values.image_transport == "raw"
        self._inputs = ObservationInputs(
            self, spec, self._aligner, self._check_instruction, self._loop.frame_arrived, raw, values.priority,
            values.frozen_after > 0.0,
        )
        self._status = VlaStatus(
            self, self._server, self._loop, self._inputs, self._aligner, self._engines, values.rate
        )
        self._heartbeat = Heartbeat(self, values.heartbeat_period, self._alive)
        self._switches = [
            self.create_service(Trigger, "~/start", self._on_start),
            self.create_service(Trigger, "~/stop", self._on_stop),
        ]
        self._timer = self.create_timer(values.status_period, self._report)
        self.get_logger().info(f"ready: {values.bundle}, {values.rate:g} chunks/s")

    def on_activate(self, state) -> TransitionCallbackReturn:
        self._active = True
        if self._values.start_on_activate:
            self._server.forget()
            self._loop.start()
        return super().on_activate(state)

    def on_deactivate(self, state) -> TransitionCallbackReturn:
        self._active = False
        self._loop.stop()
        return super().on_deactivate(state)

    def on_cleanup(self, state) -> TransitionCallbackReturn:
        self.close()
        self._status.destroy()
        self._heartbeat.destroy()
        for service in self._switches:
            self.destroy_service(service)
        self.destroy_timer(self._timer)
        self.destroy_publisher(self._chunks)
        self._server = self._loop = self._engines = None
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """Ends inference and inputs; no chunk is published afterwards."""
        if self._loop is not None:
            self._loop.stop()
        if self._inputs is not None:
            self._inputs.destroy()
            self._inputs = None
        if self._engines is not None:
            self._engines.close()

    def _open(self, path: str):
        return open_runner(path, self._values.num_steps or None, self._values.threads or None)

    def _check_instruction(self, text: str) -> None:
        self._server.engine.check_instruction(text)

    def _due(self, observation) -> bool:
        return self._server.due(observation.instruction, observation.stamp_ns)

    def _publish(self, chunk: ActionChunk) -> None:
        self._chunks.publish(self._write(self._server.deliver(chunk, self.get_clock().now().nanoseconds)))

    def _alive(self) -> str | None:
        since_ns = self._loop.busy_since_ns
        if since_ns is not None and time.monotonic_ns() - since_ns > self._values.stuck_after * NANOSECONDS:
            return None
        return self._loop.state.readiness.value if self._loop.running else "stopped"

    def _warn(self, sentence: str) -> None:
        self.get_logger().warning(sentence, throttle_duration_sec=5.0)

    def _on_start(self, request, response):
        if self._active:
            # Frames of before would show the robot where it no longer is.
            self._aligner.forget()
            self._server.forget()
            self._loop.start()
        response.success = self._active
        response.message = "serving" if self._active else "the node is not active; activate it first"
        return response

    def _on_stop(self, request, response):
        self._loop.stop()
        response.success, response.message = True, "stopped; the controller holds once its chunk has run out"
        return response

    def _report(self) -> None:
        wanted = self._table.read()
        if wanted.inference != self._values.inference:
            self._server.use(policy=make_policy(wanted.inference))
        self._values = wanted
        self._engines.update(wanted.bundle)
        self._status.report(self._active, wanted.inference)


def main(args=None) -> None:
    """Runs the node."""
    # Inference gives the interpreter away at every stage, and must not wait 5 ms to have it back.
    sys.setswitchinterval(0.0002)
    run_node(VlaNode, args)
