"""What the VLA node adds to its engine: from an observation's arrival to its published chunk.

    python benchmarks/ros_overhead.py

Without the engine's own time, and without waiting for an inference that is already running. The real node in a process
of its own, raw 640x480 images at 30 Hz and joint states at 250 Hz from another. Arrival is the moment the middleware
received the image. Writes out/bench/ros_overhead.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_file import Row, table, write  # noqa: E402
from live_nodes import INSTRUCTION, Listener, LiveNodes, domain, engine, failed, settle  # noqa: E402

NAME, UNIT, RELATION, LIMIT = "ros_overhead_p99_ms", "ms", "<=", 3.0


def main(arguments: list[str] | None = None) -> int:
    """Measures; returns 0 when the limit is met."""
    options = _parser().parse_args(arguments)
    domain()
    try:
        rows = measure(options)
    except Exception as error:  # noqa: BLE001 - a benchmark that cannot run says why in its file
        rows = failed(NAME, UNIT, RELATION, LIMIT, error)
    print(table(rows))
    print(write("ros_overhead", rows))
    return 0 if all(row.met is not False and row.value is not None for row in rows) else 1


def measure(options) -> list[Row]:
    """The rows."""
    bundle = engine(options.bundle)
    with LiveNodes() as nodes, Listener() as listener:
        nodes.source("30", "250", INSTRUCTION)
        nodes.node("vla_node", bundle=bundle, rate=options.rate, threads=1, start_on_activate="false")
        try:
            listener.conductor.bring_up("vla", 60.0)
            settle(3.0, "settling")
            listener.conductor.call("vla/start")
            settle(options.seconds, "serving")
            n = int(listener.number("vla", "chunks"))
        except Exception as error:
            raise RuntimeError(f"{error}\n{nodes.said()}") from error
        number = listener.number
        told = ", ".join(f"{p} {number('vla', f'overhead_ms.{p}'):.2f} ms" for p in ("p50", "p95", "p99", "max"))
        whole = ", ".join(f"{p} {number('vla', f'observation_to_chunk_ms.{p}'):.1f}" for p in ("p50", "p99"))
        note = (
            f"640x480 raw, 30 Hz; {told}; engine p50 {number('vla', 'stage.engine_ms.p50'):.1f} ms, "
            f"arrival to chunk {whole} ms, {n / options.seconds:.1f} chunks/s"
        )
        return [Row(NAME, number("vla", "overhead_ms.p99"), UNIT, RELATION, LIMIT, n, None, note)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bundle", type=Path, help="engine; that of the shipped checkpoint when left out")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=10.0, help="chunks per second")
    return parser


if __name__ == "__main__":
    sys.exit(main())
