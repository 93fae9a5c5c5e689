"""Whole chunks of flow policies at their true size: full precision, INT8, INT4 and mixed, against PyTorch.

Each contender is loaded in a process of its own, whose turn comes once a round: several of a 3B policy are not in memory
together, and still only figures of one run are compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.bench_file import Row
from benchmarks.large_speed import chunk_seconds
from benchmarks.smolvla_shapes import observations

ROUNDS, REPEATS = 3, 2
LANGUAGE, REST = ("prefix",), ("vision", "time?", "denoise")
INT8, INT4 = {"weights": "int8", "activations": "int8"}, {"weights": "int4", "group_size": 128}
RECIPES = {
    "int8": [{"quantize": {"targets": [*LANGUAGE, *REST], **INT8}}],
    "int4": [{"quantize": {"targets": [*LANGUAGE, *REST], **INT4}}],
    "mixed": [{"quantize": {"targets": [*LANGUAGE], **INT4}}, {"quantize": {"targets": [*REST], **INT8}}],
}


def chunk_rows(
    name: str, checkpoint: Path, directory: Path, backend: str, threads: int, memory_mb: float, torch_bf16: bool
) -> list[Row]:
    """Latency of each contender, and its speed over PyTorch's float32.

    Args:
        directory: where bundles go. memory_mb: that builds may take.
        torch_bf16: PyTorch in bfloat16 too, eager or compiled, whichever is faster.
    """
    from vla_edge.compress.calibrate import collect
    from vla_edge.compress.recipe import Accept, load_recipe, parse_recipe
    from vla_edge.engine.backends import BackendError
    from vla_edge.engine.build import build
    from vla_edge.engine.race import speedup
    from vla_edge.policy.checkpoint import load_checkpoint
    from vla_edge.progress import Bar

    data = collect(observations(load_checkpoint(checkpoint).spec, 6), "random observations", frames=3, held_out=2)
    wanted = {label: (parse_recipe({"name": label, "steps": steps}), backend) for label, steps in RECIPES.items()}
    if torch_bf16:
        wanted["torch_bf16"] = (replace(load_recipe("fp32"), accept=Accept()), "torch")
    engines, rows = {"eager_fp32": checkpoint}, []
    for label, (recipe, runtime) in wanted.items():
        bar = Bar()
        try:
            engines[label] = build(
                checkpoint, recipe, runtime, directory / f"{name}_{label}", data, bar, build_memory_mb=memory_mb
            )
        except BackendError as error:
            rows.append(Row(f"chunk_seconds.{name}_{label}", None, "s", note=str(error)))
        bar.close()
    seconds: dict[str, list[float]] = {label: [] for label in engines}
    for _ in range(ROUNDS):
        for label, engine in engines.items():
            seconds[label] += _alone(engine, threads)
    eager = np.array(seconds["eager_fp32"])
    for label, found in seconds.items():
        spread, note = (min(found), max(found)), f"{threads} threads; fastest to slowest"
        rows.append(Row(f"chunk_seconds.{name}_{label}", float(np.median(found)), "s", None, None, len(found), spread, note))
        if label != "eager_fp32":
            value, interval = speedup(eager, np.array(found))
            note = "medians; bootstrap interval"
            rows.append(Row(f"speedup_vs_eager_fp32.{name}_{label}", value, "", None, None, len(found), interval, note))
    return rows


def _alone(engine: Path, threads: int) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.large_chunks", str(engine), "--threads", str(threads)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    """Prints the seconds of inferences of one engine, or of a checkpoint in PyTorch, after one for nothing."""
    import torch

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds, *_ = chunk_seconds(options.engine, options.threads, REPEATS)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
