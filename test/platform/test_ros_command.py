"""The `ros2` command of this environment has every verb that the documentation uses."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

VERBS = {
    "ros2topic.verb": {"list", "echo", "hz", "info", "pub"},
    "ros2node.verb": {"list", "info"},
    "ros2param.verb": {"list", "get", "set", "dump", "describe"},
    "ros2pkg.verb": {"executables", "list", "prefix"},
    "ros2service.verb": {"list", "call"},
}


def test_every_command_loads():
    commands = {entry.name: entry.load() for entry in entry_points(group="ros2cli.command")}
    assert set(commands) >= {"launch", "run", "topic", "node", "param", "pkg", "service"}


@pytest.mark.parametrize("group", VERBS)
def test_every_verb_loads(group):
    verbs = {entry.name: entry.load() for entry in entry_points(group=group)}
    assert set(verbs) >= VERBS[group]


def ros2(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "import sys; from ros2cli.cli import main; sys.exit(main())", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_launch_file_tells_its_arguments():
    done = ros2("launch", "vla_edge", "build.launch.py", "--show-args")
    assert done.returncode == 0, done.stderr
    assert "'recipe':" in done.stdout and "(default: 'int8')" in done.stdout


def test_a_launch_file_that_is_not_there_is_named():
    done = ros2("launch", "vla_edge", "absent.launch.py")
    assert done.returncode != 0
    assert "absent.launch.py" in done.stderr and "Traceback" not in done.stderr


def test_the_package_has_its_executables():
    done = ros2("pkg", "executables", "vla_edge")
    found = {line.split()[1] for line in done.stdout.splitlines()}
    nodes = {f"{name}_node" for name in ("vla", "controller", "sim", "build", "replay", "recorder", "demo")}
    assert found >= nodes | {"vla-edge"}
