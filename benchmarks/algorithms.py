"""Our algorithms against other libraries' on the same real networks and text: error, time and memory.

    python -m benchmarks.algorithms

Each runs in a process of its own (`algorithms_task.py`), one thread, ours and the peer's in turn, in an environment
that has the peers (`tools/peer_environment.sh algorithms`, made when it is not there). Rows go to
out/bench/compress.json beside those of the recipes. What has run is kept, until code or versions change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_file import DIRECTORY, Row, add, table  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TASK = ROOT / "benchmarks" / "algorithms_task.py"
OURS = TASK.with_name("algorithms_ours.py")
STORE = DIRECTORY / "algorithms"
NETWORKS = ("minilm", "smollm2", "whisper")
# method -> (peer, most error relative to the peer's)
PEERS = {
    "awq": ("modelopt", 1.02),
    "smoothquant": ("modelopt", 1.02),
    "gptq": ("llmcompressor", 1.02),
    "wanda": ("llmcompressor", 1.05),
    "wanda-2:4": ("llmcompressor", 1.05),
    "sparsegpt": ("llmcompressor", 1.05),
    "sparsegpt-2:4": ("llmcompressor", 1.05),
}
ROUNDING = ("awq", "gptq")
"""Methods that have to err less than rounding to nearest."""


@dataclass(frozen=True)
class Outcome:
    """What one run gave: error of the network's answer, processor seconds, peak bytes; or why it gave nothing."""

    error: float | None = None
    seconds: float | None = None
    memory_bytes: int | None = None
    why: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Measures; returns 0 when every limit is met."""
    options = _parser().parse_args(arguments)
    made = subprocess.run(
        [ROOT / "tools" / "peer_environment.sh", "algorithms"], stdout=subprocess.PIPE, text=True, check=True
    )
    python, rows = ROOT / made.stdout.strip(), []
    for network in options.networks:
        nearest = run(python, network, "rtn", "ours")
        for method in options.methods:
            peer, most = PEERS[method]
            rows += compared(f"{network}.{method}", most, run(python, network, method, "ours"),
                             run(python, network, method, peer), peer)  # fmt: skip
            if method in ROUNDING:
                rows.append(_ratio(f"error_ratio_vs_rtn.{network}.{method}", run(python, network, method, "ours"),
                                   nearest, "error", 1.0, "rounding to nearest"))  # fmt: skip
    print(table(rows))
    print(add("compress", rows))
    return 0 if all(row.met is not False for row in rows) else 1


def compared(name: str, most_error: float, ours: Outcome, theirs: Outcome, peer: str) -> list[Row]:
    """The three ratios of one method."""
    return [
        _ratio(f"error_ratio_vs_peer.{name}", ours, theirs, "error", most_error, peer),
        _ratio(f"time_ratio_vs_peer.{name}", ours, theirs, "seconds", 1.0, peer),
        _ratio(f"memory_ratio_vs_peer.{name}", ours, theirs, "memory_bytes", 1.0, peer),
    ]


def _ratio(row: str, ours: Outcome, theirs: Outcome, field: str, most: float, peer: str) -> Row:
    mine, other = getattr(ours, field), getattr(theirs, field)
    if mine is None or other is None:
        # a peer that does not run is no measure; of ours that would be a failure
        limit = most if mine is None else None
        return Row(row, None, "", None if limit is None else "<=", limit, note=f"ours: {ours.why or 'ran'}; {peer}: "
                   f"{theirs.why or 'ran'}")  # fmt: skip
    return Row(row, mine / max(other, 1e-12), "", "<=", most, 1, None, f"ours {mine:.4g}, {peer} {other:.4g}")


def run(python: Path, network: str, method: str, who: str) -> Outcome:
    """One process, unless it has run before."""
    file = STORE / f"{network}-{method.replace(':', '')}-{who}-{_question(who)}.json"
    if file.is_file():
        return Outcome(**json.loads(file.read_text(encoding="utf-8")))
    print(f"{network}, {method}, {who} ...", file=sys.stderr, flush=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, TASK, network, method, who], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    if done.returncode:
        return Outcome(why=(done.stderr.strip().splitlines() or ["it ended without a word"])[-1][:300])
    outcome = Outcome(**json.loads(done.stdout.strip().splitlines()[-1]))
    STORE.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(vars(outcome)), encoding="utf-8")
    return outcome


def _question(who: str) -> str:
    """What the results depend on, in short; a peer's not on our algorithms, but on the settings our provider gives it."""
    digest = hashlib.sha256(TASK.read_bytes() + (ROOT / "tools" / "peer_environment.sh").read_bytes())
    compress = ROOT / "vla_edge" / "compress"
    for file in (OURS, *sorted(compress.rglob("*.py"))) if who == "ours" else (compress / "providers" / "modelopt.py",):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:10]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--methods", nargs="+", default=list(PEERS), choices=list(PEERS))
    return parser


if __name__ == "__main__":
    sys.exit(main())
