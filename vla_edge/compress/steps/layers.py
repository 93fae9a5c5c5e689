"""Steps that say how layers are stored, and that prepare them for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vla_edge.compress.quantize.formats import NAMES as FORMATS
from vla_edge.compress.quantize.ranges import CALIBRATORS
from vla_edge.compress.steps.checks import number, one_of, whole

FLOATS = ("float32", "float16", "bfloat16")
ACTIVATIONS = (None, "int8", "int8-dynamic", "fp8", "int4-dynamic")
PATTERNS = ("unstructured", "2:4")
PROVIDERS = (None, "modelopt", "llmcompressor", "torchao", "nncf", "neural-compressor")
METHODS = ("rtn", "awq", "gptq", "awq+gptq")
PRUNERS = ("magnitude", "wanda", "sparsegpt")
DECOMPOSITIONS = ("svd", "tucker", "cp")
CHANNEL = "channel"


@dataclass(frozen=True)
class Keep:
    """Leave layers in floating point.

    Attributes:
        targets: which layers.
        dtype: "float32", "float16" or "bfloat16"; 16 bits are for storage, products are computed in float32.
    """

    key: ClassVar[str] = "keep"
    needs_statistics: ClassVar[bool] = False
    needs_products: ClassVar[bool] = False
    changes_policy: ClassVar[bool] = False
    targets: tuple[str, ...]
    dtype: str = "float32"

    def check(self) -> None:
        one_of("dtype", self.dtype, FLOATS)


@dataclass(frozen=True)
class Smooth:
    """Move outliers of activations into weights before either is rounded (SmoothQuant).

    Attributes:
        targets: which layers.
        alpha: share that moves, 0 to 1, or "auto" to find each input's own.
        at_run_time: inputs that no norm or layer before can be rescaled for are multiplied when they come, which costs
            a little time; otherwise they stay as they are.
    """

    key: ClassVar[str] = "smooth"
    needs_statistics: ClassVar[bool] = True
    needs_products: ClassVar[bool] = False
    changes_policy: ClassVar[bool] = True
    targets: tuple[str, ...]
    alpha: float | str = "auto"
    at_run_time: bool = False

    def check(self) -> None:
        is_number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if self.alpha != "auto" and not (is_number and 0 <= self.alpha <= 1):
            raise ValueError(f"alpha is {self.alpha!r}, allowed is 0 to 1, or auto")
        one_of("at_run_time", self.at_run_time, (True, False), booleans=True)


@dataclass(frozen=True)
class Prune:
    """Set weights of layers to zero; what else becomes of the layers is for other steps to say.

    Attributes:
        targets: which layers.
        method: "magnitude" (the smallest go), "wanda" (those that move the output least) or "sparsegpt" (which also
            lets the weights that stay make up for those that go).
        pattern: "unstructured", or "2:4": two of every four neighbouring inputs stay.
        sparsity: share that goes; half of them in 2:4.
        damping: of sparsegpt.
    """

    key: ClassVar[str] = "prune"
    changes_policy: ClassVar[bool] = True
    targets: tuple[str, ...]
    method: str = "wanda"
    pattern: str = "unstructured"
    sparsity: float = 0.5
    damping: float = 0.01

    def check(self) -> None:
        one_of("method", self.method, PRUNERS)
        one_of("pattern", self.pattern, PATTERNS)
        number("sparsity", self.sparsity, 0, 1, "above 0, below 1")
        if self.sparsity == 1 or self.pattern == "2:4" and self.sparsity != 0.5:
            raise ValueError(f"sparsity is {self.sparsity!r}, allowed is above 0, below 1, and 0.5 for 2:4")
        number("damping", self.damping, 0, 1, "above 0, to 1")

    @property
    def needs_statistics(self) -> bool:
        return self.method != "magnitude"

    @property
    def needs_products(self) -> bool:
        return self.method == "sparsegpt"


@dataclass(frozen=True)
class LowRankStep:
    """Put two thin products in the place of layers, or thinner convolutions in the place of convolutions, where that pays;
    other layers stay whole.

    Attributes:
        targets: which layers.
        energy: share of the output's energy over the data to keep, above 0, to 1 (of convolutions that about the mean, as
            a bias mends the mean); one of energy and rank is given.
        rank: of the factors, of tucker on both sides at most; for tucker also "vbmf", see `factor.vbmf`.
        method: "svd", of the matrix that any layer is; of the convolutions among the targets that have more than one
            tap, "tucker" (one tap, all taps, one tap; see `factor.tucker`) or "cp" (one tap, each dimension's taps for
            every channel by itself, one tap; see `factor.cp`). Factors of convolutions are layers like others: later
            steps train, prune and round them.
        dtype: the factors of matrices are stored in: "float32" or "float16".
        separate: where factors take the layer's place: "smaller", where they are fewer numbers, or "faster", where they
            were measured to be on the machine of the build (where the engine's device is not there: where they are
            fewer multiplications). By default "smaller" for svd, "faster" otherwise; svd with "faster" is of
            convolutions alone (all taps, one tap), as the other methods are.
    """

    key: ClassVar[str] = "lowrank"
    needs_statistics: ClassVar[bool] = True
    needs_products: ClassVar[bool] = True
    changes_policy: ClassVar[bool] = True
    targets: tuple[str, ...]
    energy: float | None = None
    rank: int | str | None = None
    method: str = "svd"
    dtype: str = "float32"
    separate: str | None = None

    @property
    def factors_convolutions(self) -> bool:
        """Whether it changes the policy's shapes, rather than how its layers are stored."""
        return self.method != "svd" or self.separate == "faster"

    @property
    def separate_where(self) -> str:
        return self.separate or ("faster" if self.factors_convolutions else "smaller")

    def check(self) -> None:
        one_of("method", self.method, DECOMPOSITIONS)
        if (self.energy is None) == (self.rank is None):
            raise ValueError("one of energy and rank must be given")
        if self.energy is not None:
            number("energy", self.energy, 0, 1, "above 0, to 1")
        elif self.rank != "vbmf":
            whole("rank", self.rank, ", or vbmf for tucker" * self.factors_convolutions)
        elif self.method != "tucker":
            raise ValueError("rank vbmf goes with method tucker")
        one_of("dtype", self.dtype, ("float32", "float16"))
        one_of("separate", self.separate, (None, "smaller", "faster"))
        if self.factors_convolutions and self.dtype != "float32":
            raise ValueError("dtype is that of matrices' factors; a keep step stores those of convolutions in 16 bits")


@dataclass(frozen=True)
class Quantize:
    """Round the weights of layers to a coarser grid, and their inputs too if wanted.

    Attributes:
        targets: which layers.
        weights: "int8" and "fp8" (one scale per output channel), "int4" (one per group), "nvfp4" (groups of 16,
            with FP8 scales and one more for the whole).
        activations: None for float32; "int8" or "fp8" for a grid fixed by calibration; "int8-dynamic" for one found at
            run time, "int4-dynamic" for one of each group of channels.
        method: how the values are chosen: "rtn" (nearest), "awq" (channels scaled and groups clipped first), "gptq"
            (errors made up for by weights not yet rounded).
            "awq+gptq": the scales and clipping of awq, the values of gptq.
        importance: None to fit what reaches a layer all alike; "action" to fit each vector by how far it moves the
            action chunk, see `importance`.
        provider: library whose algorithm is run in the place of ours; see `providers`.
        at_run_time: as of `smooth`, for the scales of awq.
        low_rank: channels of a float16 branch that takes over what rounds worst (SVDQuant); 0 for none.
        damping, activation_order: of gptq, see `quantize.gptq`.
        correct_bias: add to the bias what rounding the weights takes from the layer's mean output.
        group_size: inputs per scale of int8 and int4, or "channel" for all; where it does not divide a layer's inputs a
            smaller one is taken.
        calibrator, percentile: how the grid of static activations is chosen.
        reduce_range: int8 weights use 7 bits, which is exact and about 15 % faster on x86-64 without VNNI and costs
            accuracy everywhere; "auto" does so where the machine of the build gains by it.
    """

    key: ClassVar[str] = "quantize"
    targets: tuple[str, ...]
    weights: str = "int8"
    activations: str | None = None
    method: str = "rtn"
    importance: str | None = None
    group_size: int | str | None = None
    provider: str | None = None
    at_run_time: bool = False
    low_rank: int = 0
    calibrator: str = "minmax"
    percentile: float = 99.99
    reduce_range: bool | str = False
    damping: float = 0.01
    activation_order: bool = True
    correct_bias: bool = False

    def check(self) -> None:
        one_of("weights", self.weights, FORMATS)
        if self.reduce_range not in (True, False, "auto"):
            raise ValueError(f"reduce_range is {self.reduce_range!r}, allowed is true, false, auto")
        if self.reduce_range and (self.weights != "int8" or self.activations is None):
            raise ValueError("reduce_range goes with int8 weights and 8-bit activations")
        one_of("activations", self.activations, ACTIVATIONS)
        if self.activations == "int4-dynamic" and (self.weights != "int4" or self.group_size in (None, CHANNEL)):
            raise ValueError("activations int4-dynamic go with weights int4 in groups, whose size they share")
        one_of("method", self.method, METHODS)
        one_of("importance", self.importance, (None, "action"))
        if self.importance and not self.needs_products:
            raise ValueError(f"importance {self.importance} goes with methods that look at data: awq, gptq, awq+gptq")
        one_of("provider", self.provider, PROVIDERS)
        one_of("calibrator", self.calibrator, CALIBRATORS)
        if self.group_size is not None and self.group_size != CHANNEL:
            whole("group_size", self.group_size, ", channel or null")
        if self.weights == "int4" and self.group_size is None:
            raise ValueError("weights int4 need a group_size (32, 64, 128, or channel for one scale per output)")
        if self.weights in ("fp8", "nvfp4") and self.group_size is not None:
            raise ValueError(f"weights {self.weights} have their own groups; leave group_size out")
        whole("low_rank", self.low_rank, ", or 0", least=0)
        if not isinstance(self.percentile, (int, float)) or not 50 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile!r}, allowed is 50 to 100")
        number("damping", self.damping, 0, 1, "above 0, to 1")
        for name in ("activation_order", "correct_bias", "at_run_time"):
            one_of(name, getattr(self, name), (True, False), booleans=True)

    @property
    def needs_statistics(self) -> bool:
        """Whether the weights are chosen by what reaches them."""
        return self.needs_products or self.correct_bias or self.provider is not None

    @property
    def needs_products(self) -> bool:
        """Whether it asks for products of channels, see `statistics.InputStatistics`."""
        return self.method != "rtn" or self.low_rank > 0

    @property
    def compares_only(self) -> bool:
        """Whether products of channels are only asked which of two errors is larger, and no equations are solved."""
        return self.method in ("rtn", "awq") and not self.low_rank

    @property
    def changes_policy(self) -> bool:
        return self.scales_channels

    @property
    def scales_channels(self) -> bool:
        """Whether the scales of awq are searched for."""
        return self.method in ("awq", "awq+gptq")

    @property
    def static_activations(self) -> bool:
        """Whether inputs are rounded to a grid that calibration fixes."""
        return self.activations in ("int8", "fp8")


def factors_convolutions(step) -> bool:
    """Whether a step puts factors in the place of convolutions."""
    return isinstance(step, LowRankStep) and step.factors_convolutions
