"""How fast, how steadily and how truly a recording is replayed.

    python benchmarks/replay.py [--long-minutes 60] [--cuts 1000]

A two-camera 640x480 recording at 30 Hz in JPEG, the shipped policy's INT8 engine at 5 Hz; memory over a minute and over
an hour of it; the same recording through the nodes and through the library; engines broken on purpose, before the
default limits; recordings cut at random bytes. Writes out/bench/replay.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_file import Row, table, write  # noqa: E402
from live_nodes import CHECKPOINT, LiveNodes, Listener, domain, engine  # noqa: E402

from vla_edge.evaluate.calibration_bag import FIRST_SEED, record  # noqa: E402

RATE_HZ = 5.0
# the expert at the table, every frame; the recording beside the checkpoint has one in six
RECORDING, EPISODES = "recording", 12
# In a process of its own, so that its peak of memory is its own.
CHILD = """
import json, resource, sys, time
from vla_edge.evaluate.replay import evaluate_bag, open_policy
policy = open_policy(sys.argv[2])
policy.warm_up()
begin, used = time.perf_counter(), time.process_time()
found = evaluate_bag(sys.argv[1], policy, rate_hz=float(sys.argv[3]))
seconds, used = time.perf_counter() - begin, time.process_time() - used
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "processor": used, "peak": peak, "frames": found.frames,
                  "duration": found.duration_s, "engine_ms": found.latency_ms.p50}))
"""


def main(arguments: list[str] | None = None) -> int:
    """Takes the figures; returns 0 when every limit is met."""
    options = _parser().parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory(prefix="vla_edge_bench_", dir=options.directory) as directory:
        parts = {"speed": speed, "parity": parity, "broken": broken, "cuts": cuts}
        record(Path(directory) / RECORDING, range(FIRST_SEED, FIRST_SEED + EPISODES), rate_hz=RATE_HZ)
        for part in options.parts or parts:
            print(f"{part} ...", file=sys.stderr, flush=True)
            rows += parts[part](options, Path(directory))
    print(table(rows))
    print(write("replay", rows))
    return 0 if all(row.met is not False for row in rows) else 1


def speed(options, directory: Path) -> list[Row]:
    """realtime_factor and memory_growth_bytes."""
    from long_bag import write_long_bag

    bundle = engine(options.bundle)
    short = write_long_bag(directory / "short", 60.0, directory / RECORDING)
    runs = [_replay(short, bundle) for _ in range(options.repeats)]
    factors = [run["duration"] / run["seconds"] for run in runs]
    frames = runs[0]["frames"]
    note = (
        f"two 640x480 cameras at 30 Hz in JPEG, INT8 engine at {RATE_HZ:g} Hz: {frames} of "
        f"{round(60 * 30)} frames evaluated, engine p50 {runs[0]['engine_ms']:.1f} ms, "
        f"{min(run['processor'] for run in runs):.1f} s of processor time for the minute; interval: slowest and fastest"
    )
    ends = (min(factors), max(factors))
    rows = [Row("realtime_factor", float(np.median(factors)), "", ">=", 10.0, len(runs), ends, note)]
    if options.long_minutes > 1:
        long = write_long_bag(directory / "long", 60.0 * options.long_minutes, directory / RECORDING)
        run = _replay(long, bundle)
        note = (
            f"peak over 1 minute {runs[0]['peak'] / 1e6:.0f} MB, over {options.long_minutes:g} minutes "
            f"{run['peak'] / 1e6:.0f} MB ({run['frames']} frames, {run['duration'] / run['seconds']:.1f} x real time)"
        )
        growth = run["peak"] - runs[0]["peak"]
        rows.append(Row("memory_growth_bytes", growth, "bytes", "<=", 50e6, run["frames"], None, note))
    return rows


def parity(options, directory: Path) -> list[Row]:
    """live_offline_max_difference, on part of the recording, in which pictures and joints are simultaneous.

    Live, a picture is longer on its way than the joints at its moment, and a node cannot use what is not there yet; so
    the pictures are received later here too.
    """
    domain()
    from long_bag import with_camera_delay

    from vla_edge.evaluate.parity import compare_chunks

    bundle, bag = engine(options.bundle), with_camera_delay(directory / RECORDING, directory / "delayed", 40.0)
    with LiveNodes() as nodes, Listener() as listener:
        chunks = _listen(listener)
        nodes.node("vla_node", bundle=bundle, image_transport="compressed", rate=RATE_HZ, threads=1, use_sim_time=True)
        listener.conductor.bring_up("vla", 120.0)
        nodes.node("replay_node", bag=bag, clock=True, rate=0.5)
        listener.conductor.wait(lambda: len(chunks) >= options.chunks, 300.0)
        if not chunks:
            raise RuntimeError(nodes.said())
        found = compare_chunks(bag, bundle, list(chunks), threads=1)
    note = f"{found.chunks} chunks of the vla node on /clock, against the library on the same recording"
    return [Row("live_offline_max_difference", found.max_difference, "rad", "<=", 1e-6, found.chunks, None, note)]


def broken(options, directory: Path) -> list[Row]:
    """broken_engines_caught, each by the limit that names its fault, the others innocent."""
    from broken_engines import Remembered, broken_engines

    from vla_edge.engine.runner import Runner
    from vla_edge.evaluate.replay import evaluate_bag
    from vla_edge.evaluate.verdict import judge

    reference, caught, told = Remembered(Runner.from_checkpoint(CHECKPOINT)), 0, []
    for case in broken_engines(CHECKPOINT, directory):
        found = evaluate_bag(directory / RECORDING, case.policy, reference, rate_hz=RATE_HZ, max_frames=options.frames)
        checks = {check.name: check.passed for check in judge(found).checks}
        first = next((name for name, passed in checks.items() if not passed), "nothing")
        guilty = [name for name in case.innocent if not checks.get(name, True)]
        right = first == case.limit and not guilty
        caught += right
        told.append(f"{case.name}: {first}" + (f", but also {', '.join(guilty)}" if guilty else ""))
    note = f"of {len(told)}, by the default limits; " + "; ".join(told)
    return [Row("broken_engines_caught", caught, "", ">=", len(told), options.frames, None, note)]


def cuts(options, directory: Path) -> list[Row]:
    """cut_bags_tried and cut_bags_wrong."""
    from cut_bags import KINDS, cut_at, try_cut, write_whole

    rng, outcomes, wrong = np.random.default_rng(0), Counter(), []
    for index, kind in enumerate(KINDS):
        whole = write_whole(directory, *kind)
        size = max(path.stat().st_size for path in whole.iterdir())
        count = len(range(index, options.cuts, len(KINDS)))
        for at in rng.integers(1, size, count).tolist():
            found = try_cut(cut_at(whole, at, directory))
            outcomes[found.outcome] += 1
            if found.outcome == "wrong":
                wrong.append(f"{kind} at {at}: {found.why}")
    kinds = ", ".join(f"{storage}{f' by {compression}' if compression else ''}" for storage, compression in KINDS)
    note = f"{kinds}; {outcomes['used']} evaluated up to the cut with a warning, {outcomes['refused']} refused"
    tried = sum(outcomes.values())
    return [
        Row("cut_bags_tried", tried, "", None, None, tried, None, note),
        Row("cut_bags_wrong", len(wrong), "", "<=", 0, tried, None, "; ".join(wrong[:5])),
    ]


def _replay(bag: Path, bundle: Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(bag), str(bundle), str(RATE_HZ)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def _listen(listener) -> list:
    from trajectory_msgs.msg import JointTrajectory

    from vla_edge.nodes import convert, qos
    from vla_edge.types import ActionChunk

    chunks: list[ActionChunk] = []

    def on_chunk(message) -> None:
        positions = np.array([point.positions for point in message.points])
        first = message.points[0].time_from_start
        dt = first.sec + first.nanosec / 1e9
        chunks.append(ActionChunk(convert.stamp_of(message), tuple(message.joint_names), positions, dt))

    listener.node.create_subscription(JointTrajectory, "action_chunk", on_chunk, qos.CHUNK_IN)
    return chunks


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", help="speed, parity, broken, cuts; all of them by default")
    parser.add_argument("--bundle", type=Path, help="engine; the shipped policy's INT8 engine by default")
    parser.add_argument("--repeats", type=int, default=3, help="replays of the minute")
    parser.add_argument("--long-minutes", type=float, default=60.0, help="of the long recording (50 MB a minute)")
    parser.add_argument("--frames", type=int, default=40, help="that each broken engine is judged on")
    parser.add_argument("--chunks", type=int, default=60, help="compared between nodes and library")
    parser.add_argument("--cuts", type=int, default=1000, help="recordings cut at random bytes")
    parser.add_argument("--directory", type=Path, help="for the recordings; the system's temporary one by default")
    return parser


if __name__ == "__main__":
    sys.exit(main())
