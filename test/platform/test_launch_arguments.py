"""A launch file reads no argument that it does not declare: `--show-args` tells all there is."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
FILES = sorted(path.name for path in LAUNCH.glob("*.launch.py"))


def read(source: str) -> set[str]:
    """Arguments that a launch file's code reads by name: said["x"], flag(context, "x"), LaunchConfiguration("x")."""
    names = set()
    tables = {"said", "launch_configurations"}
    for node in ast.walk(ast.parse(source)):
        given = []
        if isinstance(node, ast.Subscript):
            table = getattr(node.value, "id", getattr(node.value, "attr", None))
            given = [node.slice] if table in tables else []
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("flag", "LaunchConfiguration"):
            given = node.args
        names |= {each.value for each in given if isinstance(each, ast.Constant)}
    return names


def declared(path: Path) -> dict[str, str]:
    """Arguments it declares, with their descriptions."""
    spec = importlib.util.spec_from_file_location(path.stem.replace(".", "_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {row.name: row.description for row in module.generate_launch_description().get_launch_arguments()}


@pytest.mark.parametrize("name", FILES)
def test_what_a_launch_file_reads_is_declared_and_described(name):
    arguments = declared(LAUNCH / name)
    assert arguments and all(arguments.values())
    assert read((LAUNCH / name).read_text(encoding="utf-8")) - set(arguments) == set()


def test_the_check_sees_each_way_of_reading():
    source = 'a = said["x"] + context.launch_configurations["y"]; flag(context, "z"); LaunchConfiguration("w")'
    assert read(source) == set("xyzw")
