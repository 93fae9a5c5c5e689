"""How fast an engine of OpenVLA-7B's shapes decides here: one token beside llama.cpp and beside the speed of memory, and what
the planner says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.bench_file import Row
from benchmarks.ggml_products import ABSENT
from benchmarks.llama_shapes import write_llama
from benchmarks.openvla_shapes import Shapes
from benchmarks.smolvla_shapes import observations

FRACTION, PLAN = 0.8, 0.2
TURNS, PAIRS = 10, 3
REST = 0.5  # seconds; llama.cpp's threads look for more work for a while before they sleep


def chunk_seconds(runner, repeats: int = 3) -> tuple[list[float], float, str]:
    """Of whole inferences of a `Runner`, after one for nothing; mean passes over the tokens of a chunk; and where the last
    one's went."""
    runner.warm_up(1)
    found = [runner.infer(observation).timing for observation in observations(runner.spec, repeats)]
    parts = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in found[-1].stages.items())
    passes = float(np.mean([timing.passes for timing in found]))
    return [timing.total for timing in found], passes, f"{passes:.1f} passes; the last: {parts}"


def token_rows(bundle, shapes: Shapes, directory: Path, threads: int) -> list[Row]:
    """One token of the decode stage, in turns with reading memory and with llama.cpp; and reading the prompt beside it."""
    from vla_edge.engine.race import speedup, take_turns
    from vla_edge.engine.roofline import read_speed, timed
    from vla_edge.engine.runner import Runner

    runner = Runner.from_bundle(bundle.directory, threads=threads)
    layers = bundle.manifest["stages"]["prefill"]["layers"]
    weights = sum(row["bytes"] for layer, row in layers.items() if layer.startswith("layers.") or layer == "head")
    given = dict(runner.stage_inputs(observations(bundle.spec, 1)[0]))  # of each stage, its last call
    ours = {stage: _call(runner.stages[stage], given[stage]) for stage in ("prefill", "decode")}
    theirs = _llama(runner, given["prefill"], shapes, directory, threads)
    calls = {"decode": ours["decode"], "read": None, **({} if theirs is None else {"llama decode": theirs["decode"]})}
    turns = take_turns(
        {label: (lambda _, call=call: read_speed() if call is None else timed(call)) for label, call in calls.items()},
        TURNS,
        rest=REST,
    )
    seconds, speed = float(np.median(turns["decode"])), float(np.median(turns["read"]))
    # what a token cannot do without: all weights, and the keys and values of the prompt
    cache = sum(array.nbytes for name, array in given["decode"].items() if name in ("cache_keys", "cache_values"))
    least = weights + cache
    told = f"{1e3 * seconds:.0f} ms a token, {1 / seconds:.2f} tokens/s, {threads} threads; {weights / 1e9:.2f} GB of weights "
    told += f"and {cache / 1e9:.2f} of keys and values, {least / seconds / 1e9:.1f} of {speed / 1e9:.1f} GB/s"
    rows = [Row("decode_bandwidth_fraction", least / seconds / speed, "", ">=", FRACTION, TURNS, None, told)]
    if theirs is None:
        return [*rows, Row("decode_vs_llama_cpp", None, "", ">=", 1.0, 0, None, ABSENT)]
    value, interval = speedup(np.array(turns["llama decode"]), np.array(turns["decode"]))
    other = 1e3 * float(np.median(turns["llama decode"]))
    told = f"a token: {1e3 * seconds:.0f} ms, Q4_0 of llama.cpp {other:.0f} ms; bootstrap interval"
    rows.append(Row("decode_vs_llama_cpp", value, "", ">=", 1.0, TURNS, interval, told))
    pairs = {"prefill": ours["prefill"], "llama prefill": theirs["prefill"]}
    turns = take_turns({label: lambda _, call=call: timed(call) for label, call in pairs.items()}, PAIRS)
    value, interval = speedup(np.array(turns["llama prefill"]), np.array(turns["prefill"]))
    told = f"the prompt of {_length(given['prefill'])} tokens: " + ", ".join(
        f"{label} {np.median(seconds):.1f} s" for label, seconds in turns.items()
    )
    return [*rows, Row("prefill_vs_llama_cpp", value, "", None, None, PAIRS, interval, told)]


def _call(stage, given):
    """A call of a loaded stage on `given`."""
    inputs = {spec.name: np.ascontiguousarray(given[spec.name]) for spec in stage.interface.inputs}
    return stage.bind(inputs, {spec.name: spec.zeros() for spec in stage.interface.outputs})


def _length(prefill) -> int:
    return prefill["image_tokens"].shape[1] + int(prefill["lang_mask"].sum())


def _llama(runner, prefill, shapes: Shapes, directory: Path, threads: int):
    """ "prefill" and "decode" -> a call of llama.cpp of as many tokens; None where it is not installed."""
    from vla_edge.engine.backends import BackendError, StageInterface, get_backend
    from vla_edge.policy.stages import TensorSpec

    try:
        backend = get_backend("llama_cpp")
    except BackendError:
        return None
    reader, tokens = runner.stages["prefill"].interface, runner.spec.chunk_size * runner.spec.max_action_dim
    prompt = reader.inputs[0].shape[1] + reader.inputs[1].shape[1]
    file = write_llama(directory / f"llama-{shapes.layers}.gguf", shapes, prompt + tokens)
    bins = next(spec.shape[-1] for spec in reader.outputs if spec.name == "scores")
    interface = StageInterface("generate", reader.inputs, (TensorSpec("token_scores", (1, tokens, bins)),))
    stage, scores, length = backend.load(file, interface, {}, threads), np.zeros(bins, np.float32), _length(prefill)
    stage.read(length, scores)
    return {"prefill": lambda: stage.read(length, scores), "decode": lambda: stage.decode(0, length, scores)}


def plan_rows(name: str, checkpoint: Path, bundles: dict[str, Path], measured: dict[str, tuple[float, float]]) -> list[Row]:
    """The planner's chunk on this computer, with the threads that a build takes here, against the measured one.

    Args:
        bundles: way of decoding -> engine. measured: the same -> seconds of a chunk, and passes over its tokens.
    """
    from vla_edge.engine.devices import load_device
    from vla_edge.progress import Bar

    bar = Bar()
    device = load_device("local", True, bar)
    bar.close()
    rows = []
    for decoding, (seconds, passes) in measured.items():
        asked = {"decoding": "autoregressive"}
        if decoding == "fixed-point":
            asked = {"decoding": decoding, "iterations": round(passes)}
        rows.append(plan_row(f"{name}_{decoding}", checkpoint, bundles[decoding], device, seconds, **asked))
    return rows


def plan_row(name: str, checkpoint: Path, bundle: Path, device, seconds: float, **asked) -> Row:
    """The planner's chunk on a device against one that took `seconds`. `asked` is `engine_plan`'s."""
    from vla_edge.engine.engine_plan import engine_plan

    planned = engine_plan(checkpoint, bundle, device, **asked).total_ms / 1e3
    error = planned / seconds - 1
    note = f"{seconds:.2f} s a chunk, predicted {planned:.2f} ({100 * error:+.0f} %)"
    return Row(f"plan_error.{name}", abs(error), "", "<=", PLAN, note=note)


def orin_rows(name: str, checkpoint: Path, bundle: Path) -> list[Row]:
    """Chunks a second that an AGX Orin is planned to reach with the same engine, by every way of decoding."""
    from vla_edge.engine.engine_plan import engine_schemes

    rows = []
    for found in engine_schemes(checkpoint, bundle, "agx-orin-64gb", "tensorrt"):
        way = f"{found.workload.decoding}{'' if found.workload.keep_vision == 1 else '_half_vision'}"
        rate = None if found.plan is None else found.plan.chunk_rate_hz
        note = found.reason or "planned; a policy is trained for parallel decoding, and for fewer tokens of pictures"
        rows.append(Row(f"planned_orin_chunk_hz.{name}_{way}", rate, "Hz", note=note))
    return rows
