"""The package's nodes as processes of their own, before a camera and joints that cost as little as possible."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_file import Row

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "engines" / "g1_tabletop" / "checkpoint"
INSTRUCTION = "touch the red cube with your left hand"


def domain() -> None:
    """A ROS domain of this benchmark's own, on this machine only; before rclpy is imported."""
    os.environ.setdefault("AMENT_PREFIX_PATH", sys.prefix)
    os.environ["ROS_DOMAIN_ID"] = str(50 + os.getpid() % 50)
    if "ROS_LOCALHOST_ONLY" not in os.environ:
        os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")


def engine(bundle: Path | None, checkpoint: Path = CHECKPOINT) -> Path:
    """The bundle given, or the INT8 engine of the checkpoint, built when it is not there."""
    if bundle is not None:
        return bundle
    from vla_edge.engine.build import build

    return build(checkpoint, "int8")


class LiveNodes:
    """Starts processes, and ends them when it is left. Their output goes to files in a temporary directory."""

    def __init__(self):
        self._directory = tempfile.TemporaryDirectory(prefix="vla_edge_bench_")
        self._processes: list[tuple[str, subprocess.Popen]] = []

    def node(self, executable: str, **parameters) -> None:
        """A node of the package."""
        arguments = ["--ros-args"]
        for name, value in parameters.items():
            arguments += ["-p", f"{name}:={value}"]
        self._start(executable, ["-c", f"from vla_edge.nodes.{executable} import main; main()", *arguments])

    def source(self, *cameras: str, compressed: bool = False) -> None:
        """Both parts of robot_source.py."""
        source = str(Path(__file__).with_name("robot_source.py"))
        self._start("robot_joints", [source, "joints", "--instruction", INSTRUCTION])
        self._start("robot_cameras", [source, "cameras", "--names", *cameras, *["--compressed"] * compressed])

    def pid(self, executable: str) -> int:
        """Of the node last started from that executable."""
        return next(process.pid for name, process in reversed(self._processes) if name == executable)

    def _start(self, name: str, arguments: list[str]) -> None:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with open(Path(self._directory.name) / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path}
            )
        self._processes.append((name, process))

    def said(self) -> str:
        """The last lines of every process, for when something went wrong."""
        logs = sorted(Path(self._directory.name).glob("*.log"))
        return "\n".join(f"{log.stem}: {log.read_text(errors='replace')[-400:]}" for log in logs)

    def __enter__(self) -> LiveNodes:
        return self

    def __exit__(self, *_) -> None:
        for _, process in self._processes:
            process.send_signal(signal.SIGINT)
        for _, process in self._processes:
            try:
                process.wait(10.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._directory.cleanup()


class Listener:
    """Diagnostics of all nodes, and calls to them."""

    def __init__(self):
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray

        from vla_edge.nodes import middleware, qos
        from vla_edge.nodes.client import Conductor

        middleware.prepare()
        rclpy.init()
        self.node = rclpy.create_node("benchmark")
        self.values: dict[str, dict[str, str]] = {}
        self.conductor = Conductor(self.node)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_status, qos.DIAGNOSTICS)

    def _on_status(self, message) -> None:
        for status in message.status:
            self.values[status.name] = {pair.key: pair.value for pair in status.values} | {"message": status.message}

    def number(self, node: str, key: str) -> float:
        """A figure of a node's newest diagnostics."""
        return float(self.values[node][key])

    def __enter__(self) -> Listener:
        self.conductor.__enter__()
        return self

    def __exit__(self, *_) -> None:
        import rclpy

        self.conductor.__exit__()
        self.node.destroy_node()
        rclpy.shutdown()


def settle(seconds: float, what: str) -> None:
    """Waits, and says so."""
    print(f"{what}: {seconds:.0f} s", file=sys.stderr, flush=True)
    time.sleep(seconds)


def failed(name: str, unit: str, relation: str, limit: float, error: Exception) -> list[Row]:
    """A row without a value, and why."""
    return [Row(name, None, unit, relation, limit, 0, None, f"{type(error).__name__}: {error}")]
