from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import pytest
from fake_engine import FakeEngine

from vla_edge.serve.policies import make_policy
from vla_edge.serve.server import ChunkServer
from vla_edge.serve.swap import EngineSwap, SwapError, check_alike
from vla_edge.types import VlaEdgeError


@dataclass(frozen=True)
class Spec:
    joint_names: tuple = ("a", "b")
    cameras: tuple = ("head",)
    chunk_size: int = 20
    dt: float = 0.05
    relative_actions: bool = True
    num_steps: int = 10


class Engine(FakeEngine):
    def __init__(self, spec=Spec()):
        super().__init__()
        self.spec, self.warm = spec, False

    def warm_up(self):
        self.warm = True


class Refused(VlaEdgeError):
    pass


def made(open_engine):
    told = []
    server = ChunkServer(Engine(), make_policy("asynchronous"))
    return server, EngineSwap(server, open_engine, "old", lambda *what: told.append(what)), told


def test_an_engine_serves_only_once_it_is_open_alike_and_warm():
    new, may_open = Engine(Spec(num_steps=2)), threading.Event()

    def open_engine(path):
        may_open.wait(10.0)
        return new

    server, swap, told = made(open_engine)
    old = server.engine
    swap.request("new")
    assert swap.busy and server.engine is old and swap.serving == "old"
    may_open.set()
    swap.join()
    assert server.engine is new and new.warm and swap.serving == "new" and told == [("new", "")] and swap.state == "idle"


@pytest.mark.parametrize("error", [Refused("its hash differs"), RuntimeError("out of memory")])
def test_the_old_engine_goes_on_when_the_new_one_cannot_be_opened(error):
    def open_engine(path):
        raise error

    server, swap, told = made(open_engine)
    old = server.engine
    swap.request("new")
    swap.join()
    assert server.engine is old and swap.serving == "old"
    assert str(error) in swap.state and str(error) in told[0][1]


@pytest.mark.parametrize(
    "other", [{"joint_names": ("b", "a")}, {"chunk_size": 10}, {"dt": 0.1}, {"cameras": ()}, {"relative_actions": False}]
)
def test_an_engine_for_another_robot_is_refused(other):
    with pytest.raises(SwapError, match=f"other engine's {next(iter(other))} is"):
        check_alike(Spec(), replace(Spec(), **other))
    server, swap, _ = made(lambda path: Engine(replace(Spec(), **other)))
    old = server.engine
    swap.request("new")
    swap.join()
    assert server.engine is old and "configure the node anew" in swap.state


def test_of_several_requests_the_newest_counts():
    first_is_open, go_on, opened = threading.Event(), threading.Event(), []

    def open_engine(path):
        opened.append(path)
        first_is_open.set()
        go_on.wait(10.0)
        return Engine()

    _, swap, _ = made(open_engine)
    swap.request("one")
    first_is_open.wait(10.0)
    for path in ("two", "three"):
        swap.request(path)
    go_on.set()
    swap.join()
    assert opened == ["one", "three"] and swap.serving == "three"
