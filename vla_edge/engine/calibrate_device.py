"""What things cost on this computer: blocks of layers, run through the real exporter and runtime.

Each block (`calibration_blocks`) is a few layers of one size, in float32, INT8 and INT4, with one thread and with all.
How long a call takes is laid out on what the call does (`cost.features`) by least squares with no cost below zero. The
result is kept in the user's cache, for this processor, these blocks and this runtime.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vla_edge.engine.backends.cpu import processor
from vla_edge.engine.calibration_blocks import BLOCKS, VARIANTS, block_layers, block_stage
from vla_edge.engine.cost import ATTENTION, COMPUTE, LABELS, WAITS, MeasuredSum, features
from vla_edge.engine.devices import LOCAL, Device, DeviceError, Efficiency
from vla_edge.engine.native import library
from vla_edge.engine.roofline import read_speed

ROUNDS, TURN_S = 15, 0.012
_LEAST_CALLS = 2
_UNCACHED = 3  # times what caches hold: of so much they give little
_STEPS = 20_000  # of coordinate descent; it stops when nothing moves
# Power of a block's time that its relative error weighs with. A large policy is made of long calls and a small one of short
# ones; long ones are timed with less noise, and there are fewer of them among the blocks.
_LONGER = 0.2


def local_device(recalibrate: bool = False, progress=None) -> Device:
    """This computer, measured now or earlier.

    Args:
        recalibrate: measure again. progress: called with the fraction done and the step.

    Raises:
        DeviceError: it was not measured yet, and torch, which the measurement needs, is not installed.
    """
    path = calibration_path()
    if recalibrate or not path.is_file():
        result, _ = calibrate(progress or (lambda fraction, step: None))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    return device_from(read_calibration(path), path)


def calibration_path() -> Path:
    """Where this computer's calibration is kept; another processor, core count or runtime has another."""
    import onnxruntime

    it = processor()
    able = " ".join(sorted(it.flags))
    able += " own kernels" if library() is not None else ""
    how = f"{BLOCKS} {VARIANTS} {list(LABELS)} {_LONGER}"
    key = f"{it.name} {able} {len(os.sched_getaffinity(0))} {onnxruntime.__version__} {how}"
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
        own, whole = plain["cache_bytes"]
        wrong |= set(plain["read_bytes_per_s"]) != set(costs) or min(plain["read_bytes_per_s"].values()) <= 0
        if wrong or not 0 < own <= whole or not 0 < plain["memory_gb"]:
            raise ValueError("a cost is missing or below 0")
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DeviceError(f"the calibration {path} is damaged ({error}); measure again with --calibrate") from error
    return plain


def device_from(calibration: Mapping, path: Path | None = None) -> Device:
    """The device that a calibration describes."""
    costs = {int(threads): entry for threads, entry in calibration["seconds_per"].items()}
    read = {int(threads): speed for threads, speed in calibration["read_bytes_per_s"].items()}
    one = costs[min(costs)]
    return Device(
        name=LOCAL,
        title=calibration["processor"],
        peak_tera={kind: 1e-12 / one[kind] for kind in ("float32", "int8") if one[kind]},
        bandwidth_gb_s=1e-9 * max(read.values()),
        memory_gb=calibration["memory_gb"],
        floats="float32",
        runtime="onnxruntime",
        runtimes={"onnxruntime": Efficiency({"float32": 1.0}, 1.0)},
        reserved_gb=min(2.0, calibration["memory_gb"] / 4),
        host_ms_per_camera=calibration["host_ms_per_camera"],
        sources=(f"measured here, {calibration['measured']}: {path}",),
        measured=MeasuredSum(costs, tuple(calibration["cache_bytes"]), read),
    )


def calibrate(tell, beside: Mapping | None = None) -> tuple[dict, dict]:
    """Runs the blocks; what was found, in plain types.

    Args:
        beside: calls with one thread that are timed in the same turns, by any key, so that the load on the machine
            meets them and the blocks alike. Their seconds come second.

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

    caches = _caches()
    threads = sorted({1, min(len(os.sched_getaffinity(0)), 8)})
    with tempfile.TemporaryDirectory() as directory, torch_threads(0):
        runs, counted = _prepared(Path(directory), threads, caches, tell)
        keys = {("beside", key, 1): call for key, call in (beside or {}).items()}
        timed = _timed({**runs, **keys}, tell)
    seconds = {key: timed[key] for key in runs}
    costs = {}
    alone = np.zeros(len(LABELS))
    for number in threads:
        mine = [key for key in counted if key[2] == number]
        rows = np.array([[counted[key][name] for name in LABELS] for key in mine])
        took = np.array([seconds[key] for key in mine])
        found = fit_costs(rows, took, alone / number, took**_LONGER)
        if number == 1:
            # two processors multiply at most twice as fast as one; what they read, they may hold more of
            alone = np.where([label in (COMPUTE, ATTENTION) for label in LABELS.values()], found, 0.0)
        costs[str(number)] = _ordered(dict(zip(LABELS, map(float, found))))
    result = {
        "processor": f"{processor().name}, {len(os.sched_getaffinity(0))} cores",
        "measured": time.strftime("%Y-%m-%d"),
        "seconds_per": costs,
        "cache_bytes": list(caches),
        "read_bytes_per_s": {str(number): _read_speed(number, counted, seconds, caches) for number in threads},
        "memory_gb": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9,
        "host_ms_per_camera": _host_ms(),
        "blocks": {f"{i} {precision} {n}": 1e3 * seconds[i, precision, n] for i, precision, n in seconds},
    }
    return result, {key: timed["beside", key, 1] for key in beside or {}}


def fit_costs(
    rows: np.ndarray, seconds: np.ndarray, least: np.ndarray | None = None, weights: np.ndarray | None = None
) -> np.ndarray:
    """(F,) costs of at least `least` (F,), or 0, with which `rows` (N, F) give `seconds` (N,) with the least squared
    relative error, each times its weight of `weights` (N,), or 1.

    Coordinate descent on the normal equations (Franc et al., 2005, "Sequential coordinate-wise algorithm for the
    non-negative least squares problem").
    """
    weights = np.ones(len(rows)) if weights is None else weights
    relative = rows * (weights / seconds)[:, None]
    scale = np.linalg.norm(relative, axis=0)
    used = scale > 0
    scaled = relative[:, used] / scale[used]
    gram, target = scaled.T @ scaled, scaled.T @ weights
    floor = np.zeros(len(target)) if least is None else (least * scale)[used]
    x = floor.copy()
    for _ in range(_STEPS):
        before = x.copy()
        for i in range(len(x)):
            x[i] = max(floor[i], x[i] + (target[i] - gram[i] @ x) / gram[i, i])
        if np.abs(x - before).max() <= 1e-12 * max(1e-12, np.abs(x).max()):
            break
    costs = np.zeros(rows.shape[1])
    costs[used] = x / scale[used]
    return costs


def _read_speed(threads: int, counted: Mapping, seconds: Mapping, caches: tuple[float, float]) -> float:
    """Bytes per second that memory gives: the most that was read, by dot products or by a block that caches hold little
    of."""
    read = {key: sum(counted[key][f"loaded{kind}"] for kind in WAITS) for key in counted if key[2] == threads}
    blocks = [count / seconds[key] for key, count in read.items() if count > _UNCACHED * caches[1]]
    return max([read_speed(threads), *blocks])


def _ordered(costs: dict[str, float]) -> dict[str, float]:
    """`costs` where weights from farther away cost no less than from nearer, as where no block's leave a large cache."""
    found = dict(costs)
    for kind in WAITS:
        found[f"shared{kind}"] = max(found["cached"], found[f"shared{kind}"])
        found[f"loaded{kind}"] = max(found[f"shared{kind}"], found[f"loaded{kind}"])
    return found


def _prepared(directory: Path, threads: Sequence[int], caches: tuple[float, float], tell):
    """(block, precision, threads) -> a call, and -> what it counts."""
    from vla_edge.engine.backends import StageInterface, get_backend
    from vla_edge.engine.export import export_stage, trace

    runtime = get_backend("onnxruntime")
    runs, counted = {}, {}
    for index, block in enumerate(BLOCKS):
        tell(0.8 * index / len(BLOCKS), f"exporting blocks, {block.kind}")
        stage = block_stage(block)
        traced = trace(stage)
        interface = StageInterface(stage.name, stage.inputs, stage.outputs)
        work = block.work()
        for name in block.variants:
            variant = VARIANTS[name]
            place = directory / f"{index}-{name}"
            place.mkdir()
            file = export_stage(stage, block_layers(stage.module, name, runtime), place / "block.onnx", traced)
            precisions = {product.layer: variant.precision for product in work.products}
            for number in threads:
                built = runtime.build(file, place, interface, {"threads": number, **dict(variant.options)})
                loaded = runtime.load(place / built.file, interface, built.options)
                inputs = {spec.name: np.random.default_rng(0).standard_normal(spec.shape, np.float32)
                          for spec in stage.inputs}  # fmt: skip
                outputs = {spec.name: spec.zeros() for spec in stage.outputs}
                runs[index, name, number] = loaded.bind(inputs, outputs)
                counted[index, name, number] = features(work, precisions, caches, variant.way)
    return runs, counted


def _timed(runs: Mapping, tell) -> dict:
    """Seconds of each call, taken in turn so that other load on the machine meets all alike.

    A prediction is of a computer that does nothing else, and other programs only ever lengthen a call: it is the quickest
    that tells (Chen and Revels, 2016, arXiv:1608.04295).
    """
    times = dict.fromkeys(runs, math.inf)
    for number in range(ROUNDS):
        tell(0.8 + 0.2 * number / ROUNDS, "timing blocks in turn")
        for key, run in runs.items():
            times[key] = min(times[key], quickest(run, key[2]))
    return times


def quickest(run, threads: int) -> float:
    """Seconds of the quickest of as many calls in a row as fill a turn: caches are warm, as between the steps of a flow."""
    found = seconds_of(run, threads)
    for _ in range(max(_LEAST_CALLS, math.ceil(TURN_S / found))):
        found = min(found, seconds_of(run, threads))
    return found


def seconds_of(run, threads: int) -> float:
    """Of one call. With one thread it is its processor time, which other programs do not lengthen by their turns."""
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


def _caches() -> tuple[float, float]:
    """Bytes of weights that stay near a processor between calls, a quarter of the last level, which other stages and
    programs share; and all of it. 2 and 8 MB where the system does not tell."""
    found = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        if text[:-1].isdigit() and text[-1] in "KM":
            found = max(found, int(text[:-1]) * (2**10 if text[-1] == "K" else 2**20))
    whole = found or 8 * 2**20
    return whole / 4, float(whole)
