"""Our engines for any client that speaks openpi's protocol, so that a workstation can serve a robot."""

from __future__ import annotations

import hmac
import logging
import threading
import time
from http import HTTPStatus

import numpy as np

from vla_edge.engine.remote import (
    ACTIONS,
    IMAGE,
    MOST_BYTES,
    PORT,
    PROMPT,
    SEED,
    STAMP,
    STATE,
    TIMING,
    RemoteError,
)
from vla_edge.engine.remote.messages import pack, unpack
from vla_edge.types import JointState, Observation, VlaEdgeError

_INVALID = 1007


class PolicyServer:
    """A runner behind a websocket. Starts to listen when made; use as a context manager, or `close` it.

    An observation it cannot take is answered by a text frame with one sentence, and the connection goes on; after a
    frame that is no message the connection ends.

    Args:
        runner: what answers. host: of the interface to listen on; the loopback by default, since whoever reaches it can
            use it. port: 0 for any.
        api_key: what clients have to present; None for nothing.
        most_bytes: of a message.

    Raises:
        RemoteError: the packages are missing, or the address cannot be listened on.
    """

    def __init__(
        self,
        runner,
        host: str = "127.0.0.1",
        port: int = PORT,
        api_key: str | None = None,
        most_bytes: int = MOST_BYTES,
    ):
        try:
            import msgpack  # noqa: F401
            from websockets.sync.server import serve
        except ImportError as error:
            raise RemoteError(
                f"serving to other computers needs websockets and msgpack ({error}); pip install 'vla_edge[remote]'"
            ) from error
        if runner.spec.lags:
            raise RemoteError(
                f"the policy reads {runner.spec.observation_steps} observations at a time and a message carries one; run "
                "it on the robot itself"
            )
        self._runner, self._key, self._most_bytes = runner, api_key, most_bytes
        quiet = logging.getLogger("vla_edge.remote")
        quiet.setLevel(logging.CRITICAL)  # a peer's bad handshake is no news for the console
        try:
            self._server = serve(
                self._talk, host, port, compression=None, max_size=most_bytes,
                process_request=self._admit, logger=quiet,
            )  # fmt: skip
        except OSError as error:
            raise RemoteError(f"cannot listen on {host}:{port} ({error}); choose another port") from error
        self.port: int = self._server.socket.getsockname()[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def __enter__(self) -> PolicyServer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening, and end every connection."""
        self._server.shutdown()
        self._thread.join(5)

    def _admit(self, connection, request):
        if request.path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        given = request.headers.get("Authorization", "")
        if self._key is not None and not hmac.compare_digest(given.encode(), f"Api-Key {self._key}".encode()):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "the API key is missing or wrong\n")
        return None

    def _talk(self, connection) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            connection.send(pack(self._metadata()))
            for message in connection:
                begin = time.perf_counter()
                try:
                    if isinstance(message, str):
                        raise RemoteError("a text frame came where an observation in msgpack was expected")
                    observed = unpack(message, self._most_bytes)
                except RemoteError as error:
                    connection.send(str(error))
                    connection.close(_INVALID, "not a message")
                    return
                try:
                    answer = self._answer(observed, begin)
                except VlaEdgeError as error:
                    connection.send(str(error))
                    continue
                connection.send(answer)
        except ConnectionClosed:
            pass  # the peer has gone, or sent a frame larger than allowed

    def _answer(self, observed, begin: float) -> bytes:
        observation = self._observation(observed)
        seed = observed.get(SEED, 0)
        if not isinstance(seed, (int, np.integer)) or seed < 0:
            raise RemoteError(f"{SEED} is {seed!r}, allowed is a whole number from 0 up")
        found = self._runner.infer(observation, seed=int(seed))
        milliseconds = 1e3 * (time.perf_counter() - begin)
        return pack({ACTIONS: np.array(found.chunk.positions), TIMING: {"infer_ms": milliseconds}})

    def _observation(self, observed) -> Observation:
        """Raises RemoteError for what is missing or of another shape; what is in it the runner judges."""
        spec = self._runner.spec
        keys = {camera.name: IMAGE.format(camera=camera.name) for camera in spec.cameras}
        if not isinstance(observed, dict):
            raise RemoteError(f"the message is no observation; send {', '.join([*keys.values(), STATE, PROMPT])}")
        needed = (*keys.values(), STATE, *((PROMPT,) if spec.reads_instruction else ()))
        missing = [key for key in needed if key not in observed]
        if missing:
            raise RemoteError(f"the observation lacks {', '.join(missing)}")
        images = {name: _image(observed[key], key) for name, key in keys.items()}
        try:
            state = np.asarray(observed[STATE], np.float64)
        except (TypeError, ValueError) as error:
            raise RemoteError(f"{STATE} holds no numbers") from error
        if state.shape != (len(spec.joint_names),) or not np.isfinite(state).all():
            raise RemoteError(
                f"{STATE} has shape {state.shape}; send {len(spec.joint_names)} finite positions in rad, in the order "
                "of the metadata's joint_names"
            )
        prompt = observed.get(PROMPT, "")
        if not isinstance(prompt, str):
            raise RemoteError(f"{PROMPT} is no text")
        stamp = observed.get(STAMP, time.time_ns())
        if not isinstance(stamp, (int, np.integer)) or not 0 <= stamp < 2**63:
            raise RemoteError(f"{STAMP} is {stamp!r}, allowed are nanoseconds as a whole number")
        joints = JointState(int(stamp), spec.joint_names, state)
        return Observation(int(stamp), images, joints, prompt)

    def _metadata(self) -> dict:
        spec = self._runner.spec
        return {
            "joint_names": list(spec.joint_names),
            "dt": spec.dt,
            "keys": [*(IMAGE.format(camera=camera.name) for camera in spec.cameras), STATE, PROMPT],
            "policy": spec.to_dict(),
            "engine": {key: _simple(value) for key, value in self._runner.description().items()},
        }


def _image(value, key: str) -> np.ndarray:
    """(H, W, 3) uint8, from that or from (3, H, W)."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3:
        if value.shape[2] == 3:
            return value
        if value.shape[0] == 3:
            return np.ascontiguousarray(value.transpose(1, 2, 0))
    shown = f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
    raise RemoteError(f"{key} is {shown}; send (height, width, 3) uint8 RGB")


def _simple(value):
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)
