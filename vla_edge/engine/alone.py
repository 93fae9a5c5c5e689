"""An engine in a process of its own: how much memory it takes there, and how soon it acts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from vla_edge.engine.backends import BackendError
from vla_edge.engine.bundle import Bundle

_IMPORT = (
    "import sys; from vla_edge.engine.backends import get_backend; from vla_edge.engine.profile import peak_bytes; "
    "from vla_edge.engine.runner import Runner; [get_backend(name) for name in sys.argv[2:]]; "
)
_IDLE = _IMPORT + "print(peak_bytes())"
# what it has mapped is looked at while it is there
_BUSY = _IMPORT + "runner = Runner.from_bundle(sys.argv[1]); runner.warm_up(2); print(peak_bytes())"
_START = "import sys; from vla_edge.engine.runner import Runner; Runner.from_bundle(sys.argv[1]).warm_up(1)"
_LONGEST_S = 600.0


def most_memory(bundle: Bundle, idle: bool = False) -> int:
    """Bytes, at most, of a process with `bundle` in use; with `idle`, of one that has imported the same and loads nothing.

    Raises:
        BackendError: it cannot be run here.
    """
    backends = {entry.backend for entry in bundle.stages}
    return int(_said(_IDLE if idle else _BUSY, bundle.directory, sorted(backends)))


def cold_start(bundle: str | Path) -> float:
    """Seconds from starting an interpreter to the first result of the engine, measured from outside.

    Raises:
        BackendError: it cannot be run here.
    """
    begin = time.perf_counter()
    _said(_START, Path(bundle).resolve())
    return time.perf_counter() - begin


def _said(program: str, bundle: Path, backends: Iterable[str] = ()) -> str:
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(part for part in (str(root), os.environ.get("PYTHONPATH", "")) if part)
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, str(bundle), *backends], check=True, capture_output=True, text=True,
            timeout=_LONGEST_S, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        last = (getattr(error, "stderr", "") or "").strip().splitlines()
        raise BackendError(
            f"the engine {bundle} does not run in a process of its own: {last[-1] if last else error}"
        ) from error
    return done.stdout
