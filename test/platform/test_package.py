"""What the package says about itself is true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "vla_edge").rglob("*.py"))
ROS = {
    "ament_index_python", "builtin_interfaces", "cv_bridge", "diagnostic_msgs", "launch", "launch_ros",
    "lifecycle_msgs", "rcl_interfaces", "rclpy", "rosgraph_msgs", "rosidl_runtime_py", "sensor_msgs", "std_msgs",
    "std_srvs", "trajectory_msgs", "unitree_hg",
}
"""ROS packages that vla_edge.nodes imports, by the names of package.xml."""
ROSDEP = {
    "python3-hypothesis", "python3-numpy", "python3-opencv", "python3-pil", "python3-pytest",
    "python3-pytest-timeout", "python3-scipy", "python3-tqdm", "python3-yaml",
}  # fmt: skip
"""Keys that rosdep's python.yaml defines for Ubuntu and Debian: look there before adding one. A key it lacks
(python3-zstandard, python3-lz4) ends `rosdep install` before it has installed anything."""
PYPI = {
    "cv2": "opencv-python-headless", "yaml": "pyyaml", "PIL": "pillow", "modelopt": "nvidia-modelopt",
    "neural_compressor": "neural-compressor-pt", "pinocchio": "pin", "tensorrt_rtx": "tensorrt-rtx",
    "cuda": "cuda-bindings", "llama_cpp": "llama-cpp-python",
}  # fmt: skip

SYSTEM = {"tensorrt", "pycuda"}
"""What comes with a robot's system (JetPack), and no index has."""


def imports(path: Path) -> set[str]:
    """Top-level packages a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"vla_edge"}


def declared() -> set[str]:
    """Distributions that setup.py asks for, in any extra."""
    done = subprocess.run(
        [sys.executable, "tools/requirements.py", "--all"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def files() -> list[Path]:
    """What belongs to the project, and not to a build or an environment."""
    top = [path for path in ROOT.iterdir() if path.is_file()]
    kept = ("vla_edge", "test", "launch", "config", "doc", "tools", "benchmarks", "engines", "resource", ".ci")
    below = [path for name in kept for path in (ROOT / name).rglob("*") if path.is_file()]
    return [path for path in top + below if not {"bundles", "__pycache__"} & set(path.parts)]


def test_versions_agree():
    package = ElementTree.parse(ROOT / "package.xml").getroot().findtext("version")
    setup = re.search(r'version="([^"]+)"', (ROOT / "setup.py").read_text()).group(1)
    changelog = re.search(r"^(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.rst").read_text(), re.M).group(1)
    assert package == setup == changelog


def test_every_import_is_a_declared_dependency():
    wanted = set().union(*map(imports, SOURCES))
    known = {name.replace("-", "_") for name in declared()} | ROS | SYSTEM | set(PYPI)
    assert {PYPI[name] for name in wanted & set(PYPI)} <= declared()
    assert wanted - known == set(), "declare it in setup.py"
    package = ElementTree.parse(ROOT / "package.xml").getroot()
    exec_depends = {element.text for element in package.iter("exec_depend")}
    assert (wanted & ROS) - {"rosidl_runtime_py", "unitree_hg"} <= exec_depends  # Unitree's is no package of a distribution


def test_every_dependency_is_imported_by_something():
    # torch's exporter imports onnxscript, Neural Compressor accelerate, Meta-World packaging, pytest its plugins; the
    # meshes' package is installed apart from the others.
    used = set().union(*map(imports, SOURCES), *map(imports, (ROOT / "test").rglob("*.py")))
    used |= {"onnxscript", "accelerate", "packaging", "setuptools", "rosbags_image", "pytest_timeout"}
    idle = {name for name in declared() if name.replace("-", "_") not in used} - set(PYPI.values())
    assert idle == set(), "no file imports it"


def test_rosdep_knows_every_key_of_package_xml():
    package = ElementTree.parse(ROOT / "package.xml").getroot()
    keys = {element.text for kind in ("exec_depend", "test_depend") for element in package.iter(kind)}
    assert package.get("format") == "3"
    assert keys - ROS - {"ros2launch"} <= ROSDEP


def test_core_folders_know_nothing_of_ros():
    for path in SOURCES:
        if "nodes" not in path.relative_to(ROOT).parts:
            assert not imports(path) & ROS, path


@pytest.mark.parametrize("folder", ["control", "robots", "observe", "serve"])
def test_what_runs_beside_the_robot_never_names_torch(folder):
    for path in (ROOT / "vla_edge" / folder).rglob("*.py"):
        assert "torch" not in imports(path), path


@pytest.mark.parametrize(
    "module",
    ["vla_edge.engine.runner", "vla_edge.control.kernel", "vla_edge.observe.align", "vla_edge.policy.preprocess",
     "vla_edge.serve.inference_loop", "vla_edge.engine.backends.onnxruntime"],
)  # fmt: skip
def test_the_serving_path_loads_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_source_is_valid_for_python_3_10():
    for path in [*SOURCES, *(ROOT / "launch").glob("*.py"), *(ROOT / "tools").rglob("*.py"), ROOT / "setup.py"]:
        ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=(3, 10))


def test_every_pin_is_exact_and_every_dependency_pinned():
    for name in ("constraints.txt", "tools/constraints-humble.txt", "tools/constraints-jazzy.txt"):
        lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        pins = [line for line in lines if line]
        assert pins and all(re.fullmatch(r"[A-Za-z0-9._-]+==[^=*]+", pin) for pin in pins), name
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert declared() - pinned - {"setuptools"} == set()


def test_every_dependency_has_its_version_and_licence_written_down():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    text = (ROOT / "doc/dependencies.md").read_text()
    rows = re.findall(r"^\| ([a-z0-9-]+) \| (\d[^ ]*) \| [^|]+ \| ([^|]+) \|$", text, re.M)
    written = {name: version for name, version, licence in rows}
    assert declared() - set(written) == set()
    assert {name: version for name, version in written.items() if pins.get(name) != version} == {}


def test_no_file_names_a_machine():
    pattern = re.compile(rb"/(?:work|root|home)/[a-z]|https?://(?:10\.|192\.168\.|localhost|127\.)")
    suffixes = {".py", ".md", ".rst", ".yaml", ".yml", ".json", ".toml", ".cfg", ".txt", ".xml", ".sh", ".html", ""}
    here = Path(__file__)
    for path in files():
        if path.suffix in suffixes and path != here:
            found = pattern.search(path.read_bytes())
            assert not found, f"{path.relative_to(ROOT)}: {found.group()!r}"


def test_links_between_documents_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "doc").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"
    for path in [*SOURCES, *(ROOT / "tools").rglob("*.*")]:
        if path.suffix in (".py", ".sh", ".txt"):
            for target in re.findall(r"\bdoc/[a-z_]+\.md", path.read_text(encoding="utf-8")):
                assert (ROOT / target).exists(), f"{path.relative_to(ROOT)} -> {target}"
