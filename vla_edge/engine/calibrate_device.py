"""What things cost on this computer: blocks of transformer layers, run through the real exporter and runtime.

Each block is a few layers of one size, in float32, INT8 and INT4, with one thread and with all. How long a call takes is
laid out on what the call does (`cost.features`) by least squares with no cost below zero. The result is kept in the
user's cache for this processor and these versions. None of the blocks has the shapes of a shipped policy.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_edge.engine.cost import LABELS, MeasuredSum, features
from vla_edge.engine.devices import LOCAL, Device, DeviceError, Efficiency
from vla_edge.engine.operations import Attention, Decoder, Operation, Pointwise, Product, StageWork, encoder_layer
from vla_edge.engine.precision import LayerPrecision

ROUNDS = 11
PRECISIONS = {
    "float32": LayerPrecision("float32"),
    "int8": LayerPrecision("int8", "int8-dynamic"),
    "int4": LayerPrecision("int4", group=64),
}
_STEPS = 20_000  # of coordinate descent; it stops when nothing moves


@dataclass(frozen=True)
class Block:
    """Layers of one size.

    Attributes:
        kind: "encoder" or "decoder"; "products" alone, with more bytes than caches hold; "pointwise" (norm, activation,
            residual) or "attention" alone, which tell apart what layers always have together.
    """

    kind: str
    layers: int
    rows: int
    width: int
    hidden: int
    heads: int = 1
    kv_heads: int = 1

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.width, self.hidden, self.heads, self.kv_heads, self.width // self.heads)

    def work(self) -> StageWork:
        """What one call computes."""
        operations: list[Operation] = []
        for index in range(self.layers):
            name = f"layers.{index}"
            if self.kind == "encoder":
                operations += encoder_layer(name, self.rows, self.width, self.hidden, self.heads)
            elif self.kind == "decoder":
                operations += self.decoder.layer(name, self.rows, self.rows)
            elif self.kind == "pointwise":
                operations.append(Pointwise(7 * self.rows * self.width, 3))
            elif self.kind == "attention":
                operations += [
                    Pointwise(6 * self.rows * self.width, 3),  # queries, keys and values are told apart by a sum each
                    Attention(self.rows, self.rows, self.heads, self.kv_heads, self.width // self.heads),
                ]
            else:
                operations += [
                    Product(f"{name}.0", self.rows, self.width, self.hidden),
                    Product(f"{name}.1", self.rows, self.hidden, self.width),
                ]
        return StageWork("block", 1, "call", tuple(operations))


BLOCKS = (
    Block("encoder", 1, 64, 192, 576, 3),
    Block("encoder", 3, 100, 96, 288, 3),
    Block("encoder", 2, 256, 160, 640, 5),
    Block("encoder", 1, 196, 384, 1152, 6),
    Block("decoder", 1, 80, 224, 448, 7, 7),
    Block("decoder", 4, 40, 128, 256, 4, 2),
    Block("decoder", 2, 24, 256, 512, 8, 4),
    Block("decoder", 1, 128, 384, 1024, 6, 2),
    Block("decoder", 3, 12, 96, 192, 3, 3),
    Block("products", 1, 1, 2048, 8192),
    Block("pointwise", 3, 90, 320, 0),
    Block("pointwise", 6, 20, 112, 0),
    Block("attention", 2, 112, 192, 0, 6, 6),
    Block("attention", 3, 48, 96, 0, 2, 2),
)


def local_device(recalibrate: bool = False, progress=None) -> Device:
    """This computer, measured now or earlier.

    Args:
        recalibrate: measure again. progress: called with the fraction done and the step.

    Raises:
        DeviceError: it was not measured yet, and torch, which the measurement needs, is not installed.
    """
    path = calibration_path()
    if recalibrate or not path.is_file():
        result = calibrate(progress or (lambda fraction, step: None))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    return device_from(read_calibration(path), path)


def calibration_path() -> Path:
    """Where this computer's calibration is kept; another processor, core count or runtime has another."""
    import onnxruntime

    processor = next(
        (line for line in _cpuinfo().splitlines() if line.startswith(("model name", "CPU part"))), "unknown"
    )
    key = f"{processor} {len(os.sched_getaffinity(0))} {onnxruntime.__version__} {BLOCKS}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "vla_edge" / f"device-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def read_calibration(path: Path) -> dict:
    """A stored calibration.

    Raises:
        DeviceError: it is damaged.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        costs = plain["seconds_per"]
        wrong = not costs or any(set(entry) != set(LABELS) or min(entry.values()) < 0 for entry in costs.values())
        if wrong or not 0 < plain["cache_bytes"] or not 0 < plain["memory_gb"]:
            raise ValueError("a cost is missing or below 0")
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DeviceError(f"the calibration {path} is damaged ({error}); measure again with --calibrate") from error
    return plain


def device_from(calibration: Mapping, path: Path | None = None) -> Device:
    """The device that a calibration describes."""
    costs = {int(threads): entry for threads, entry in calibration["seconds_per"].items()}
    one = costs[min(costs)]
    bandwidth = 1e-9 / one["loaded"] if one["loaded"] else 0.0
    return Device(
        name=LOCAL,
        title=calibration["processor"],
        peak_tera={kind: 1e-12 / one[kind] for kind in ("float32", "int8") if one[kind]},
        bandwidth_gb_s=bandwidth,
        memory_gb=calibration["memory_gb"],
        floats="float32",
        runtime="onnxruntime",
        runtimes={"onnxruntime": Efficiency({"float32": 1.0}, 1.0)},
        reserved_gb=min(2.0, calibration["memory_gb"] / 4),
        host_ms_per_camera=calibration["host_ms_per_camera"],
        sources=(f"measured here, {calibration['measured']}: {path}",),
        measured=MeasuredSum(costs, calibration["cache_bytes"]),
    )


def calibrate(tell) -> dict:
    """Runs the blocks; plain types.

    Raises:
        DeviceError: torch is not installed.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise DeviceError(
            "this computer was not measured yet, which needs torch; pip install torch, or plan for another device"
        ) from error
    from vla_edge.engine.build import torch_threads

    cache = _cache_bytes()
    threads = sorted({1, min(len(os.sched_getaffinity(0)), 8)})
    with tempfile.TemporaryDirectory() as directory, torch_threads(0):
        runs, counted = _prepared(Path(directory), threads, cache, tell)
        seconds = _timed(runs, tell)
    costs = {}
    for number in threads:
        mine = [key for key in counted if key[2] == number]
        rows = np.array([[counted[key][name] for name in LABELS] for key in mine])
        found = fit_costs(rows, np.array([seconds[key] for key in mine]))
        costs[str(number)] = dict(zip(LABELS, map(float, found)))
    return {
        "processor": _processor(),
        "measured": time.strftime("%Y-%m-%d"),
        "seconds_per": costs,
        "cache_bytes": cache,
        "memory_gb": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9,
        "host_ms_per_camera": _host_ms(),
        "blocks": {f"{i} {precision} {n}": 1e3 * seconds[i, precision, n] for i, precision, n in seconds},
    }


def fit_costs(rows: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """(F,) costs of at least 0 with the least squared relative error of `rows` (N, F) times them against `seconds` (N,).

    Coordinate descent on the normal equations (Franc et al., 2005, "Sequential coordinate-wise algorithm for the
    non-negative least squares problem").
    """
    relative = rows / seconds[:, None]
    scale = np.linalg.norm(relative, axis=0)
    used = scale > 0
    scaled = relative[:, used] / scale[used]
    gram, target = scaled.T @ scaled, scaled.T @ np.ones(len(rows))
    x = np.zeros(len(target))
    for _ in range(_STEPS):
        before = x.copy()
        for i in range(len(x)):
            x[i] = max(0.0, x[i] + (target[i] - gram[i] @ x) / gram[i, i])
        if np.abs(x - before).max() <= 1e-12 * max(1e-12, np.abs(x).max()):
            break
    costs = np.zeros(rows.shape[1])
    costs[used] = x / scale[used]
    return costs


def _prepared(directory: Path, threads: Sequence[int], cache: float, tell):
    """(block, precision, threads) -> a call, and -> what it counts."""
    from vla_edge.engine.backends import StageInterface, get_backend
    from vla_edge.engine.export import export_stage, trace

    runtime = get_backend("onnxruntime")
    runs, counted = {}, {}
    for index, block in enumerate(BLOCKS):
        tell(0.8 * index / len(BLOCKS), f"exporting blocks, {block.kind}")
        stage = _stage(block)
        traced = trace(stage)
        interface = StageInterface(stage.name, stage.inputs, stage.outputs)
        for name in PRECISIONS if block.hidden else ("float32",):
            precision = PRECISIONS[name]
            place = directory / f"{index}-{name}"
            place.mkdir()
            file = export_stage(stage, _layers(stage.module, name, runtime), place / "block.onnx", traced)
            work = block.work()
            precisions = {product.layer: precision for product in work.products}
            for number in threads:
                built = runtime.build(file, place, interface, {"threads": number, "fold_weights": False})
                loaded = runtime.load(place / built.file, interface, built.options)
                inputs = {spec.name: np.random.default_rng(0).standard_normal(spec.shape, np.float32)
                          for spec in stage.inputs}  # fmt: skip
                outputs = {spec.name: spec.zeros() for spec in stage.outputs}
                runs[index, name, number] = loaded.bind(inputs, outputs)
                counted[index, name, number] = features(work, precisions, cache)
    return runs, counted


def _layers(module, precision: str, runtime) -> dict:
    from torch import nn

    from vla_edge.compress.apply import compress_layer
    from vla_edge.compress.steps import Keep, Quantize

    step = {
        "float32": Keep(("*",)),
        "int8": Quantize(("*",), "int8", "int8-dynamic", reduce_range="auto"),
        "int4": Quantize(("*",), "int4", group_size=64),
    }[precision]
    reduced = runtime.gains_by_reduced_range()
    return {
        name: compress_layer(name, layer, step, reduce_range=reduced)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }


def _stage(block: Block):
    import torch
    from torch import nn

    from vla_edge.policy.blocks import MASKED, DecoderLayer, EncoderLayer, attend, rotary, rotate, split_heads
    from vla_edge.policy.stages import Stage, TensorSpec

    torch.manual_seed(0)
    shape = block.decoder

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            make = {
                "encoder": lambda: EncoderLayer(block.width, block.hidden, block.heads, 1e-6),
                "decoder": lambda: DecoderLayer(
                    block.width, block.hidden, block.heads, block.kv_heads, shape.head_dim, 1e-6
                ),
                "products": lambda: nn.Sequential(
                    nn.Linear(block.width, block.hidden, bias=False), nn.Linear(block.hidden, block.width, bias=False)
                ),
                "pointwise": lambda: nn.Sequential(nn.LayerNorm(block.width), nn.GELU(approximate="tanh")),
                "attention": nn.Identity,
            }[block.kind]
            self.layers = nn.ModuleList(make() for _ in range(block.layers))
            cos, sin = rotary(torch.arange(block.rows)[None], shape.head_dim)
            mask = torch.triu(torch.full((block.rows, block.rows), MASKED), diagonal=1)[None, None]
            for name, table in (("cos", cos), ("sin", sin), ("mask", mask)):
                self.register_buffer(name, table, persistent=False)

        def forward(self, x):
            for layer in self.layers:
                x = self.step(layer, x)
            return (x,)

        def step(self, layer, x):
            if block.kind == "pointwise":
                return x + layer(x)
            if block.kind == "attention":
                q, k, v = (split_heads(x + shift, shape.head_dim) for shift in (0.1, 0.2, 0.3))
                return attend(q, k, v)[0]
            if block.kind != "decoder":
                return layer(x)
            normed = layer.attention_norm(x)
            k, v = layer.project(normed, normed)
            q, k = (rotate(tensor, self.cos, self.sin) for tensor in (layer.queries(normed), k))
            return layer.finish(x, attend(q, k, v, self.mask)[0])

    spec = (1, block.rows, block.width)
    return Stage("block", Layers().eval(), (TensorSpec("x", spec),), (TensorSpec("y", spec),))


def _timed(runs: Mapping, tell) -> dict:
    """Seconds of each call, taken in turn so that other load on the machine meets all alike."""
    times: dict = {key: [] for key in runs}
    for number in range(ROUNDS):
        tell(0.8 + 0.2 * number / ROUNDS, "timing blocks in turn")
        for key, run in runs.items():
            times[key].append(quickest(run, key[2]))
    return {key: float(np.median(values)) for key, values in times.items()}


def quickest(run, threads: int, calls: int = 4) -> float:
    """Seconds of the quickest of some calls in a row: caches are warm, as between the steps of a flow, and other
    programs' turns fall into the others."""
    return min(seconds_of(run, threads) for _ in range(calls))


def seconds_of(run, threads: int) -> float:
    """Of one call. With one thread it is that thread's processor time, which other programs do not lengthen."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    begin = clock()
    run()
    return clock() - begin


def _host_ms() -> float:
    """Of bringing one 640 x 480 picture to 256 x 256, the median."""
    from vla_edge.policy.preprocess import resize_with_pad

    pixels = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
    times = []
    for _ in range(15):
        begin = time.perf_counter()
        resize_with_pad(pixels, 256, 256)
        times.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(times))


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def _processor() -> str:
    for line in _cpuinfo().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {len(os.sched_getaffinity(0))} cores"
    return f"this computer, {len(os.sched_getaffinity(0))} cores"


def _cache_bytes() -> int:
    """That stay cached between calls: a quarter of the last level, which other stages and programs share; 2 MB where the
    system does not tell."""
    found = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        if text[:-1].isdigit() and text[-1] in "KM":
            found = max(found, int(text[:-1]) * (2**10 if text[-1] == "K" else 2**20))
    return found // 4 or 2 * 2**20
