"""Meta-World, an outside benchmark, in the closed loop: what compression costs the policy that was trained on it.

    $(tools/peer_environment.sh metaworld) -m benchmarks.meta_world

Engines and full precision act on the same seeds; writes out/bench/metaworld.json. Started again it goes on with the
episodes that are missing.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_file import DIRECTORY, Row, table, write  # noqa: E402
from broken_engines import two_bits  # noqa: E402

CHECKPOINT = Path(__file__).resolve().parents[1] / "engines" / "metaworld" / "checkpoint"
RECIPES = ("w8a8-smoothquant", "int8", "int4-gptq", "int4-rtn")
# Chosen before the first run, and used for nothing else.
FIRST_SEED, EPISODES = 560_000, 300
CONTROLS = 40
"""Episodes of an engine that was broken on purpose: what shows that there is something to lose."""


def metaworld_rows(checkpoint: Path, recipes: tuple[str, ...], episodes: int, say=print) -> list[Row]:
    """Success of full precision and of every recipe's engine, and what was lost pair by pair."""
    from vla_edge.engine.build import build
    from vla_edge.evaluate.closed_loop import run_closed_loop
    from vla_edge.evaluate.comparison import compare_engines
    from vla_edge.evaluate.metrics import wilson_interval
    from vla_edge.progress import Bar
    from vla_edge.sim.worlds import world

    bar, traced, bundles = Bar(), {}, {}
    try:
        for recipe in recipes:
            bundles[recipe] = build(
                checkpoint, recipe, traced=traced,
                progress=lambda fraction, what, recipe=recipe: bar(fraction, f"{recipe}: {what}"),
            )  # fmt: skip
        seeds, tier = range(FIRST_SEED, FIRST_SEED + episodes), world("metaworld").tier(None)
        found = compare_engines(checkpoint, bundles, seeds, tier, 1, DIRECTORY / "metaworld.episodes", bar, "metaworld")
    finally:
        bar.close()
    where = f"Meta-World {version('metaworld')}, MuJoCo {version('mujoco')}, tier {tier}; Wilson interval"
    rows = [_success("full_precision", found.reference, where)]
    for engine in found.contenders:
        pairs = engine.paired
        lost = 100 * wilson_interval(pairs.only_first, pairs.n).high
        note = (
            f"{pairs.only_first} episodes lost, {pairs.only_second} won; McNemar p = {pairs.p_value:.3g}; "
            f"at most {lost:.1f} % are lost (Wilson)"
        )
        rows += [
            _success(engine.name, engine.successes, where),
            Row(f"success_loss.{engine.name}", 0.0 - pairs.difference, "", None, None, episodes, None, note),
            Row(f"action_error_rel.{engine.name}", engine.verification["action_error_rel"], "", None, None, 1, None,
                "of the motion's standard deviation, on held-out observations"),
            Row(f"engine_bytes.{engine.name}", engine.engine_bytes, "B"),
        ]  # fmt: skip
    broken = run_closed_loop(two_bits(checkpoint, "denoise"), list(seeds)[:CONTROLS], tier, world="metaworld")
    rows.append(_success("two_bits", {row.seed: row.success for row in broken.rows}, f"its expert at 2 bits; {where}"))
    say(table(rows))
    return rows


def _success(name: str, successes, where: str) -> Row:
    from vla_edge.evaluate.metrics import wilson_interval

    count, n = sum(successes.values()), len(successes)
    found = wilson_interval(count, n)
    return Row(f"success.{name}", count / n, "", None, None, n, (found.low, found.high), f"{count} of {n}; {where}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--episodes", type=int, default=EPISODES)
    options = parser.parse_args()
    rows = metaworld_rows(options.checkpoint, tuple(options.recipes), options.episodes)
    print(write("metaworld", rows))


if __name__ == "__main__":
    main()
