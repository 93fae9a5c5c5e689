"""A policy that is never in memory as a whole becomes the engine that it would have become there, however often the build is
interrupted, and in memory that does not grow with its layers."""

from __future__ import annotations

import errno
import filecmp
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from vla_edge.compress.calibrate import collect
from vla_edge.compress.pipeline import carry_out
from vla_edge.compress.recipe import Accept, RecipeError, load_recipe, parse_recipe
from vla_edge.engine import build as building
from vla_edge.engine import export, piecewise
from vla_edge.engine.backends import BackendError
from vla_edge.engine.bundle import BundleError
from vla_edge.engine.foreseen import enough
from vla_edge.engine.piecewise import Piecewise, needs_pieces, whole_memory
from vla_edge.engine.runner import Runner
from vla_edge.engine.trace import linear_layers
from vla_edge.policy.checkpoint import CheckpointError, load_checkpoint, load_policy
from vla_edge.types import JointState, Observation

SAVED = Path(__file__).parents[1] / "parity"
CHECKPOINTS = {
    "openvla": "openvla/openvla", "oft": "openvla/oft", "pi0": "pi/pi0", "pi05": "pi/pi05", "smolvla": "smolvla/interleaved",
    "groot": "groot/isaac", "groot17": "groot17/keys", "act": "baselines/act", "diffusion": "baselines/diffusion_ddim",
}  # fmt: skip
FLOWS = ("pi0", "pi05", "smolvla", "groot", "groot17")
LANGUAGE = {"targets": ["prefill.layers?", "act.layers?"], "weights": "int4", "group_size": 16, "method": "awq+gptq"}
REST = {"targets": ["vision", "prefill.head?", "act.head?", "act.state_*?"], "weights": "int8", "method": "gptq"}
RECIPE = parse_recipe({"name": "pieces", "steps": [{"quantize": LANGUAGE}, {"quantize": REST}]})
ALL = {"targets": ["*"], "weights": "int4", "group_size": 16}
AWQ = parse_recipe({"name": "awq", "steps": [{"quantize": {**ALL, "method": "awq"}}]})
FEWER = {"prune_tokens": {"after": 1, "by": "attention"}}
ENOUGH = 1 << 30  # for a piece of any of these policies


def observations(spec, count: int = 16) -> list[Observation]:
    rng = np.random.default_rng(0)
    sizes = {camera.name: (camera.source_height, camera.source_width, 3) for camera in spec.cameras}
    names = tuple(dict.fromkeys((*spec.joint_names, *spec.read_names)))
    return [
        Observation(
            200_000_000 * index + 5_000_000_000 * (index // 4),
            {name: rng.integers(0, 256, size, dtype=np.uint8) for name, size in sizes.items()},
            JointState(0, names, rng.normal(0, 0.3, len(names))),
            ("touch the red cube", "push the ball")[index // 4 % 2],
        )
        for index in range(count)
    ]


def saved(family: str, directory: Path) -> Path:
    """A checkpoint its original has saved."""
    return Path(shutil.copytree(SAVED / CHECKPOINTS[family] / "checkpoint", directory / "checkpoint"))


@pytest.fixture
def openvla(tmp_path) -> Path:
    """In shards."""
    return saved("openvla", tmp_path)


@pytest.fixture(autouse=True)
def no_program(monkeypatch):
    """Beside these policies PyTorch itself is large."""
    monkeypatch.setattr(piecewise, "_PROGRAM", 0)


def data_of(directory: Path):
    return collect(observations(load_checkpoint(directory).spec), "random observations", frames=5, held_out=3)


def too_little(directory: Path, recipe=RECIPE) -> int:
    """Memory in which a piece fits, and not the whole."""
    return whole_memory(load_checkpoint(directory), recipe) - 1


def in_pieces(directory: Path, recipe=RECIPE, data=None, tell=lambda *_: None, memory: int = ENOUGH) -> Piecewise:
    pieces = Piecewise(load_checkpoint(directory), recipe, memory, directory.parent / "work")
    pieces.run(data or data_of(directory), False, [], tell)
    return pieces


def same(ours, theirs) -> bool:
    """Whether two layers are the same to the bit."""
    parts = [(ours.dense_weight(), theirs.dense_weight()), (ours.bias, theirs.bias), (ours.input_scale, theirs.input_scale)]
    if ours.quantized:
        parts += [(ours.weight.values, theirs.weight.values), (ours.weight.scales, theirs.weight.scales)]
    alike = ours.describe() == theirs.describe() and ours.activation == theirs.activation
    return alike and all((a is None) == (b is None) and (a is None or np.array_equal(a, b)) for a, b in parts)


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("openvla", RECIPE),
        ("oft", RECIPE),
        *(
            pytest.param(
                family, parse_recipe({"steps": [{"quantize": {**ALL, **method}}]}), id=f"{family}-{name}",
                marks=() if family == "pi0" or family in FLOWS and name == "awq" else pytest.mark.slow,
            )
            for family in (*FLOWS, "act", "diffusion")
            for name, method in {
                "int8": {"weights": "int8", "group_size": None, "activations": "int8"},
                "awq": {"method": "awq"},
                "gptq": {"method": "gptq"},
            }.items()
        ),
    ],
)  # fmt: skip
def test_layers_norms_and_chunks_are_those_of_the_whole_policy(family, recipe, tmp_path):
    directory = saved(family, tmp_path)
    checkpoint, data = load_checkpoint(directory), data_of(directory)
    policy = load_policy(checkpoint)
    pieces = in_pieces(directory, recipe, data)
    found, expected = pieces.compressed(), carry_out(recipe, policy, checkpoint, data, lambda *_: None)
    assert list(found.layers) == list(expected.layers)
    assert all(same(found.layers[name], expected.layers[name]) for name in expected.layers)
    wanted, held = expected.policy.state_dict(), set()
    for stage in found.policy.stages():
        with pieces.ready(stage):
            there = {name: value for name, value in found.policy.state_dict().items() if not value.is_meta}
            layers = linear_layers(stage)
            rest = [name for name, _ in stage.module.named_parameters() if name.rpartition(".")[0] not in layers]
            assert {f"{stage.name}.{name}" for name in rest} <= there.keys()
            assert all(torch.equal(value, wanted[name]) for name, value in there.items())
            held |= there.keys()
    assert {name.partition(".")[0] for name in held if "norm" in name} >= {"vision", found.policy.stages()[1].name}
    reference = Runner.from_policy(policy, checkpoint)
    chunks = pieces.foreseen.reference(checkpoint.spec)
    for observation in (*data.held_out, *data.observations):
        np.testing.assert_array_equal(
            chunks.infer(observation).chunk.positions, reference.infer(observation).chunk.positions
        )


@pytest.mark.parametrize(
    "steps",
    [
        [{"smooth": {"targets": ["vision"]}}, {"quantize": {"targets": ["vision"], "activations": "int8"}}],
        [{"prune": {"targets": ["prefill.layers"]}}, {"quantize": {**LANGUAGE, "method": "gptq", "correct_bias": True}}],
        [{"quantize": {**LANGUAGE, "method": "awq", "at_run_time": True}}, {"keep": {"targets": ["vision"], "dtype": "float16"}}],
        [{"quantize": {**LANGUAGE, "method": "rtn", "low_rank": 2}}],
        [{"lowrank": {"targets": ["prefill.layers.*.mlp"], "energy": 0.5}}, {"quantize": {"targets": ["vision"], "weights": "fp8"}}],
        [{"quantize": {"targets": ["*"], "weights": "int4", "group_size": 16}}],
    ],
)  # fmt: skip
def test_what_can_be_done_in_pieces_gives_what_it_gives_on_the_whole(openvla, steps):
    recipe = parse_recipe({"name": "steps", "steps": steps})
    found = in_pieces(openvla, recipe).compressed().layers
    checkpoint = load_checkpoint(openvla)
    expected = carry_out(recipe, load_policy(checkpoint), checkpoint, data_of(openvla), lambda *_: None).layers
    assert all(same(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["openvla", "oft", "pi0"])
def test_fewer_image_tokens_are_the_same_in_pieces(family, tmp_path, monkeypatch):
    monkeypatch.setattr("vla_edge.engine.native.rewrite.library", lambda: None)  # which way is the faster is not the question
    directory = saved(family, tmp_path)
    recipe = parse_recipe({"name": "fewer", "steps": [FEWER, {"quantize": ALL}]})
    recipe, data = replace(recipe, accept=Accept()), data_of(directory)
    whole = building.build(directory, recipe, "onnxruntime", tmp_path / "whole", data)
    monkeypatch.setattr(building, "needs_pieces", lambda *_: True)
    pieces = building.build(directory, recipe, "onnxruntime", tmp_path / "pieces", data, build_memory_mb=ENOUGH / 1e6)
    files = sorted(path.name for path in whole.iterdir() if path.name != "manifest.yaml")
    assert filecmp.cmpfiles(whole, pieces, files, shallow=False) == (files, [], [])
    plain = load_policy(load_checkpoint(directory))
    policy = carry_out(recipe, plain, load_checkpoint(directory), data, lambda *_: None).policy
    entries = yaml.safe_load((pieces / "manifest.yaml").read_text())["stages"]
    for stage, before in zip(policy.stages(), plain.stages()):
        shapes = [tuple(tensor["shape"]) for tensor in entries[stage.name]["inputs"]]
        assert shapes == [spec.shape for spec in stage.inputs]
        assert stage.name not in ("denoise", "decode") or shapes != [spec.shape for spec in before.inputs]


class Interrupted(BaseException):
    """As a signal: nothing catches it."""


def test_a_policy_in_bfloat16_is_calibrated_in_it_and_held_to_what_it_does_in_full_precision(openvla, monkeypatch):
    for file in openvla.glob("*.safetensors"):
        save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    checkpoint, data, found = load_checkpoint(openvla), data_of(openvla), {}
    reference = Runner.from_policy(load_policy(checkpoint), checkpoint)
    for pays in (False, True):
        monkeypatch.setattr(piecewise, "bfloat16_pays", lambda pays=pays: pays)
        pieces = in_pieces(openvla, data=data)
        layers = pieces.compressed().layers
        found[pays] = {name: layers[name].effective_weight() for name in layers if name.startswith("prefill.layers")}
        chunks, seen = pieces.foreseen.reference(checkpoint.spec), pieces.foreseen
        for observation in data.held_out:
            expected = reference.infer(observation).chunk.positions
            np.testing.assert_array_equal(chunks.infer(observation).chunk.positions, expected)
        calibrated = range(len(data.held_out), len(seen))
        assert len(calibrated) == 5 and all(len(seen.calls(place, "prefill")) == 1 for place in calibrated)
        # of those that are only calibrated on, what reaches the prompt is enough: tokens go through the same layers
        assert [bool(seen.calls(place, "decode")) for place in calibrated] == [not pays] * 5
        assert [seen.has_chunk(place) for place in calibrated] == [not pays] * 5
    apart = [np.linalg.norm(found[True][name] - exact) / np.linalg.norm(exact) for name, exact in found[False].items()]
    assert 0 < max(apart) < 0.3  # of weights that have nothing to do with each other: above 1


def test_only_where_all_that_follows_shares_its_layers_an_inference_may_end_early():
    shared = SimpleNamespace
    vision, prefill = shared(name="vision", shares=None), shared(name="prefill", shares=None)
    decode, draft = shared(name="decode", shares="prefill"), shared(name="draft", shares=None)
    assert enough([vision, prefill, decode]) == "prefill"
    assert enough([vision, prefill, decode, draft]) is None
    assert enough([vision, prefill]) is None


@pytest.mark.parametrize(("family", "recipe"), [("openvla", RECIPE), ("pi0", AWQ)])
def test_interrupted_anywhere_it_goes_on_and_comes_to_the_same(family, recipe, tmp_path):
    directory, seen = saved(family, tmp_path), []
    expected = in_pieces(directory, recipe, tell=lambda f, what: seen.append(what)).compressed().layers
    expected = {name: expected[name] for name in expected}
    for moment in random.Random(0).sample(range(len(seen)), 6):
        shutil.rmtree(tmp_path / "work")
        left = [moment]

        def interrupt(_fraction: float, _what: str, left=left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Interrupted

        with pytest.raises(Interrupted):
            in_pieces(directory, recipe, tell=interrupt)
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
        found = in_pieces(directory, recipe).compressed().layers
        assert all(same(found[name], expected[name]) for name in expected)
        assert all(path.stat().st_mtime_ns == time for path, time in kept.items())  # what was finished is not done again
    assert not list((tmp_path / "work").rglob("*.handed"))


def test_as_many_observations_are_held_out_as_are_inferred_together(openvla, monkeypatch):
    checkpoint = load_checkpoint(openvla)
    one = Runner.from_policy(load_policy(checkpoint), checkpoint).buffer_bytes
    pieces = Piecewise(checkpoint, RECIPE, ENOUGH, openvla)
    for together, expected in ((1, 4), (5, 5), (7, 7), (9, 8)):
        monkeypatch.setattr(Piecewise, "_beside_a_piece", round((together + 0.5) * one))
        assert pieces.frames["held_out"] == expected


def test_what_another_recipe_left_behind_is_not_taken_for_its_own(openvla, tmp_path):
    in_pieces(openvla)
    other = replace(RECIPE, steps=RECIPE.steps[:1])
    found = in_pieces(openvla, other).compressed().layers
    assert found["vision.projector.0"].precision == "float32" and found["prefill.layers.0.q"].precision == "int4"
    assert len(list((tmp_path / "work").iterdir())) == 1


def test_recipes_that_want_the_whole_policy_are_refused_with_what_to_take(openvla):
    for step, reason in (
        ({"quantize": {**LANGUAGE, "importance": "action"}}, "importance action needs gradients"),
        ({"finetune": {"steps": 1}}, "finetune works on the whole policy"),
        ({"kv_cache": {}}, "kv_cache works on the whole policy"),
        ({"prune_tokens": {"after": 1}}, "prune_tokens by action needs gradients"),
        ({"shrink": {"targets": ["*"], "channels": 0.5}}, "shrink works on the whole policy"),
    ):
        with pytest.raises(RecipeError, match=f"step 1: {reason}.*Take recipe {piecewise.PIECEWISE_RECIPE}, or one of"):
            in_pieces(openvla, parse_recipe({"name": "whole", "steps": [step]}))
    recipe = load_recipe(piecewise.PIECEWISE_RECIPE)  # which can
    assert piecewise.Piecewise(load_checkpoint(openvla), recipe, too_little(openvla, recipe), openvla).plan


def test_what_every_flow_step_reads_is_kept_once_for_an_observation(tmp_path):
    directory = saved("pi0", tmp_path)
    foreseen = in_pieces(directory, AWQ).foreseen
    calls = foreseen.calls(0, "denoise")
    assert len(calls) == load_checkpoint(directory).spec.num_steps == len(foreseen.for_all["time"]) > 1
    assert all(set(call) == set(calls[0]) for call in calls) and "prefix_keys" in calls[0]
    with np.load(foreseen.path(0)) as file:
        assert sum(key.endswith("prefix_keys") for key in file.files) == 1
        assert sum(key.endswith("/x") for key in file.files) == len(calls)


def test_what_one_stage_writes_is_not_built_in_pieces_and_where_it_fits_as_a_whole(openvla, monkeypatch):
    # as the backend says itself where its package is installed
    read = {"onnxruntime": ".onnx", "llama_cpp": ".gguf"}
    monkeypatch.setattr(piecewise, "get_backend", lambda name: SimpleNamespace(READS=read[name]))
    checkpoint, memory, backends = load_checkpoint(openvla), too_little(openvla), ("onnxruntime", "llama_cpp")
    with pytest.raises(BackendError, match="what llama_cpp runs is not built piece by piece; choose another backend"):
        Piecewise(checkpoint, RECIPE, memory, openvla, backends)
    assert needs_pieces(checkpoint, RECIPE, memory) and not needs_pieces(checkpoint, RECIPE, memory, backends)
    assert needs_pieces(checkpoint, RECIPE, 1000, backends)


def test_weights_that_are_rounded_already_are_not_taken_over_in_pieces(openvla, tmp_path):
    for path in openvla.glob("model-*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith("_proj.weight") and "layers" in name]:
            scale = tensors[name].float().abs().amax(1, keepdim=True) / 127
            tensors[f"{name}_scale"] = scale
            tensors[name] = (tensors[name].float() / scale).round().to(torch.int8)
        save_file(tensors, path)
    checkpoint, memory = load_checkpoint(openvla), too_little(openvla)
    with pytest.raises(CheckpointError, match="rounded already are not taken over piece by piece; give the weights"):
        building.build(openvla, RECIPE, "onnxruntime", tmp_path / "b", data_of(openvla), build_memory_mb=1000 / 1e6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
    assert not needs_pieces(checkpoint, RECIPE, memory)


def test_memory_for_not_even_a_piece_is_refused(openvla):
    with pytest.raises(BackendError, match="not even its largest piece fits"):
        in_pieces(openvla, memory=1000)


def test_values_that_are_not_finite_are_found_where_they_are_read(openvla, tmp_path):
    path = openvla / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    tensors["language_model.model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"not finite, first in prefill\.layers\.2\.mlp\.up\.weight"):
        building.build(openvla, RECIPE, "onnxruntime", tmp_path / "b", data_of(openvla), build_memory_mb=too_little(openvla) / 1e6)
    assert not (tmp_path / "b").exists()


def test_a_missing_shard_is_named_before_any_work(openvla, tmp_path):
    (openvla / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks 'model-00002-of-00002.safetensors' of the 2 shards"):
        building.build(openvla, RECIPE, "onnxruntime", tmp_path / "b", build_memory_mb=1 / 1e6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_a_disk_that_is_too_small_is_told_before_any_work(openvla, monkeypatch):
    monkeypatch.setattr(piecewise.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(BackendError, match="the build writes about .* GB beside .* and 0.0 GB are free there"):
        in_pieces(openvla)


@pytest.mark.parametrize("module", ["vla_edge.compress.layer_files", "vla_edge.engine.foreseen"])
def test_a_disk_that_gets_full_is_a_named_error_and_leaves_nothing_half_written(openvla, tmp_path, monkeypatch, module):
    written, write = [], sys.modules[module].write_whole

    def full(path: Path, content) -> None:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        write(path, content)

    monkeypatch.setattr(sys.modules[module], "write_whole", full)
    output, data = tmp_path / "bundles" / "b", data_of(openvla)
    with pytest.raises(BundleError, match="the disk is full, so there is no bundle .*/bundles/b; free some space"):
        building.build(openvla, RECIPE, "onnxruntime", output, data, build_memory_mb=too_little(openvla) / 1e6)
    assert len(written) == 3 and all(path.is_file() for path in written)
    assert [path.name for path in output.parent.iterdir()] == [".b.training"]  # what it goes on from


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "recipe", "heads", "decoding"),
    [
        ("openvla", RECIPE, 0, []),
        ("openvla", RECIPE, 0, [{"fixed_point": {}}]),
        ("openvla", RECIPE, 0, [{"speculate": {}}, {"prefill_blocks": {"size": 8}}]),
        ("openvla", RECIPE, 0, [FEWER, {"fixed_point": {}}]),
        ("groot17", AWQ, 0, [FEWER]),
        ("openvla", RECIPE, 3, []),
        *((family, AWQ, 0, []) for family in FLOWS),
    ],
)
def test_the_bundle_is_the_same_to_the_byte(family, recipe, heads, decoding, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST_FILE", 20_000)  # constants lie beside the stages
    monkeypatch.setattr("vla_edge.engine.native.rewrite.library", lambda: None)  # which way is the faster is not the question
    directory = saved(family, tmp_path)
    if heads:
        drafted = {f"{head}.0.weight": torch.randn(256, 16) for head in range(heads)}
        save_file(drafted, directory / "medusa_lm_head.safetensors")
    recipe = replace(recipe, steps=(*parse_recipe({"steps": decoding}).steps, *recipe.steps), accept=Accept())
    # what reaches the layers while tokens are guessed together, or are fewer, is not what does while they are not
    if decoding:
        recipe = replace(recipe, steps=tuple(replace(s, method="rtn") if hasattr(s, "method") else s for s in recipe.steps))
    data, traced = data_of(directory), {}
    whole = building.build(directory, recipe, "onnxruntime", tmp_path / "whole", data, traced=traced)
    monkeypatch.setattr(building, "needs_pieces", lambda *_: True)
    pieces = building.build(directory, recipe, "onnxruntime", tmp_path / "pieces", data, build_memory_mb=ENOUGH / 1e6)
    files = sorted(path.name for path in whole.iterdir() if path.name != "manifest.yaml")
    assert files == sorted(path.name for path in pieces.iterdir() if path.name != "manifest.yaml")
    assert any(name.endswith(".weights") for name in files) or family == "smolvla"  # whose constants are all small
    assert filecmp.cmpfiles(whole, pieces, files, shallow=False) == (files, [], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "pieces", "whole"]


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_piecewise as here
from vla_edge.engine import piecewise
from vla_edge.engine.profile import peak_bytes
piecewise._PROGRAM = 0
piecewise.Piecewise._writing = lambda self: 0  # no stage is
before = peak_bytes()
here.in_pieces(Path(sys.argv[1]), here.AWQ, memory=int(sys.argv[2]))
print(peak_bytes() - before)
"""


def start(checkpoint: Path, memory: int = ENOUGH) -> subprocess.Popen:
    """A process that carries the recipe out in pieces, in the directory work beside the checkpoint."""
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", program, str(checkpoint), str(memory)], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", ["openvla", "pi0"])
def test_killed_at_ten_random_moments_it_comes_to_the_same_bytes(family, tmp_path):
    begin, directory = time.monotonic(), saved(family, tmp_path)
    assert start(directory).wait(300) == 0
    seconds, chance, kills = time.monotonic() - begin, random.Random(1), 0
    expected = (tmp_path / "work").rename(tmp_path / "expected")
    files = [str(path.relative_to(expected)) for path in expected.rglob("*") if path.is_file()]
    assert len(files) > 10

    def compare() -> None:
        there = [str(path.relative_to(tmp_path / "work")) for path in (tmp_path / "work").rglob("*") if path.is_file()]
        assert sorted(there) == sorted(files)
        assert filecmp.cmpfiles(expected, tmp_path / "work", files, shallow=False) == (files, [], [])

    while kills < 10:
        process = start(directory)
        try:
            assert process.wait(seconds * chance.uniform(0.3, 0.9)) == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait(60)
            kills += 1
            continue
        compare()  # done before it could be killed: once more from the beginning
        shutil.rmtree(tmp_path / "work")
    assert start(directory).wait(300) == 0
    compare()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", ["openvla", "pi0"])
def test_memory_does_not_grow_with_the_layers(family, tmp_path):
    from benchmarks import openvla_shapes, pi0_shapes

    peaks, layer = {}, 4 * (4 * 512**2 + 3 * 512 * 1408)
    for layers in (2, 10):
        directory = tmp_path / str(layers) / "checkpoint"
        if family == "openvla":
            shapes = openvla_shapes.Shapes(layers, 512, 1408, 8, 32064, 28, ((64, 128, 2), (64, 128, 2)))
            checkpoint = openvla_shapes.write_openvla(directory, shapes)
        else:
            shapes = pi0_shapes.Shapes((64, 128, 2), (512, 1728), (64, 128), layers, 8, 64, 4096, cameras=1)
            checkpoint = pi0_shapes.write_pi0(directory, shapes)
        process = start(checkpoint, 80_000_000)
        peaks[layers] = int(process.communicate(timeout=600)[0])
    # what goes between stages has a row for each layer; of the 8 layers that there are more, less than half stays
    assert peaks[10] - peaks[2] < 4 * layer
