"""A policy on another computer answers as it would here, and a peer that misbehaves is one sentence."""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from stub_runner import StubRunner
from tiny import make_observations

pytest.importorskip("websockets")
msgpack = pytest.importorskip("msgpack")

from websockets.sync.client import connect  # noqa: E402
from websockets.sync.server import serve  # noqa: E402

from vla_edge.engine.remote import RemoteError  # noqa: E402
from vla_edge.engine.remote.client import RemoteRunner  # noqa: E402
from vla_edge.engine.remote.messages import pack, unpack  # noqa: E402
from vla_edge.engine.remote.server import PolicyServer  # noqa: E402

OBSERVATION = make_observations(1)[0]


@pytest.fixture
def server():
    with PolicyServer(StubRunner(), port=0, most_bytes=100_000) as running:
        yield running


def address(server) -> str:
    return f"ws://127.0.0.1:{server.port}"


def raw_observation() -> dict:
    return {
        "observation/head": OBSERVATION.images["head"], "observation/state": np.zeros(3), "prompt": "touch",
    }  # fmt: skip


def test_the_answer_is_what_the_runner_gives_here(server):
    remote = RemoteRunner(address(server))
    assert remote.spec == StubRunner().spec and remote.description()["name"] == "stub"
    for seed in (0, 5):
        ours = StubRunner().infer(OBSERVATION, seed).chunk
        theirs = remote.infer(OBSERVATION, seed)
        np.testing.assert_allclose(theirs.chunk.positions, ours.positions)
        assert (theirs.chunk.stamp_ns, theirs.chunk.joint_names) == (ours.stamp_ns, ours.joint_names)
        assert 0 < theirs.timing.stages["remote"] <= theirs.timing.total
    shuffled = replace(
        OBSERVATION,
        joints=replace(
            OBSERVATION.joints, names=OBSERVATION.joints.names[::-1], position=OBSERVATION.joints.position[::-1]
        ),
    )
    np.testing.assert_allclose(remote.infer(shuffled).chunk.positions, remote.infer(OBSERVATION).chunk.positions)


def test_an_observation_that_is_refused_says_why_and_the_connection_goes_on(server):
    with connect(address(server)) as peer:
        peer.recv()
        wrong = {
            "lacks observation/head": {key: v for key, v in raw_observation().items() if key != "observation/head"},
            "send .height, width, 3.": raw_observation() | {"observation/head": np.zeros((4, 4), np.uint8)},
            "send 3 finite positions": raw_observation() | {"observation/state": np.full(3, np.nan)},
            "has shape .2,.": raw_observation() | {"observation/state": [0.0, 1.0]},
            "holds no numbers": raw_observation() | {"observation/state": "here"},
            "prompt is no text": raw_observation() | {"prompt": 3},
            "stamp_ns is -1": raw_observation() | {"stamp_ns": -1},
            "seed is 'x'": raw_observation() | {"seed": "x"},
            "is no observation": [1, 2],
            "'no' is not known": raw_observation() | {"prompt": "no"},
        }
        for says, observation in wrong.items():
            peer.send(pack(observation))
            answer = peer.recv(timeout=5)
            assert isinstance(answer, str)
            with pytest.raises(AssertionError, match=says):
                raise AssertionError(answer)
        peer.send(pack(raw_observation() | {"observation/head": OBSERVATION.images["head"].transpose(2, 0, 1)}))
        assert unpack(peer.recv(timeout=5))["actions"].shape == (8, 3)


class Evil:
    """Leaves a file where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("/tmp/vla_edge_was_here",)


@pytest.mark.parametrize(
    "frame",
    [
        b"", b"\xc1", pack(raw_observation())[:-10], os.urandom(500), pickle.dumps(Evil()), "text", b"\x91" * 3000,
        msgpack.packb({b"__ndarray__": True, b"data": pickle.dumps(Evil()), b"dtype": "|O", b"shape": [1]}),
        msgpack.packb({b"__ndarray__": True, b"data": b"12", b"dtype": "<f4", b"shape": [2**40]}),
        msgpack.packb({b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4", b"shape": [-1]}),
        msgpack.packb({b"__ndarray__": True, b"data": b"1234", b"shape": [1]}),
        msgpack.packb(msgpack.ExtType(5, b"x")),
    ],
    ids=[
        "empty", "no msgpack", "cut", "random", "pickle", "text", "deep", "object array", "huge shape",
        "negative shape", "no dtype", "extension",
    ],
)  # fmt: skip
def test_a_frame_that_is_no_message_ends_its_connection_only(server, frame):
    with connect(address(server)) as peer:
        peer.recv()
        peer.send(frame)
        answer = peer.recv(timeout=5)
        assert isinstance(answer, str) and len(answer) < 400
    assert not os.path.exists("/tmp/vla_edge_was_here")
    RemoteRunner(address(server)).infer(OBSERVATION)


def test_a_frame_that_is_too_large_is_not_read(server):
    from websockets.exceptions import ConnectionClosed

    with connect(address(server)) as peer:
        peer.recv()
        with pytest.raises(ConnectionClosed, match="1009|too big"):
            peer.send(bytes(200_000))
            peer.recv(timeout=5)
    RemoteRunner(address(server)).infer(OBSERVATION)
    with pytest.raises(RemoteError, match="200000 bytes came, 100000 are allowed"):
        unpack(bytes(200_000), 100_000)


def test_a_peer_that_vanishes_disturbs_nobody(server):
    for half in (True, False):
        with socket.create_connection(("127.0.0.1", server.port)) as peer:
            if half:
                peer.sendall(b"GET / HTTP/1.1\r\n")
    RemoteRunner(address(server)).infer(OBSERVATION)


def test_only_who_has_the_key_is_let_in():
    import urllib.request

    with PolicyServer(StubRunner(), port=0, api_key="secret") as running:
        RemoteRunner(address(running), api_key="secret").infer(OBSERVATION)
        for key in (None, "secre", "Secret"):
            with pytest.raises(RemoteError, match="refuses the connection.*check its API key"):
                RemoteRunner(address(running), api_key=key)
        healthy = address(running).replace("ws:", "http:") + "/healthz"
        assert urllib.request.urlopen(healthy, timeout=5).read() == b"OK\n"


def impostor(*answers):
    """A server that sends its metadata, then `answers`, one for each message; a callable does something instead."""

    def talk(connection):
        connection.send(answers[0])
        for answer in answers[1:]:
            connection.recv()
            answer(connection) if callable(answer) else connection.send(answer)

    running = serve(talk, "127.0.0.1", 0)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    return running, f"ws://127.0.0.1:{running.socket.getsockname()[1]}"


GOOD = pack({"policy": StubRunner().spec.to_dict()})


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("Traceback: boom", "says: Traceback: boom"),
        (b"\xc1", "not whole msgpack"),
        (pack({"actions": np.zeros((8, 2))}), r"actions of \(8, 2\), not \(T, 3\)"),
        (pack({"actions": np.full((8, 3), np.inf)}), "not finite"),
        (pack([]), "not .T, 3."),
        (pack({"actions": np.zeros((0, 3))}), "not .T, 3."),
        (lambda connection: connection.close(), "has vanished"),
        (lambda connection: connection.socket.shutdown(socket.SHUT_RDWR), "has vanished"),
        (lambda connection: time.sleep(1.0), "did not answer within 0.3 s"),
        (bytes(300_000), "has vanished.*(1009|too big)"),
    ],
    ids=["error", "no msgpack", "shape", "not finite", "no mapping", "empty", "closes", "drops", "late", "too large"],
)
def test_a_server_that_misbehaves_is_a_named_error_and_is_reached_again(answer, says):
    running, uri = impostor(GOOD, answer, pack({"actions": np.ones((8, 3))}))
    try:
        remote = RemoteRunner(uri, timeout=0.3, most_bytes=100_000)
        with pytest.raises(RemoteError, match=says):
            remote.infer(OBSERVATION)
        if says.startswith("did not"):
            assert remote._connection is None, "a late answer must not be taken for the next one"
    finally:
        running.shutdown()


def test_what_is_no_policy_server_is_a_named_error():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(RemoteError, match="there is no policy server at"):
        RemoteRunner(f"ws://127.0.0.1:{port}", timeout=0.5)
    with pytest.raises(RemoteError, match="is no address"):
        RemoteRunner("nowhere")
    for metadata, says in ((pack([1]), "sent no metadata"), (pack({}), "does not tell its policy"), ("hi", "says: hi")):
        running, uri = impostor(metadata)
        try:
            with pytest.raises(RemoteError, match=says):
                RemoteRunner(uri, timeout=1.0)
        finally:
            running.shutdown()


def test_another_servers_keys_can_be_given():
    seen = []

    def answer(connection):
        connection.send(pack({"actions": np.ones((8, 3), np.float32)}))

    def talk(connection):
        connection.send(pack({}))
        seen.append(unpack(connection.recv()))
        answer(connection)

    running = serve(talk, "127.0.0.1", 0)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        uri = f"ws://127.0.0.1:{running.socket.getsockname()[1]}"
        keys = {"head": "observation/exterior_image_1_left", "state": "observation/joint_position"}
        chunk = RemoteRunner(uri, StubRunner().spec, keys).infer(OBSERVATION).chunk
    finally:
        running.shutdown()
    assert chunk.positions.shape == (8, 3)
    assert {"observation/exterior_image_1_left", "observation/joint_position", "prompt"} <= set(seen[0])


def test_a_port_that_is_taken_is_a_named_error(server):
    with pytest.raises(RemoteError, match="cannot listen on 127.0.0.1"):
        PolicyServer(StubRunner(), port=server.port)
    with pytest.raises(RemoteError, match="object is neither a plain value"):
        pack({"x": object()})
