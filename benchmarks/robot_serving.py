"""Closed loop with inference slowed down, for each inference policy: success and smoothness; and how near inpainting
comes to the guidance it stands for.

    python -m benchmarks.robot_serving

Paired episodes on fixed seeds, in lockstep: delays are world time, so no figure depends on how fast this machine is.
`benchmarks/robot.py` takes the rows over; alone it writes out/bench/robot_serving.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_file import DIRECTORY, Row, table, write  # noqa: E402
from live_nodes import CHECKPOINT, engine  # noqa: E402

# Chosen before the first run, and used for nothing else.
FIRST_SEED, EPISODES = 540_000, 60
HELD = "real_time_chunking"
"""The policy that the limits are for, named before the first run: what doc/serving.md advises for slow engines."""
POLICIES = (HELD, "asynchronous", "temporal_ensembling", "synchronous", "state_roll_forward", "offset_cancel")
DELAYS = {"touch": (0.3, 0.5, 0.1), "hard": (0.3,)}
"""s, by tier."""
MOST_LOSS, MOST_STEP = 0.05, 0.01
GUIDED_EPISODES, GUIDED_PAIRS, FROZEN, JOINED = 2, 24, 6, 16


def serving_rows(
    bundle: Path, episodes: int = EPISODES, workers: int = 1, tiers: tuple[str, ...] = tuple(DELAYS), say=print
) -> list[Row]:
    """Success, steps between plans, steps and jerk of the command, by tier, delay and policy."""
    from vla_edge.evaluate.closed_loop import run_closed_loop

    rows, seeds = [], range(FIRST_SEED, FIRST_SEED + episodes)
    for tier in tiers:
        prefix = "" if tier == "touch" else f"{tier}_"
        arms = [(0.0, "asynchronous"), *((delay, policy) for delay in DELAYS[tier] for policy in POLICIES)]
        undelayed = None
        for delay, policy in arms:
            found = run_closed_loop(bundle, seeds, tier, delay_s=delay, workers=workers, inference=policy)
            undelayed = undelayed or found
            rows += _arm(f"{prefix}delay_{1e3 * delay:.0f}", policy, found)
            if delay == 0.3:
                limit = ("<=", MOST_LOSS) if policy == HELD else (None, None)
                rows.append(_loss(f"{prefix}delay_300_success_loss.{policy}", undelayed, found, limit))
            say(table(rows[-6:]))
    return rows


def _arm(name: str, policy: str, found) -> list[Row]:
    """Of one run."""
    smooth, told = found.smoothness, found.summary()
    low, high = found.success_interval.low, found.success_interval.high
    note = (
        f"{found.successes} of {found.n}, wrong first {found.wrong_first}, median {told['median_seconds']} s, "
        f"{told['chunks'] / found.n:.1f} chunks an episode, {told['holds']} holds; Wilson interval"
    )
    limit = ("<=", MOST_STEP) if policy == HELD else (None, None)
    boundary = "two plans apart at the moment one takes over, worst joint: what is left to blend"
    left = "command off the line through the two ticks before, 500 Hz, worst joint: what was left of it after blending"
    return [
        Row(f"{name}_success.{policy}", found.success_rate, "", None, None, found.n, (low, high), note),
        Row(f"boundary_step_p99_rad.{policy}.{name}", _number(smooth.plan_step_p99), "rad", *limit,
            smooth.boundaries, None, boundary),
        Row(f"departure_p99_rad.{policy}.{name}", _number(smooth.departure_p99), "rad", None, None,
            smooth.boundaries, None, "two plans coming apart from one row to the next in the 0.5 s after, worst joint"),
        Row(f"command_step_p99_rad.{policy}.{name}", _number(smooth.command_step_p99), "rad", *limit,
            smooth.boundaries, None, left),
        Row(f"jerk_rms.{policy}.{name}", smooth.jerk_rms, "rad/s^3", None, None, found.n, None, "of the command"),
    ]  # fmt: skip


def _loss(name: str, undelayed, delayed, limit: tuple[str | None, float | None]) -> Row:
    """Success lost to the delay, pair by pair."""
    test = undelayed.against(delayed)
    note = (
        f"undelayed {undelayed.successes} of {undelayed.n}, delayed {delayed.successes}; at most "
        f"{test.drop_bound():.3f}, one-sided 95 %"
    )
    return Row(name, undelayed.success_rate - delayed.success_rate, "", *limit, delayed.n, None, note)


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def guidance_rows(checkpoint: Path = CHECKPOINT, pairs: int = GUIDED_PAIRS) -> list[Row]:
    """Inpainting beside the guidance of arXiv:2506.07339 (its product by PyTorch's backward pass, beta 5), that guidance
    with the Jacobian itself in place of its transpose, and without it: the same pairs of observations of the expert
    at the table, each chunk continuing the one before, 6 rows frozen and 10 joined softly.
    """
    import torch

    from vla_edge.engine.continuation import Continuation, inpaint
    from vla_edge.engine.runner import Runner
    from vla_edge.evaluate import calibration_bag
    from vla_edge.evaluate.bag import Bag
    from vla_edge.serve.plan import rows_from
    from vla_edge.serve.policies.real_time_chunking import RealTimeChunking, soft_mask
    from vla_edge.types import NANOSECONDS

    torch.set_num_threads(1)
    runner = Runner.from_checkpoint(checkpoint)
    leads = {"inpaint": (RealTimeChunking().begin, inpaint), "inpaint_throughout": (1.0, inpaint)}
    leads |= {name: (1.0, lead) for name, lead in _guided(runner, checkpoint).items()}
    with tempfile.TemporaryDirectory(prefix="vla_edge_bench_") as directory:
        recording = Path(directory) / "recording"
        first = calibration_bag.FIRST_SEED
        calibration_bag.record(recording, range(first, first + GUIDED_EPISODES))
        with Bag(recording) as bag:
            horizon = runner.spec.chunk_size * runner.spec.dt
            seen = [frame.observation for frame in bag.frames(("head",), runner.spec.joint_names, 5.0, horizon)]
    following = [
        (a, b) for a, b in zip(seen, seen[1:])
        if a.instruction == b.instruction and 0 < b.stamp_ns - a.stamp_ns < 0.4 * NANOSECONDS
    ][:pairs]  # fmt: skip
    weights = soft_mask(runner.spec.chunk_size, FROZEN, JOINED)
    frozen, free, bend = ({name: [] for name in (*leads, "unled")} for _ in range(3))
    for before, now in following:
        running = runner.infer(before).chunk
        (plan, _), alone = rows_from(running, now.stamp_ns), runner.infer(now).chunk.positions
        for name in frozen:
            continuation = Continuation(plan, weights, *leads[name]) if name in leads else None
            led = runner.infer(now, continuation=continuation).chunk.positions
            frozen[name].append(np.abs(led[:FROZEN] - plan[:FROZEN]).max())
            free[name].append(np.sqrt(np.mean((led[JOINED:] - alone[JOINED:]) ** 2)))
            bend[name].append(np.abs(np.diff(led, 2, axis=0)).max())
    n, rows = len(following), []
    for name in frozen:
        spread = tuple(map(float, np.percentile(frozen[name], (5, 95))))
        note = (
            f"worst of the frozen rows, mean over pairs, p5 to p95; free rows {1e3 * np.mean(free[name]):.2f} mrad rms "
            f"from the unled chunk, largest bend {1e3 * np.mean(bend[name]):.1f} mrad per step squared"
        )
        rows.append(Row(f"frozen_error_rad.{name}", float(np.mean(frozen[name])), "rad", None, None, n, spread, note))
    return rows


def _guided(runner, checkpoint: Path) -> dict:
    """The paper's guidance and two shortcuts, in PyTorch."""
    import torch

    from vla_edge.policy.checkpoint import load_checkpoint, load_policy

    denoise = load_policy(load_checkpoint(checkpoint)).denoise
    cache = [spec.name for spec in runner.stages["denoise"].interface.inputs[2:]]

    def believed(t: float):
        """x -> A(x) for the observation that the runner is at."""
        condition = runner.stages["time"].run({"time": np.array([t], np.float32)})["time_condition"]
        fixed = [torch.from_numpy(np.array(value)) for value in (condition, *(runner._loop.buffers[name] for name in cache))]
        return lambda x: x - t * denoise(x, *fixed)[0]

    def transposed(x, error, t):
        return torch.func.vjp(believed(t), x)[1](error)[0]

    def straight(x, error, t):
        return torch.func.jvp(believed(t), (x,), (error,))[1]

    def lead(product):
        def guide(x, v, t, target, weights):
            error = torch.from_numpy(weights * (target - (x - np.float32(t) * v)))
            k = 5.0 if t >= 1.0 else min(5.0, ((1.0 - t) ** 2 + t**2) / (t * (1.0 - t)))
            return v - np.float32(k) * product(torch.from_numpy(x.copy()), error, t).detach().numpy()

        return guide

    return {
        "paper": lead(transposed), "jacobian": lead(straight), "no_jacobian": lead(lambda x, error, t: error)
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Takes all figures; returns 0 when every limit is met."""
    options = _parser().parse_args(arguments)
    rows = serving_rows(engine(options.bundle), options.episodes, options.workers, tuple(options.tiers))
    rows += guidance_rows()
    print(table(rows))
    print(write("robot_serving", rows, options.output))
    return 0 if all(row.met is not False for row in rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bundle", type=Path, help="engine; that of the shipped checkpoint when left out")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="of each arm")
    parser.add_argument("--tiers", nargs="+", default=list(DELAYS), choices=list(DELAYS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, default=DIRECTORY)
    return parser


if __name__ == "__main__":
    sys.exit(main())
