"""Two network namespaces and a bad network between them, which delays, reorders and loses what it carries.

    python bad_network.py NEAR FAR KNOBS

Makes the namespaces, with one end of the network in each, and carries Ethernet frames from end to end until it is
terminated; then removes them. KNOBS is a JSON file that is read again and again: {"delay": s, "jitter": s, "loss":
share}. Prints "ready" once the ends are up. Needs root, `ip` and /dev/net/tun; no traffic leaves the two namespaces.
(tc's netem would do the same, but many kernels come without it.)
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

_TUNSETIFF, _TAP, _NO_PREAMBLE = 0x400454CA, 0x0002, 0x1000
_FRAME = 65536


def open_end(namespace: str, address: str) -> int:
    """A device in the namespace whose frames are read from, and written to, the file descriptor returned."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    made = fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", b"vla%d", _TAP | _NO_PREAMBLE))
    device = made[:16].rstrip(b"\0").decode()
    for command in (
        f"link set {device} netns {namespace}", f"-n {namespace} addr add {address}/24 dev {device}",
        f"-n {namespace} link set lo up", f"-n {namespace} link set {device} up",
        f"-n {namespace} route add 224.0.0.0/4 dev {device}",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    return end


def carry(ends: tuple[int, int], knobs: Path) -> None:
    """Forever."""
    chance, number, under_way = random.Random(0), 0, []
    how, read_again = {}, 0.0
    while True:
        now = time.monotonic()
        if now >= read_again:
            how, read_again = json.loads(knobs.read_text()), now + 0.02
        while under_way and under_way[0][0] <= now:
            _, _, end, frame = heapq.heappop(under_way)
            try:
                os.write(end, frame)
            except OSError:
                pass  # a full queue loses frames too
        wait = min(read_again, under_way[0][0] if under_way else read_again) - time.monotonic()
        for end in select.select(ends, (), (), max(0.0, wait))[0]:
            try:
                frame = os.read(end, _FRAME)
            except BlockingIOError:
                continue
            if chance.random() >= how.get("loss", 0.0):
                number += 1
                due = time.monotonic() + how.get("delay", 0.0) + how.get("jitter", 0.0) * chance.random()
                heapq.heappush(under_way, (due, number, ends[1 - ends.index(end)], frame))


def main(near: str, far: str, knobs: str) -> None:
    """Until terminated."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    made = []
    try:
        for namespace in (near, far):
            subprocess.run(["ip", "netns", "add", namespace], check=True)
            made.append(namespace)
        ends = open_end(near, "192.0.2.1"), open_end(far, "192.0.2.2")
        print("ready", flush=True)
        carry(ends, Path(knobs))
    finally:
        for namespace in made:
            subprocess.run(["ip", "netns", "del", namespace], check=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
