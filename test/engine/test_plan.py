"""Predictions: arithmetic by hand, bytes against known figures, what must never grow, what a device refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_edge.compress.recipe import RecipeError, load_recipe, parse_recipe
from vla_edge.engine.architecture_files import (
    ArchitectureError,
    architecture_names,
    load_architecture,
    parse_architecture,
)
from vla_edge.engine.bottleneck import DECODING, FLOW_STEPS, LEVERS
from vla_edge.engine.checkpoint_shapes import architecture_of
from vla_edge.engine.cost import CACHE, COMPUTE, LABELS, SCHEDULING, WEIGHTS, CostError, Roofline
from vla_edge.engine.devices import load_device
from vla_edge.engine.operations import Attention, Pointwise, Product, Rotation, StageWork, layer_shapes
from vla_edge.engine.plan import PlanError, predict
from vla_edge.engine.plan_search import RECIPES, candidates
from vla_edge.engine.precision import LayerPrecision, asked_of_workload, layer_precisions
from vla_edge.engine.workload import Workload, WorkloadError
from vla_edge.types import JointState, Observation

PARITY = Path(__file__).parents[1] / "parity"
W4A16 = parse_recipe({"steps": [{"quantize": {"targets": ["*"], "weights": "int4", "group_size": 128}}]}, name="w4a16")
W4A8 = parse_recipe(
    {"steps": [{"quantize": {"targets": ["*"], "weights": "int4", "group_size": 128, "activations": "int8-dynamic"}}]},
    name="w4a8",
)
ROUND = Roofline(
    peak={"bfloat16": 2e12, "int8": 4e12}, compute={"bfloat16": 0.5, "int8": 0.5}, bytes_per_s=1e9, bandwidth=0.5,
    floats="bfloat16", kernel_s=1e-5,
)  # fmt: skip


def blank(spec) -> Observation:
    """Black pictures, joints at zero, an instruction of words that tokenizers of tests know."""
    images = {c.name: np.zeros((c.source_height, c.source_width, 3), np.uint8) for c in spec.cameras}
    names = tuple(dict.fromkeys((*spec.joint_names, *spec.read_names)))
    return Observation(0, images, JointState(0, names, np.zeros(len(names))), "touch the red cube")


def work(*operations) -> StageWork:
    return StageWork("vision", 1, "camera", operations)


@pytest.fixture(scope="module")
def orin():
    return load_device("agx-orin-64gb")


def plan_of(name: str, recipe, device, runtime="fused", **changes):
    architecture = load_architecture(name)
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    return predict(architecture, recipe, device, Workload.of(architecture, **changes), runtime)


# arithmetic


def test_a_product_takes_as_long_as_its_bytes_or_its_multiplications_whichever_is_longer():
    precisions = {"a": LayerPrecision("bfloat16")}
    # 16 rows: 2 * 16 * 1000 * 500 / 1e12 = 16 us; (1e6 weight bytes + 2 * 16 * 1500) / 5e8 = 2.096 ms
    few = ROUND.call_seconds(work(Product("a", 16, 1000, 500)), precisions, None)
    assert few == {WEIGHTS: pytest.approx(1.048e6 / 5e8), SCHEDULING: pytest.approx(1e-5)}
    # 4,000 rows: 4e9 / 1e12 = 4 ms; (1e6 + 12e6) / 5e8 = 26 ms. int8 weights and 16 times the memory turn it around
    many = replace(ROUND, bytes_per_s=16e9).call_seconds(work(Product("a", 4000, 1000, 500)), precisions, None)
    assert many == {COMPUTE: pytest.approx(4e-3), SCHEDULING: pytest.approx(1e-5)}


def test_rows_are_rounded_up_to_what_tensor_cores_multiply():
    precisions, fast = {"a": LayerPrecision("bfloat16")}, replace(ROUND, bytes_per_s=1e15)
    one, sixteen, seventeen = (
        fast.call_seconds(work(Product("a", rows, 1000, 1000)), precisions, None)[COMPUTE] for rows in (1, 16, 17)
    )
    assert one == sixteen == pytest.approx(32e-6) and seventeen == pytest.approx(64e-6)


def test_attention_and_pointwise_work_by_hand():
    # 2 products * 2 * 10 * 20 * 4 * 8 = 25,600 operations; keys and values 2 * 20 * 2 * 8 = 640 numbers of 2 bytes,
    # queries and results 2 * 10 * 4 * 8 of 2 bytes: 2,560 / 5e8 = 5.12 us against 25.6 ns
    attention = Attention(10, 20, 4, 2, 8)
    assert attention.flops == 25_600 and attention.scores == 800
    spent = ROUND.call_seconds(work(attention), {}, None)
    assert spent == {CACHE: pytest.approx(5.12e-6), SCHEDULING: pytest.approx(1e-5)}
    assert ROUND.call_seconds(work(attention), {}, 4)[CACHE] == pytest.approx((640 / 2 + 1280) / 5e8)
    # each of 1,000 numbers of 2 bytes is read and written, by a kernel for each of 2 tensors
    assert ROUND.call_seconds(work(Rotation(1000, 2)), {}, None) == {
        "pointwise": pytest.approx(8e-6), SCHEDULING: pytest.approx(2e-5),
    }  # fmt: skip
    # 300 numbers are read and written and 400 more moved, 2 bytes each, by 3 kernels
    assert ROUND.call_seconds(work(Pointwise(300, 400, 3)), {}, None) == {
        "pointwise": pytest.approx(4e-6), SCHEDULING: pytest.approx(3e-5),
    }  # fmt: skip


def test_kernels_wait_for_a_host_that_launches_them_slower_than_they_run():
    eager = replace(ROUND, kernel_s=0.0, dispatch_s=1e-3)
    spent = eager.call_seconds(work(*[Pointwise(500, 0, 1)] * 5), {}, None)
    assert sum(spent.values()) == pytest.approx(5e-3)


def test_a_plan_adds_calls_up(orin):
    plan = plan_of("pi0", "bf16", orin, cameras=3, steps=7)
    vision, prefix, denoise = (plan.stage(name) for name in ("vision", "prefix", "denoise"))
    assert (vision.calls, prefix.calls, denoise.calls) == (3, 1, 7)
    assert plan.total_ms == pytest.approx(3 * vision.call_ms + prefix.call_ms + 7 * denoise.call_ms + 15)
    assert plan.chunk_rate_hz == pytest.approx(1e3 / plan.total_ms)
    assert plan.action_rate_hz == pytest.approx(50 * plan.chunk_rate_hz)
    assert sum(plan.spent_ms.values()) == pytest.approx(plan.total_ms)


def test_speculation_takes_as_many_passes_as_drafts_that_are_drawn_at_random():
    import random

    architecture = load_architecture("openvla-7b")
    workload = Workload.of(architecture, chunk=200, decoding="speculative", draft=3, acceptance=0.6)
    scheme, draw, won = workload.scheme(architecture), random.Random(0), 0
    for _ in range(20_000):
        accepted = 0
        while accepted < 3 and draw.random() < 0.6:
            accepted += 1
        won += accepted + 1
    assert scheme.passes == pytest.approx((1400 - 1) / (won / 20_000), rel=0.01)
    assert scheme.drafts == scheme.passes and scheme.rows == 4, "a block proposes all in a pass"
    assert replace(workload, drafter="history").scheme(architecture).drafts == 0


def test_a_draft_is_planned_as_the_network_that_is_trained():
    from vla_edge.policy.draft_shapes import BLOCK, HIDDEN, LAYERS, WIDTH, DraftConfig
    from vla_edge.policy.openvla_draft import make_draft

    architecture = load_architecture("openvla-7b")
    works = architecture.works(Workload.of(architecture, decoding="speculative"))
    (draft,) = [work for work in works if work.name == "draft"]
    module = make_draft(DraftConfig(BLOCK, architecture.language.width, 7, LAYERS, 5, WIDTH, HIDDEN * WIDTH))
    linear = {name: m for name, m in module.named_modules() if hasattr(m, "in_features")}
    layers = {f"draft.{name}": (m.in_features, m.out_features) for name, m in linear.items()}
    assert {product.layer: (product.inputs, product.outputs) for product in draft.products} == layers


# shapes and bytes


@pytest.mark.parametrize("saved", [None, "groot/lerobot", "groot/isaac", "groot17/keys", "groot17/isaac"])
def test_layers_are_those_of_the_policy_itself_with_rows_and_calls_as_it_runs(request, saved):
    from vla_edge.engine.layer_latency import _calls
    from vla_edge.engine.runner import Runner
    from vla_edge.engine.trace import policy_layers
    from vla_edge.policy.checkpoint import load_checkpoint, load_policy

    checkpoint = PARITY / saved / "checkpoint" if saved else request.getfixturevalue("checkpoint")
    loaded = load_checkpoint(checkpoint)
    policy = load_policy(loaded)
    modules = policy_layers(policy.stages())
    architecture = architecture_of(checkpoint)
    works = architecture.works(Workload.of(architecture))
    assert layer_shapes(works) == {name: (m.in_features, m.out_features) for name, m in modules.items()}
    seen = _calls(modules, Runner.from_policy(policy, loaded), blank(loaded.spec))
    for stage in works:
        for product in stage.products:
            assert seen[product.layer] == (product.rows if stage.calls else 0, stage.calls), product.layer


@pytest.mark.parametrize(
    "name, parameters, missing",
    [
        # of the last language layer, of which only keys and values are used, and of a head that is not used
        ("smolvla-450m", 0.450e9, 49280 * 960 + 960 * 960 * 2 + 3 * 960 * 2560),
        ("pi0", 3.3e9, 2 * 2048 * 2048 + 3 * 2048 * 16384),
        ("openvla-7b", 7.54e9, 0),
        # of 32 embodiments the networks of one, SigLIP's pooling head, and a head over the vocabulary
        ("gr00t-n1.5", 2.724e9, 31 * 9.87e6 + 15.2e6 + 151680 * 2048),
        ("gr00t-n1.7", 3.1e9, 0),
    ],
)
def test_published_policies_have_as_many_parameters_as_published(name, parameters, missing):
    architecture = load_architecture(name)
    shapes = layer_shapes(architecture.works(Workload.of(architecture)))
    embeddings = architecture.vocabulary * architecture.language.width
    assert sum(i * o for i, o in shapes.values()) + embeddings + missing == pytest.approx(parameters, rel=0.12)


def test_7b_in_int4_has_a_body_of_3_4_gb_and_an_engine_of_more(orin):
    plan = plan_of("openvla-7b", W4A16, orin)
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    body = 32 * layer + 4096 * 32064  # half a byte each and two bytes per 128
    assert plan.memory.weights["language body"] == body // 2 + 2 * body // 128
    assert 3.4e9 < plan.memory.weights["language body"] < 3.5e9
    assert plan.memory.engine == sum(plan.memory.weights.values()) > 4.0e9
    whole = plan_of("openvla-7b", "bf16", orin).memory
    assert whole.engine == pytest.approx(15.1e9, rel=0.01)  # twice 7.54 billion parameters
    assert whole.cache == 288 * 32 * 2 * 4096 * 2


@pytest.mark.parametrize("kv, bits", [("int8", 8), ("int4", 4)])
def test_the_cache_shrinks_with_its_bits(orin, kv, bits):
    full = plan_of("openvla-7b", W4A16, orin).memory.cache
    assert plan_of("openvla-7b", W4A16, orin, kv=kv).memory.cache == full * bits // 16


@pytest.mark.parametrize(
    "step",
    [
        {"keep": {"dtype": "float16"}},
        {"quantize": {"weights": "int8"}},
        {"quantize": {"weights": "int8", "activations": "int8-dynamic"}},
        {"quantize": {"weights": "int4", "group_size": 32}},
        {"quantize": {"weights": "int4", "group_size": 64}},
        {"quantize": {"weights": "int4", "group_size": 32, "low_rank": 3}},
        {"quantize": {"weights": "fp8", "activations": None}},
        {"quantize": {"weights": "nvfp4"}},
        {"lowrank": {"rank": 5}},
    ],
    ids=str,
)
def test_bytes_are_those_of_the_compressed_layer(step):
    import numpy as np
    from torch import nn

    from vla_edge.compress.apply import compress_layer
    from vla_edge.compress.low_rank import factorize
    from vla_edge.compress.quantize.formats import number_format
    from vla_edge.compress.quantize.rtn import round_to_nearest

    (key, values), shape = next(iter(step.items())), (96, 48)
    recipe = parse_recipe({"steps": [{key: {"targets": ["*"], **values}}]})
    planned = layer_precisions(recipe, {"vision.a": shape})["vision.a"].nbytes(*shape)
    layer = nn.Linear(*shape)
    weight = layer.weight.detach().numpy()
    if key == "lowrank":
        real = factorize(weight, 5, dtype="float32").nbytes
    elif key == "keep":
        real = compress_layer("a", layer, recipe.steps[0]).nbytes
    else:
        real = round_to_nearest(weight, number_format(values["weights"]), values.get("group_size")).nbytes
        if values["weights"] == "nvfp4":
            real = round_to_nearest(weight, number_format("nvfp4"), 16).nbytes
        if rank := values.get("low_rank"):
            real += factorize(weight, rank, dtype="float16").nbytes
    assert planned == real, np.array(weight).shape


def test_every_shipped_architecture_can_be_planned(orin):
    for name in architecture_names():
        assert plan_of(name, "bf16", orin).total_ms > 0, name


# what must never grow


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["smolvla-450m", "pi0.5", "openvla-7b"]),
    st.sampled_from(["bf16", "w8a8-smoothquant", "int4-gptq"]),
    st.integers(1, 3),
    st.floats(0.2, 1.0),
    st.floats(1.05, 3.0),
)
def test_more_work_never_takes_less_time_and_a_better_device_never_more(name, recipe, cameras, kept, better):
    device = load_device("agx-orin-64gb")
    base = plan_of(name, recipe, device, cameras=cameras, keep_vision=kept)
    assert plan_of(name, recipe, device, cameras=cameras + 1, keep_vision=kept).total_ms > base.total_ms
    assert plan_of(name, recipe, device, cameras=cameras, keep_vision=1.0).total_ms >= base.total_ms
    more = {"chunk": base.workload.chunk + 8}
    assert plan_of(name, recipe, device, cameras=cameras, keep_vision=kept, **more).total_ms >= base.total_ms
    wider = replace(device, bandwidth_gb_s=device.bandwidth_gb_s * better)
    faster = replace(device, peak_tera={kind: better * tera for kind, tera in device.peak_tera.items()})
    for improved in (wider, faster):
        assert plan_of(name, recipe, improved, cameras=cameras, keep_vision=kept).total_ms <= base.total_ms + 1e-9
    assert plan_of(name, recipe, device, cameras=cameras, keep_vision=kept, kv="int4").memory.running <= (
        base.memory.running
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 64), st.integers(1, 64))
def test_fewer_bits_never_weigh_more(rows, inputs, outputs):
    shape = 32 * inputs, outputs
    sizes = [
        LayerPrecision(kind, group=group).nbytes(*shape)
        for kind, group in (("float32", None), ("bfloat16", None), ("int8", None), ("int4", 32))
    ]
    assert sizes[0] > sizes[1] and sizes[3] < sizes[1]
    assert sizes[3] < sizes[2]


def test_flow_steps_are_what_a_plan_of_many_waits_for_until_they_are_few(orin):
    many, few = (plan_of("smolvla-450m", "bf16", orin, steps=steps) for steps in (50, 1))
    assert many.bottleneck == FLOW_STEPS and LEVERS[FLOW_STEPS] in many.lever
    assert few.bottleneck != FLOW_STEPS and few.lever == LEVERS[few.bottleneck]


def test_single_tokens_wait_for_weights_and_want_several_in_a_pass(orin):
    plan = plan_of("openvla-7b", "bf16", orin, chunk=4)
    assert (plan.bottleneck, plan.lever) == (WEIGHTS, DECODING)


def test_every_label_of_a_cost_has_a_lever():
    assert set(LABELS.values()) <= set(LEVERS)


# the headline


def test_4_bit_weights_alone_do_not_bring_7b_to_4_hz_and_4_bit_weights_with_8_bit_products_do(orin):
    assert plan_of("openvla-7b", "bf16", orin).chunk_rate_hz < 2
    alone, products = plan_of("openvla-7b", W4A16, orin), plan_of("openvla-7b", W4A8, orin)
    assert 2.5 < alone.chunk_rate_hz < 4 < products.chunk_rate_hz
    # weights are read faster, prefill is not: it multiplies in 16 bits whatever the weights are stored in
    full = plan_of("openvla-7b", "bf16", orin)
    assert alone.stage("prefill").ms > 0.95 * full.stage("prefill").ms
    assert alone.stage("decode").ms < 0.4 * full.stage("decode").ms


def test_candidates_come_least_compressed_first_and_say_why_they_are_not_there(orin):
    architecture = load_architecture("openvla-oft")
    found = list(candidates(architecture, orin, Workload.of(architecture), "fused", 128))
    order = [RECIPES.index(candidate.recipe) for candidate in found]
    assert order == sorted(order)
    assert all((candidate.plan is None) == bool(candidate.reason) for candidate in found)
    reached = [candidate.recipe for candidate in found if candidate.reaches(4)]
    assert "w8a8-smoothquant" in reached and "int4-gptq" not in reached and "fp8" not in reached
    assert all(c.plan.action_rate_hz == pytest.approx(8 * c.plan.chunk_rate_hz) for c in found if c.plan)


def test_flow_policies_are_searched_over_flow_steps(orin):
    architecture = load_architecture("pi0.5")
    found = candidates(architecture, orin, Workload.of(architecture), "fused", recipes=["bf16"])
    assert {candidate.workload.steps for candidate in found} == {10, 5, 2, 1}


# what is refused


@pytest.mark.parametrize(
    "recipe, device, runtime, reason",
    [
        ("fp8", "agx-orin-64gb", "fused", "no FP8 products"),
        ("nvfp4", "agx-orin-64gb", "fused", "no FP4 products"),
        ("nvfp4", "rtx-4090", "fused", "no FP4 products"),
        ("int8", "agx-orin-64gb", "tensorrt", "take int8-static"),
        ("w4a8", "rtx-4090", "tensorrt", "grids"),
        ("w4a4-svdquant", "agx-orin-64gb", "tensorrt", "4-bit integers"),
        ("int4-gptq", "agx-orin-64gb", "eager", "PyTorch eager"),
    ],
)
def test_what_a_device_cannot_do_is_refused_with_the_reason(recipe, device, runtime, reason):
    with pytest.raises(PlanError, match=reason):
        plan_of("pi0.5", recipe, load_device(device), runtime)


def test_what_is_known_to_go_wrong_on_orin_is_said_and_not_refused(orin):
    words = " ".join(plan_of("pi0.5", "int8-static", orin, "tensorrt").cautions)
    assert "#4832" in words and "symmetric" in words and "TensorRT 10.3" in words
    assert not plan_of("pi0.5", "bf16", load_device("rtx-4090"), "tensorrt").cautions
    assert "trained" in plan_of("openvla-7b", "bf16", orin, decoding="parallel").cautions[0]


@pytest.mark.peers
@pytest.mark.parametrize("capability", [86, 89, 120])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4", "fp8", "fp8 static", "nvfp4"])
def test_refusals_of_hardware_are_those_of_tensorrts_builder(tmp_path, orin, precision, capability):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from test_tensorrt_rtx import builds
    from toy import compressed
    from torch import nn

    from vla_edge.engine.backends.tensorrt_plan import read
    from vla_edge.engine.export import export_stage
    from vla_edge.engine.refusals import refuse
    from vla_edge.policy.stages import Stage, TensorSpec

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 48)

        def forward(self, x):
            return (self.layer(x),)

    stage = Stage("one", One().eval(), (TensorSpec("x", (1, 8, 64)),), (TensorSpec("y", (1, 8, 48)),))
    path = export_stage(stage, compressed(stage, precision), tmp_path / "one.onnx")
    weights, _, static = precision.partition(" ")
    planned = {"vision.layer": LayerPrecision(weights, weights if static else None, group=8)}
    refused = refuse(planned, replace(orin, capability=capability), "tensorrt")
    assert (refused is None) == builds(read(path), capability), refused


def test_an_engine_that_does_not_fit_is_refused():
    with pytest.raises(PlanError, match="12.0 left for it"):
        plan_of("openvla-7b", "bf16", load_device("orin-nx-16gb"))
    assert plan_of("openvla-7b", W4A16, load_device("orin-nx-16gb")).memory.running < 12e9


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("pi0", {"decoding": "parallel"}, "decodes no tokens"),
        ("openvla-7b", {"steps": 4}, "has no flow"),
        ("openvla-oft", {"decoding": "autoregressive"}, "in one pass"),
        ("openvla-7b", {"decoding": "paralel"}, "did you mean 'parallel'"),
        ("openvla-7b", {"decoding": "speculative", "drafter": "medusa"}, "allowed is block or history"),
        ("pi0", {"keep_vision": 0.0}, "above 0, to 1"),
        ("pi0", {"keep_vision": float("nan")}, "above 0, to 1"),
        ("pi0", {"cameras": 0}, "at least 1"),
        ("pi0", {"kv": "int3"}, "allowed is float32"),
    ],
)
def test_what_a_policy_cannot_be_asked_is_said(orin, name, changes, words):
    with pytest.raises(WorkloadError, match=words):
        plan_of(name, "bf16", orin, **changes)


def test_recipes_that_shapes_do_not_tell_about_are_refused(orin):
    with pytest.raises(RecipeError, match="takes channels out"):
        plan_of("pi0", "prune-structured", orin)
    with pytest.raises(RecipeError, match="give a rank"):
        plan_of("pi0", "lowrank", orin)
    elsewhere = parse_recipe({"name": "elsewhere", "steps": [{"keep": {"targets": ["denoise"], "dtype": "float16"}}]})
    with pytest.raises(RecipeError, match="matches no layer"):
        plan_of("openvla-7b", elsewhere, orin)


def test_products_of_which_no_speed_is_known_are_not_guessed(orin):
    with pytest.raises(CostError, match="int4 products"):
        plan_of("pi0", "w4a4-svdquant", orin)


def test_unknown_architectures_and_entries_name_the_nearest():
    with pytest.raises(ArchitectureError, match="did you mean 'openvla-7b'"):
        load_architecture("openvla7b")
    plain = {"name": "x", "kind": "tokens", "source": "", "towers": {}, "connector": [], "image_tokens": 1,
             "language": {"width": 8, "hidden": 8, "heads": 1, "kv_heads": 1, "head_dim": 8}, "language_layers": 1,
             "vocabulary": 8}  # fmt: skip
    assert parse_architecture(plain, "here").language_layers == 1
    with pytest.raises(ArchitectureError, match="did you mean 'vocabulary'"):
        parse_architecture({**plain, "vocabulry": 9}, "here")
    with pytest.raises(ArchitectureError, match="lacks image_tokens"):
        parse_architecture({k: v for k, v in plain.items() if k != "image_tokens"}, "here")
    with pytest.raises(ArchitectureError, match="kind is flow"):
        parse_architecture({**plain, "kind": "flow"}, "here")


def test_what_a_recipe_makes_of_an_inference_is_planned():
    architecture, device = load_architecture("smolvla-450m"), load_device("agx-orin-64gb")
    whole = predict(architecture, load_recipe("fp16"), device, runtime="fused")
    fewer = predict(architecture, load_recipe("two-step"), device, runtime="fused")
    assert fewer.workload.steps == 2 and whole.workload.steps == 10
    assert predict(architecture, load_recipe("kv8"), device).workload.kv == "int8"
    pruned = predict(architecture, load_recipe("prune-tokens"), device).workload.keep_vision
    assert 0 < pruned < 1


@pytest.mark.parametrize(("name", "stage"), [("openvla-7b", "prefill"), ("pi0", "prefix")])
def test_image_tokens_are_left_out_behind_the_layers_that_see_them(name, stage):
    architecture = load_architecture(name)

    def rows(**asked) -> list[int]:
        works = architecture.works(Workload.of(architecture, **asked))
        found = next(work for work in works if work.name == stage).operations
        named = [op for op in found if isinstance(op, Product) and op.layer.startswith(f"{stage}.layers.")]
        return [next(op.rows for op in named if op.layer.startswith(f"{stage}.layers.{index}.")) for index in range(6)]

    whole, gone = rows()[0], architecture.cameras * architecture.image_tokens // 2
    assert rows(keep_vision=0.5) == [whole] * 2 + [whole - gone] * 4
    assert rows(keep_vision=0.5, keep_after=4) == [whole] * 4 + [whole - gone] * 2
    recipe = parse_recipe({"steps": [{"prune_tokens": {"keep": 0.5, "after": 3, "by": "attention"}}]})
    assert asked_of_workload(recipe) == {"keep_vision": 0.5, "keep_after": 3}
