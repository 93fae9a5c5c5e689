"""A policy server as a runner: what it answers is checked as if our own engine had computed it."""

from __future__ import annotations

import threading
import time

import numpy as np

from vla_edge.engine.remote import (
    ACTIONS,
    IMAGE,
    MOST_BYTES,
    PROMPT,
    SEED,
    STAMP,
    STATE,
    RemoteError,
)
from vla_edge.engine.remote.messages import pack, unpack
from vla_edge.engine.runner import Inference
from vla_edge.policy.preprocess import positions_by_name
from vla_edge.policy.spec import PolicySpec
from vla_edge.types import ActionChunk, InferenceTiming, Observation


class RemoteRunner:
    """The engine behind `uri`, reached when it is made and again after every failure.

    Args:
        uri: "ws://host:port" or "wss://...".
        spec: the policy, where the server does not tell it (servers other than ours); its `actions` have to be absolute
            joint targets in rad, in the order of the policy's joints.
        keys: camera, or "state" or "prompt" -> key of the observation, where the server's differ from ours.
        api_key: presented to the server. timeout: s to wait for an answer. most_bytes: of one.

    Raises:
        RemoteError: the packages are missing, there is no server, or it tells no policy and `spec` was not given.
    """

    def __init__(
        self,
        uri: str,
        spec: PolicySpec | None = None,
        keys: dict[str, str] | None = None,
        api_key: str | None = None,
        timeout: float = 2.0,
        most_bytes: int = MOST_BYTES,
    ):
        self._uri, self._api_key, self._timeout, self._most_bytes = uri, api_key, timeout, most_bytes
        self._keys = dict(keys or {})
        self._lock = threading.Lock()
        self._connection = None
        metadata = self._connect()
        self._engine = metadata.get("engine") if isinstance(metadata.get("engine"), dict) else {}
        if spec is None:
            try:
                spec = PolicySpec.from_dict(metadata["policy"])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise RemoteError(
                    f"the server at {uri} does not tell its policy's cameras and joints ({error!r}); give its spec"
                ) from error
        self.spec = spec

    def infer(self, observation: Observation, seed: int = 0, noise: np.ndarray | None = None) -> Inference:
        """The chunk for one observation.

        Args:
            seed: sent along; with the stamp it decides the noise of our own servers.
            noise: cannot be chosen on another computer.

        Raises:
            ObservationError: the policy cannot be shown this observation.
            RemoteError: the server refuses it, has vanished, is late, or answers with what is no chunk.
        """
        if noise is not None:
            raise RemoteError("the noise of a policy on another computer cannot be chosen; give a seed")
        begin = time.perf_counter()
        state = positions_by_name(observation.joints, self.spec.joint_names)
        message = {
            **{self._key(name, IMAGE.format(camera=name)): image for name, image in observation.images.items()},
            self._key("state", STATE): np.asarray(state, np.float64),
            self._key("prompt", PROMPT): observation.instruction,
            STAMP: observation.stamp_ns,
            SEED: seed,
        }
        data = pack(message)
        sent = time.perf_counter()
        with self._lock:
            if self._connection is None:
                self._connect()
            answer = self._exchange(data)
        received = time.perf_counter()
        chunk = ActionChunk(observation.stamp_ns, self.spec.joint_names, self._actions(answer), self.spec.dt)
        end = time.perf_counter()
        return Inference(chunk, InferenceTiming(sent - begin, {"remote": received - sent}, end - received, end - begin))

    def warm_up(self, repeats: int = 2) -> None:
        """Nothing: the server warms up its own engine."""

    def check_instruction(self, instruction: str) -> None:
        """Nothing: the server judges instructions."""

    def description(self) -> dict:
        """What the server tells of its engine, and where it is."""
        return {"name": "remote", **self._engine, "uri": self._uri}

    def close(self) -> None:
        """End the connection."""
        with self._lock:
            self._drop()

    def _key(self, name: str, ours: str) -> str:
        return self._keys.get(name, ours)

    def _connect(self) -> dict:
        """A new connection; returns the server's metadata."""
        try:
            import msgpack  # noqa: F401
            from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException
            from websockets.sync.client import connect
        except ImportError as error:
            raise RemoteError(
                f"reaching a policy server needs websockets and msgpack ({error}); pip install 'vla_edge[remote]'"
            ) from error
        headers = {"Authorization": f"Api-Key {self._api_key}"} if self._api_key else None
        try:
            opened = connect(
                self._uri, compression=None, max_size=self._most_bytes, additional_headers=headers,
                open_timeout=self._timeout, close_timeout=self._timeout,
            )  # fmt: skip
            self._connection = opened.__enter__()
            metadata = unpack(self._receive(), self._most_bytes)
        except InvalidURI as error:
            raise RemoteError(f"{self._uri!r} is no address of a policy server; write ws://host:port") from error
        except InvalidHandshake as error:
            raise RemoteError(
                f"the server at {self._uri} refuses the connection ({error}); check its API key"
            ) from error
        except (OSError, TimeoutError, WebSocketException) as error:
            self._drop()
            raise RemoteError(f"there is no policy server at {self._uri} ({error}); start one there") from error
        except RemoteError:
            self._drop()
            raise
        if not isinstance(metadata, dict):
            self._drop()
            raise RemoteError(f"what answers at {self._uri} is no policy server: it sent no metadata")
        return metadata

    def _exchange(self, data: bytes):
        """Send, and wait for the answer. After any failure the connection is dropped: a late answer would be taken for
        that of the next observation."""
        from websockets.exceptions import ConnectionClosed

        try:
            self._connection.send(data)
            message = self._receive()
            return unpack(message, self._most_bytes)
        except TimeoutError as error:
            self._drop()
            raise RemoteError(f"the policy server at {self._uri} did not answer within {self._timeout:g} s") from error
        except (ConnectionClosed, OSError) as error:
            self._drop()
            raise RemoteError(f"the policy server at {self._uri} has vanished ({error}); start it again") from error
        except RemoteError:
            self._drop()
            raise

    def _receive(self) -> bytes:
        message = self._connection.recv(timeout=self._timeout)
        if isinstance(message, str):
            raise RemoteError(f"the policy server at {self._uri} says: {' '.join(message.split())[-300:]}")
        return message

    def _actions(self, answer) -> np.ndarray:
        joints = len(self.spec.joint_names)
        actions = answer.get(ACTIONS) if isinstance(answer, dict) else None
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.shape[1] != joints or not len(actions):
            found = getattr(actions, "shape", type(actions).__name__)
            raise RemoteError(f"the policy server at {self._uri} answers with actions of {found}, not (T, {joints})")
        if not np.isfinite(actions).all():
            raise RemoteError(f"the policy server at {self._uri} answers with actions that are not finite")
        return actions.astype(np.float64)

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            threading.Thread(target=connection.close, daemon=True).start()
