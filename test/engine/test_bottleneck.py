"""Every bottleneck has a lever, and known circumstances lead to the known bottleneck."""

from __future__ import annotations

import numpy as np
import pytest
from toy import compressed, even_stage

from vla_edge.engine.bottleneck import LEVERS
from vla_edge.engine.stage_figures import StageFigures, chunk_bottleneck, stage_figures
from vla_edge.engine.export import export_stage, trace
from vla_edge.engine.product import PRECISIONS, in_precision, product_file
from vla_edge.engine.roofline import Roofline, measure_roofline
from vla_edge.engine.work import Work, stage_work

# 100 GFLOP/s, 400 in int8, 10 GB/s
MACHINE = Roofline(1e10, {"float32": 1e11, "int8": 4e11})


def work(flops=0.0, int8=0.0, attention=0.0, weights=0, cache=0, other=0) -> Work:
    return Work({"float32": flops, "int8": int8}, attention, weights, cache, other)


@pytest.mark.parametrize(
    ("milliseconds", "done", "label", "share"),
    [
        (12.0, work(flops=1e9), "compute", 10 / 12),
        (3.0, work(int8=1e9), "compute", 2.5 / 3),
        (12.0, work(flops=1e6, weights=10**8), "weight bandwidth", 10 / 12),
        (12.0, work(flops=1e6, weights=10**7, cache=9 * 10**7), "kv cache", 10 / 12),
        (12.0, work(flops=4e8, attention=6e8), "attention", 10 / 12),
        (50.0, work(flops=4e8, attention=6e8), "attention", 0.2),
        (100.0, work(flops=1e9, weights=10**6), "small operators", 0.1),
    ],
)
def test_a_stage_is_held_back_by_the_ceiling_it_is_at(milliseconds, done, label, share):
    found = stage_figures(milliseconds, 1, done, MACHINE)
    assert found.bottleneck == label and found.of_roofline == pytest.approx(share, rel=1e-2)


def test_figures_are_of_one_call():
    once, often = stage_figures(12.0, 1, work(flops=1e9), MACHINE), stage_figures(120.0, 10, work(flops=1e9), MACHINE)
    assert often.ms == pytest.approx(12.0) and often.flops_per_s == pytest.approx(once.flops_per_s) == pytest.approx(
        1e9 / 0.012
    )


def parts(preprocess=1.0, vision=10.0, prefix=10.0, denoise=10.0, postprocess=0.1, tail=1.2):
    rows = {
        "preprocess": preprocess,
        "vision": vision,
        "prefix": prefix,
        "denoise": denoise,
        "postprocess": postprocess,
    }
    rows["total"] = sum(rows.values())
    return {name: {"p50": value, "p95": value, "p99": value * tail} for name, value in rows.items()}


def stage(label: str, calls: int = 1) -> StageFigures:
    return StageFigures(1.0, calls, 1.0, 1.0, 0.8, label)


@pytest.mark.parametrize(
    ("rows", "stages", "label"),
    [
        (parts(preprocess=40.0), {}, "host work"),
        (parts(tail=5.0), {}, "scheduling"),
        (parts(denoise=90.0), {"denoise": stage("weight bandwidth", 10)}, "flow steps"),
        (parts(denoise=90.0), {"denoise": stage("weight bandwidth", 4)}, "weight bandwidth"),
        (parts(denoise=15.0), {"denoise": stage("kv cache", 10)}, "kv cache"),
        (parts(vision=50.0), {"vision": stage("attention")}, "attention"),
        (parts(prefix=50.0), {"prefix": stage("small operators")}, "small operators"),
        (parts(prefix=50.0), {}, "compute"),
    ],
)
def test_a_chunk_is_held_back_by_its_slowest_part(rows, stages, label):
    assert chunk_bottleneck(rows, stages) == label and LEVERS[label]


def test_every_label_has_its_lever():
    wanted = {"weight bandwidth", "kv cache", "compute", "attention", "host work", "scheduling", "flow steps"}
    assert wanted <= set(LEVERS) and all(len(lever) > 20 for lever in LEVERS.values())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_work_of_a_product_is_counted_from_its_file(tmp_path, precision):
    layer = in_precision(np.ones((48, 64), np.float32), precision, 32)
    (tmp_path / "p.onnx").write_bytes(product_file(layer, 8))
    found = stage_work(tmp_path / "p.onnx")
    assert found.flops == {"int8" if precision in ("int8", "int8 dynamic") else "float32": 2.0 * 8 * 64 * 48}
    assert found.attention_flops == 0 and found.other_bytes == 4 * 8 * (64 + 48)
    bits = {"float32": 32, "float16": 16, "int4": 4, "nvfp4": 4}.get(precision.split()[0], 8)
    assert 48 * 64 * bits / 8 <= found.weight_bytes <= 48 * 64 * bits / 8 + 1400


def test_attention_is_told_from_layers(toy, tmp_path):
    toy_stage, graph = toy
    found = stage_work(export_stage(toy_stage, compressed(toy_stage, "int8"), tmp_path / "toy.onnx", graph))
    assert found.attention_flops == 2 * 9 * 9 * 24 * 2
    assert found.flops == {"float32": 2.0 * 9 * (3 * 40 * 24 + 24 * 37 + 37 * 7)}
    assert stage_work(tmp_path / "toy.plan") is None


def test_inputs_from_the_prefix_are_the_cache(tmp_path):
    import onnx

    even = even_stage()
    path = export_stage(even, {}, tmp_path / "even.onnx", trace(even))
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.node):
        for index, name in enumerate(getattr(value, "input", [])):
            value.input[index] = "prefix_x" if name == "x" else name
        if getattr(value, "name", "") == "x":
            value.name = "prefix_x"
    onnx.save(model, path)
    assert stage_work(path).cache_bytes == 4 * 8 * 64


def test_the_machine_is_measured(monkeypatch):
    from vla_edge.engine import roofline

    monkeypatch.setattr(roofline, "READ_BYTES", 2**22)
    monkeypatch.setattr(roofline, "SIZE", 64)
    found = measure_roofline(("onnxruntime",))
    assert found.bytes_per_s > 1e6 and set(found.flops_per_s) == {"float32", "int8"}
    assert all(speed > 1e6 for speed in found.flops_per_s.values())
