"""The steps a recipe can have: what each is about, and which values it takes.

`check` raises ValueError; which step of which recipe it was is for `recipe` to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vla_edge.compress.quantize.formats import NAMES as FORMATS
from vla_edge.compress.quantize.ranges import CALIBRATORS
from vla_edge.engine.drafting import MOST_CHUNKS

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
        _one_of("dtype", self.dtype, FLOATS)


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
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if self.alpha != "auto" and not (number and 0 <= self.alpha <= 1):
            raise ValueError(f"alpha is {self.alpha!r}, allowed is 0 to 1, or auto")
        _one_of("at_run_time", self.at_run_time, (True, False), booleans=True)


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
        _one_of("method", self.method, PRUNERS)
        _one_of("pattern", self.pattern, PATTERNS)
        _number("sparsity", self.sparsity, 0, 1, "above 0, below 1")
        if self.sparsity == 1 or self.pattern == "2:4" and self.sparsity != 0.5:
            raise ValueError(f"sparsity is {self.sparsity!r}, allowed is above 0, below 1, and 0.5 for 2:4")
        _number("damping", self.damping, 0, 1, "above 0, to 1")

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
        _one_of("method", self.method, DECOMPOSITIONS)
        if (self.energy is None) == (self.rank is None):
            raise ValueError("one of energy and rank must be given")
        if self.energy is not None:
            _number("energy", self.energy, 0, 1, "above 0, to 1")
        elif self.rank != "vbmf":
            _whole("rank", self.rank, ", or vbmf for tucker" * self.factors_convolutions)
        elif self.method != "tucker":
            raise ValueError("rank vbmf goes with method tucker")
        _one_of("dtype", self.dtype, ("float32", "float16"))
        _one_of("separate", self.separate, (None, "smaller", "faster"))
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
        _one_of("weights", self.weights, FORMATS)
        if self.reduce_range not in (True, False, "auto"):
            raise ValueError(f"reduce_range is {self.reduce_range!r}, allowed is true, false, auto")
        if self.reduce_range and (self.weights != "int8" or self.activations is None):
            raise ValueError("reduce_range goes with int8 weights and 8-bit activations")
        _one_of("activations", self.activations, ACTIVATIONS)
        if self.activations == "int4-dynamic" and (self.weights != "int4" or self.group_size in (None, CHANNEL)):
            raise ValueError("activations int4-dynamic go with weights int4 in groups, whose size they share")
        _one_of("method", self.method, METHODS)
        _one_of("importance", self.importance, (None, "action"))
        if self.importance and not self.needs_products:
            raise ValueError(f"importance {self.importance} goes with methods that look at data: awq, gptq, awq+gptq")
        _one_of("provider", self.provider, PROVIDERS)
        _one_of("calibrator", self.calibrator, CALIBRATORS)
        if self.group_size is not None and self.group_size != CHANNEL:
            _whole("group_size", self.group_size, ", channel or null")
        if self.weights == "int4" and self.group_size is None:
            raise ValueError("weights int4 need a group_size (32, 64, 128, or channel for one scale per output)")
        if self.weights in ("fp8", "nvfp4") and self.group_size is not None:
            raise ValueError(f"weights {self.weights} have their own groups; leave group_size out")
        _whole("low_rank", self.low_rank, ", or 0", least=0)
        if not isinstance(self.percentile, (int, float)) or not 50 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile!r}, allowed is 50 to 100")
        _number("damping", self.damping, 0, 1, "above 0, to 1")
        for name in ("activation_order", "correct_bias", "at_run_time"):
            _one_of(name, getattr(self, name), (True, False), booleans=True)

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


@dataclass(frozen=True)
class Shrink:
    """Take channels of feed-forwards, heads of attentions and whole layers out of the policy, those missed least.

    Attributes:
        targets: which parts; a block is made smaller, or goes, where they cover all of its layers.
        channels, heads: share of each block's that goes, 0 to below 1; at least one always stays.
        blocks: how many layers go as a whole, or which share of them; first, before channels and heads.
        by: what tells which layers are missed least, see `prune.blocks`: "action" for the error of the chunk without
            them, "cosine" for how little they change what goes through them.
    """

    key: ClassVar[str] = "shrink"
    needs_statistics: ClassVar[bool] = True
    changes_policy: ClassVar[bool] = True
    targets: tuple[str, ...]
    channels: float = 0.0
    heads: float = 0.0
    blocks: int | float = 0
    by: str = "action"

    def check(self) -> None:
        if isinstance(self.blocks, float):
            _number("blocks", self.blocks, 0, 1 - 1e-12, "a whole number, or a share above 0, below 1")
        else:
            _whole("blocks", self.blocks, ", 0, or a share above 0, below 1", least=0)
        _one_of("by", self.by, ("action", "cosine"))
        for name in ("channels", "heads"):
            _number(name, getattr(self, name), -1e-12, 1, "0 to below 1")
            if getattr(self, name) == 1:
                raise ValueError(f"{name} is 1, allowed is 0 to below 1")
        if self.channels == self.heads == self.blocks == 0:
            raise ValueError("channels, heads and blocks are all 0; give one of them")


@dataclass(frozen=True)
class Finetune:
    """Train the policy to do what it did before the steps so far, under what they decided: weights that were pruned
    stay zero, weights that are quantized are trained through their rounding.

    Attributes:
        steps: of the optimizer. batch: frames each. rate: at its peak. seed: of the order of frames, and of noise.
        features, attention: weight of the teacher's keys and values, and of where its text layers look. shown: of the
            actions that demonstrations show, beside those of the teacher.
        temperature: that scores of tokens are divided by, for policies that write their actions as tokens; 1 when None.
        demonstrations: directories to train on; what the build is given, or else the recording it calibrates on.
    """

    key: ClassVar[str] = "finetune"
    needs_statistics: ClassVar[bool] = True
    changes_policy: ClassVar[bool] = True
    steps: int = 300
    batch: int = 32
    rate: float = 3e-4
    features: float = 0.1
    attention: float = 0.0
    shown: float = 0.0
    temperature: float | None = None
    seed: int = 0
    demonstrations: tuple[str, ...] = ()

    def check(self) -> None:
        _training(self)
        for name in ("features", "attention", "shown"):
            _number(name, getattr(self, name), -1e-12, 1e6, "0 or above")
        if self.temperature is not None:
            _number("temperature", self.temperature, 0, 100, "above 0, to 100")


@dataclass(frozen=True)
class FewSteps:
    """Train the action expert to reach in few flow steps where the policy's own many lead.

    Attributes:
        num_steps: flow steps afterwards; divides those of the checkpoint.
        steps, batch, rate, seed, demonstrations: as of `finetune`.
    """

    key: ClassVar[str] = "few_steps"
    needs_statistics: ClassVar[bool] = True
    changes_policy: ClassVar[bool] = True
    num_steps: int = 2
    steps: int = 400
    batch: int = 64
    rate: float = 3e-4
    seed: int = 0
    demonstrations: tuple[str, ...] = ()

    def check(self) -> None:
        _training(self)
        _whole("num_steps", self.num_steps)


@dataclass(frozen=True)
class FlowSteps:
    """Go from noise to actions in another number of flow steps, or ask the network in some of them alone, with the policy
    as it is; see `flow_steps`.

    Attributes:
        num_steps: Euler steps, of equal length; the checkpoint's own when None.
        evaluations: so many of them ask the network, those that change the actions least; all when None.
    """

    key: ClassVar[str] = "flow_steps"
    changes_policy: ClassVar[bool] = False
    num_steps: int | None = None
    evaluations: int | None = None

    @property
    def needs_statistics(self) -> bool:
        return self.evaluations is not None

    @property
    def calls(self) -> int:
        """How often the network is asked."""
        return self.evaluations or self.num_steps

    def check(self) -> None:
        if self.num_steps is None and self.evaluations is None:
            raise ValueError("num_steps and evaluations are both left out; give one or both")
        for name in ("num_steps", "evaluations"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name))


@dataclass(frozen=True)
class VisionCacheStep:
    """Use the tokens of a camera's picture again while hardly anything in it changes, see `engine.vision_cache`.

    Attributes:
        change: mean absolute difference, 0 to 1, of the block of the picture that differs most, up to which they hold.
    """

    key: ClassVar[str] = "vision_cache"
    needs_statistics: ClassVar[bool] = False
    changes_policy: ClassVar[bool] = False
    change: float = 0.15

    def check(self) -> None:
        _number("change", self.change, 0, 1, "above 0, to 1")


@dataclass(frozen=True)
class FixedPoint:
    """Decode all tokens of a chunk together, from a guess until they stand, see `engine.token_loop`.

    Attributes:
        most_passes: after which tokens are taken as they are, which bounds the time and may change the chunk; None for as
            many as it takes, with the chunk of decoding one by one.
    """

    key: ClassVar[str] = "fixed_point"
    needs_statistics: ClassVar[bool] = False
    changes_policy: ClassVar[bool] = True
    most_passes: int | None = None

    def check(self) -> None:
        if self.most_passes is not None:
            _whole("most_passes", self.most_passes)


@dataclass(frozen=True)
class Speculate:
    """Verify tokens that a draft proposes, several in a pass, see `engine.token_loop`: the chunk of decoding one by one, in
    fewer passes where the draft is right.

    Attributes:
        draft: "trained" for the checkpoint's own, "history" for tokens of earlier chunks, "none" to decode one by one although
            the checkpoint has a draft, "auto" for the trained one where there is one.
        tokens: that are proposed at a time; 4, or as many as can be, when None.
        chunks: that "history" remembers.
        tolerance: bins by which a proposed token may differ from the likeliest and still stand, of 256; above 0 it may change
            the chunk (relaxed acceptance; Spec-VLA, Wang et al., 2025, arXiv:2507.22424).
    """

    key: ClassVar[str] = "speculate"
    needs_statistics: ClassVar[bool] = False
    changes_policy: ClassVar[bool] = True
    draft: str = "auto"
    tokens: int | None = None
    chunks: int = 8
    tolerance: int = 0

    def check(self) -> None:
        _one_of("draft", self.draft, ("auto", "trained", "history", "none"))
        if self.tokens is not None:
            _whole("tokens", self.tokens)
        _whole("chunks", self.chunks)
        if self.chunks > MOST_CHUNKS:
            raise ValueError(f"chunks is {self.chunks}, allowed is 1 to {MOST_CHUNKS}")
        if isinstance(self.tolerance, bool) or not isinstance(self.tolerance, int) or not 0 <= self.tolerance < 256:
            raise ValueError(f"tolerance is {self.tolerance!r}, allowed is a whole number of bins, 0 to 255")


@dataclass(frozen=True)
class PrefillBlocks:
    """Read the prompt a block of places at a time, so that what lies between layers is no longer than a block; blocks before
    the first change since the last observation are not read again. See `policy.openvla_tokens.BlockPrefill`.

    Attributes:
        size: places of a block; a shorter prompt is one block.
    """

    key: ClassVar[str] = "prefill_blocks"
    needs_statistics: ClassVar[bool] = False
    changes_policy: ClassVar[bool] = True
    size: int = 64

    def check(self) -> None:
        _whole("size", self.size)


@dataclass(frozen=True)
class PruneTokens:
    """Go on with the image tokens that matter, after the first text layers; what follows gets shorter, and so does the
    cache that each flow step reads. Which they are is decided anew for each observation, see `prune.tokens`.

    Attributes:
        keep: share of the image tokens of all cameras together that stay, above 0, below 1.
        after: text layers that see all of them.
    """

    key: ClassVar[str] = "prune_tokens"
    needs_statistics: ClassVar[bool] = True
    changes_policy: ClassVar[bool] = True
    keep: float = 0.5
    after: int = 2

    def check(self) -> None:
        _number("keep", self.keep, 0, 1, "above 0, below 1")
        if self.keep == 1:
            raise ValueError("keep is 1, allowed is above 0, below 1; all tokens stay without this step")
        _whole("after", self.after)

    def kept(self, tokens: int) -> int:
        """Of so many image tokens, how many stay."""
        return round(self.keep * tokens)


@dataclass(frozen=True)
class KVCache:
    """Hand the prefix's keys and values to the flow steps in few bits, see `quantize.kv_cache`.

    Attributes:
        bits: 8 or 4.
        values: "token" for a grid of each token's values, "channel" for one of each channel, as keys have.
        salient: share of the tokens, those that are looked at most, that keep 8 bits where the others get 4.
    """

    key: ClassVar[str] = "kv_cache"
    needs_statistics: ClassVar[bool] = False
    changes_policy: ClassVar[bool] = True
    bits: int = 8
    values: str = "token"
    salient: float = 0.0

    def check(self) -> None:
        _one_of("bits", self.bits, (8, 4))
        _one_of("values", self.values, ("token", "channel"))
        _number("salient", self.salient, -1e-12, 1, "0 to below 1")
        if self.salient == 1 or self.salient and self.bits == 8:
            raise ValueError(f"salient is {self.salient!r}, allowed is 0 to below 1, and 0 where all tokens get 8 bits")

    def salient_tokens(self, tokens: int) -> int:
        """Of so many tokens, how many keep 8 bits."""
        return round(self.salient * tokens)


def factors_convolutions(step) -> bool:
    """Whether a step puts factors in the place of convolutions."""
    return isinstance(step, LowRankStep) and step.factors_convolutions


STEPS = {
    step.key: step
    for step in (
        Keep, Smooth, Prune, LowRankStep, Quantize, Shrink, PruneTokens, FlowSteps, VisionCacheStep, FixedPoint, Speculate,
        PrefillBlocks, Finetune, FewSteps, KVCache,
    )  # fmt: skip
}
Decoding = FixedPoint | Speculate | PrefillBlocks
"""What says how a prompt is read and tokens are written."""
Storage = Keep | LowRankStep | Quantize
"""What says how a layer is stored; the other steps prepare it."""
Training = Finetune | FewSteps


def _training(step) -> None:
    for name in ("steps", "batch"):
        _whole(name, getattr(step, name))
    _number("rate", step.rate, 0, 1, "above 0, to 1")
    _whole("seed", step.seed, ", or 0", least=0)


def _one_of(name: str, value, allowed: Sequence, booleans: bool = False) -> None:
    if value not in allowed or isinstance(value, bool) is not booleans:
        words = ", ".join("null" if item is None else str(item) for item in allowed)
        raise ValueError(f"{name} is {value!r}, allowed is {words}")


def _number(name: str, value, low: float, high: float, words: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
        raise ValueError(f"{name} is {value!r}, allowed is {words}")


def _whole(name: str, value, more: str = "", least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, allowed is a positive whole number{more}")
