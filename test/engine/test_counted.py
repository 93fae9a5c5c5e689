"""Policies of convolutions are counted from their own modules, and planned as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vla_edge.compress.recipe import load_recipe
from vla_edge.engine.checkpoint_shapes import architecture_of
from vla_edge.engine.cost import LABELS, SCHEDULING, MeasuredSum, Roofline
from vla_edge.engine.counted import count_stage
from vla_edge.engine.devices import load_device
from vla_edge.engine.engine_plan import engine_plan, engine_schemes
from vla_edge.engine.operations import Attention, Convolution, GroupNorm, Pointwise, Product, StageWork, layer_shapes
from vla_edge.engine.plan import predict
from vla_edge.engine.precision import layer_precisions
from vla_edge.engine.workload import Workload, WorkloadError

SAVED = Path(__file__).parents[1] / "parity"
FAMILIES = ("baselines/act", "baselines/diffusion_ddim", "openvla/openvla", "openvla/oft", "pi/pi0", "pi/pi05")


def saved(name: str) -> Path:
    return SAVED / name / "checkpoint"


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_those_of_the_policy_itself(name):
    from vla_edge.engine.trace import policy_layers
    from vla_edge.policy.checkpoint import load_checkpoint, load_policy

    modules = policy_layers(load_policy(load_checkpoint(saved(name))).stages())
    architecture = architecture_of(saved(name))
    shapes = layer_shapes(architecture.works(Workload.of(architecture)))
    assert shapes == {layer: (module.in_features, module.out_features) for layer, module in modules.items()}


@pytest.mark.parametrize("name", ["baselines/act", "baselines/diffusion_ddim"])
def test_rows_and_calls_are_those_of_an_inference(name):
    from vla_edge.engine.layer_latency import _calls
    from vla_edge.engine.runner import Runner
    from vla_edge.engine.trace import policy_layers
    from vla_edge.policy.checkpoint import load_checkpoint, load_policy
    from vla_edge.types import JointState, Observation

    loaded = load_checkpoint(saved(name))
    policy, spec = load_policy(loaded), loaded.spec
    images = {c.name: np.zeros((c.source_height, c.source_width, 3), np.uint8) for c in spec.cameras}
    names = tuple(dict.fromkeys((*spec.joint_names, *spec.read_names)))
    observation = Observation(0, images, JointState(0, names, np.zeros(len(names))), "")
    seen = _calls(policy_layers(policy.stages()), Runner.from_policy(policy, loaded), observation)
    architecture = architecture_of(saved(name))
    for stage in architecture.works(Workload.of(architecture)):
        for product in stage.products:
            assert seen[product.layer] == (product.rows if stage.calls else 0, stage.calls), product.layer


def test_operations_by_hand():
    import torch
    from torch import nn

    from vla_edge.policy.convolution import Convolution as Module
    from vla_edge.policy.convolution import GroupNorm as Norm
    from vla_edge.policy.stages import Stage, TensorSpec

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm, self.out = Module(4, 8, (3, 3), 2, 1), Norm(2, 8), nn.Linear(8, 2)
            self.places = nn.Parameter(torch.zeros(3, 3, 8))

        def forward(self, x):
            x = self.norm(self.convolution(x)) + self.places.exp()  # a constant, which is folded
            return (self.out(x.tanh().permute(0, 2, 1, 3)),)

    stage = Stage("s", Block(), (TensorSpec("x", (1, 6, 6, 4)),), (TensorSpec("y", (1, 3, 3, 2)),))
    assert count_stage(stage) == (
        Convolution("s.convolution.linear", 9, 36, 8, (3, 3), 144),
        GroupNorm(72),
        Pointwise(0, 3 * 72, 1, True),
        Pointwise(72, 0, 1, True),
        Product("s.out", 9, 8, 2),
    )
    assert not stage.module.out.weight.is_meta, "only a copy has no values"


def test_a_compiler_for_a_gpu_joins_work_on_each_number_and_eager_launches_each():
    work = StageWork("s", 1, "call", (Pointwise(0, 1, 1, True), Pointwise(1, 0, 1, True), GroupNorm(1), Pointwise(1, 0, 1, True)))

    def kernels(**launch):
        return Roofline({"float32": 1e30}, {"float32": 1.0}, 1e30, 1.0, "float32", **launch).call_seconds(work, {}, None)

    assert kernels(kernel_s=1.0)[SCHEDULING] == 3 and kernels(dispatch_s=1.0)[SCHEDULING] == pytest.approx(4)


def test_an_encoder_and_a_decoder_attend_to_what_they_are_given():
    architecture = architecture_of(saved("baselines/act"))
    act = next(stage for stage in architecture.works(Workload.of(architecture)) if stage.name == "act")
    found = [(o.rows, o.keys) for o in act.operations if isinstance(o, Attention)]
    tokens = 2 + 2 * 3 * 3  # latent and state, and two pictures of 70 x 90
    assert found[:2] == [(tokens, tokens)] * 2 and found[2:4] == [(7, 7), (7, tokens)]


@pytest.mark.parametrize(("recipe", "feature"), [("fp32", "convolved"), ("int8", "int8")])
def test_a_convolution_is_multiplied_as_the_exporter_writes_it(recipe, feature):
    architecture = architecture_of(saved("baselines/act"))
    works = architecture.works(Workload.of(architecture))
    model = MeasuredSum({1: dict.fromkeys(LABELS, 0.0) | {feature: 1.0}})
    precisions = layer_precisions(load_recipe(recipe), layer_shapes(works))
    vision = works[0]
    flops = sum(p.flops for p in vision.products if recipe == "int8" or isinstance(p, Convolution))
    assert sum(model.call_seconds(vision, precisions, None).values()) == pytest.approx(flops)


def test_they_are_planned_on_every_device_with_their_steps():
    orin = load_device("agx-orin-64gb")
    plan = engine_plan(saved("baselines/diffusion_ddim"), "bf16", orin)
    assert [(s.name, s.calls) for s in plan.stages] == [("vision", 3), ("prefix", 1), ("denoise", 7)]
    assert engine_plan(saved("baselines/diffusion_ddim"), "bf16", orin, steps=3).stage("denoise").calls == 3
    assert set(plan.memory.weights) == {"vision", "action head"} and plan.memory.cache == 0
    schemes = engine_schemes(saved("baselines/diffusion_ddim"), "bf16", orin)
    assert [c.workload.steps for c in schemes] == [7, 3, 1] and all(c.plan for c in schemes)
    (only,) = engine_schemes(saved("baselines/act"), "bf16", orin)
    assert only.plan.actions == 7


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"cameras": 3}, "was made for 2; leave it out"), ({"steps": 4}, "makes its chunk in one pass and has no flow"),
        ({"decoding": "parallel"}, "decodes no tokens"), ({"keep_vision": 0.5}, "no vision tokens to leave out"),
        ({"prompt_tokens": 9}, "was made for 0"),
    ],
)  # fmt: skip
def test_what_an_act_cannot_be_asked_is_said(asked, words):
    with pytest.raises(WorkloadError, match=words):
        engine_plan(saved("baselines/act"), "bf16", "h200", **asked)


def test_a_checkpoint_of_openvla_is_planned_under_every_decoding():
    orin = load_device("agx-orin-64gb")
    found = engine_schemes(saved("openvla/openvla"), "bf16", orin)
    assert {c.workload.decoding for c in found} == {"autoregressive", "speculative", "fixed-point", "parallel"}
    (first, *_) = found
    assert predict(architecture_of(saved("openvla/openvla")), load_recipe("bf16"), orin) == first.plan
    passes = engine_plan(saved("openvla/openvla"), "bf16", orin, decoding="fixed-point", iterations=2).stage("decode").calls
    assert passes == 2
    assert {c.workload.decoding for c in engine_schemes(saved("openvla/oft"), "bf16", orin)} == {"parallel"}
