"""How far the planner is off: against latencies others have published, and against engines built and timed here.

    python -m benchmarks.plan

Published rows that decided an efficiency are stated; those held out are limited to 25 % on Orin and RTX 4090. Of this
computer, the shipped policy is built in three precisions and each stage is timed beside a fresh calibration, limited to
15 %. Writes out/bench/plan.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_file import DIRECTORY, Row, table, write  # noqa: E402

LIMITED = ("agx-orin-64gb", "agx-orin-32gb", "rtx-4090")
RECIPES = ("fp32", "int8", "int4-rtn")
STAGES = ("vision", "prefix", "denoise")
ROUNDS = 15


def main(arguments: list[str] | None = None) -> int:
    """Takes all figures; returns 0 when every limit is met."""
    from vla_edge.resources import shipped_checkpoint

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=shipped_checkpoint())
    parser.add_argument("--output", type=Path, default=DIRECTORY)
    parser.add_argument("--published-only", action="store_true", help="build and time nothing")
    options = parser.parse_args(arguments)
    rows = published_rows()
    if not options.published_only:
        rows += local_rows(options.checkpoint, options.output)
    path = write("plan", rows, options.output)
    print(table(rows))
    print(path)
    return 0 if all(row.met is not False for row in rows) else 1


def published_rows() -> list[Row]:
    """The error of every published latency."""
    from vla_edge.engine.plan_score import score

    rows = []
    for entry in score():
        row = entry.row
        limited = row.device in LIMITED and not row.solves
        told = f"{row.ms:g} ms by {row.source}, predicted {entry.predicted_ms:.1f} ({100 * entry.error:+.1f} %)"
        decided = f"decides {row.solves}; " if row.solves else "held out; "
        rows.append(
            Row(
                f"plan_error.published.{row.name.replace(' ', '_').replace(',', '')}", abs(entry.error), "",
                "<=" if limited else None, 0.25 if limited else None, note=decided + told,
            )
        )  # fmt: skip
    return rows


def local_rows(checkpoint: Path, output: Path) -> list[Row]:
    """The error of every stage of the shipped policy on this computer, with one thread."""
    from vla_edge.compress.calibrate import load_calibration
    from vla_edge.compress.recipe import load_recipe
    from vla_edge.engine.architecture_files import architecture_of
    from vla_edge.engine.build import build
    from vla_edge.engine.calibrate_device import quickest
    from vla_edge.engine.devices import load_device
    from vla_edge.engine.plan import predict
    from vla_edge.engine.runner import Runner
    from vla_edge.progress import Bar

    bar, traced = Bar(), {}
    bundles = {
        recipe: build(checkpoint, recipe, output=output / "bundles" / recipe, traced=traced, progress=bar)
        for recipe in RECIPES
    }
    device = load_device("local", recalibrate=True, progress=bar)
    bar.close()
    calls = {}
    for recipe, path in bundles.items():
        runner = Runner.from_bundle(path, threads=1)
        observation = load_calibration(checkpoint.parent / "calibration", runner.spec).held_out[0]
        inputs: dict = {}
        for name, arrays in runner.stage_inputs(observation):
            inputs.setdefault(name, arrays)
        for name in STAGES:
            stage = runner.stages[name]
            wanted = {spec.name: np.ascontiguousarray(inputs[name][spec.name]) for spec in stage.interface.inputs}
            calls[recipe, name] = stage.bind(wanted, {spec.name: spec.zeros() for spec in stage.interface.outputs})
    times: dict = {key: [] for key in calls}
    for _ in range(ROUNDS):
        for key, call in calls.items():
            times[key].append(1e3 * quickest(call, 1))
    architecture, rows = architecture_of(checkpoint), []
    for recipe in RECIPES:
        plan = predict(architecture, load_recipe(recipe), device)
        for name in STAGES:
            measured, predicted = float(np.median(times[recipe, name])), plan.stage(name).call_ms
            rows.append(
                Row(
                    f"plan_error.local.{recipe}.{name}", abs(predicted / measured - 1), "", "<=", 0.15, ROUNDS,
                    note=f"{measured:.3f} ms a call here, predicted {predicted:.3f} "
                    f"({100 * (predicted / measured - 1):+.1f} %)",
                )
            )  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(main())
