"""openpi's own client talks to our server, and its writing of arrays is ours."""

from __future__ import annotations

import numpy as np
import pytest
from stub_runner import StubRunner
from tiny import make_observations

pytestmark = pytest.mark.peers
theirs = pytest.importorskip("openpi_client.websocket_client_policy", reason="openpi-client is not installed")

from vla_edge.engine.remote.messages import pack, unpack  # noqa: E402
from vla_edge.engine.remote.server import PolicyServer  # noqa: E402


def test_openpis_client_gets_our_chunk_and_our_errors():
    observation = make_observations(1)[0]
    with PolicyServer(StubRunner(), port=0, api_key="key") as server:
        client = theirs.WebsocketClientPolicy("127.0.0.1", server.port, api_key="key")
        assert client.get_server_metadata()["joint_names"] == list(StubRunner().spec.joint_names)
        message = {
            "observation/head": observation.images["head"], "observation/state": observation.joints.position,
            "prompt": observation.instruction,
        }  # fmt: skip
        answer = client.infer(message)
        np.testing.assert_allclose(answer["actions"], StubRunner().infer(observation).chunk.positions)
        assert answer["server_timing"]["infer_ms"] > 0
        with pytest.raises(RuntimeError, match="lacks observation/state"):
            client.infer({key: value for key, value in message.items() if key != "observation/state"})
        client.infer(message)


def test_arrays_are_written_as_openpi_writes_them():
    from openpi_client import msgpack_numpy

    value = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float64(2.5), "c": ["x", 1, None]}
    assert pack(value) == msgpack_numpy.packb(value)
    for read, written in ((unpack, msgpack_numpy.packb(value)), (msgpack_numpy.unpackb, pack(value))):
        found = read(written)
        np.testing.assert_array_equal(found["a"], value["a"])
        assert found["b"] == 2.5 and found["c"] == value["c"]
