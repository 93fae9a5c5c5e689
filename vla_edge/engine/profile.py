"""Where an inference spends its time: stage by stage, the host's own work, and how near the machine's ceilings."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vla_edge.types import Observation

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Profile:
    """An engine on this computer.

    Attributes:
        parts: preprocess, each stage (all its calls), postprocess, total -> "p50", "p95", "p99" ms and n.
        host: image decode, resize, tokenization, post-processing, each alone -> the same.
        stages: stage -> figures against the roofline, of those whose files tell their work.
        roofline: of this computer.
        peak_bytes: most memory of this process so far. bundle_bytes: of the engine's files.
        bottleneck, lever: what holds a chunk back, and what to do.
    """

    parts: Mapping[str, Mapping[str, float]]
    host: Mapping[str, Mapping[str, float]]
    stages: Mapping[str, object]
    roofline: object
    peak_bytes: int
    bundle_bytes: int
    bottleneck: str
    lever: str

    def to_dict(self) -> dict:
        """Plain types."""
        return asdict(self)


def profile(runner, observations: Sequence[Observation], repeats: int = 30) -> dict[str, dict[str, float]]:
    """Part of an inference -> {"p50", "p95", "p99"} ms and n, over `repeats` inferences after a warm-up.

    Parts are preprocess, each stage (all its calls), postprocess and total.
    """
    runner.warm_up()
    rows: dict[str, list[float]] = {}
    for index in range(repeats):
        timing = runner.infer(observations[index % len(observations)]).timing
        parts = {"preprocess": timing.preprocess, **timing.stages, "postprocess": timing.postprocess}
        for name, seconds in {**parts, "total": timing.total}.items():
            rows.setdefault(name, []).append(1e3 * seconds)
    return {name: summary(milliseconds) for name, milliseconds in rows.items()}


def profile_bundle(
    bundle, observations: Sequence[Observation], repeats: int = 100, threads: int | None = None, roofline=None
) -> Profile:
    """Everything about the engine in `bundle` (an `engine.bundle.Bundle`) on this computer.

    Args:
        observations: that its policy can be shown. roofline: measured before; measured here when None.

    Raises:
        BackendError, RunnerError, ObservationError: the engine cannot be run here, or on these observations.
    """
    from vla_edge.engine.bottleneck import LEVERS
    from vla_edge.engine.stage_figures import chunk_bottleneck, stage_figures
    from vla_edge.engine.roofline import measure_roofline
    from vla_edge.engine.runner import Runner
    from vla_edge.engine.work import stage_work

    runner = Runner.from_bundle(bundle.directory, threads=threads)
    parts = profile(runner, observations, repeats)
    peak = peak_bytes()  # before the measurements below need memory of their own
    host = _host(bundle, observations, repeats)
    roofline = measure_roofline() if roofline is None else roofline
    passes = runner.infer(observations[0]).timing.passes  # not alike for all, where a draft proposes
    calls = {"vision": len(bundle.spec.cameras) * bundle.spec.observation_steps, "denoise": runner.num_steps}
    calls |= dict.fromkeys(("decode", "revise", "verify", "draft"), max(passes, 1))
    stages = {}
    for entry in bundle.stages:
        name = entry.interface.name
        work = stage_work(bundle.directory / entry.file)
        if work is not None and name in parts:
            stages[name] = stage_figures(parts[name]["p50"], calls.get(name, 1), work, roofline)
    label = chunk_bottleneck(parts, stages)
    return Profile(parts, host, stages, roofline, peak, bundle.bytes, label, LEVERS[label])


def peak_bytes() -> int:
    """Most memory this process has had, as far as can be told: pages of a file are counted once, however often it is mapped
    now."""
    import resource
    import sys

    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found.group(1)) - _mapped_again()
    # elsewhere; on Linux this counts what the process was forked from
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _mapped_again() -> int:
    """Bytes that the system counts more than once: stages map the weights that they share, each for itself."""
    seen: dict[tuple[str, ...], int] = {}
    again, key = 0, None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ (\S+) (\S+) (\d+)", line):
            key = header.groups() if header.group(3) != "0" else None  # offset, device and file; memory has none
        elif key is not None and (resident := re.match(r"Rss:\s+(\d+) kB", line)):
            held = 1024 * int(resident.group(1))
            again += min(held, seen.get(key, 0))
            seen[key] = max(held, seen.get(key, 0))
    return again


def summary(values: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and n of `values`."""
    points = np.percentile(values, PERCENTILES)
    return {**{f"p{p}": round(float(point), 3) for p, point in zip(PERCENTILES, points)}, "n": len(values)}


def _host(bundle, observations: Sequence[Observation], repeats: int) -> dict[str, dict[str, float]]:
    """What surrounds the network, each alone: an image of its first camera, the instruction, the actions."""
    import cv2

    from vla_edge.observe.image import decode_compressed
    from vla_edge.policy.preprocess import Postprocessor, Preprocessor
    from vla_edge.policy.tokenize import InstructionTokenizer

    spec = bundle.spec
    camera, observation = spec.cameras[0], observations[0]
    tokenizer = InstructionTokenizer.of(spec, bundle.tokenizer_path)
    prepare, finish = Preprocessor(spec, tokenizer), Postprocessor(spec)
    picture = observation.images[camera.name]
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    actions = np.zeros((1, spec.chunk_size, spec.max_action_dim), np.float32)
    work = {
        "image decode": lambda: decode_compressed(jpeg.tobytes(), format="jpeg"),
        "image resize": lambda: prepare.image(observation, camera),
        "tokenization": lambda: tokenizer(observation.instruction),
        "post-processing": lambda: finish(actions, observation.joints),
    }
    return {name: summary(_times(call, repeats)) for name, call in work.items()}


def _times(call: Callable[[], object], repeats: int) -> list[float]:
    """ms of each repetition."""
    call()
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - begin))
    return found
