"""Launch files declare what they promise, and end with the code of what they ran."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from rosbags.highlevel import AnyReader

from vla_edge.nodes import build_node, replay_node, sim_node
from vla_edge.nodes.launching import arguments, values

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
RUN = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
service = LaunchService(noninteractive=True)
given = [tuple(argument.split(":=", 1)) for argument in sys.argv[2:]]
source = PythonLaunchDescriptionSource(sys.argv[1])
service.include_launch_description(LaunchDescription([IncludeLaunchDescription(source, launch_arguments=given)]))
sys.exit(service.run())
"""


def declared(name: str) -> set[str]:
    """Arguments of a launch file."""
    spec = importlib.util.spec_from_file_location(name.split(".")[0], LAUNCH / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {argument.name for argument in module.generate_launch_description().get_launch_arguments()}


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """Environment in which the ament index knows the package as it lies here, whatever is installed beside it."""
    prefix = tmp_path_factory.mktemp("prefix")
    (prefix / "share/ament_index/resource_index/packages").mkdir(parents=True)
    (prefix / "share/ament_index/resource_index/packages/vla_edge").touch()
    (prefix / "lib/vla_edge").mkdir(parents=True)
    for node in ("vla", "controller", "sim", "build", "replay", "recorder", "demo"):
        script = prefix / "lib/vla_edge" / f"{node}_node"
        script.write_text(
            f"#!{sys.executable}\nfrom vla_edge.nodes.{node}_node import main\nif __name__ == '__main__':\n    main()\n"
        )
        script.chmod(0o755)
    paths = [str(LAUNCH.parent), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "AMENT_PREFIX_PATH": os.pathsep.join([str(prefix), os.environ["AMENT_PREFIX_PATH"]]),
        "PYTHONPATH": os.pathsep.join(paths),
    }


def launch(installed: dict, name: str, timeout: float, **given) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", RUN, str(LAUNCH / name), *(f"{key}:={value}" for key, value in given.items())]
    return subprocess.run(command, env=installed, capture_output=True, text=True, timeout=timeout)


def test_whatever_a_build_can_be_told_is_an_argument_of_its_launch_file():
    from vla_edge.engine.build import build

    # progress, traced and then are objects of a program, nothing a command line could say.
    told = set(inspect.signature(build).parameters) - {"progress", "traced", "then"}
    assert told <= declared("build.launch.py")
    assert told <= declared("demo.launch.py")
    assert {row.name for row in build_node.PARAMETERS} == declared("build.launch.py")


def test_nodes_that_are_launched_alone_take_all_their_parameters_as_arguments():
    recorded = {"record", "recording"}
    assert {row.name for row in replay_node.PARAMETERS} | recorded == declared("replay.launch.py")
    assert {row.name for row in sim_node.PARAMETERS} | recorded == declared("sim.launch.py")
    assert {"bundle", "robot", "sink", "namespace", "record", "params"} <= declared("bringup.launch.py")


def test_arguments_come_back_in_the_types_of_the_parameters():
    class Context:
        launch_configurations = {
            argument.name: argument.default_value[0].text for argument in arguments(sim_node.PARAMETERS)
        }

    for name, value in values(sim_node.PARAMETERS, Context).items():
        row = next(row for row in sim_node.PARAMETERS if row.name == name)
        assert row.check(value) == row.default


def test_a_build_that_fails_fails_its_launch_with_one_sentence(installed, checkpoint):
    done = launch(installed, "build.launch.py", 60, checkpoint=checkpoint, recipe="int9")
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "there is no recipe 'int9'; did you mean 'int8'?" in said
    assert "Traceback" not in said


def test_the_demonstration_runs_from_the_build_to_its_report_and_ends_by_itself(installed, checkpoint, tmp_path):
    params = tmp_path / "short.yaml"
    demo = (LAUNCH.parent / "config" / "demo.yaml").read_text()
    params.write_text(re.sub(r"seeds: \[.*?\]", "seeds: [9001, 9002]", demo, flags=re.S))
    out = tmp_path / "out"
    done = launch(
        installed, "demo.launch.py", 170, checkpoint=checkpoint, recipe="fp32", output=tmp_path / "engine",
        calibration=calibration_bag(tmp_path), params=params, out=out,
    )
    said = done.stdout + done.stderr
    assert (out / "report.json").is_file(), said
    report = json.loads((out / "report.json").read_text())
    # A policy of random weights cannot do the task, and the launch says so with its code.
    assert done.returncode == 1 and report["successes"] == 0 and report["episodes"] == 2
    assert not report["problems"], report["problems"]
    assert report["chunk_rate_hz"] > 1.0
    assert set(report["observation_to_chunk_ms"]) >= {"p50", "p95", "p99"}
    assert {"name", "precision", "backend", "bytes", "stage_ms"} <= set(report["engine"])
    controller = report["controller"]
    assert {"tick_hz", "lateness_us", "ticks", "limit_hits", "holds"} <= set(controller)
    assert set(controller["lateness_us"]) == {"p50", "p99", "p999", "max"} and controller["ticks"] > 5000
    assert report["replay"]["frames"] > 5 and report["replay"]["action_mae_rad"] > 0
    assert len(report["replay"]["per_joint"]) == 15
    for file in ("report.html", "demo.mcap", "demo.gif", "demo/metadata.yaml"):
        assert (out / file).stat().st_size > 1000, file
    about = yaml.safe_load((out / "demo" / "metadata.yaml").read_text())["rosbag2_bagfile_information"]["custom_data"]
    assert about["vla_edge.manifest"] == (tmp_path / "engine" / "manifest.yaml").read_text()
    counts = read_strictly(out / "demo")
    assert min(counts[topic] for topic in ("/action_chunk", "/joint_command", "/joint_states", "/diagnostics")) > 5


def test_ctrl_c_ends_the_demonstration_with_every_process_it_started(installed, checkpoint, tmp_path):
    """The terminal sends SIGINT to the whole foreground group; so does this."""
    command = [
        sys.executable, "-c", RUN, str(LAUNCH / "demo.launch.py"), f"checkpoint:={checkpoint}", "recipe:=fp32",
        f"output:={tmp_path / 'engine'}", f"calibration:={calibration_bag(tmp_path)}", f"out:={tmp_path / 'out'}",
    ]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env=installed, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120.0
        while '1/12  "' not in log.read_text(errors="replace"):  # the first episode is over: everything runs
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.2)
        assert len(members(process.pid)) >= 8
        os.killpg(process.pid, signal.SIGINT)
        process.wait(30.0)
        deadline = time.monotonic() + 10.0
        while (left := members(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, left
        assert "Traceback" not in log.read_text(errors="replace")
    finally:
        for pid in members(process.pid):
            os.kill(pid, signal.SIGKILL)


def members(session: int) -> dict[int, str]:
    """Process -> command line of all of a session that have not ended, whatever group they moved to."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rsplit(")", 1)[1].split()[:4]
            if int(sid) == session and state != "Z":
                found[int(stat.parent.name)] = (stat.parent / "cmdline").read_text().replace("\0", " ")
        except (OSError, ValueError):
            continue  # it ended while it was looked at
    return found


def read_strictly(bag: Path) -> Counter:
    """Topic -> messages, each decoded by a reader that is not ours and takes no byte too many."""
    with AnyReader([bag]) as reader:
        counts = Counter()
        for connection, _, data in reader.messages():
            reader.deserialize(data, connection.msgtype)
            counts[connection.topic] += 1
    return counts


def calibration_bag(tmp_path: Path) -> Path:
    """A recording the tiny policy's tokenizer understands."""
    from g1_engine import observations

    from vla_edge.evaluate.bag_writer import BagWriter

    with BagWriter(tmp_path / "calibration", image_format="jpeg") as writer:
        said = None
        for observation in observations(24):
            stamp = observation.stamp_ns + 1_000_000_000
            if observation.instruction != said:
                said = observation.instruction
                writer.instruction(stamp - 2, said)
            joints = observation.joints
            writer.joints(type(joints)(stamp - 1, joints.names, joints.position))
            writer.image(stamp, "head", observation.images["head"])
    return tmp_path / "calibration"
