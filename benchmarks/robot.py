"""What a robot asks of its controller and of serving: ticks on time, commands inside the limits whatever arrives.

    make bench-robot

The real nodes, each in a process of its own: the VLA node infers on the same processors while the controller ticks; a
bare loop in C and a timer of rclpy run beside the same inference, one after the other. The rows of ros_overhead.py,
soak.py and, where it is there, robot_serving.py come too. Writes out/bench/robot.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_file import DIRECTORY, Row, table, write  # noqa: E402
from c_loop import lateness_us, timer_lateness_us  # noqa: E402
from fuzz import fuzz  # noqa: E402
from live_nodes import Listener, LiveNodes, domain, engine, settle  # noqa: E402
from ros_overhead import overhead_rows  # noqa: E402
from soak import soak_rows  # noqa: E402
from tick_lateness import processor_time  # noqa: E402

RATES = (1000, 2000)
MOST_P999_US, MOST_VS_C = 500.0, 2.0
MOST_UNACCOUNTED = 10
"""Ticks between the steady clock and the controller's account of them: its report is some ticks old."""


def main(arguments: list[str] | None = None) -> int:
    """Measures; returns 0 when every limit is met."""
    options = _parser().parse_args(arguments)
    domain()
    rows = controller_rows(options)
    if not options.controller_only:
        rows += overhead_rows(None, options.seconds, options.rate)
    print(table(rows), flush=True)  # what wants a quiet machine; the rest does not depend on how fast it is
    rows += fuzz_rows(options.chunks)
    if not options.controller_only:
        rows += _serving(options)
    if options.soak:
        rows += soak_rows(engine(options.bundle), options.soak, options.threads)
    print(table(rows))
    print(write("robot", rows, options.output))
    return 0 if all(row.met is not False for row in rows) else 1


def controller_rows(options) -> list[Row]:
    """Of ticks at every rate."""
    rows = []
    for rate in RATES:
        try:
            rows += tick_rows(rate, options)
        except Exception as error:  # noqa: BLE001 - a benchmark that cannot run says why in its file
            name = f"tick_{rate // 1000}khz_lateness_p999_us"
            rows.append(Row(name, None, "us", "<=", MOST_P999_US, 0, None, f"{type(error).__name__}: {error}"))
    return rows


def tick_rows(rate: int, options) -> list[Row]:
    """Of one tick rate."""
    name, seconds = f"tick_{rate // 1000}khz", options.seconds
    bundle = engine(options.bundle)
    with LiveNodes() as nodes, Listener() as listener:
        nodes.source("head")
        nodes.node("vla_node", bundle=bundle, rate=options.rate, threads=options.threads, status_period=0.5)
        try:
            listener.conductor.bring_up("vla", 60.0)
            settle(3.0, "settling")
            print(f"a loop in C at {rate} Hz: {seconds:.0f} s", file=sys.stderr, flush=True)
            try:
                c_loop, granted = lateness_us(rate, seconds)
            except RuntimeError as error:
                c_loop, granted = None, str(error)
            nodes.node("controller_node", rearm_on_activate="true", status_period=0.5, tick_rate=rate, command_rate=500)
            listener.conductor.bring_up("controller", 60.0)
            before = processor_time()
            settle(seconds, f"controlling at {rate} Hz")
            stolen, whole = processor_time() - before
            number, said = listener.number, listener.values["controller"]
            if said["mode"] == "INIT":
                raise RuntimeError(f"the controller was not armed: {said['message']}, {said['last_problem']}")
            late = {p: number("controller", f"lateness_us.{p}") for p in ("p50", "p99", "p999", "max")}
            work = {p: number("controller", f"work_us.{p}") for p in ("p50", "p99")}
            n, overruns = int(number("controller", "ticks")), number("controller", "overruns")
            unaccounted = abs(rate * n / number("controller", "tick_hz") - n - overruns)
            told = (
                f"{overruns:.0f} deadlines passed before their tick and were made up, {said['gaps']} pauses, "
                f"{said['chunks.accepted']} chunks followed, mode {said['mode']} ({said['reason']}), real time: "
                f"{said['realtime']}; engine p50 {number('vla', 'stage.engine_ms.p50'):.0f} ms at "
                f"{number('vla', 'rate_hz'):.1f} Hz, {options.threads} thread(s), {os.cpu_count()} processors; a "
                f"hypervisor took {100 * stolen / whole:.1f} % of their time"
            )
        except Exception as error:
            raise RuntimeError(f"{error}\n{nodes.said()}") from error
        timer_seconds = min(seconds, 10.0)
        print(f"a timer of rclpy at {rate} Hz: {timer_seconds:.0f} s", file=sys.stderr, flush=True)
        timer = timer_lateness_us(rate, timer_seconds)
    rows = [
        Row(f"{name}_lateness_p99_us", late["p99"], "us", None, None, n, None,
            f"{', '.join(f'{p} {us:.0f} us' for p, us in late.items())}; {told}"),
        Row(f"{name}_lateness_p999_us", late["p999"], "us", "<=", MOST_P999_US, n, None, "the same run"),
        Row(f"{name}_unaccounted", unaccounted, "ticks", "<=", MOST_UNACCOUNTED, n, None, "neither made nor made up"),
        # A lateness says nothing of a controller that stood: it has to have followed chunks all the while.
        Row(f"{name}_faults", number("controller", "faults"), "", "<=", 0.0, n, None,
            f"mode {said['mode']} at the end ({said['reason']}), {said['holds']} times in HOLD"),
        Row(f"{name}_work_p99_us", work["p99"], "us", None, None, n, None, f"of one tick; p50 {work['p50']:.0f} us"),
        Row(f"{name}_rclpy_timer_lateness_p99_us", float(np.percentile(timer, 99)), "us", None, None, len(timer), None,
            f"of an rclpy timer beside the controller, on the grid of its first call; last call {timer[-1]:.0f} us late"),
    ]
    if c_loop is None:
        return rows + [Row(f"{name}_p99_vs_c_loop", None, "", "<=", MOST_VS_C, 0, None, granted)]
    p99, p999 = np.percentile(c_loop, (99, 99.9))
    note = f"C loop p50 {np.median(c_loop):.0f}, p99 {p99:.0f}, p99.9 {p999:.0f} us beside the same inference; {granted}"
    return rows + [Row(f"{name}_p99_vs_c_loop", late["p99"] / p99, "", "<=", MOST_VS_C, n, None, note)]


def fuzz_rows(chunks: int) -> list[Row]:
    """Of adversarial chunks through the kernel."""
    def tell(total) -> None:
        if total.chunks % 50_000 == 0:
            print(f"fuzzing: {total.chunks} chunks, {total.violations} outside", file=sys.stderr, flush=True)

    total = fuzz(chunks, tell=tell)
    note = f"{total.accepted} accepted, {total.commands} commands judged; seed 0"
    return [
        Row("fuzz_chunks", total.chunks, "", None, None, total.chunks, None, note),
        Row("fuzz_violations", total.violations, "", "<=", 0.0, total.commands, None,
            total.worst or "position, velocity, acceleration, jerk, finiteness and counters, of every command"),
    ]


def _serving(options) -> list[Row]:
    """The rows of serving, where its benchmark is there."""
    try:
        from robot_serving import serving_rows
    except ImportError:
        return []
    return serving_rows(engine(options.bundle))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bundle", type=Path, help="engine; the INT8 engine of the shipped checkpoint when left out")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each loop at each rate")
    parser.add_argument("--rate", type=float, default=10.0, help="chunks per second")
    parser.add_argument("--threads", type=int, default=2, help="of the engine")
    parser.add_argument("--chunks", type=int, default=1_000_000, help="to fuzz with")
    parser.add_argument("--controller-only", action="store_true", help="leave out serving's rows")
    parser.add_argument("--soak", type=float, default=3600.0, help="s of soaking at the end; 0 for none")
    parser.add_argument("--output", type=Path, default=DIRECTORY)
    return parser


if __name__ == "__main__":
    sys.exit(main())
