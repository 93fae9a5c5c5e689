"""How far the planner is off: against latencies others have published, and against engines built and timed here.

    python -m benchmarks.plan

Published rows that decided an efficiency are stated; those held out are limited to 25 % on Orin and RTX 4090. Of this
computer, the shipped policy is built in three precisions and each stage is timed in turns with a fresh calibration, limited
to 15 %. Writes out/bench/plan.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_file import DIRECTORY, Row, table, write  # noqa: E402

LIMITED = ("agx-orin-64gb", "agx-orin-32gb", "rtx-4090")
RECIPES = ("fp32", "int8", "int4-rtn")
STAGES = ("vision", "prefix", "denoise")
RUNTIME = "onnxruntime"  # that a local plan is of


def main(arguments: list[str] | None = None) -> int:
    """Takes all figures; returns 0 when every limit is met."""
    from vla_edge.resources import shipped_checkpoint

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=shipped_checkpoint())
    parser.add_argument("--output", type=Path, default=DIRECTORY)
    parser.add_argument("--bundles", type=Path, help="directory with bundles built before, named as their recipes")
    parser.add_argument("--published-only", action="store_true", help="build and time nothing")
    options = parser.parse_args(arguments)
    rows = published_rows()
    if not options.published_only:
        ready = {recipe: options.bundles / recipe for recipe in RECIPES} if options.bundles else None
        rows += local_rows(options.checkpoint, ready or built(options.checkpoint, options.output))
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


def local_rows(checkpoint: Path, bundles: Mapping[str, Path]) -> list[Row]:
    """The error of every stage of `checkpoint` on this computer, with one thread; blocks and stages timed in turns."""
    from vla_edge.compress.recipe import load_recipe
    from vla_edge.engine.checkpoint_shapes import architecture_of
    from vla_edge.engine.calibrate_device import ROUNDS, calibrate, device_from
    from vla_edge.engine.plan import predict
    from vla_edge.progress import Bar

    bar = Bar()
    found, measured = calibrate(bar, stage_calls(checkpoint, bundles))
    bar.close()
    one = {**found, "seconds_per": {"1": found["seconds_per"]["1"]}}  # what is timed has one thread, so what is predicted
    architecture, device, rows = architecture_of(checkpoint), device_from(one), []
    for recipe in bundles:
        plan = predict(architecture, load_recipe(recipe), device)
        for stage in STAGES:
            ms, predicted = 1e3 * measured[recipe, stage], plan.stage(stage).call_ms
            note = f"{ms:.3f} ms a call, predicted {predicted:.3f} ({100 * (predicted / ms - 1):+.1f} %)"
            name = f"plan_error.local.{recipe}.{stage}"
            rows.append(Row(name, abs(predicted / ms - 1), "", "<=", 0.15, ROUNDS, note=note))
    return rows


def stage_calls(checkpoint: Path, bundles: Mapping[str, Path]) -> dict:
    """(recipe, stage) -> a call of it on what a real observation brings, with one thread."""
    from vla_edge.compress.calibrate import load_calibration
    from vla_edge.engine.runner import Runner

    calls, observation = {}, None
    for recipe, path in bundles.items():
        runner = Runner.from_bundle(path, threads=1)
        if observation is None:
            observation = load_calibration(checkpoint.parent / "calibration", runner.spec).held_out[0]
        inputs: dict = {}
        for name, arrays in runner.stage_inputs(observation):
            inputs.setdefault(name, arrays)
        for name in STAGES:
            interface = runner.stages[name].interface
            wanted = {spec.name: np.ascontiguousarray(inputs[name][spec.name]) for spec in interface.inputs}
            given = {spec.name: spec.zeros() for spec in interface.outputs}
            calls[recipe, name] = runner.stages[name].bind(wanted, given)
    return calls


def built(checkpoint: Path, output: Path) -> dict[str, Path]:
    """Recipe -> bundle."""
    from vla_edge.engine.build import build
    from vla_edge.progress import Bar

    bar, traced = Bar(), {}
    found = {
        recipe: build(checkpoint, recipe, RUNTIME, output=output / "bundles" / recipe, traced=traced, progress=bar)
        for recipe in RECIPES
    }
    bar.close()
    return found


if __name__ == "__main__":
    sys.exit(main())
