"""The file every benchmark writes: `out/bench/<name>.json`, and the same as a table on the screen."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

DIRECTORY = Path("out/bench")
VECTORS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_")
SAME = ("processor", "instructions", "cores")


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        value: None when it could not be taken; `note` then says why.
        relation, limit: what it has to hold (">=" or "<="), None where it is stated only.
        n: measurements behind it. interval: 95 % of it, or of its spread, as the note says.
    """

    name: str
    value: float | None
    unit: str = ""
    relation: str | None = None
    limit: float | None = None
    n: int = 1
    interval: tuple[float, float] | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the limit holds; None without a limit."""
        if self.limit is None:
            return None
        if self.value is None:
            return False
        # numpy's own truth values are not False, and would pass for met
        return bool(self.value >= self.limit if self.relation == ">=" else self.value <= self.limit)


def write(name: str, rows: Sequence[Row], directory: Path = DIRECTORY) -> Path:
    """Write `directory/<name>.json`; returns its path."""
    content = {
        "machine": machine(),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": [asdict(row) for row in rows],
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    temporary = path.with_suffix(".json.partial")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def read(path: Path) -> list[Row]:
    """The rows of a file."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def with_earlier(rows: Sequence[Row], path: Path, holds: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """And those of an earlier file, of the same versions and computer, that are not measured anew and of which `holds` is
    true."""
    try:
        content, earlier = json.loads(path.read_text(encoding="utf-8")), read(path)
    except FileNotFoundError:
        return list(rows)
    measured, here = {row.name for row in rows}, machine()
    if content["versions"] != versions() or any(content["machine"].get(key) != here[key] for key in SAME):
        return list(rows)
    return [*rows, *(row for row in earlier if row.name not in measured and holds(row))]


def add(name: str, rows: Sequence[Row], directory: Path = DIRECTORY) -> Path:
    """Write `directory/<name>.json` with the rows `with_earlier` keeps of it; returns its path."""
    return write(name, with_earlier(rows, directory / f"{name}.json"), directory)


def table(rows: Sequence[Row]) -> str:
    """The rows for people."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        value = "-" if row.value is None else f"{row.value:.4g} {row.unit}".strip()
        interval = "" if row.interval is None else f"({row.interval[0]:.4g} to {row.interval[1]:.4g})"
        limit = "" if row.limit is None else f"{row.relation} {row.limit:g} {'met' if row.met else 'MISSED'}"
        lines.append(f"{row.name:{width}}  {value:>14}  {interval:22}  n {row.n:<6} {limit:16}  {row.note}".rstrip())
    return "\n".join(lines)


def machine() -> dict:
    """What the figures were taken on."""
    from vla_edge.engine.backends.cpu import processor

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "processor": processor().name,
        "architecture": platform.machine(),
        # what decides how fast float32, bfloat16 and 8-bit products are; names of processors do not tell it
        "instructions": sorted(flag for flag in processor().flags if flag.startswith(VECTORS)),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(pages / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_1min_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Of what was measured."""
    from vla_edge.engine.build import versions as of_build

    return of_build()
