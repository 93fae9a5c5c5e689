"""The fastest contender that computes the right thing wins, and what was tried is told."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vla_edge.engine import choose as module
from vla_edge.engine.backends import BackendError, BuiltStage, StageInterface, chosen_backends
from vla_edge.engine.choose import choose, label
from vla_edge.policy.stages import TensorSpec

CLOCK = SimpleNamespace(now=0.0, perf_counter=lambda: CLOCK.now)
STAGE = StageInterface("s", (TensorSpec("x", (4,)),), (TensorSpec("y", (4,)),))
INPUTS = {"x": np.arange(4, dtype=np.float32)}


class Pretended:
    """A runtime whose every way of running takes the seconds and adds the error that its options say."""

    def __init__(self, *ways: dict):
        self.ways, self.loaded, self.built = ways, [], 0

    def candidates(self, onnx):
        return [{"threads": 1, **way} for way in self.ways]

    def build(self, onnx, directory, stage, options=None):
        self.built += 1
        if "refuses" in options:
            raise BackendError(options["refuses"])
        (directory / "s.bin").write_text(str(options))
        return BuiltStage("s.bin", options)

    def load(self, path, stage, options=None, threads=None):
        def step(outputs):
            CLOCK.now += options["s"]
            outputs["y"][...] = INPUTS["x"] * (1 + options.get("error", 0.0))

        def run(inputs):
            outputs = {"y": np.zeros(4, np.float32)}
            step(outputs)
            return outputs

        return SimpleNamespace(interface=stage, run=run, bind=lambda inputs, outputs: lambda: step(outputs))


def contest(monkeypatch, tmp_path, only_exact=False, in_turn=False, **runtimes):
    monkeypatch.setattr(module, "get_backend", runtimes.__getitem__)
    monkeypatch.setattr(module, "time", CLOCK)
    return choose(tmp_path / "s.onnx", tmp_path, STAGE, list(runtimes), INPUTS, only_exact, in_turn)


def test_the_fastest_wins_and_every_time_is_told(monkeypatch, tmp_path):
    found = contest(
        monkeypatch, tmp_path, a=Pretended({"s": 0.03}), b=Pretended({"s": 0.002}, {"s": 0.02, "compile": True})
    )
    assert (found.backend, found.built.options["s"]) == ("b", 0.002)
    assert (tmp_path / "s.bin").read_text() == str(found.built.options), "only the winner's file is left"
    assert [path.name for path in tmp_path.iterdir()] == ["s.bin"]
    assert found.tried["a on cpu, 1 thread"] == pytest.approx(30)


def test_a_fast_one_that_computes_something_else_is_refused(monkeypatch, tmp_path):
    wrong, blank = Pretended({"s": 0.0, "error": 0.2}), Pretended({"s": 0.0, "error": np.nan})
    found = contest(monkeypatch, tmp_path, a=Pretended({"s": 0.01}), wrong=wrong, blank=blank)
    assert found.backend == "a" and list(found.tried) == ["a on cpu, 1 thread"]
    assert "relative L2 0.2" in found.refused["wrong on cpu, 1 thread"]
    assert "not finite" in found.refused["blank on cpu, 1 thread"]


def test_threads_and_rounding_have_to_be_worth_it(monkeypatch, tmp_path):
    two = Pretended({"s": 0.030}, {"s": 0.028, "threads": 2}, {"s": 0.029, "precision": "bf16", "exact": False})
    assert contest(monkeypatch, tmp_path, a=two).built.options["s"] == 0.030
    rounding = Pretended({"s": 0.03}, {"s": 0.01, "exact": False})
    assert contest(monkeypatch, tmp_path, a=rounding).built.options["s"] == 0.01
    little = {"s": 0.0285, "own_kernels": True, "exact": False}
    assert contest(monkeypatch, tmp_path, a=Pretended({"s": 0.03}, little)).built.options["s"] == 0.03
    assert contest(monkeypatch, tmp_path, a=Pretended({"s": 0.03}, {**little, "finer": True})).built.options["s"] == 0.0285
    assert contest(monkeypatch, tmp_path, only_exact=True, a=rounding).built.options["s"] == 0.03


def test_a_short_call_that_is_slow_in_its_heat_has_another_chance(monkeypatch, tmp_path):
    class Disturbed(Pretended):
        """Whose second way takes twice its time until it has been called so many times."""

        calls = 0

        def load(self, path, stage, options=None, threads=None):
            def step(outputs):
                self.calls += bool(options.get("own_kernels"))
                CLOCK.now += options["s"] * (2 if options.get("own_kernels") and self.calls < 40 else 1)
                outputs["y"][...] = INPUTS["x"]

            def run(inputs):
                outputs = {"y": np.zeros(4, np.float32)}
                step(outputs)
                return outputs

            return SimpleNamespace(interface=stage, run=run, bind=lambda inputs, outputs: lambda: step(outputs))

    for seconds, wins in ((0.01, True), (0.2, False)):
        ways = {"s": seconds}, {"s": 0.9 * seconds, "own_kernels": True}
        found = contest(monkeypatch, tmp_path, a=Disturbed(*ways))
        assert bool(found.built.options.get("own_kernels")) is wins


def test_when_nothing_runs_the_first_reason_is_given(monkeypatch, tmp_path):
    with pytest.raises(BackendError, match="no such kernel"):
        contest(monkeypatch, tmp_path, a=Pretended({"refuses": "no such kernel"}), b=Pretended({"refuses": "nor here"}))
    assert not list(tmp_path.iterdir())


def test_a_way_of_running_has_a_name():
    assert label("openvino", {"threads": 2, "precision": "bf16"}) == "openvino on cpu, bf16, 2 threads"
    assert label("onnxruntime", {"fold_weights": True}) == "onnxruntime on cpu, unpacked weights, 1 thread"


def test_auto_is_what_is_installed_and_a_list_is_kept_in_order(monkeypatch):
    assert chosen_backends("auto")[0] == "onnxruntime" and "torch" not in chosen_backends("auto")
    assert chosen_backends("torch, onnxruntime,torch") == ("torch", "onnxruntime")
    with pytest.raises(BackendError, match="no backend 'onyx'"):
        chosen_backends("onnxruntime,onyx")
    from vla_edge.engine import backends

    monkeypatch.setattr(backends, "BACKENDS", {name: ("vla_edge_none", name) for name in backends.BACKENDS})
    with pytest.raises(BackendError, match="no runtime is installed.*pip install onnxruntime"):
        chosen_backends("auto")


def test_where_memory_is_short_only_ways_that_take_little_of_it_are_tried(monkeypatch, tmp_path):
    packed, unpacked = {"s": 0.02, "fold_weights": False}, {"s": 0.001, "fold_weights": True}
    own = {"own_kernels": True, "exact": False}
    ours = [{"s": 0.01, **own}, {"s": 0.004, **own, "threads": 2}]

    def tried(*ways, **asked):
        return sorted(contest(monkeypatch, tmp_path, a=Pretended(*ways), **asked).tried.values())

    assert tried(packed, unpacked, *ours) == [1, 4, 10, 20]
    assert tried(packed, unpacked, *ours, in_turn=True) == [4, 10]
    assert tried(packed, unpacked, in_turn=True) == [20]
    assert tried(packed, unpacked, *ours, in_turn=True, only_exact=True) == [20]


def test_a_file_that_is_the_same_for_any_threads_is_built_once(monkeypatch, tmp_path):
    ways = [{"s": 0.02}, {"s": 0.02, "threads": 2}, {"s": 0.01, "compile": True}]
    for at_load, expected in ((True, 2), (False, 3)):
        runtime = Pretended(*ways)
        runtime.THREADS_AT_LOAD = at_load
        found = contest(monkeypatch, tmp_path, a=runtime)
        assert runtime.built == expected and len(found.tried) == 3
        assert found.built.options["compile"] and (tmp_path / "s.bin").is_file()
