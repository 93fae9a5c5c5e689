"""An engine on another computer, over the protocol of openpi's policy servers: websockets carrying msgpack.

    messages.py  values <-> bytes
    server.py    our engines for any client of openpi's
    client.py    a server as a runner

A connection begins with the server's metadata; then each observation is answered by actions, and a text frame is an
error. Nothing in a message is code: arrays travel as type, shape and bytes, and other types are refused.
"""

from __future__ import annotations

from vla_edge.types import VlaEdgeError


class RemoteError(VlaEdgeError):
    """A peer that cannot be reached, has vanished, or sends what cannot be used."""


# Keys of an observation. {camera} is a camera of the policy; joints are in the order of its joint names.
IMAGE, STATE, PROMPT, STAMP, SEED = "observation/{camera}", "observation/state", "prompt", "stamp_ns", "seed"
ACTIONS, TIMING = "actions", "server_timing"
PORT = 8000
MOST_BYTES = 64 * 2**20


def is_address(text: str) -> bool:
    """Whether `text` is the address of a policy server, and no path."""
    return text.startswith(("ws://", "wss://"))
