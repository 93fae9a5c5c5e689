"""Engines against PyTorch and against each other, at the policy's own size and at SmolVLA-450M's.

    python benchmarks/engine.py                    everything; wants a quiet machine, 12 GB of memory, half an hour
    python benchmarks/engine.py --policies shipped

Whole inferences (image to joint targets, all flow steps), in turn in one process, so that only ratios of one run count.
Weights of SmolVLA-450M's shapes are random: they are as fast as trained ones and mean nothing. Writes
out/bench/engine.json, in which rows of an earlier run on the same computer stay that are not measured anew.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import lerobot_peer  # noqa: E402
from bench_file import DIRECTORY, Row, add, table  # noqa: E402
from decode import decode_rows  # noqa: E402
from smolvla_shapes import observations, write_smolvla  # noqa: E402

from vla_edge.compress.steps import FlowSteps, PruneTokens, VisionCacheStep  # noqa: E402

SINGLES = ("onnxruntime", "openvino")
FEWER = (FlowSteps(num_steps=4), PruneTokens(keep=0.5, after=2), VisionCacheStep())
# between the frames of a camera that looks at a scene at rest
FRAME_NS = 100_000_000
POLICIES = {"shipped": None, "smolvla450_1cam": 1, "smolvla450_2cam": 2}


def main(arguments: list[str] | None = None) -> int:
    """Takes all figures; returns 0 when every limit is met."""
    options = _parser().parse_args(arguments)
    rows: list[Row] = []
    for name in options.policies:
        rows += policy_rows(name, options)
        add("engine", rows, options.output)  # what was measured stays
    if not options.no_decode:
        rows += decode_rows(options.rounds, options.threads)
    path = add("engine", rows, options.output)
    print(table(rows))
    print(path)
    return 0 if all(row.met is not False for row in rows) else 1


def policy_rows(name: str, options) -> list[Row]:
    """Speed, size in memory and start of one policy's engines."""
    import torch

    from vla_edge.compress.calibrate import collect, load_calibration
    from vla_edge.compress.recipe import Accept, load_recipe
    from vla_edge.engine.alone import cold_start
    from vla_edge.engine.backends import BackendError
    from vla_edge.engine.build import build
    from vla_edge.engine.race import race, speedup
    from vla_edge.engine.runner import Runner
    from vla_edge.policy.checkpoint import load_checkpoint

    torch.set_num_threads(options.threads)
    if POLICIES[name] is None:
        checkpoint = options.checkpoint
        data = load_calibration(checkpoint.resolve().parent / "calibration", load_checkpoint(checkpoint).spec)
    else:
        checkpoint = write_smolvla(options.output / name / "checkpoint", POLICIES[name])
        data = collect(observations(load_checkpoint(checkpoint).spec, 6), name, frames=3, held_out=2)
    # the same graph as int8; calibrating random weights would take minutes a build and change nothing
    recipe_name = options.recipe or ("int8" if POLICIES[name] is None else "int8-dynamic")
    ungated = replace(load_recipe(recipe_name), accept=Accept())
    plain = replace(load_recipe("fp32"), accept=Accept())
    traced: dict = {}
    wanted = {"auto": (ungated, "auto"), **{backend: (ungated, backend) for backend in SINGLES}}
    if not options.no_torch:
        wanted["torch_bf16"] = (plain, "torch")
    if POLICIES[name] is not None:
        wanted["fewer"] = (replace(ungated, name="fewer", steps=(*FEWER, *ungated.steps)), "auto")
    runners, paths = {"eager_fp32": Runner.from_checkpoint(checkpoint)}, {}
    missing = {"torch_bf16": "left out (--no-torch)"} if options.no_torch else {}
    peer = None
    if lerobot_peer.INTERPRETERS["smolvla"].is_file():
        peer = runners["lerobot"] = lerobot_peer.LeRobotPeer(checkpoint, options.threads)
    else:
        missing["lerobot"] = lerobot_peer.HOW["smolvla"]
    for label, (recipe, backend) in wanted.items():
        target = options.output / "bundles" / f"{name}-{label}"
        try:
            if options.again and (target / "manifest.yaml").is_file():
                paths[label] = target
            else:
                print(f"{name}: building {label}", file=sys.stderr)
                paths[label] = build(checkpoint, recipe, backend, target, data, traced=traced)
            runners[label] = Runner.from_bundle(paths[label], threads=options.threads)
        except BackendError as error:
            missing[label] = str(error)
    laps = race(runners, data.held_out, options.rounds)
    if peer is not None:
        peer.close()
    medians = {label: float(np.median(lap.total_ms)) for label, lap in laps.items()}
    told = f"{options.threads} threads, recipe {recipe_name}, medians: " + ", ".join(
        f"{label} {ms:.1f} ms" for label, ms in medians.items()
    )

    def ratio(row: str, slow: str, fast: str, limit: float | None, more: str = "") -> Row:
        if slow in missing or fast in missing:
            return Row(row, None, "", None, None, 0, None, missing.get(slow) or missing[fast])
        value, interval = speedup(laps[slow].total_ms, laps[fast].total_ms)
        return Row(row, value, "", limit and ">=", limit, options.rounds, interval, f"{told}; bootstrap interval{more}")

    singles = [label for label in SINGLES if label in medians]
    best_single = min(singles, key=medians.__getitem__)
    torch_ways = f"; PyTorch, each stage's fastest way: {_ways(paths['torch_bf16'])}" if "torch_bf16" in paths else ""
    rows = [
        ratio(f"speedup_vs_eager_fp32.{name}", "eager_fp32", "auto", 5.0, f"; auto: {_ways(paths['auto'])}"),
        ratio(f"speedup_vs_torch_bf16.{name}", "torch_bf16", "auto", 1.7, torch_ways),
        ratio(f"speedup_vs_lerobot.{name}", "lerobot", "auto", 7.0),
        # equal is as good: two builds of one choice differ by noise
        ratio(f"mixed_vs_best_single.{name}", best_single, "auto", 0.97),
        _rate(f"chunk_rate_hz.{name}", laps["auto"].total_ms, 3.0 if name == "smolvla450_1cam" else None, told),
    ]
    if POLICIES[name] is not None:
        note = "four flow steps, half of the image tokens after two text layers; every picture is looked at"
        limit = 5.0 if POLICIES[name] == 1 else None
        rows.append(_rate(f"chunk_rate_hz.{name}_4_steps", laps["fewer"].total_ms, limit, note))
        rows.append(_rate_at_rest(f"chunk_rate_hz.{name}_4_steps_at_rest", runners["fewer"], data.held_out[0], options, limit))
    del runners
    rows.append(_memory_row(name, paths["auto"]))
    starts = [cold_start(paths["auto"]) for _ in range(options.starts)]
    note = "new process to the end of its first inference, compiled models cached; smallest to largest"
    spread = (min(starts), max(starts))
    limit = ("<=", 3.0) if name == "shipped" else (None, None)
    rows.append(Row(f"cold_start_s.{name}", float(np.median(starts)), "s", *limit, len(starts), spread, note))
    return rows


def _ways(bundle: Path) -> str:
    """How each stage of a bundle is run."""
    from vla_edge.engine.bundle import Bundle
    from vla_edge.engine.choose import label

    return ", ".join(f"{e.interface.name}: {label(e.backend, e.options)}" for e in Bundle.load(bundle).stages)


def _rate(name: str, milliseconds: np.ndarray, limit: float | None, note: str) -> Row:
    rate = 1e3 / float(np.median(milliseconds))
    spread = tuple(1e3 / float(p) for p in np.percentile(milliseconds, [95, 5]))
    return Row(name, rate, "Hz", limit and ">=", limit, len(milliseconds), spread, f"{note}; 5 to 95 % of inferences")


def _rate_at_rest(name: str, runner, observation, options, limit: float | None) -> Row:
    """Of a stream of frames in which nothing moves but the sensor's noise; each second they are looked at all the same."""
    rng = np.random.default_rng(0)
    milliseconds = []
    for index in range(options.rounds):
        images = {
            camera: np.clip(image.astype(np.int16) + rng.integers(-2, 3, image.shape), 0, 255).astype(np.uint8)
            for camera, image in observation.images.items()
        }
        frame = replace(observation, stamp_ns=observation.stamp_ns + (index + 1) * FRAME_NS, images=images)
        milliseconds.append(1e3 * runner.infer(frame).timing.total)
    looked = int(np.sum(np.array(milliseconds) > 1.5 * np.median(milliseconds)))
    note = f"as before, at 10 frames/s of a scene at rest: {looked} of {options.rounds} were looked at; mean of all"
    return Row(name, 1e3 / float(np.mean(milliseconds)), "Hz", limit and ">=", limit, options.rounds, None, note)


def _memory_row(name: str, bundle: Path) -> Row:
    """What a process with the engine has at most, over one with everything imported and nothing loaded."""
    from vla_edge.engine.alone import most_memory
    from vla_edge.engine.bundle import Bundle

    opened = Bundle.load(bundle)
    idle, busy = most_memory(opened, idle=True), most_memory(opened)
    tensors = {
        spec.name: spec for entry in opened.stages for spec in (*entry.interface.inputs, *entry.interface.outputs)
    }
    activations = sum(spec.zeros().nbytes for spec in tensors.values())
    note = f"{busy / 1e6:.0f} MB, {idle / 1e6:.0f} before loading; bundle {opened.bytes / 1e6:.1f} and "
    note += f"tensors between stages {activations / 1e6:.1f} MB"
    limit = ("<=", 1.3) if POLICIES[name] is not None else (None, None)
    ratio = (busy - idle) / (opened.bytes + activations)
    return Row(f"peak_memory_ratio.{name}", ratio, "", *limit, 1, None, note)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("engines/g1_tabletop/checkpoint"))
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--recipe", help="int8, or its kind for random weights, when left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--starts", type=int, default=5, help="cold starts")
    parser.add_argument("--again", action="store_true", help="race the engines of an earlier run as they are")
    parser.add_argument("--no-torch", action="store_true", help="leave out PyTorch in bfloat16, which has to compile")
    parser.add_argument("--no-decode", action="store_true", help="leave out the 4-bit products of a 7B model")
    parser.add_argument("--output", type=Path, default=DIRECTORY)
    return parser


if __name__ == "__main__":
    sys.exit(main())
