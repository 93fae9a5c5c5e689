"""Whole chunks of flow policies at their true size: INT8, INT4 and mixed beside PyTorch, eager and compiled, and LeRobot.

Each contender is loaded in a process of its own, whose turn comes once a round: several of a 3B policy are not in memory
together, and still only figures of one run are compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.bench_file import Row
from benchmarks.large_speed import chunk_seconds, plan_row
from benchmarks.lerobot_peer import HOW, INTERPRETERS, LeRobotPeer
from benchmarks.smolvla_shapes import observations

ROUNDS, REPEATS = 3, 2
LANGUAGE, REST = ("prefix",), ("vision", "time?", "denoise")
INT8, INT4 = {"weights": "int8", "activations": "int8"}, {"weights": "int4", "group_size": 128}
RECIPES = {
    "int8": [{"quantize": {"targets": [*LANGUAGE, *REST], **INT8}}],
    "int4": [{"quantize": {"targets": [*LANGUAGE, *REST], **INT4}}],
    "mixed": [{"quantize": {"targets": [*LANGUAGE], **INT4}}, {"quantize": {"targets": [*REST], **INT8}}],
}
SLOWEST = "eager_fp32"
TORCH = {SLOWEST: (False, False), "eager_bf16": (True, False), "compiled_fp32": (False, True), "compiled_bf16": (True, True)}
"""How PyTorch runs a checkpoint: whether it multiplies in bfloat16, its weights kept so, and whether through `torch.compile`."""


def chunk_rows(name: str, checkpoint: Path, directory: Path, backend: str, threads: int, memory_mb: float) -> list[Row]:
    """Latency of each contender, its speed over PyTorch's float32, and of what the planner knows how far it was off.

    Args:
        name: of the policy. directory: where bundles go. memory_mb: that builds may take.
    """
    from vla_edge.engine.devices import load_device
    from vla_edge.engine.race import speedup
    from vla_edge.progress import Bar

    bundles, rows = built(name, checkpoint, directory, backend, memory_mb)
    contenders = {label: [str(checkpoint), "--torch", label] for label in TORCH}
    contenders |= {label: [str(bundle)] for label, bundle in bundles.items()}
    peer = next(family for family in INTERPRETERS if name.startswith(family))
    if INTERPRETERS[peer].is_file():
        contenders["lerobot"] = [str(checkpoint), "--lerobot", peer]
    else:
        rows.append(Row(f"chunk_seconds.{name}_lerobot", None, "s", note=HOW[peer]))
    bar = Bar()
    device = load_device("local", True, bar)
    bar.close()
    seconds: dict[str, list[float]] = {label: [] for label in contenders}
    for _ in range(ROUNDS):
        for label in list(seconds):
            try:
                seconds[label] += _alone(contenders[label], threads)
            except subprocess.CalledProcessError as error:
                why = f"its process ended with {error.returncode}, see above"
                rows.append(Row(f"chunk_seconds.{name}_{label}", None, "s", note=why))
                del seconds[label]
    for label, found in seconds.items():
        spread, note = (min(found), max(found)), f"{threads} threads; fastest to slowest"
        rows.append(Row(f"chunk_seconds.{name}_{label}", float(np.median(found)), "s", None, None, len(found), spread, note))
        if label in bundles:
            rows.append(plan_row(f"{name}_{label}", checkpoint, bundles[label], device, float(np.median(found))))
        if label != SLOWEST:
            value, interval = speedup(np.array(seconds[SLOWEST]), np.array(found))
            note = "medians; bootstrap interval"
            rows.append(Row(f"speedup_vs_eager_fp32.{name}_{label}", value, "", None, None, len(found), interval, note))
    return rows


def built(
    name: str, checkpoint: Path, directory: Path, backend: str, memory_mb: float
) -> tuple[dict[str, Path], list[Row]]:
    """Recipe -> bundle, and a row for each that could not be built."""
    from vla_edge.compress.calibrate import collect
    from vla_edge.compress.recipe import parse_recipe
    from vla_edge.engine.backends import BackendError
    from vla_edge.engine.build import build
    from vla_edge.policy.checkpoint import load_checkpoint
    from vla_edge.progress import Bar

    data = collect(observations(load_checkpoint(checkpoint).spec, 6), "random observations", frames=3, held_out=2)
    bundles, rows = {}, []
    for label, steps in RECIPES.items():
        bar, recipe = Bar(), parse_recipe({"name": label, "steps": steps})
        try:
            bundles[label] = build(
                checkpoint, recipe, backend, directory / f"{name}_{label}", data, bar, build_memory_mb=memory_mb
            )
        except BackendError as error:
            rows.append(Row(f"chunk_seconds.{name}_{label}", None, "s", note=str(error)))
        bar.close()
    return bundles, rows


def torch_runner(checkpoint: Path, way: str, threads: int):
    """A checkpoint in PyTorch, by one of `TORCH`."""
    import torch
    from torch import nn

    from vla_edge.engine.backends import StageInterface
    from vla_edge.engine.backends.torch import TorchFileStage
    from vla_edge.engine.runner import Runner
    from vla_edge.policy.checkpoint import load_checkpoint, load_policy

    bfloat16, compiled = TORCH[way]
    loaded = load_checkpoint(checkpoint)
    policy, stages = load_policy(loaded).eval(), {}
    for layer in policy.modules() if bfloat16 else ():
        if isinstance(layer, nn.Linear):
            layer.to(torch.bfloat16)
    for stage in policy.stages():
        module = torch.compile(stage.module, dynamic=False) if compiled else stage.module
        interface = StageInterface(stage.name, stage.inputs, stage.outputs)
        stages[stage.name] = TorchFileStage(interface, module, "cpu", bfloat16, threads)
    return Runner(loaded.spec, loaded.tokenizer_path, stages)


def _alone(arguments: list[str], threads: int) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.large_chunks", *arguments, "--threads", str(threads)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    """Prints the seconds of inferences of one engine, or of a checkpoint in PyTorch or LeRobot, after one for nothing."""
    import torch

    from vla_edge.engine.runner import Runner

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("engine", type=Path, help="a bundle, or a checkpoint")
    parser.add_argument("--torch", choices=TORCH, help="how PyTorch runs the checkpoint")
    parser.add_argument("--lerobot", choices=INTERPRETERS, help="that runs the checkpoint, or another with its shapes")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.lerobot:
        runner = LeRobotPeer(options.engine, options.threads, options.lerobot)
        runner.warm_up()
        seconds = [runner.infer().timing.total for _ in range(REPEATS)]
    elif options.torch:
        seconds, *_ = chunk_seconds(torch_runner(options.engine, options.torch, options.threads), REPEATS)
    else:
        seconds, *_ = chunk_seconds(Runner.from_bundle(options.engine, threads=options.threads), REPEATS)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
