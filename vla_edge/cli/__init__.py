"""The `vla-edge` command: build an engine, look into it, judge it on a recording or in simulation, time it.

Every command prints for people, or with --json one JSON object on standard output. Errors are one sentence on standard
error and exit code 2; an engine that fails its limits gives exit code 1.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys

from vla_edge.cli import judge, look, make
from vla_edge.cli.common import WRONG_USE
from vla_edge.types import VlaEdgeError


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = parser().parse_args(arguments)
    # an interrupted build must be able to clear away what it has begun
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        result, code, text = options.run(options)
    except VlaEdgeError as error:
        print(f"vla-edge: {error}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print("vla-edge: interrupted; nothing half-written is left", file=sys.stderr)
        return 128 + signal.SIGINT
    from vla_edge.evaluate.evaluation import plain

    print(json.dumps(plain(result), indent=2) if options.json else text)
    return code


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="vla-edge", description=__doc__.split("\n\n")[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="one JSON object on standard output")
        return sub

    for group in (make, look, judge):
        group.add(command)
    return top
