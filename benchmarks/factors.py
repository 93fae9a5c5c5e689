"""What factors of convolutions gain in time: those of an ACT's ResNet-18 (random weights, one picture of 480 x 640 px), each
alone and all together, against the convolutions themselves in the same run.

Ranks are those with which factors take a given share of the multiplications; weights do not change how long they take.

Usage: python -m benchmarks.factors [--backend onnxruntime] [--shares 0.5 0.25]
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from bench_file import Row, table, write  # noqa: E402

from vla_edge.compress.factor.kernels import CPFactors, Kernel, TuckerFactors  # noqa: E402
from vla_edge.compress.factor.replace import factorable, module_of, put_factors  # noqa: E402
from vla_edge.compress.steps import Keep  # noqa: E402
from vla_edge.engine.backends import chosen_backends  # noqa: E402
from vla_edge.engine.factor_race import ROUNDS, FactorRace, race_of_stages  # noqa: E402
from vla_edge.policy.act import ACT, ACTConfig  # noqa: E402
from vla_edge.policy.resnet import STAGES  # noqa: E402

HEIGHT, WIDTH = 480, 640
METHODS = ("svd", "tucker", "cp")
PLAIN = Keep(("*",))
# one convolution of each of the four stages, with what reaches it
ALONE = {64: (120, 160), 128: (60, 80), 256: (30, 40), 512: (15, 20)}


def factors(convolution, method: str, share: float):
    """A module of random weights in the place of `convolution`, with that share of its multiplications."""
    inputs, outputs, taps = convolution.inputs, convolution.linear.out_features, math.prod(convolution.kernel)
    weight = convolution.linear.weight.detach().double().numpy()
    kernel = Kernel(weight, convolution.kernel, convolution.stride, np.eye(0))
    rng = np.random.default_rng(0)

    def some(*shape: int) -> np.ndarray:
        return rng.normal(size=shape) / np.sqrt(shape[-1])

    def cost(rank: int) -> int:
        if method == "svd":
            return taps * inputs * rank + rank * outputs
        return kernel.multiplications(method, (rank,) if method == "cp" else (min(rank, inputs), min(rank, outputs)))

    most = share * kernel.multiplications()
    rank = max(1, next(rank for rank in range(1, 10_000) if cost(rank) > most) - 1)
    if method == "cp":
        made = CPFactors(some(rank, inputs), tuple(some(rank, size) for size in convolution.kernel), some(outputs, rank))
    elif method == "svd":
        made = TuckerFactors((inputs, rank), None, some(rank, taps * inputs), some(outputs, rank))
    else:
        made = TuckerFactors((rank, rank), some(rank, inputs), some(rank, taps * rank), some(outputs, rank))
    return rank, module_of(made, convolution, np.zeros(taps * inputs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--shares", type=float, nargs="+", default=(0.5, 0.25))
    options = parser.parse_args()
    backends = chosen_backends(options.backend)
    race, rows = FactorRace(backends), []
    policy = ACT(ACTConfig(
        1, HEIGHT, WIDTH, STAGES["resnet18"], 64, 512, 3200, 8, 4, 1, "relu", False, 14, 14, 100
    )).eval()  # fmt: skip
    there = factorable(policy.stages())

    def told(name: str, value: float, note: str, n: int) -> None:
        rows.append(Row(f"time_ratio.{name}", value, n=n, note=note))
        print(table(rows[-1:]), file=sys.stderr, flush=True)

    for share in options.shares:
        for width, size in ALONE.items():
            layer = next(c for c in there.values() if c.inputs == c.linear.out_features == width)
            for method in METHODS:
                rank, module = factors(layer, method, share)
                value = race(layer, module, size, PLAIN)
                told(f"{method}.{width}x{width}.{share:g}", value, f"rank {rank}, {size[0]} x {size[1]} places", ROUNDS)
        for method in METHODS:
            other = copy.deepcopy(policy)
            for name, layer in factorable(other.stages()).items():
                if layer.inputs > 3:
                    put_factors(other.stages(), name, factors(layer, method, share)[1])
            value = race_of_stages(policy.stages()[0], other.stages()[0], backends)
            told(f"{method}.vision.{share:g}", value, "all convolutions of more than one tap but the first", ROUNDS)
    print(table(rows))
    print(write("factors", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
