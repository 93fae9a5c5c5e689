"""Single-row products with the 4-bit weights of a 7B model, which have to come from memory: against the speed at which this
computer reads, and against llama.cpp's own library.

    "$(tools/peer_environment.sh llama_cpp)" benchmarks/decode.py      these rows alone, with llama.cpp beside

Everything is timed in turn in one process, so that only ratios of one run count.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_file import Row, table  # noqa: E402
from ggml_products import ABSENT, GgmlChain, library  # noqa: E402

# weights of a 7B model's feed-forward layers, more of them than the last-level cache holds
LAYERS, SHAPES, WIDTH = 8, ((11008, 4096), (4096, 11008)), 4096
# inputs that share a scale: as recipes have it, and as llama.cpp's Q4_0 has it
GROUP, GGML_GROUP = 128, 32
# between two runtimes that both round inputs to 8 bits; with other weights it would be 1.4
MOST_RELATIVE_L2 = 0.05


def decode_rows(rounds: int, threads: int) -> list[Row]:
    """The share of the reading speed, and the speed over llama.cpp's with our usual groups and with its own weights."""
    from vla_edge.engine.race import take_turns
    from vla_edge.engine.roofline import read_speed, timed

    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 1, WIDTH)).astype(np.float32)
    ggml = library()
    with tempfile.TemporaryDirectory() as directory:
        usual, told, weights = _ours(_layers(GROUP), x, Path(directory) / "usual", threads)
        calls = {"usual": usual, "read": None}
        if ggml is not None:
            same = _layers(GGML_GROUP)
            calls["same"], told_same, _ = _ours(same, x, Path(directory) / "same", threads)
            for number in sorted({1, threads}):
                chain = GgmlChain(ggml, [layer.weight for layer in same], number)
                _hold(chain(x[0, 0]), calls["same"]())
                calls[f"llama.cpp {number}"] = lambda chain=chain: chain(x[0, 0])
        turns = take_turns(
            {name: (lambda _, call=call: read_speed() if call is None else timed(call)) for name, call in calls.items()},
            rounds,
        )
    # in each round by itself: on a shared machine the memory's speed changes from one moment to the next
    share = float(np.median(weights / np.array(turns["usual"]) / np.array(turns["read"])))
    seconds, speed = float(np.median(turns["usual"])), float(np.median(turns["read"]))
    note = f"{LAYERS} layers in groups of {GROUP}, {told}, medians {weights / seconds / 1e9:.1f} and {speed / 1e9:.1f} GB/s"
    rows = [Row("int4_decode_bandwidth_fraction", share, "", ">=", 0.8, rounds, None, note)]
    if ggml is None:
        return [*rows, Row("int4_decode_vs_llama_cpp", None, "", ">=", 1.0, 0, None, ABSENT)]
    ours = {"int4_decode_vs_llama_cpp": "usual", "int4_decode_vs_llama_cpp.same_weights": "same"}
    return rows + [_against(name, key, turns, chain, rounds, told_same if key == "same" else told) for name, key in ours.items()]


def _against(name: str, key: str, turns, chain: GgmlChain, rounds: int, told: str) -> Row:
    from vla_edge.engine.race import speedup

    theirs = min((label for label in turns if label.startswith("llama")), key=lambda label: np.median(turns[label]))
    value, interval = speedup(np.array(turns[theirs]), np.array(turns[key]))
    note = (
        f"{1e3 * np.median(turns[key]):.1f} ms ({told}); Q4_0 {1e3 * np.median(turns[theirs]):.1f} ms on the better of its "
        f"numbers of threads ({theirs.rpartition(' ')[2]}), {chain.nbytes / 1e6:.0f} MB in {chain.kind}; bootstrap interval"
    )
    return Row(name, value, "", ">=", 1.0, rounds, interval, note)


def _layers(group: int) -> list:
    from vla_edge.engine.product import in_precision

    rng = np.random.default_rng(0)
    shapes = [SHAPES[index % 2] for index in range(LAYERS)]
    return [in_precision(rng.normal(0, s[1] ** -0.5, s).astype(np.float32), "int4 weights", group) for s in shapes]


def _ours(layers, x: np.ndarray, directory: Path, threads: int):
    """A call of the fastest way that a build finds, what it is, and the bytes of the weights.

    A build leaves a processor to the controller where all of them save little; here the fastest is what counts, as it
    does of llama.cpp's numbers of threads.
    """
    from vla_edge.engine.backends import AUTO, chosen_backends, get_backend
    from vla_edge.engine.choose import choose, label
    from vla_edge.engine.product import chain_file, product_interface

    directory.mkdir()
    stage = product_interface(1, WIDTH, WIDTH)
    file = directory / "given.onnx"
    file.write_bytes(chain_file(layers, 1))
    choice = choose(file, directory, stage, chosen_backends(AUTO), {"x": x})
    backend, options = choice.backend, dict(choice.built.options)
    ways = {label(backend, {**options, "threads": number}): number for number in (1, threads)}
    options["threads"] = ways[min(ways, key=lambda way: choice.tried.get(way, np.inf))]
    loaded = get_backend(backend).load(directory / choice.built.file, stage, options)
    outputs = {spec.name: spec.zeros() for spec in stage.outputs}
    step = loaded.bind({"x": x}, outputs)

    def call() -> np.ndarray:
        step()
        return outputs["y"][0, 0]

    told = f"{label(backend, options)}; tried {dict(choice.tried)}, refused {list(choice.refused)}"
    return call, told, sum(layer.nbytes for layer in layers)


def _hold(found: np.ndarray, expected: np.ndarray) -> None:
    """Both compute the same products, or their times say nothing."""
    distance = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not distance <= MOST_RELATIVE_L2:
        raise SystemExit(f"ggml computes something else: relative L2 {distance:.3g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(table(decode_rows(options.rounds, options.threads)))
