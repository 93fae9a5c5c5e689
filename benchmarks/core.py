"""Core figures: how much faster, how close, how small, how soon; and what ROS and the controller add.

    python benchmarks/core.py

Engines are timed in turn in one process, two threads each, on observations of the shipped recording; every ratio is of
whole inferences (image to joint targets, all flow steps). The live nodes are measured by scripts of their own, which
are run here and whose rows are taken over. Writes out/bench/core.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_file import DIRECTORY, Row, read, table, write  # noqa: E402

RECIPES = {"fp32": "fp32", "int8": "int8", "int4": "int4-rtn"}
LIVE = {
    "ros_overhead": (False, "ros_overhead_p99_ms.raw", "ms", "<=", 3.0),
    "tick_lateness": (True, "tick_1khz_lateness_p99_us", "us", "<=", 300.0),
}
COLD_STARTS = 5


def main(arguments: list[str] | None = None) -> int:
    """Takes all figures; returns 0 when every limit is met."""
    options = _parser().parse_args(arguments)
    rows = engine_rows(options.checkpoint, options.calibration, options.threads, options.rounds, options.output)
    if not options.engine_only:
        for name, (serves, *missing) in LIVE.items():
            rows += live_rows(name, options.output / "bundles" / RECIPES["int8"] if serves else None, *missing)
    path = write("core", rows, options.output)
    print(table(rows))
    print(path)
    return 0 if all(row.met is not False for row in rows) else 1


def engine_rows(checkpoint: Path, calibration: Path | None, threads: int, rounds: int, output: Path) -> list[Row]:
    """Everything that needs no ROS."""
    import torch

    from vla_edge.compress.calibrate import load_calibration
    from vla_edge.compress.recipe import Accept, load_recipe
    from vla_edge.engine.alone import cold_start
    from vla_edge.engine.build import build
    from vla_edge.engine.bundle import Bundle
    from vla_edge.engine.race import race, speedup
    from vla_edge.engine.runner import Runner
    from vla_edge.engine.verify import compare

    torch.set_num_threads(threads)
    traced: dict = {}
    paths = {}
    for name, recipe in RECIPES.items():
        # the rows below hold the limits: an engine past its recipe's is measured here, not refused
        ungated = replace(load_recipe(recipe), accept=Accept())
        target = output / "bundles" / recipe
        paths[name] = build(
            checkpoint, ungated, output=target, calibration=calibration, traced=traced, progress=_tell(recipe)
        )
    runners = {"eager": Runner.from_checkpoint(checkpoint)}
    runners |= {name: Runner.from_bundle(path, threads=threads) for name, path in paths.items()}
    source = calibration or checkpoint.resolve().parent / "calibration"
    held_out = load_calibration(source, runners["eager"].spec).held_out
    laps = race(runners, held_out, rounds)
    medians = {name: float(np.median(lap.total_ms)) for name, lap in laps.items()}
    told = ", ".join(f"{name} {ms:.1f} ms" for name, ms in medians.items())

    rows = []
    for name in RECIPES:
        ratio, interval = speedup(laps["eager"].total_ms, laps[name].total_ms)
        limit = (">=", 2.5) if name == "int8" else (None, None)
        note = f"{threads} threads, medians: {told}; bootstrap interval"
        rows.append(Row(f"{name}_speedup_vs_eager_fp32", ratio, "", *limit, rounds, interval, note))
    rows.append(_one_thread_row(runners["eager"], paths["int8"], held_out, rounds))
    torch.set_num_threads(threads)
    ratio, interval = speedup(laps["fp32"].total_ms, laps["int8"].total_ms)
    note = "what 8 bits add to the runtime's own gain; bootstrap interval"
    rows.append(Row("int8_speedup_vs_fp32_engine", ratio, "", None, None, rounds, interval, note))
    for name in RECIPES:
        found = compare(runners[name], runners["eager"], held_out)
        limit = ("<=", 0.03) if name == "int8" else (None, None)
        note = (
            f"{1e3 * found.action_error_rad:.3f} mrad of motion std {1e3 * found.motion_std_rad:.1f} mrad, cosine at "
            f"least {found.cosine_min:.5f}; interval: p5 to p95 of single observations"
        )
        value = found.action_error_rel
        rows.append(Row(f"{name}_action_error_rel", value, "", *limit, found.frames, found.frame_error_rel, note))
    layers = [layer for stage in Bundle.load(paths["int8"]).stages for layer in stage.layers.values()]
    sizes = np.array([layer["shape"][0] * layer["shape"][1] for layer in layers])
    share = sizes[[layer["weights"] == "int8" for layer in layers]].sum() / sizes.sum()
    note = "by number of weights, all linear layers of all stages"
    rows.append(Row("int8_matmul_weight_fraction", float(share), "", ">=", 0.95, len(layers), None, note))
    starts = [cold_start(paths["int8"]) for _ in range(COLD_STARTS)]
    spread = (min(starts), max(starts))
    note = "new process, interpreter and imports included, to the end of the first inference; smallest to largest"
    rows.append(Row("cold_start_s", float(np.median(starts)), "s", None, None, len(starts), spread, note))
    for name, path in paths.items():
        label = "bundle_bytes" if name == "int8" else f"bundle_bytes.{name}"
        rows.append(Row(label, Bundle.load(path).bytes, "B", note=f"recipe {RECIPES[name]}, all files"))
    return rows


def _one_thread_row(eager, bundle: Path, observations, rounds: int) -> Row:
    """The same ratio on one thread each, which other load on the machine disturbs least."""
    import torch

    from vla_edge.engine.race import race, speedup
    from vla_edge.engine.runner import Runner

    torch.set_num_threads(1)
    laps = race({"eager": eager, "int8": Runner.from_bundle(bundle, threads=1)}, observations, rounds)
    ratio, interval = speedup(laps["eager"].total_ms, laps["int8"].total_ms)
    told = ", ".join(f"{name} {np.median(lap.total_ms):.1f} ms" for name, lap in laps.items())
    note = f"1 thread, medians: {told}; bootstrap interval"
    return Row("int8_speedup_vs_eager_fp32.one_thread", ratio, "", None, None, rounds, interval, note)


def live_rows(script: str, bundle: Path | None, name: str, unit: str, relation: str, limit: float) -> list[Row]:
    """The rows of a script beside this one that writes a benchmark file of its own; one without value if it cannot.

    Args:
        bundle: the engine that the nodes serve meanwhile; None for the script's own.
    """
    path = Path(__file__).with_name(f"{script}.py")
    if not path.exists():
        return [Row(name, None, unit, relation, limit, 0, None, f"benchmarks/{script}.py is not there")]
    written = DIRECTORY / f"{script}.json"
    written.unlink(missing_ok=True)
    try:
        serving = [] if bundle is None else ["--bundle", str(bundle.resolve())]
        done = subprocess.run([sys.executable, str(path), *serving], timeout=300)
    except subprocess.TimeoutExpired:
        return [Row(name, None, unit, relation, limit, 0, None, f"benchmarks/{script}.py took longer than 300 s")]
    if not written.exists():
        note = f"benchmarks/{script}.py ended with code {done.returncode} and wrote no {written}"
        return [Row(name, None, unit, relation, limit, 0, None, note)]
    return read(written)


def _tell(recipe: str):
    steps = []

    def progress(fraction: float, step: str) -> None:
        if not steps or steps[-1] != step:
            steps.append(step)
            print(f"{recipe}: {100 * fraction:3.0f} %  {step}", file=sys.stderr)

    return progress


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("engines/g1_tabletop/checkpoint"))
    parser.add_argument("--calibration", type=Path, help="recording; the one beside the checkpoint when left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--output", type=Path, default=DIRECTORY)
    parser.add_argument("--engine-only", action="store_true", help="leave out what needs ROS")
    return parser


if __name__ == "__main__":
    sys.exit(main())
