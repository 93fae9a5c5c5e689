"""The simulated G1 at its table, in real time: joint commands in, joint states and camera images out.

Physics runs in a thread on absolute deadlines, which takes the newest command as it goes; pictures are drawn by another
process. ~/reset sets a scene up by its seed, and the world judges how the instruction was carried out. The parameter
`faults` makes sensors and arms fail, for tests and rehearsals.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import rclpy
from rclpy.node import Node
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool, Float64MultiArray, Int64

from vla_edge.control.loop import DeadlineLoop
from vla_edge.control.realtime import prioritize
from vla_edge.nodes import convert, qos
from vla_edge.nodes.params import Parameter, Parameters
from vla_edge.nodes.run import run_node
from vla_edge.nodes.sim_camera import CameraProcess, View
from vla_edge.nodes.sim_teller import SimTeller
from vla_edge.nodes.stream import Stream
from vla_edge.sim.faults import Faults, FaultyCamera, FaultyJoints, parse_faults
from vla_edge.sim.tasks import TIERS
from vla_edge.sim.view import state_vector
from vla_edge.sim.world import STEP_NS, TabletopWorld
from vla_edge.types import NANOSECONDS, VlaEdgeError

PARAMETERS = (
    Parameter("tier", "touch", "difficulty of the scenes", choices=TIERS),
    Parameter("seed", 0, "of the first scene", 0, 2**62),
    Parameter("joint_state_rate", 250, "joint states per second; a whole number of physics steps", 50, 500),
    Parameter("camera_rate", 15.0, "most pictures per second", 1.0, 60.0),
    Parameter("camera_height", 480, "pixels", 16, 960),
    Parameter("camera_width", 640, "pixels", 16, 1280),
    Parameter("overview_every", 4, "one picture of the overview camera for this many of the head camera", 1, 1000),
    Parameter("jpeg_quality", 90, "of compressed images", 1, 100),
    Parameter("priority", 20, "SCHED_FIFO priority of physics, which stands for a robot that waits for nobody; 0: none",
              0, 98),
    Parameter("camera_nice", 5, "steps that drawing stands back behind physics and control", 0, 19),
    Parameter("faults", "", "what goes wrong, for example '{joint_noise: 0.01, image_freeze: true}'; see doc/serving.md",
              validate=lambda text: parse_faults(text, TabletopWorld.joint_names)),
)


class SimNode(Node):
    """See the file's first lines."""

    def __init__(self):
        super().__init__("sim")
        self._table = Parameters(self, PARAMETERS)
        values = self._values = self._table.read()
        self._period_ns = NANOSECONDS // values.joint_state_rate // STEP_NS * STEP_NS
        self._joints = self.create_publisher(JointState, "joint_states", qos.SENSOR_OUT)
        self._state = self.create_publisher(Float64MultiArray, "~/state", qos.SENSOR_OUT)
        self._stop = self.create_publisher(Bool, "emergency_stop", qos.LATCHED)
        self._teller = SimTeller(self)
        size = (values.camera_height, values.camera_width)
        self._camera = CameraProcess(
            (
                View("head", self.resolve_topic_name("head/image"), *size),
                View("overview", self.resolve_topic_name("overview/image"), *size, values.overview_every),
            ),
            self.get_namespace(), values.camera_nice, values.jpeg_quality,
        )
        self.exit_code = 0
        self._world = TabletopWorld()
        self._wanted_seed: int | None = values.seed
        self._decided = True
        self._next_picture_ns = 0
        self._faults = Faults()
        self._faulty_joints = FaultyJoints(self._publish_joints)
        self._faulty_camera = FaultyCamera(self._camera.show)
        self.create_timer(0.1, self._on_timer)
        self._commands = Stream(self, JointState, "joint_command", self._on_command, qos.SENSOR)
        self.create_subscription(Int64, "~/reset", self._on_reset, qos.COMMAND)
        self._loop = DeadlineLoop(self._period_ns, self._tick)
        self._thread = threading.Thread(target=self._loop.run, name="physics", daemon=True)
        self._thread.start()
        prioritize(values.priority)

    def close(self) -> None:
        """Ends physics and cameras."""
        self._loop.stop()
        self._thread.join(2.0)
        self._commands.destroy()
        self._camera.close()

    def _on_command(self, message: JointState, info) -> None:
        try:
            self._world.apply(convert.to_command(message))
        except (ValueError, VlaEdgeError) as error:
            self.get_logger().warning(str(error), throttle_duration_sec=5.0)

    def _on_reset(self, message: Int64) -> None:
        self._wanted_seed = message.data

    def _on_timer(self) -> None:
        faults, before = parse_faults(self._table.read().faults), self._faults
        self._faults = faults
        if faults.emergency_stop != before.emergency_stop:
            self._stop.publish(Bool(data=faults.emergency_stop))
        if faults != before:
            told = {name: value for name, value in vars(faults).items() if value != getattr(Faults, name)}
            self.get_logger().warning(f"faults: {told or 'none'}")

    def _publish_joints(self, state) -> None:
        self._joints.publish(convert.to_joint_state(state))

    def _tick(self, deadline_ns: int) -> None:
        seed, self._wanted_seed = self._wanted_seed, None
        if seed is not None:
            self._reset(seed)
        self._commands.drain()
        faults, world = self._faults, self._world
        world.disturb(faults.torque_joint, faults.torque)
        world.step(self._period_ns / NANOSECONDS)
        stamp_ns = time.time_ns()
        self._faulty_joints.put(replace(world.joint_state(), stamp_ns=stamp_ns), deadline_ns, faults)
        self._faulty_camera.tick(deadline_ns)
        if deadline_ns >= self._next_picture_ns:
            period_ns = round(NANOSECONDS / self._values.camera_rate)
            self._next_picture_ns = max(self._next_picture_ns + period_ns, deadline_ns)
            snapshot = self._world.snapshot()
            self._faulty_camera.put(stamp_ns, snapshot, deadline_ns, faults)
            if self._state.get_subscription_count():
                self._state.publish(Float64MultiArray(data=convert.doubles(state_vector(snapshot))))
            if not self._camera.alive and not self.exit_code:
                self.get_logger().fatal("the camera process is gone; its own message above says why")
                self.exit_code = 1
                self._loop.stop()
                rclpy.try_shutdown()
        if not self._decided and self._world.finished():
            self._decided = True
            self._teller.end(self._world.outcome())

    def _reset(self, seed: int) -> None:
        try:
            episode = self._world.reset(seed, self._values.tier)
        except VlaEdgeError as error:
            self.get_logger().error(f"reset to seed {seed} failed: {error}")
            return
        self._decided = False
        self._teller.begin(episode)


def main(args=None) -> None:
    """Runs the node."""
    run_node(SimNode, args, images=False)
