"""Gives an environment whose rclpy comes from PyPI wheels the pure-Python rest of ROS 2: launch, launch_ros, ros2cli.

PyPI has no package of these under their own names. One wheel there, isaacsim-ros2, carries them unmodified, among much
else under another licence: this script takes the packages named below (Apache-2.0 and BSD-3-Clause, in Python only),
their metadata, and nothing more, and deletes the wheel. Where a ROS 2 distribution is installed none of this is needed.

Usage: python tools/ros_command_line.py [wheel]     (in the environment to complete; downloads the wheel when not given)
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from configparser import ConfigParser
from pathlib import Path, PurePosixPath

WHEEL, SHA256 = "isaacsim-ros2", "34910c880e452528f5771e0f31673b08703e522f2d09cdb173216be7cd89844f"
INSIDE = PurePosixPath("isaacsim/exts/isaacsim.ros2.core/jazzy/rclpy")
PACKAGES = (
    "osrf_pycommon",
    "launch",
    "launch_xml",
    "launch_yaml",
    "launch_ros",
    "launch_testing",
    "launch_testing_ros",
    "composition_interfaces",  # launch_ros imports its message classes
    "rosidl_runtime_py",
    "ros2cli",
    "ros2node",
    "ros2param",
    "ros2pkg",
    "ros2run",
    "ros2service",
    "ros2topic",
    "ament_copyright",  # ros2pkg imports it
)
LOOSE_MODULES = ("launch_testing_ros_pytest_entrypoint.py",)


def main(arguments: list[str]) -> None:
    site = Path(sysconfig.get_paths()["purelib"])
    if arguments:
        install(Path(arguments[0]), site)
        return
    with tempfile.TemporaryDirectory() as directory:
        install(download(Path(directory)), site)


def download(directory: Path) -> Path:
    """The pinned wheel. It is made for one Python; the packages taken from it run on any."""
    constraints = Path(__file__).resolve().parents[1] / "constraints.txt"
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version=3.12", "--platform=manylinux_2_35_x86_64", f"--dest={directory}"]
    command += [_pinned(WHEEL, constraints)]
    subprocess.run(command, check=True)
    return next(directory.glob("*.whl"))


def install(wheel: Path, site: Path) -> None:
    """Copies the packages into `site`, and writes their commands beside this interpreter."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        sys.exit(f"{wheel.name} has SHA-256 {digest}, not the {SHA256} it was reviewed with; nothing was installed.")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            path = PurePosixPath(name)
            if INSIDE in path.parents and wanted(path.relative_to(INSIDE)):
                target = site / path.relative_to(INSIDE)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(without_requirements(path.name, archive.read(name)))
    prefix = Path(sys.prefix)
    for package in PACKAGES:
        mark = prefix / "share" / "ament_index" / "resource_index" / "packages" / package
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        for command, target in console_scripts(site, package):
            write_command(prefix / "bin" / command, target)


def wanted(path: PurePosixPath) -> bool:
    """Whether a file is of one of PACKAGES: its Python, its data, its metadata; never a library for another Python."""
    top = path.parts[0]
    package = top.split("-")[0] if top.endswith(".egg-info") else top
    return (package in PACKAGES or str(path) in LOOSE_MODULES) and path.suffix != ".so" and path.name != "requires.txt"


def without_requirements(name: str, content: bytes) -> bytes:
    """Metadata without what it requires: packages that PyPI has under other names, or not at all (`pip check`)."""
    if name != "PKG-INFO":
        return content
    return b"\n".join(line for line in content.split(b"\n") if not line.startswith(b"Requires-Dist:"))


def console_scripts(site: Path, package: str) -> list[tuple[str, str]]:
    """(command, module:function) pairs a package's metadata declares."""
    scripts: list[tuple[str, str]] = []
    for file in site.glob(f"{package}-*.egg-info/entry_points.txt"):
        declared = ConfigParser(delimiters=("=",))
        declared.optionxform = str  # names are case-sensitive
        declared.read(file)
        if declared.has_section("console_scripts"):
            scripts += declared.items("console_scripts")
    return scripts


def write_command(file: Path, target: str) -> None:
    module, function = target.split(":")
    file.write_text(f"#!{sys.executable}\nimport sys\n\nfrom {module} import {function}\n\nsys.exit({function}())\n")
    os.chmod(file, 0o755)


def _pinned(name: str, constraints: Path) -> str:
    for line in constraints.read_text().splitlines():
        if line.partition("==")[0].strip().lower() == name:
            return line.split("#")[0].strip()
    sys.exit(f"{constraints.name} pins no {name}.")


if __name__ == "__main__":
    main(sys.argv[1:])
