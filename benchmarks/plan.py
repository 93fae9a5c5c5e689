"""How far the planner is off: against latencies others have published, and against engines built and timed here.

    python -m benchmarks.plan

Published rows that decided an efficiency are stated; those held out are limited to 25 % on Orin and RTX 4090. Of this
computer, the shipped policy is built in three precisions, an ACT and a diffusion policy are exported, and each stage is
timed in turns with a fresh calibration, limited to 15 %. Writes out/bench/plan.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_file import DIRECTORY, Row, table, write  # noqa: E402

LIMITED = ("agx-orin-64gb", "agx-orin-32gb", "rtx-4090")
RECIPES = ("fp32", "int8", "int4-rtn")
STAGES = ("vision", "prefix", "denoise")
RUNTIME = "onnxruntime"  # that a local plan is of


def main(arguments: list[str] | None = None) -> int:
    """Takes all figures; returns 0 when every limit is met."""
    from vla_edge.resources import shipped_checkpoint

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=shipped_checkpoint())
    parser.add_argument("--output", type=Path, default=DIRECTORY)
    parser.add_argument("--bundles", type=Path, help="directory with bundles built before, named as their recipes")
    parser.add_argument("--published-only", action="store_true", help="build and time nothing")
    options = parser.parse_args(arguments)
    rows = published_rows()
    if not options.published_only:
        ready = {recipe: options.bundles / recipe for recipe in RECIPES} if options.bundles else None
        rows += local_rows(options.checkpoint, ready or built(options.checkpoint, options.output))
    path = write("plan", rows, options.output)
    print(table(rows))
    print(path)
    return 0 if all(row.met is not False for row in rows) else 1


def published_rows() -> list[Row]:
    """The error of every published latency."""
    from vla_edge.engine.plan_score import score

    rows = []
    for entry in score():
        row = entry.row
        limited = row.device in LIMITED and not row.solves
        told = f"{row.ms:g} ms by {row.source}, predicted {entry.predicted_ms:.1f} ({100 * entry.error:+.1f} %)"
        decided = f"decides {row.solves}; " if row.solves else "held out; "
        rows.append(
            Row(
                f"plan_error.published.{row.name.replace(' ', '_').replace(',', '')}", abs(entry.error), "",
                "<=" if limited else None, 0.25 if limited else None, note=decided + told,
            )
        )  # fmt: skip
    return rows


def local_rows(checkpoint: Path, bundles: Mapping[str, Path]) -> list[Row]:
    """The error of every stage of `checkpoint` and of the two policies of convolutions on this computer, with one thread;
    blocks and stages timed in turns."""
    from vla_edge.compress.recipe import load_recipe
    from vla_edge.engine.calibrate_device import ROUNDS, calibrate, device_from
    from vla_edge.engine.checkpoint_shapes import architecture_of
    from vla_edge.engine.plan import predict
    from vla_edge.engine.precision import LayerPrecision
    from vla_edge.progress import Bar

    bar = Bar()
    with tempfile.TemporaryDirectory() as directory:
        convolutional = convolution_calls(Path(directory))
        calls = stage_calls(checkpoint, bundles)
        calls |= {(*key, "as built"): call for key, (call, _) in convolutional.items()}
        found, measured = calibrate(bar, calls)
    bar.close()
    one = {**found, "seconds_per": {"1": found["seconds_per"]["1"]}}  # what is timed has one thread, so what is predicted
    architecture, device, predicted = architecture_of(checkpoint), device_from(one), {}
    for recipe in bundles:
        plan = predict(architecture, load_recipe(recipe), device)
        predicted |= {(recipe, stage): plan.stage(stage).call_ms for stage in STAGES}
    for key, (_, work) in convolutional.items():
        precisions = {product.layer: LayerPrecision("float32") for product in work.products}
        predicted[key] = 1e3 * sum(device.model().call_seconds(work, precisions, None).values())
    rows = []
    for key, ms in predicted.items():
        # what is predicted is the faster way; a build on a busy computer may have taken the other
        ways = {way: 1e3 * seconds for (*of, way), seconds in measured.items() if tuple(of) == key}
        took = min(ways.values())
        note = f"{took:.3f} ms a call, predicted {ms:.3f} ({100 * (ms / took - 1):+.1f} %)"
        note += f"; as built {ways['as built']:.3f}" if len(ways) > 1 else ""
        rows.append(Row("plan_error.local." + ".".join(key), abs(ms / took - 1), "", "<=", 0.15, ROUNDS, note=note))
    return rows


def convolution_calls(directory: Path) -> dict:
    """(policy, stage) -> a call of it in float32, with one thread, and what it computes: an ACT and a diffusion policy of
    random weights, narrower than LeRobot's own (ResNet-18 and U-Net of half their channels), each stage as a build writes
    it."""
    import torch
    from vla_edge.engine.backends import StageInterface, get_backend
    from vla_edge.engine.calibration_blocks import block_layers
    from vla_edge.engine.counted import count_stage
    from vla_edge.engine.export import export_stage, trace
    from vla_edge.engine.operations import StageWork
    from vla_edge.policy.act import ACT, ACTConfig
    from vla_edge.policy.diffusion import DiffusionConfig, DiffusionPolicy
    from vla_edge.policy.spec import DiffusionSpec

    torch.manual_seed(0)
    pictures = {"cameras": 1, "height": 192, "width": 224, "blocks": (2, 2, 2, 2), "channels": 32}
    spec = DiffusionSpec("DDIM", 100, "squaredcos_cap_v2", 1e-4, 0.02, "epsilon", 1.0, 16, 1)
    policies = {
        "act": ACT(
            ACTConfig(
                **pictures, model_width=256, hidden=1600, heads=8, encoder_layers=4, decoder_layers=1, activation="relu",
                norm_first=False, state_dim=14, action_dim=14, chunk_size=50,
            )
        ),
        "diffusion": DiffusionPolicy(
            DiffusionConfig(
                **pictures, grouped=True, keypoints=32, observations=2, state_dim=14, action_dim=14, widths=(128, 256, 512),
                kernel=5, groups=8, level_width=128, scales=True, chunk_size=8, diffusion=spec,
            )
        ),
    }  # fmt: skip
    runtime, calls = get_backend(RUNTIME), {}
    for name, policy in policies.items():
        for stage in policy.eval().stages():
            if stage.name == "time":
                continue
            place = directory / f"{name}.{stage.name}"
            place.mkdir()
            layers = block_layers(stage.module, "float32", runtime)
            file = export_stage(stage, layers, place / "given.onnx", trace(stage))
            interface = StageInterface(stage.name, stage.inputs, stage.outputs)
            built = runtime.build(file, place, interface, {"threads": 1})
            loaded = runtime.load(place / built.file, interface, built.options)
            rng = np.random.default_rng(0)
            given = {spec.name: rng.standard_normal(spec.shape, np.float32) for spec in stage.inputs}
            call = loaded.bind(given, {spec.name: spec.zeros() for spec in stage.outputs})
            calls[name, stage.name] = call, StageWork(stage.name, 1, "call", count_stage(stage))
    return calls


def stage_calls(checkpoint: Path, bundles: Mapping[str, Path]) -> dict:
    """(recipe, stage, way) -> a call of it on what a real observation brings, with one thread. A way is how 4-bit weights
    are multiplied: as built, and the other of the two that round no more than the file asks for, unpacked or packed."""
    from vla_edge.compress.calibrate import load_calibration
    from vla_edge.engine.backends import get_backend
    from vla_edge.engine.bundle import Bundle
    from vla_edge.engine.runner import Runner

    calls, observation = {}, None
    for recipe, path in bundles.items():
        bundle, runner = Bundle.load(path), Runner.from_bundle(path, threads=1)
        if observation is None:
            observation = load_calibration(checkpoint.parent / "calibration", runner.spec).held_out[0]
        inputs: dict = {}
        for name, arrays in runner.stage_inputs(observation):
            inputs.setdefault(name, arrays)
        for entry in bundle.stages:
            interface = entry.interface
            if interface.name not in STAGES:
                continue
            given = {spec.name: np.ascontiguousarray(inputs[interface.name][spec.name]) for spec in interface.inputs}
            ways = {"as built": entry.options}
            if "int4" in entry.precision:
                ways["other"] = {**entry.options, "fold_weights": not entry.options["fold_weights"]}
            for way, options in ways.items():
                loaded = get_backend(RUNTIME).load(bundle.directory / entry.file, interface, options, 1)
                taken = {spec.name: spec.zeros() for spec in interface.outputs}
                calls[recipe, interface.name, way] = loaded.bind(given, taken)
    return calls


def built(checkpoint: Path, output: Path) -> dict[str, Path]:
    """Recipe -> bundle."""
    from vla_edge.engine.build import build
    from vla_edge.progress import Bar

    bar, traced = Bar(), {}
    found = {
        recipe: build(checkpoint, recipe, RUNTIME, output=output / "bundles" / recipe, traced=traced, progress=bar)
        for recipe in RECIPES
    }
    bar.close()
    return found


if __name__ == "__main__":
    sys.exit(main())
