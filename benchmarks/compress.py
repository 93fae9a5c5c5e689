"""What compression costs the robot: every recipe against full precision, in radians and in successes.

    python -m benchmarks.compress

Builds each recipe, lets it act on the same seeds of the harder tier as full precision, and writes
out/bench/compress.json, beside what `algorithms.py` measures, and for people out/bench/recipes.html. Finished
episodes are kept, so an interrupted run goes on; rows of recipes that `--recipes` leaves out stay. Which seeds and how
many was fixed before the first run, and is not to be changed after one.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_file import DIRECTORY, Row, read, table, with_earlier, write  # noqa: E402

CHECKPOINT = Path("engines/g1_tabletop/checkpoint")
DEMONSTRATIONS = Path("out/demonstrations")
TIER, FIRST_SEED, EPISODES = "hard", 400_000, 1_200
MIXED = "engines/g1_tabletop/mixed.yaml"
# recipe -> (most points lost, most points lost at the one-sided bound of 95 %, most action error); None: only told
LIMITS = {
    "w8a8-smoothquant": (1.0, 2.0, None),
    "int4-awq": (1.0, 2.0, None),
    MIXED: (1.0, 2.0, 0.03),
    "int4-rtn": (None, None, None),
    "int4-gptq": (None, None, None),
    "int8": (None, None, None),
    "prune-30": (1.0, None, None),
    "prune-structured": (2.0, None, None),
    "int8-two-step": (None, None, None),
    "two-step": (2.0, None, None),
    "distilled": (3.0, None, None),
}
MOST_BITS = {MIXED: 4.5}


def main(arguments: list[str] | None = None) -> int:
    """Measures; returns 0 when every limit is met."""
    from vla_edge.compress.recipe import load_recipe
    from vla_edge.engine.build import build
    from vla_edge.evaluate.comparison import compare_engines
    from vla_edge.evaluate.comparison_report import write_comparison_report
    from vla_edge.progress import Bar

    options = _parser().parse_args(arguments)
    shown = sorted({file.parent for file in options.demonstrations.rglob("shard-*.npz")})
    bar, bundles, missing, traced = Bar(), {}, [], {}
    for name in options.recipes:
        recipe = load_recipe(name)
        built = options.bundles / recipe.name if options.bundles else None
        if built is not None and (built / "manifest.yaml").is_file():
            bundles[recipe.name] = built
            continue
        if recipe.trains and not shown:
            why = f"no demonstrations in {options.demonstrations}; make demonstrations records them"
            missing.append(Row(f"success_drop_points.{recipe.name}", None, "points", note=why))
            continue
        bundles[recipe.name] = build(
            options.checkpoint, recipe, demonstrations=shown if recipe.trains else (), traced=traced,
            progress=lambda fraction, what, name=recipe.name: bar(fraction, f"{name}: {what}"),
        )  # fmt: skip
    seeds = range(FIRST_SEED, FIRST_SEED + options.episodes)
    comparison = compare_engines(
        options.checkpoint, bundles, seeds, TIER, options.workers, DIRECTORY / "compress.episodes", bar
    )
    bar.close()
    n, successes = len(seeds), sum(comparison.reference.values())
    told = f"tier {TIER}, seeds from {FIRST_SEED}"
    rows = [Row("success_rate.full_precision", successes / n, "", None, None, n, None, told)]
    limits = {Path(name).stem: limit for name, limit in LIMITS.items()}
    most_bits = {Path(name).stem: limit for name, limit in MOST_BITS.items()}
    for c in comparison.contenders:
        lost, bound, error = limits.get(c.name, (None, None, None))
        paired, upper = c.paired, 100 * c.paired.drop_bound()
        note = (
            f"{sum(c.successes.values())} of {n} against {successes}; {paired.only_first} seeds only full precision, "
            f"{paired.only_second} only this, McNemar p {paired.p_value:.3g}"
        )
        rows += [
            Row(f"success_drop_points.{c.name}", c.drop_points, "points", _at_most(lost), lost, n, None, note),
            Row(f"success_drop_bound_points.{c.name}", upper, "points", _at_most(bound), bound, n, None,
                "one-sided, 95 %"),
            Row(f"action_error_rel.{c.name}", c.verification["action_error_rel"], "", _at_most(error), error,
                c.verification["frames"], tuple(c.verification["frame_error_rel"]), "5th to 95th percentile of frames"),
            Row(f"bits.{c.name}", c.bits, "bits", _at_most(most_bits.get(c.name)), most_bits.get(c.name), 1, None,
                f"engine {c.engine_bytes / 1e6:.2f} MB, language matrices {c.language_bytes / 1e6:.2f} MB, "
                f"{c.profile_ms['total']['p50']:.1f} ms a chunk at its build"),
        ]  # fmt: skip
    file = DIRECTORY / "compress.json"
    # what other recipes lost holds as long as full precision did then what it does now
    same = file.is_file() and rows[0] in read(file)
    rows = with_earlier(rows + missing, file, lambda row: same or "_ratio_vs_" in row.name)
    print(table(rows))
    print(write("compress", rows))
    print(write_comparison_report(comparison, DIRECTORY / "recipes.html")[0])
    return 0 if all(row.met is not False for row in rows) else 1


def _at_most(limit: float | None) -> str | None:
    return None if limit is None else "<="


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--recipes", nargs="+", default=list(LIMITS))
    parser.add_argument("--bundles", type=Path, help="directory of bundles by recipe, to act with as they are")
    parser.add_argument("--demonstrations", type=Path, default=DEMONSTRATIONS, help="for recipes that train")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="fewer only to try this out")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    return parser


if __name__ == "__main__":
    sys.exit(main())
