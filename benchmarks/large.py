"""Builds of policies larger than the memory they are given, at OpenVLA-7B's true shapes.

    python -m benchmarks.large                          everything: 14 GB of random weights, hours, 40 GB of disk
    python -m benchmarks.large --layers 2 --kills 0     the same with fewer layers, whose rows carry their number

Every build is a process of its own, so that its peak of memory is its own, and is measured from outside. Weights are
random: they take as long and as much as trained ones and mean nothing. Writes out/bench/7b.json.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.bench_file import DIRECTORY, Row, add, table
from benchmarks.openvla_shapes import Shapes, write_openvla

MEMORY = 6_000_000_000
BODY, RUN, MINUTES, TOKENS = 3.6e9, 8e9, 60.0, 16_384
METHODS = ("awq", "gptq")
# ways to decide, with the steps of an engine of their own: all tokens of a chunk guessed together, half of the image tokens
# behind the second text layer; rounded to the nearest, as speed does not depend on how
OWN = {"fixed-point": "rtn, fixed_point", "half-vision": "rtn, prune_tokens"}
DECODINGS = ("autoregressive", *OWN)
STEPS = {"prune_tokens": {"keep": 0.5, "by": "attention"}}
# asked for, and not taken by this benchmark
ELSEWHERE = {
    "speedup_vs_eager_fp32.openvla": "the eager policy takes 28 GB in float32; make bench-engine has SmolVLA-450M's",
}


def main(arguments: list[str] | None = None) -> int:
    """Takes all figures; returns 0 when every limit is met."""
    options = _parser().parse_args(arguments)
    if options.build:
        return _build(options)
    name = "openvla" if options.layers == Shapes().layers else f"openvla_{options.layers}_layers"
    checkpoint = write_openvla(options.output / name / "checkpoint", Shapes(layers=options.layers))
    rows: list[Row] = []
    for method in options.methods if options.builds else ():
        rows += build_rows(f"{name}_{method}", checkpoint, method, options)
        add("7b", rows, options.output)  # what was measured stays
    if options.run:
        rows += run_rows(name, checkpoint, options)
        add("7b", rows, options.output)
    for policy in options.flow:
        rows += flow_rows(policy, options)
        add("7b", rows, options.output)
    if options.kills:
        shapes = Shapes(layers=min(options.kill_layers, options.layers))
        fewer = write_openvla(options.output / f"openvla_{shapes.layers}_layers" / "checkpoint", shapes)
        rows.append(kill_row(f"openvla_{shapes.layers}_layers", fewer, options))
    rows += [Row(row, None, "", None, None, 0, None, why) for row, why in ELSEWHERE.items()]
    path = add("7b", rows, options.output)
    print(table(rows))
    print(path)
    return 0 if all(row.met is not False for row in rows) else 1


def build_rows(name: str, checkpoint: Path, method: str, options) -> list[Row]:
    """Size, memory and time of one build, and of its engine."""
    from vla_edge.engine.bundle import Bundle

    begin = time.monotonic()
    process = _start(checkpoint, name, method, options)
    told, _ = process.communicate()
    minutes = (time.monotonic() - begin) / 60
    if process.returncode:
        why = f"the build failed with {process.returncode}, see above"
        return [Row(f"build_minutes.{name}", None, "min", "<=", MINUTES, 0, None, why)]
    figures = json.loads(told)
    bundle = Bundle.load(figures["bundle"])
    layers = bundle.manifest["stages"]["prefill"]["layers"]
    body = sum(row["bytes"] for layer, row in layers.items() if layer.startswith("layers."))
    whole = options.layers == Shapes().layers
    tokens = figures["tokens"]
    note = f"{tokens} tokens, {1e4 * minutes / tokens:.1f} minutes per 10,000, {figures['threads']} threads"
    return [
        Row(f"body_bytes.{name}", body, "B", "<=", BODY, 1, None, f"{options.layers} layers in INT4, groups of 128"),
        Row(f"engine_bytes.{name}", bundle.bytes, "B", note="all files; vision in INT8, words as in the checkpoint"),
        Row(f"build_peak_rss_bytes.{name}", figures["peak"], "B", "<=", MEMORY, 1, None, "of the process that builds"),
        Row(f"build_minutes.{name}", minutes, "min", *(("<=", MINUTES) if whole else (None, None)), 1, None, note),
    ]


def run_rows(name: str, checkpoint: Path, options) -> list[Row]:
    """Memory and speed of the first engine (`autoregressive`), and of those that decide in a way of their `OWN`."""
    from benchmarks.large_speed import chunk_seconds, orin_rows, plan_rows, token_rows
    from vla_edge.engine.alone import most_memory
    from vla_edge.engine.bundle import Bundle
    from vla_edge.engine.runner import Runner

    rows, measured = [], {}
    bundles = {}
    for way in options.decodings:
        bundle = f"{name}_{way if way in OWN else options.methods[0]}"
        if way in OWN and _start(checkpoint, bundle, OWN[way], options).wait():
            rows.append(Row(f"chunk_seconds.{name}_{way}", None, "s", note="the build failed, see above"))
            continue
        bundles[way] = options.output / "bundles" / bundle
    for way, bundle in bundles.items():
        busy = most_memory(Bundle.load(bundle))
        note = "a process with the engine, after a warm-up"
        rows.append(Row(f"run_rss_bytes.{name}_{way}", busy, "B", "<=", RUN, 1, None, note))
        for threads in sorted({1, options.threads}):
            seconds, passes, told = chunk_seconds(Runner.from_bundle(bundle, threads=threads))
            middle, spread = sorted(seconds)[len(seconds) // 2], (min(seconds), max(seconds))
            row = f"chunk_seconds.{name}_{way}" + ("" if threads == options.threads else f"_{threads}_thread")
            rows.append(Row(row, middle, "s", n=len(seconds), interval=spread, note=f"{threads} threads, {told}"))
            if threads == options.threads:
                measured[way] = middle, passes
    if "autoregressive" in bundles:
        first = Bundle.load(bundles["autoregressive"])
        rows += token_rows(first, Shapes(layers=options.layers), options.output, options.threads)
        rows += orin_rows(name, checkpoint, first.directory)
    return rows + plan_rows(name, checkpoint, bundles, measured)


def flow_rows(name: str, options) -> list[Row]:
    """Chunk latencies of a flow policy."""
    from benchmarks.large_chunks import chunk_rows
    from benchmarks import pi0_shapes
    from benchmarks.smolvla_shapes import write_smolvla

    directory = options.output / name / "checkpoint"
    if name == "pi0":
        checkpoint = pi0_shapes.write_pi0(directory, pi0_shapes.Shapes(cameras=1))
    else:
        checkpoint = write_smolvla(directory, 1)
    return chunk_rows(name, checkpoint, options.output / "bundles", options.backend, options.threads, MEMORY / 1e6)


def kill_row(name: str, checkpoint: Path, options) -> Row:
    """How many kills at random moments a build survives without a byte of difference."""
    method, chance = options.methods[0], random.Random(0)
    whole = options.output / "bundles" / f"{name}_{method}"
    if not (whole / "manifest.yaml").is_file() and _start(checkpoint, f"{name}_{method}", method, options).wait():
        return Row("resume_kills_ok", None, "", ">=", options.kills, 0, None, "the build that is not killed failed")
    seconds = options.kill_after * 60
    for number in range(options.kills):
        process = _start(checkpoint, f"{name}_killed", method, options)
        try:
            process.wait(chance.uniform(0.1, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            continue
        break  # it was done before: kills so far are those that count
    else:
        number = options.kills
    failed = _start(checkpoint, f"{name}_killed", method, options).wait()
    killed = options.output / "bundles" / f"{name}_killed"
    same = not failed and _files(whole) == _files(killed)
    shutil.rmtree(killed, ignore_errors=True)
    note = f"{name}: killed and resumed, compared with the build that was not" if same else "the bundles differ"
    return Row("resume_kills_ok", number if same else 0, "", ">=", options.kills, options.kills, None, note)


def _files(bundle: Path) -> dict:
    from vla_edge.engine.bundle import Bundle

    return dict(Bundle.load(bundle).manifest["files"])


def _start(checkpoint: Path, name: str, method: str, options) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "benchmarks.large", "--build", str(checkpoint), name, method, "--output", str(options.output),
        "--tokens", str(options.tokens), "--threads", str(options.threads), "--backend", options.backend,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _build(options) -> int:
    """One build in this process; prints its figures."""
    import torch

    from benchmarks.smolvla_shapes import observations
    from vla_edge.compress.calibrate import collect
    from vla_edge.compress.recipe import parse_recipe
    from vla_edge.engine.build import build
    from vla_edge.engine.piecewise import Piecewise
    from vla_edge.policy.checkpoint import load_checkpoint
    from vla_edge.progress import Bar

    checkpoint, name, method = options.build
    torch.set_num_threads(options.threads)
    loaded = load_checkpoint(checkpoint)
    how, *others = method.split(", ")
    language = {"targets": ["prefill.layers"], "weights": "int4", "group_size": 128, "method": how}
    rest = {"targets": ["vision", "prefill.head"], "weights": "int8"}
    steps = [*({step: STEPS.get(step, {})} for step in others), {"quantize": language}, {"quantize": rest}]
    recipe = parse_recipe({"name": f"int4-{how}", "steps": steps})
    prompt = loaded.spec.tokenizer_max_length + (loaded.spec.cameras[0].height // 14) ** 2
    frames, held_out = -(-options.tokens // prompt), Piecewise(loaded, recipe, MEMORY, options.output).frames["held_out"]
    shown = observations(loaded.spec, 2 * (frames + held_out))
    data = collect(shown, "random observations", frames=frames, held_out=held_out)
    target = options.output / "bundles" / name
    path = build(checkpoint, recipe, options.backend, target, data, Bar(), build_memory_mb=MEMORY / 1e6)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = len(data.observations) * prompt
    print(json.dumps({"bundle": str(path), "peak": peak, "tokens": tokens, "threads": options.threads}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=Shapes().layers, help="of the language model")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=["rtn", "awq", "gptq", "awq+gptq"])
    parser.add_argument("--no-build", dest="builds", action="store_false", help="take the engines that are there")
    parser.add_argument("--decodings", nargs="+", default=list(DECODINGS), choices=DECODINGS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="to calibrate on, at least")
    parser.add_argument("--flow", nargs="*", default=["smolvla450", "pi0"], choices=["smolvla450", "pi0"])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--kill-after", type=float, default=1.0, help="minutes, at most")
    parser.add_argument("--kill-layers", type=int, default=2, help="of the policy whose build is killed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--no-run", dest="run", action="store_false", help="leave the engines' memory and speed out")
    parser.add_argument("--output", type=Path, default=DIRECTORY)
    parser.add_argument("--build", nargs=3, metavar=("CHECKPOINT", "NAME", "METHOD"), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
