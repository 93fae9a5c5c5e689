"""What the VLA node adds to its engine: from an observation's stamp to its published chunk.

    python benchmarks/ros_overhead.py

Without the engine's own time, and without waiting for an inference that is already running. The real node in a process
of its own; two cameras of 640x480 pixels at 30 Hz, raw and then as JPEG, and joint states at 250 Hz from another. The
stamp is taken right before a message is handed to the middleware. Writes out/bench/ros_overhead.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_file import DIRECTORY, Row, table, write  # noqa: E402
from live_nodes import Listener, LiveNodes, domain, failed, settle  # noqa: E402
from two_cameras import SECOND, two_camera_engine  # noqa: E402

NAME, UNIT, RELATION = "ros_overhead_p99_ms", "ms", "<="
LIMITS = {"raw": 3.0, "compressed": 8.0}


def main(arguments: list[str] | None = None) -> int:
    """Measures; returns 0 when both limits are met."""
    options = _parser().parse_args(arguments)
    domain()
    rows = overhead_rows(options.bundle, options.seconds, options.rate)
    print(table(rows))
    print(write("ros_overhead", rows))
    return 0 if all(row.met is not False and row.value is not None for row in rows) else 1


def overhead_rows(bundle: Path | None, seconds: float, rate: float) -> list[Row]:
    """A row for each form of image.

    Args:
        bundle: engine with cameras `head` and `wrist`; None builds one.
        rate: chunks per second.
    """
    rows = []
    for transport, limit in LIMITS.items():
        name = f"{NAME}.{transport}"
        try:
            rows.append(_row(name, limit, transport, bundle or two_camera_engine(DIRECTORY), seconds, rate))
        except Exception as error:  # noqa: BLE001 - a benchmark that cannot run says why in its file
            rows += failed(name, UNIT, RELATION, limit, error)
    return rows


def _row(name: str, limit: float, transport: str, bundle: Path, seconds: float, rate: float) -> Row:
    with LiveNodes() as nodes, Listener() as listener:
        nodes.source("head", SECOND, compressed=transport == "compressed")
        nodes.node(
            "vla_node", bundle=bundle, rate=rate, threads=1, start_on_activate="false", image_transport=transport
        )
        try:
            listener.conductor.bring_up("vla", 60.0)
            settle(3.0, "settling")
            listener.conductor.call("vla/start")
            settle(seconds, f"serving, images {transport}")
            n = int(listener.number("vla", "chunks"))
        except Exception as error:
            raise RuntimeError(f"{error}\n{nodes.said()}") from error

    def told(key: str) -> str:
        return ", ".join(f"{p} {listener.number('vla', f'{key}_ms.{p}'):.2f}" for p in ("p50", "p95", "p99", "max"))

    note = (
        f"two cameras, 640x480 at 30 Hz, {transport}; from the stamp: {told('overhead_from_stamp')} ms; from the "
        f"arrival: {told('overhead')} ms; of that decoding and alignment: {told('stage.align')} ms; engine p50 "
        f"{listener.number('vla', 'stage.engine_ms.p50'):.1f} ms, {n / seconds:.1f} chunks/s"
    )
    return Row(name, listener.number("vla", "overhead_from_stamp_ms.p99"), UNIT, RELATION, limit, n, None, note)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bundle", type=Path, help="engine with two cameras, head and wrist; built when left out")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each form of image")
    parser.add_argument("--rate", type=float, default=10.0, help="chunks per second")
    return parser


if __name__ == "__main__":
    sys.exit(main())
