"""Another engine in place of the serving one, between two chunks: opened, checked and warmed up beside it first."""

from __future__ import annotations

import threading
from collections.abc import Callable

from vla_edge.policy.spec import PolicySpec
from vla_edge.serve.server import ChunkServer
from vla_edge.types import VlaEdgeError

# What the robot, its cameras and its controller were set up for.
FIXED = ("joint_names", "cameras", "chunk_size", "dt", "relative_actions")


class SwapError(VlaEdgeError):
    """An engine that cannot take the place of the serving one."""


def check_alike(serving: PolicySpec, other: PolicySpec) -> None:
    """Nothing, when a policy can go on where another is.

    Raises:
        SwapError: names the first difference.
    """
    for name in FIXED:
        if getattr(serving, name) != getattr(other, name):
            raise SwapError(
                f"the other engine's {name} is {getattr(other, name)}, the serving one's {getattr(serving, name)}; "
                "configure the node anew for a policy that differs in that"
            )


class EngineSwap:
    """Exchanges a server's engine in a thread of its own. While it works the old engine serves; when it fails, too.

    Args:
        server: whose engine it is.
        open_engine: path -> engine with `spec` and `warm_up`, not yet warmed up; raises VlaEdgeError.
        serving: path of the engine that serves.
        done: called from the thread with the path, and with what went wrong or nothing.

    Attributes:
        serving: path of the engine that serves now.
        state: for the diagnostics.
    """

    def __init__(
        self, server: ChunkServer, open_engine: Callable[[str], object], serving: str,
        done: Callable[[str, str], None] = lambda path, problem: None,
    ):
        self._server, self._open, self._done = server, open_engine, done
        self.serving, self.state = serving, "idle"
        self._lock = threading.Lock()
        self._wanted: str | None = None
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether an engine is being opened."""
        return self._thread is not None

    def request(self, path: str) -> None:
        """Exchange for the engine at `path`; the newest request counts."""
        with self._lock:
            self._wanted = path
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="engine swap", daemon=True)
                self._thread.start()

    def join(self, timeout: float = 60.0) -> None:
        """Waits for what is under way."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._lock:
                path, self._wanted = self._wanted, None
                if path is None:
                    self._thread = None
                    return
            self.state = f"opening {path}"
            problem = self._exchange(path)
            self.state = f"refused {path}: {problem}" if problem else "idle"
            self._done(path, problem)

    def _exchange(self, path: str) -> str:
        try:
            engine = self._open(path)
            check_alike(self._server.engine.spec, engine.spec)
            engine.warm_up()
        except VlaEdgeError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - a backend may raise anything, and the old engine goes on
            return f"{type(error).__name__}: {error}"
        self._server.use(engine)
        self.serving = path
        return ""
