"""Other libraries' results in our representation compute what the libraries' own simulation computes."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_subject import Subject, make_observations

from vla_edge.compress.apply import compress_layer
from vla_edge.compress.calibrate import CalibrationError, collect, watch_inputs
from vla_edge.compress.fake import FakeLinear, installed
from vla_edge.compress.fold import input_groups
from vla_edge.compress.pipeline import carry_out
from vla_edge.compress.providers import PROVIDERS, get_provider
from vla_edge.compress.quantize.rtn import fitting_group
from vla_edge.compress.recipe import RecipeError, parse_recipe
from vla_edge.compress.statistics import InputStatistics
from vla_edge.compress.steps import Quantize
from vla_edge.engine.export import as_it_is
from vla_edge.engine.trace import policy_layers

SEEN = 6
FOUR = {"weights": "int4", "group_size": 16}
W8A8 = {"weights": "int8", "activations": "int8"}
PACKAGES = {"neural-compressor": "neural_compressor"}


def recipe(*more, **step):
    return parse_recipe({"name": "test", "steps": [{"quantize": {"targets": ["*"], **step}}, *more]})


def carried_out(loaded, found, **options):
    data = collect(make_observations(12), "random observations", frames=8, held_out=2)
    return carry_out(found, *loaded, data, lambda *_: None, **options)


def installed_provider(name: str) -> str:
    package = PACKAGES.get(name, name)
    pytest.importorskip(package, reason=f"{package} is not installed")
    return name


def some(names) -> list[str]:
    """A few layers of each kind, with and without bias."""
    return [
        name for name in names if name.startswith(("vision.encoder.layers.0", "denoise.layers.0", "denoise.action"))
    ]


def quantized(loaded, provider: str, **step) -> SimpleNamespace:
    """A provider's layers, the library's modules, and the weights they had."""
    step = recipe(provider=installed_provider(provider), **step).steps[0]
    subject = Subject(copy.deepcopy(loaded[0]), loaded[1])
    modules = {name: subject.modules[name] for name in some(subject.modules)}
    weights = {name: module.weight.detach().numpy().copy() for name, module in modules.items()}

    def run():
        subject.runner.set_num_steps(subject.runner.num_steps)
        for observation in make_observations(SEEN):
            subject.runner.infer(observation)

    layers = get_provider(step).quantize(subject.policy, modules, step, run)
    return SimpleNamespace(layers=layers, modules=modules, weights=weights, policy=subject.policy)


def as_computed(module) -> np.ndarray:
    """(out, in) float32 that the library multiplies with, all that happens to the input included."""
    with torch.no_grad():
        out = module(torch.eye(module.in_features)).reshape(module.in_features, -1)
        return (out if module.bias is None else out - module.bias).numpy().T


@pytest.fixture
def theirs(monkeypatch):
    """provider -> what gives the weights that it computes with, noted while it works."""
    models, made_up = [], []

    def note(owner, name: str, notes: list, pick):
        real = getattr(owner, name)

        def noting(*args, **kwargs):
            notes.append(pick(result := real(*args, **kwargs)))
            return result

        monkeypatch.setattr(owner, name, noting)

    def weights(provider: str, found, step) -> dict[str, np.ndarray]:
        if provider == "nncf":
            alone = {}
            for (name, module), model in zip(found.modules.items(), models):
                model.in_features, model.bias = module.in_features, module.bias
                alone[name] = as_computed(model)
            return alone
        if provider == "neural-compressor" and made_up:
            return dict(zip(found.modules, made_up))
        if provider == "neural-compressor":
            from neural_compressor.torch.algorithms.weight_only.utility import quant_tensor

            bits, group = (4, 16) if step["weights"] == "int4" else (8, -1)
            return {
                name: quant_tensor(torch.tensor(weight), bits, fitting(weight, group), scheme="sym").numpy()
                for name, weight in found.weights.items()
            }
        return {name: as_computed(module) for name, module in found.modules.items()}

    def fitting(weight, group: int) -> int:
        return group if group < 0 else fitting_group(weight.shape[1], group)

    def start(provider: str):
        if installed_provider(provider) == "nncf":
            import nncf

            note(nncf, "compress_weights", models, lambda model: model)
        elif provider == "neural-compressor":
            from neural_compressor.torch.algorithms.weight_only.gptq import GPTQ

            note(GPTQ, "fasterquant", made_up, lambda result: result[-1].numpy())
        return weights

    return start


WEIGHTS_ONLY = [
    ("llmcompressor", {**FOUR, "method": "awq"}),
    ("llmcompressor", {**FOUR, "method": "gptq"}),
    ("llmcompressor", {"weights": "int8", "method": "gptq", "group_size": 32, "activation_order": False}),
    ("torchao", FOUR),
    ("torchao", {"weights": "int8"}),
    ("nncf", FOUR),
    ("nncf", {**FOUR, "method": "awq"}),
    ("nncf", {"weights": "int8"}),
    ("neural-compressor", FOUR),
    ("neural-compressor", {**FOUR, "method": "gptq"}),
    ("neural-compressor", {"weights": "int8"}),
    ("neural-compressor", {"weights": "int8", "method": "gptq", "damping": 0.05}),
]


def told(case) -> str:
    return "-".join(map(str, [case[0], *case[1].values()]))


@pytest.mark.peers
@pytest.mark.parametrize(("provider", "step"), WEIGHTS_ONLY, ids=map(told, WEIGHTS_ONLY))
def test_weights_are_the_librarys_and_err_as_ours_do(loaded, theirs, provider, step):
    weights = theirs(provider)
    found = quantized(loaded, provider, **step)
    expected = weights(provider, found, step)
    for name, layer in found.layers.items():
        # the integers are theirs; scales of groups are stored in half precision, as ours are, and some compute in it
        np.testing.assert_allclose(layer.effective_weight(), expected[name], rtol=2**-10, atol=1e-7)
        assert layer.precision == step["weights"]
        assert layer.weight.group_size == (
            fitting_group(layer.shape[1], step["group_size"]) if "group_size" in step else None
        )
    seen = watched(loaded)
    # scales of awq were made for inputs that are multiplied; without them it is held to rounding to nearest
    step = {key: value for key, value in step.items() if (key, value) != ("method", "awq")}
    ours = native(loaded, step, seen)
    ratio = output_error(found.layers, found.weights, seen) / output_error(ours, found.weights, seen)
    assert 0.5 < ratio < 2.0


def watched(loaded) -> dict[str, InputStatistics]:
    """Layer -> statistics of its inputs in full precision."""
    subject = Subject(copy.deepcopy(loaded[0]), loaded[1])
    modules = {name: subject.modules[name] for name in some(subject.modules)}
    return watch_inputs(subject.runner, modules, lambda _: InputStatistics(), make_observations(SEEN), lambda _: None)


def native(loaded, step: dict, seen) -> dict:
    """The same step by our algorithm."""
    step = recipe(**step).steps[0]
    modules = Subject(*loaded).modules
    return {name: compress_layer(name, modules[name], step, statistics=seen[name]) for name in seen}


def output_error(layers, weights, seen) -> float:
    """Mean over layers of the squared error of their outputs, over the square of these."""
    shares = []
    for name, layer in layers.items():
        lost, moment = layer.effective_weight() - weights[name], seen[name].second_moment
        shares.append(np.sum((lost @ moment) * lost) / np.sum((weights[name] @ moment) * weights[name]))
    return float(np.mean(shares))


ROUNDED_INPUTS = [
    ("llmcompressor", W8A8),
    ("llmcompressor", {**W8A8, "method": "gptq"}),
    ("llmcompressor", {"weights": "fp8", "activations": "fp8", "method": "gptq"}),
]


@pytest.mark.peers
@pytest.mark.parametrize(("provider", "step"), ROUNDED_INPUTS, ids=map(told, ROUNDED_INPUTS))
def test_layers_with_rounded_inputs_give_what_the_librarys_give(loaded, provider, step):
    found = quantized(loaded, provider, **step)
    generator = torch.Generator().manual_seed(0)
    for name, module in found.modules.items():
        x = torch.randn((64, module.in_features), generator=generator)
        with torch.no_grad():
            given, expected = FakeLinear(found.layers[name])(x), module(x)
        plain = x @ torch.from_numpy(found.weights[name]).T
        plain = plain if module.bias is None else plain + module.bias
        assert (given - expected).abs().mean() < 0.01 * (expected - plain).abs().mean()
        assert found.layers[name].describe()["activations"] == step["activations"]


@pytest.mark.peers
def test_llm_compressors_grids_hold_every_call_and_a_channel_that_holds_still(loaded):
    policy = copy.deepcopy(loaded[0])
    modules = policy_layers(policy.stages())
    group = next(g for g in input_groups(modules, policy.stages()) if g.names[0].startswith("vision.encoder.layers.0"))
    with torch.no_grad():
        group.producer.weight[0], group.producer.bias[0] = 0, 3
    found = quantized((policy, loaded[1]), "llmcompressor", **W8A8)
    still = found.layers[group.names[0]].input_scale
    assert still[0] < 10 * np.median(still)
    for name, statistics in watched((policy, loaded[1])).items():
        layer = found.layers[name]
        grid, scale = layer.activation, layer.input_scale
        low, high = (statistics.low * scale).min(), (statistics.high * scale).max()
        assert -grid.zero_point * grid.scale < low + grid.scale, name
        assert (255 - grid.zero_point) * grid.scale > high - grid.scale, name


STEPS = [
    ("modelopt", {**FOUR, "method": "awq"}),
    ("modelopt", W8A8),
    ("modelopt", {"weights": "fp8", "activations": "fp8"}),
]


@pytest.mark.peers
@pytest.mark.parametrize(("provider", "step"), STEPS, ids=map(told, STEPS))
def test_a_policy_read_back_gives_the_librarys_chunks(loaded, provider, step, monkeypatch):
    module = get_provider(recipe(provider=installed_provider(provider), **step).steps[0])
    kept = {}
    quantize = module.quantize

    def and_keep(root, modules, step, run):
        layers = quantize(root, modules, step, run)
        kept["policy"] = root  # simulates its own quantization from now on
        return layers

    monkeypatch.setattr(module, "quantize", and_keep)
    done = carried_out(loaded, recipe(provider=provider, **step))
    assert np.abs(chunks(loaded, done) - Subject(kept["policy"], loaded[1]).chunks()).mean() < 0.1 * lost(loaded, done)
    assert all(layer.precision == step["weights"] for layer in done.layers.values())


def chunks(loaded, done) -> np.ndarray:
    subject = Subject(done.policy, loaded[1])
    with installed(policy_layers(done.policy.stages()), done.layers):
        return subject.chunks()


def lost(loaded, done) -> float:
    return float(np.abs(chunks(loaded, done) - Subject(copy.deepcopy(loaded[0]), loaded[1]).chunks()).mean())


@pytest.mark.peers
@pytest.mark.parametrize("activations", ["int8", "int8-dynamic"])
def test_stages_read_back_from_pt2e_compute_as_its_graphs(loaded, monkeypatch, activations):
    installed_provider("torchao")
    from vla_edge.compress.providers import torchao

    graphs, read = {}, torchao._read_graph

    def and_keep(stage, graph, *rest):
        graphs[stage] = graph
        return read(stage, graph, *rest)

    monkeypatch.setattr(torchao, "_read_graph", and_keep)
    found = quantized(loaded, "torchao", weights="int8", activations=activations)
    assert set(graphs) == {"vision", "denoise"} and found.layers.keys() == found.modules.keys()
    generator = torch.Generator().manual_seed(0)
    for stage in found.policy.stages():
        if stage.name not in graphs:
            continue
        inputs = [0.3 * torch.randn(spec.shape, generator=generator) for spec in stage.inputs]
        layers = {name: layer for name, layer in found.layers.items() if name.startswith(stage.name)}
        with torch.no_grad():
            plain = first(stage.module(*inputs))
            expected = first(graphs[stage.name](*inputs))
            with installed(found.modules, layers):
                given = first(stage.module(*inputs))
        assert (given - expected).abs().mean() < 0.05 * (expected - plain).abs().mean()


def first(outputs):
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


@pytest.mark.peers
@pytest.mark.parametrize("step", [FOUR, {"weights": "int8"}], ids=["int4", "int8"])
def test_finetune_trains_through_torchaos_fake_quantizer(loaded, tmp_path, step, monkeypatch):
    installed_provider("torchao")
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    from vla_edge.compress.providers.torchao import FakeQuantized

    kept, compressed = {}, FakeQuantized.compressed

    def and_keep(layer):
        kept[id(layer)] = layer.seen().detach().numpy()
        done[id(layer)] = compressed(layer)
        return done[id(layer)]

    done, called = {}, []
    forward = IntxFakeQuantizer.forward
    monkeypatch.setattr(FakeQuantized, "compressed", and_keep)
    monkeypatch.setattr(IntxFakeQuantizer, "forward", lambda self, x: called.append(1) or forward(self, x))
    training = {"finetune": {"steps": 4, "batch": 4}}
    found = carried_out(loaded, recipe(training, provider="torchao", **step), work=tmp_path)
    before = carried_out(loaded, recipe(provider="torchao", **step))
    assert len(kept) == len(found.layers) and len(called) > 4 * len(kept)
    for key, weight in kept.items():
        np.testing.assert_allclose(done[key].effective_weight(), weight, rtol=2**-10, atol=1e-7)
    assert any(not np.array_equal(found.layers[n].weight.scales, before.layers[n].weight.scales) for n in found.layers)


def test_what_a_provider_cannot_do_or_is_not_there_is_said_before_any_work(loaded, monkeypatch):
    with pytest.raises(RecipeError, match="provider is 'modelop'"):
        recipe(provider="modelop", weights="int8")
    from vla_edge.compress.providers import llmcompressor, modelopt

    def absent():
        raise ImportError("no module named modelopt")

    monkeypatch.setattr(modelopt, "load", absent)
    with pytest.raises(RecipeError, match="needs the package nvidia-modelopt.*pip install nvidia-modelopt"):
        carried_out(loaded, recipe(provider="modelopt", weights="int8", activations="int8"))
    for module in (modelopt, llmcompressor):
        monkeypatch.setattr(module, "load", lambda: None)
    with pytest.raises(RecipeError, match="does not offer weights int8, activations null, method gptq; it offers"):
        carried_out(loaded, recipe(provider="modelopt", weights="int8", method="gptq"))
    for unheeded in ({"calibrator": "mse"}, {"group_size": 32}, {"correct_bias": True}):
        (name,) = unheeded
        with pytest.raises(RecipeError, match=f"'modelopt' does not heed {name} .* with weights int8"):
            carried_out(loaded, recipe(provider="modelopt", **W8A8, **unheeded))
    with pytest.raises(RecipeError, match="'modelopt' does not heed group_size channel with weights int4"):
        carried_out(loaded, recipe(provider="modelopt", weights="int4", group_size="channel"))
    for step, does in (
        ({"prune": {"targets": ["vision"]}}, "prunes"),
        ({"smooth": {"targets": ["vision"]}}, "smooths"),
    ):
        found = parse_recipe({"steps": [step, {"quantize": {"targets": ["*"], "provider": "llmcompressor", **W8A8}}]})
        with pytest.raises(RecipeError, match=f"{does} vision.*, which llmcompressor compresses as it was; drop one"):
            carried_out(loaded, found)


def test_what_a_library_reports_does_not_come_between_results(loaded, monkeypatch, capsys):
    from vla_edge.compress.providers import modelopt

    def talkative(root, modules, step, run):
        print("inserted quantizers")
        return {name: as_it_is(module) for name, module in modules.items()}

    monkeypatch.setattr(modelopt, "load", lambda: print("loaded"))
    monkeypatch.setattr(modelopt, "quantize", talkative)
    carried_out(loaded, recipe(provider="modelopt", **W8A8))
    captured = capsys.readouterr()
    assert captured.out == "" and "loaded" in captured.err and "inserted quantizers" in captured.err


def test_a_layer_that_the_data_never_reach_is_an_error(loaded, monkeypatch):
    from vla_edge.compress.providers import modelopt

    class Idle(torch.nn.Linear):
        def __call__(self, x):
            return torch.nn.functional.linear(x, self.weight, self.bias)

    monkeypatch.setattr(modelopt, "load", lambda: None)
    monkeypatch.setattr(modelopt, "quantize", lambda root, modules, step, run: run())
    policy, checkpoint = copy.deepcopy(loaded[0]), loaded[1]
    policy_layers(policy.stages())["denoise.action_out"].__class__ = Idle
    with pytest.raises(CalibrationError, match="calibration never reached layer denoise.action_out"):
        carried_out((policy, checkpoint), recipe(provider="modelopt", **W8A8))


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_provider_that_is_not_installed_is_an_error_that_says_what_to_install(name):
    module, package = PROVIDERS[name]
    try:
        importlib.import_module(module).load()
    except ImportError:
        step = Quantize(("*",), provider=name)
        with pytest.raises(
            RecipeError, match=f"provider '{name}' needs the package {package}, .* pip install {package}"
        ):
            get_provider(step)
    else:
        pytest.skip(f"{package} is installed")
