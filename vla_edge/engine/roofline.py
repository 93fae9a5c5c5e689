"""How fast this computer can read memory and multiply, measured in seconds, not taken from a data sheet."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# more than the last-level caches of robots' computers
READ_BYTES = 192 * 2**20
SIZE = 768
# the best of these counts: other work on the machine only ever slows a ceiling down
REPEATS = 20


@dataclass(frozen=True)
class Roofline:
    """The two ceilings.

    Attributes:
        bytes_per_s: reading memory with every processor of this process.
        flops_per_s: precision -> operations per second of a large product.
    """

    bytes_per_s: float
    flops_per_s: Mapping[str, float]

    def seconds(self, flops: Mapping[str, float], count: int) -> float:
        """The least time for `flops` by precision and for `count` bytes, when both go on at once."""
        compute = sum(number / self.flops_per_s[precision] for precision, number in flops.items())
        return max(compute, count / self.bytes_per_s)


def measure_roofline(backends: tuple[str, ...] | None = None) -> Roofline:
    """Of this computer, by its fastest installed runtime.

    Args:
        backends: to choose from; those of "auto" when None.

    Raises:
        BackendError: no runtime is installed.
    """
    from vla_edge.engine.backends import AUTO, chosen_backends

    names = chosen_backends(AUTO) if backends is None else backends
    return Roofline(read_speed(), {precision: _multiply(precision, names) for precision in ("float32", "int8")})


def read_speed(threads: int | None = None) -> float:
    """Bytes per second of dot products over arrays larger than the caches, with every processor of this process or with so
    many threads."""
    threads = threads or len(os.sched_getaffinity(0))
    arrays = [np.ones(READ_BYTES // 4 // threads, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        best = min(timed(lambda: list(pool.map(lambda a: np.dot(a, a), arrays))) for _ in range(REPEATS))
    return sum(array.nbytes for array in arrays) / best


def _multiply(precision: str, backends: tuple[str, ...]) -> float:
    """Operations per second of a product of square matrices that is computed as the file says."""
    from vla_edge.engine.backends import get_backend
    from vla_edge.engine.choose import choose
    from vla_edge.engine.product import in_precision, product_file, product_interface

    weight = np.random.default_rng(0).normal(size=(SIZE, SIZE)).astype(np.float32)
    stage = product_interface(SIZE, SIZE, SIZE)
    inputs = {"x": np.random.default_rng(1).uniform(-1, 1, (1, SIZE, SIZE)).astype(np.float32)}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "given.onnx"
        file.write_bytes(product_file(in_precision(weight, precision, 64), SIZE))
        choice = choose(file, directory, stage, backends, inputs, only_exact=True)
        loaded = get_backend(choice.backend).load(Path(directory) / choice.built.file, stage, choice.built.options)
        step = loaded.bind(inputs, {spec.name: spec.zeros() for spec in stage.outputs})
        step()
        best = min(timed(step) for _ in range(REPEATS))
    return 2 * SIZE**3 / best


def timed(call) -> float:
    """Seconds of `call`."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
