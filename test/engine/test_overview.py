"""The table of runtimes tells what was tried: a runtime that computes something else, or is absent, is not praised."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vla_edge.engine import overview as module
from vla_edge.engine.backends import BackendError, BuiltStage
from vla_edge.engine.overview import Overview, overview, table


def pretended(run, here=True):
    """A runtime that answers with `run`."""
    return SimpleNamespace(
        version=lambda: "1.0", precisions=lambda: ("float32",), candidates=lambda onnx: [{"threads": 1}],
        runs_here=lambda: here, build=lambda *_: BuiltStage("given.onnx"),
        load=lambda *_: SimpleNamespace(run=run),
    )  # fmt: skip


@pytest.fixture
def runtimes(monkeypatch):
    found = {}
    monkeypatch.setattr(module, "BACKENDS", found)
    monkeypatch.setattr(module, "runs_here", lambda name: found[name].runs_here())

    def get(name):
        if found[name] is None:
            raise BackendError(f"backend {name!r} needs the package x; install it with pip install x")
        return found[name]

    monkeypatch.setattr(module, "get_backend", get)
    return found


def test_onnx_runtime_multiplies_in_every_precision_of_the_table(monkeypatch):
    monkeypatch.setattr(module, "BACKENDS", {"onnxruntime": ("", "")})
    (row,) = overview()
    assert set(row.ran) == set(module.PRECISIONS) and not row.refused and not row.built


def test_a_wrong_product_an_absent_package_and_an_absent_device_are_told(runtimes):
    zeros = {"y": np.zeros((1, module.ROWS, module.OUTPUTS), np.float32)}
    runtimes |= {"wrong": pretended(lambda inputs: zeros), "absent": None, "elsewhere": pretended(None, here=False)}
    wrong, absent, elsewhere = overview()
    assert not wrong.ran and "relative L2 1" in wrong.refused["float32"]
    assert absent.version is None and "pip install x" in absent.missing
    assert not elsewhere.ran and set(elsewhere.built) == set(module.PRECISIONS)
    text = table([wrong, absent, elsewhere])
    assert "wrong has no float32: it computes something else" in text and "pip install x" in text


def test_a_table_of_nothing_but_absent_runtimes_can_be_printed():
    assert "pip install x" in table([Overview("a", None, missing="pip install x")])
