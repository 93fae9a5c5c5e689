"""An hour of the live nodes: no growth in memory, no drift, no missed heartbeat.

    python benchmarks/soak.py [--seconds 600]

The real nodes in processes of their own: a camera and joints, the VLA node inferring, the controller following its
chunks. Memory is the sum of what the processes of both nodes hold for themselves (private pages), sampled after they
have settled. A FAULT is counted, and the controller armed again. Writes out/bench/soak.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_file import DIRECTORY, Row, table, write  # noqa: E402
from live_nodes import Listener, LiveNodes, domain, engine, failed, settle  # noqa: E402

SETTLE_S = 150.0
"""Until the rolling windows of latencies, of 1000 values at 10 a second, are full."""
EVERY_S = 5.0
BEAT_S = 0.2
LIMITS = {
    # What an allocator moves about; a leak of one small object per tick would be 300 MB in an hour.
    "soak_memory_growth_bytes": 4 * 2**20,
    "soak_drift_ticks": 10,
    "soak_missed_heartbeats": 0,
    "soak_faults": 0,
}


@dataclass
class Samples:
    """Of one run; one entry for each sample where it is a list.

    Attributes:
        seconds: since the first sample. memory: bytes, all processes. handles: open files and threads, all processes.
        beats: stamps of the heartbeat, s.
    """

    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    handles: list[int] = field(default_factory=list)
    beats: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add_beat(self, beat) -> None:
        """Takes a message."""
        self.beats.append(beat.stamp.sec + 1e-9 * beat.stamp.nanosec)

    def growth(self) -> float:
        """Bytes from the first tenth of the samples to the last, by medians."""
        tenth = max(1, len(self.memory) // 10)
        return float(np.median(self.memory[-tenth:]) - np.median(self.memory[:tenth]))

    def missed(self) -> int:
        """Beats that the intervals between the stamps have room for."""
        return int(np.maximum(np.round(np.diff(self.beats) / BEAT_S) - 1, 0).sum())


def main(arguments: list[str] | None = None) -> int:
    """Measures; returns 0 when every limit is met."""
    options = _parser().parse_args(arguments)
    domain()
    rows = soak_rows(options.bundle, options.seconds, options.threads)
    print(table(rows))
    print(write("soak", rows))
    return 0 if all(row.met for row in rows) else 1


def soak_rows(bundle: Path | None, seconds: float, threads: int) -> list[Row]:
    """Rows without values where it cannot run."""
    try:
        return _measure(engine(bundle), seconds, threads)
    except Exception as error:  # noqa: BLE001 - a benchmark that cannot run says why in its file
        return [row for name, limit in LIMITS.items() for row in failed(name, "", "<=", limit, error)]


def _measure(bundle: Path, seconds: float, threads: int) -> list[Row]:
    from rclpy.qos import QoSProfile
    from std_msgs.msg import Header

    samples = Samples()
    with LiveNodes() as nodes, Listener() as listener:
        listener.node.create_subscription(Header, "vla/heartbeat", samples.add_beat, QoSProfile(depth=100))
        nodes.source("head")
        nodes.node("vla_node", bundle=bundle, rate=10.0, threads=threads, heartbeat_period=BEAT_S)
        try:
            listener.conductor.bring_up("vla", 60.0)
            nodes.node("controller_node", rearm_on_activate="true")
            listener.conductor.bring_up("controller", 60.0)
            settle(min(SETTLE_S, seconds / 4), "settling")
            watched = [pid for name in ("vla_node", "controller_node") for pid in family(nodes.pid(name))]
            samples.beats.clear()
            before, began = _ticks(listener), time.monotonic()
            print(f"soaking: {seconds:.0f} s", file=sys.stderr, flush=True)
            while (passed := time.monotonic() - began) < seconds:
                samples.seconds.append(passed)
                samples.memory.append(sum(map(private_bytes, watched)))
                samples.handles.append(sum(map(open_handles, watched)))
                if (said := listener.values["controller"])["mode"] == "FAULT":
                    # Counted, and left as an operator would: what stands tells nothing of the rest of the hour.
                    samples.faults.append(f"after {passed:.0f} s: {said['reason']}")
                    _rearm(listener)
                time.sleep(min(EVERY_S, seconds - passed))
            if listener.values["controller"]["mode"] in ("INIT", "DAMP"):
                raise RuntimeError(f"the controller is not armed: {listener.values['controller']}")
            after, said = _ticks(listener), dict(listener.values["controller"])
            chunks, rate = said["chunks.accepted"], listener.number("vla", "rate_hz")
        except Exception as error:
            raise RuntimeError(f"{error}\n{nodes.said()}") from error
    n, hours = len(samples.memory), (samples.seconds[-1] - samples.seconds[0]) / 3600
    slope = np.polyfit(np.array(samples.seconds) / 3600, samples.memory, 1)[0] if n > 2 else float("nan")
    values = {
        "soak_memory_growth_bytes": (
            samples.growth(), n,
            f"of {samples.memory[0] / 2**20:.0f} MiB in {len(watched)} processes over {hours:.2f} h, by medians of first and last tenth; fitted {slope / 2**20:+.2f} MiB/h; open files and threads "
            f"{samples.handles[0]} to {samples.handles[-1]}"),
        "soak_drift_ticks": (
            abs(after - before), int(said["ticks"]), "between ticks, those made up included, and the steady clock"),
        "soak_missed_heartbeats": (samples.missed(), len(samples.beats), f"every {BEAT_S:g} s, by their stamps"),
        "soak_faults": (
            int(said["faults"]), int(said["ticks"]),
            f"{'; '.join(samples.faults) or 'none'}; mode {said['mode']} ({said['reason']}), {chunks} chunks followed at {rate:.1f} Hz, {said['gaps']} pauses of the controller, real time: {said['realtime']}"),
    }
    return [
        Row(name, value, "B" if name.endswith("bytes") else "", "<=", LIMITS[name], count, None, note)
        for name, (value, count, note) in values.items()
    ]


def _rearm(listener: Listener) -> None:
    from vla_edge.nodes.client import ConductError

    try:
        listener.conductor.call("controller/rearm")
    except ConductError as error:
        print(f"not armed again: {error}", file=sys.stderr, flush=True)


def _ticks(listener: Listener) -> float:
    """Ticks that the controller is behind the steady clock, by its own account."""
    ticks, rate = listener.number("controller", "ticks"), listener.number("controller", "tick_hz")
    return 1000.0 * ticks / rate - ticks - listener.number("controller", "overruns")


def family(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += family(int(child))
    return found


def private_bytes(pid: int) -> int:
    """Memory that would be free if the process were not there."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


def open_handles(pid: int) -> int:
    """Files and threads."""
    return len(os.listdir(f"/proc/{pid}/fd")) + len(os.listdir(f"/proc/{pid}/task"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bundle", type=Path, help="engine; the INT8 engine of the shipped checkpoint when left out")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    return parser


if __name__ == "__main__":
    sys.exit(main())
