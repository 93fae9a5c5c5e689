"""SmolVLA (Shukor et al., 2025, arXiv:2506.01844): SigLIP vision, a small language model's prefix, a flow-matching
action expert that alternates self-attention over prefix and actions with cross-attention to the prefix.

Sizes come from the checkpoint, so the 450M original and a small policy are the same code. The policy is built of its
stages, and what the original recomputes at every flow step although it depends on the observation alone (the expert's
cross-attention keys and values, rotary tables) or on time alone lives in the prefix and time stages. test/parity holds
the result to LeRobot's own. Parameter names of LeRobot's files are mapped in `smolvla_names`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_edge.policy.blocks import (
    MASKED,
    Block,
    DecoderLayer,
    Fold,
    KeyValue,
    QueryLayer,
    RMSNorm,
    SeeingTower,
    Skipped,
    Units,
    VisionTransformer,
    attend,
    attention_columns,
    causal_bias,
    padding_bias,
    pixel_shuffle,
    rotary,
    rotate,
    sinusoid,
)
from vla_edge.policy.chain import Chain, numbered
from vla_edge.policy.narrow import Narrowing, taken
from vla_edge.policy.stages import Stage, TensorSpec


@dataclass(frozen=True)
class SmolVLAConfig:
    """Shapes of a SmolVLA, read from LeRobot's config.json and the backbone's.

    Attributes:
        image_size, patch_size: px; scale_factor: pixel-shuffle factor.
        expert_every: an expert layer stands beside every n-th text layer.
        self_attention_every: expert layers whose index is a multiple of it self-attend, the others cross-attend.
        cross_attention: False makes every expert layer self-attend.
        image_start_ids, image_end_ids: special tokens around each image, empty when unused.
        trained_prefix: as in `PolicySpec`; above 0 every action token has a flow time of its own.
    """

    cameras: int
    image_size: int
    patch_size: int
    scale_factor: int
    vision_width: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_eps: float
    vocabulary: int
    text_width: int
    text_hidden: int
    text_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    text_eps: float
    expert_width: int
    expert_hidden: int
    expert_every: int
    self_attention_every: int
    cross_attention: bool
    chunk_size: int
    max_state_dim: int
    max_action_dim: int
    language_length: int
    min_period: float
    max_period: float
    image_start_ids: tuple[int, ...] = ()
    image_end_ids: tuple[int, ...] = ()
    trained_prefix: int = 0

    @property
    def image_tokens(self) -> int:
        """Tokens of one camera after pixel shuffle."""
        return (self.image_size // self.patch_size // self.scale_factor) ** 2

    @property
    def prefix_length(self) -> int:
        """P: images with their markers, instruction, state."""
        per_camera = self.image_tokens + len(self.image_start_ids) + len(self.image_end_ids)
        return self.cameras * per_camera + self.language_length + 1

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Indices of the text layers that have an expert layer beside them."""
        return tuple(range(0, self.text_layers, self.expert_every))

    def is_cross(self, layer: int) -> bool:
        """Whether the expert layer beside text layer `layer` cross-attends."""
        every = self.self_attention_every
        return self.cross_attention and not (every > 0 and layer % every == 0)


class PrefixCache(NamedTuple):
    """What the action expert needs of one observation (E expert layers).

    Attributes:
        keys, values: (E, B, KVH, P, hd); in cross layers already projected by the expert.
        mask: (B, P) 1 where a token is real.
        cos, sin: (B, T, hd / 2) rotary table of the action tokens, which follow the prefix.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    cos: Tensor
    sin: Tensor


class VisionTower(SeeingTower):
    """image (B, 3, H, W) in [-1, 1] -> image_tokens (B, N, text_width)."""

    WORDS = ("connector",)

    def __init__(self, c: SmolVLAConfig):
        super().__init__()
        self.encoder = VisionTransformer(
            c.image_size, c.patch_size, c.vision_width, c.vision_hidden, c.vision_layers, c.vision_heads, c.vision_eps
        )
        self.connector = nn.Linear(c.vision_width * c.scale_factor**2, c.text_width, bias=False)
        self.factor, self.scale = c.scale_factor, math.sqrt(c.text_width)

    def words(self, seen: Tensor) -> Tensor:
        return self.connector(pixel_shuffle(seen, self.factor)) * self.scale


class PrefixEncoder(Narrowing):
    """Image tokens, instruction and state -> the action expert's cache, once per observation.

    The last text layer is reduced to its keys and values: nothing reads its output.
    """

    def __init__(self, c: SmolVLAConfig):
        super().__init__()
        self.config = c
        self.embedding = nn.Embedding(c.vocabulary, c.text_width)
        self.state_proj = nn.Linear(c.max_state_dim, c.text_width)
        self.layers = nn.ModuleList(
            DecoderLayer(c.text_width, c.text_hidden, c.heads, c.kv_heads, c.head_dim, c.text_eps)
            for _ in range(c.text_layers - 1)
        )
        self.last_norm = RMSNorm(c.text_width, c.text_eps)
        self.last = KeyValue(c.text_width, c.kv_heads, c.head_dim)
        width = c.kv_heads * c.head_dim
        self.cross = nn.ModuleDict(
            {str(i): KeyValue(width, c.kv_heads, c.head_dim) for i in c.expert_layers if c.is_cross(i)}
        )
        self.read = c.expert_layers  # text layers whose keys and values make up the cache
        start, between = len(c.image_start_ids), len(c.image_start_ids) + c.image_tokens + len(c.image_end_ids)
        firsts = (start + camera * between for camera in range(c.cameras))
        self.sees((first + place for first in firsts for place in range(c.image_tokens)), c.prefix_length)
        self.store: nn.Module | None = None  # the cache crosses to the action expert as it is

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """See `Chain`."""
        layers = (*numbered("layers", self.layers), ("last_norm", "last"))
        with_cross = ((*names, *([f"cross.{i}"] if str(i) in self.cross else ())) for i, names in enumerate(layers))
        return ("embedding", "state_proj"), *with_cross

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`; rows are keys and values, of layers that are read. Of a prefix from which nothing is taken out and
        whose cache crosses as it is: the others are made by `forward` alone."""
        if number == 0:
            return self._begin(*inputs), ()
        x, mask, suffix, bias, cos, sin = handed
        x, rows, *_ = self._through(number - 1, x, bias, cos, sin)
        if number <= len(self.layers):
            return (x, mask, suffix, bias, cos, sin), rows
        return (mask, *rotary(suffix, self.config.head_dim)), rows

    def forward(
        self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor, state: Tensor
    ) -> tuple[Tensor, ...]:
        cache, _, looks = self._encode(image_tokens, lang_tokens, lang_mask, state)
        return tuple(cache) if self.store is None else self.store(*cache, looks)

    def encode(
        self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor, state: Tensor
    ) -> tuple[PrefixCache, list[Tensor]]:
        """The cache, and each layer's attention probabilities (B, H, P, P) for auxiliary losses.

        Args:
            image_tokens: (B, cameras * N, text_width). lang_tokens, lang_mask: (B, L). state: (B, max_state_dim).
        """
        return self._encode(image_tokens, lang_tokens, lang_mask, state)[:2]

    def _encode(self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor, state: Tensor):
        """As `encode`, and (B, P) how much words and state look at each token that is left, where `store` asks."""
        c = self.config
        x, mask, suffix, bias, cos, sin = self._begin(image_tokens, lang_tokens, lang_mask, state)
        cache, probabilities, looks = [], [], torch.zeros(())
        for index in range(c.text_layers):
            whole = index < len(self.layers)
            if whole and isinstance(self.layers[index], Skipped):
                continue
            x, rows, q, k, weights = self._through(index, x, bias, cos, sin)
            if rows:
                cache.append(rows)
            if whole:
                probabilities.append(weights)
                if self.store is not None:
                    rows = slice(-c.language_length - 1, None)
                    columns = attention_columns(q[:, :, rows], k, bias[:, :, rows], mask[:, rows])
                    looks = looks + columns.mean(1)
                if index == self.narrows_at:
                    kept, mask = self.choose(q, k, bias, mask)
                    x, cos, sin, looks = (taken(tensor, kept, 1) for tensor in (x, cos, sin, looks))
                    cache = [(taken(k, kept, 2), taken(v, kept, 2)) for k, v in cache]
                    bias = self._bias(mask)
        keys, values = (torch.stack(tensors) for tensors in zip(*cache))
        if self.store is not None:  # the state is looked at by itself alone
            lookers = mask[:, -c.language_length - 1 :].sum(1, keepdim=True)
            looks = torch.cat([looks[:, :-1] / lookers, looks[:, -1:]], 1)
        return PrefixCache(keys, values, mask, *rotary(suffix, c.head_dim)), probabilities, looks

    def _begin(self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        """x (B, P, text_width), which tokens are real, places of the action tokens, and what the first layer attends by:
        bias and rotary table."""
        c = self.config
        language = self.embedding(lang_tokens) * math.sqrt(c.text_width)
        x = torch.cat([self._with_markers(image_tokens), language, self.state_proj(state)[:, None]], dim=1)
        batch, length = x.shape[:2]
        real = x.new_ones(batch, length - c.language_length - 1)
        mask = torch.cat([real, lang_mask.to(x.dtype), x.new_ones(batch, 1)], dim=1)
        suffix = mask.sum(1, keepdim=True) + torch.arange(c.chunk_size, device=x.device)
        return (x, mask, suffix, self._bias(mask), *rotary(mask.cumsum(1) - 1, c.head_dim))

    def _through(self, index: int, x: Tensor, bias: Tensor, cos: Tensor, sin: Tensor):
        """x through text layer `index`; what the action expert reads of it; its queries and keys, and its attention
        probabilities (B, H, P, P). The last has neither queries nor an output."""
        whole = index < len(self.layers)
        layer = self.layers[index] if whole else self.last
        normed = (layer.attention_norm if whole else self.last_norm)(x)
        k, v = layer.project(normed, normed)
        k = rotate(k, cos, sin)
        rows = self._read(index, k, v)
        if not whole:
            return x, rows, None, k, None
        q = rotate(layer.queries(normed), cos, sin)
        attended, weights = attend(q, k, v, bias)
        return layer.finish(x, attended), rows, q, k, weights

    def _read(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """What the action expert reads of text layer `index`, if anything."""
        if index not in self.read:
            return ()
        if str(index) in self.cross:
            return self.cross[str(index)].project(k.transpose(1, 2).flatten(2), v.transpose(1, 2).flatten(2))
        return k, v

    def _bias(self, mask: Tensor) -> Tensor:
        """(B, 1, P, P): bidirectional, but image and language never look at the state, which is the last token."""
        length = mask.shape[1]
        state_bias = F.pad(mask.new_full((length - 1, 1), MASKED), (length - 1, 0, 0, 1))
        return padding_bias(mask) + state_bias

    def folds(self) -> tuple[Fold, ...]:
        return (Fold(self.last_norm, (self.last.k, self.last.v)),)

    def _with_markers(self, image_tokens: Tensor) -> Tensor:
        c = self.config
        if not (c.image_start_ids or c.image_end_ids):
            return image_tokens
        start, end = (
            self.embedding(torch.tensor(ids, dtype=torch.int64, device=image_tokens.device))[None].expand(
                image_tokens.shape[0], -1, -1
            )
            for ids in (c.image_start_ids, c.image_end_ids)
        )
        parts = [part for tokens in image_tokens.split(c.image_tokens, dim=1) for part in (start, tokens, end)]
        return torch.cat(parts, dim=1)


class TimeEncoder(nn.Module):
    """Flow time (B,) -> its share in the first layer of the action-time MLP, (B, expert_width)."""

    def __init__(self, c: SmolVLAConfig):
        super().__init__()
        self.width, self.periods = c.expert_width, (c.min_period, c.max_period)
        self.mlp_in = nn.Linear(c.expert_width, c.expert_width)

    def forward(self, time: Tensor) -> tuple[Tensor]:
        return (self.mlp_in(sinusoid(time, self.width, *self.periods)),)


class ActionExpert(Chain):
    """Noisy actions x (B, T, A) and the prefix cache as it crosses -> flow velocity (B, T, A), pointing at the noise.

    `time_condition` is (B, W), or (B, T, W) where every action has a flow time of its own.
    """

    def __init__(self, c: SmolVLAConfig):
        super().__init__()
        self.cross = [c.is_cross(layer) for layer in c.expert_layers]
        self.action_in = nn.Linear(c.max_action_dim, c.expert_width)
        self.mlp_in = nn.Linear(c.expert_width, c.expert_width, bias=False)
        self.mlp_out = nn.Linear(c.expert_width, c.expert_width)
        self.layers = nn.ModuleList(
            QueryLayer(c.expert_width, c.expert_hidden, c.heads, c.head_dim, c.text_eps)
            if cross
            else DecoderLayer(c.expert_width, c.expert_hidden, c.heads, c.kv_heads, c.head_dim, c.text_eps)
            for cross in self.cross
        )
        self.norm = RMSNorm(c.expert_width, c.text_eps)
        self.action_out = nn.Linear(c.expert_width, c.max_action_dim)
        self.load: nn.Module | None = None  # inverse of the prefix's `store`
        causal = causal_bias(c.chunk_size)
        cos, sin = rotary(torch.arange(c.chunk_size)[None], c.head_dim)
        for name, table in (("causal", causal[None, None]), ("own_cos", cos), ("own_sin", sin)):
            self.register_buffer(name, table, persistent=False)

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """See `Chain`; a layer that was taken out is none."""
        layers = ((f"layers.{index}",) for index in self._left)
        return ("action_in", "mlp_in", "mlp_out"), *layers, ("norm", "action_out")

    @property
    def _left(self) -> list[int]:
        return [index for index, layer in enumerate(self.layers) if not isinstance(layer, Skipped)]

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`."""
        x, time_condition, keys, values, mask, cos, sin = inputs
        if number == 0:
            condition = time_condition if time_condition.ndim == 3 else time_condition[:, None]
            h = self.mlp_out(F.silu(self.mlp_in(self.action_in(x)) + condition))
            prefix_bias = padding_bias(mask)
            batch, length = h.shape[:2]
            biases = prefix_bias.expand(-1, -1, length, -1), self.causal.expand(batch, -1, -1, -1)
            return (h, prefix_bias, torch.cat(biases, dim=-1)), ()
        h, prefix_bias, joint_bias = handed
        row, left = number - 1, self._left
        if row == len(left):
            return (self.action_out(self.norm(h)),), ()
        layer = self.layers[left[row]]
        normed = layer.attention_norm(h)
        q, k, v = layer.queries(normed), keys[row], values[row]
        if self.cross[left[row]]:
            attended, _ = attend(rotate(q, self.own_cos, self.own_sin), k, v, prefix_bias)
        else:
            own_k, own_v = layer.project(normed, normed)
            k, v = torch.cat([k, rotate(own_k, cos, sin)], dim=2), torch.cat([v, own_v], dim=2)
            attended, _ = attend(rotate(q, cos, sin), k, v, joint_bias)
        return (layer.finish(h, attended), prefix_bias, joint_bias), ()

    def forward(self, x: Tensor, time_condition: Tensor, *cache: Tensor) -> tuple[Tensor]:
        return super().forward(x, time_condition, *(cache if self.load is None else self.load(*cache)))

    def folds(self) -> tuple[Fold, ...]:
        return (Fold(self.norm, (self.action_out,)),)


def _spans(name: str, layers: nn.ModuleList, last: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Of a chain of layers, those that are left: path -> the norms that read what goes in and what comes out."""
    left = {f"{name}.{i}": layer.attention_norm for i, layer in enumerate(layers) if not isinstance(layer, Skipped)}
    return dict(zip(left, zip(left.values(), [*left.values(), last][1:])))


class SmolVLA(nn.Module):
    """The whole policy, made of its stages."""

    matched = "velocity"

    def __init__(self, config: SmolVLAConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config)
        self.prefix = PrefixEncoder(config)
        self.time = TimeEncoder(config)
        self.denoise = ActionExpert(config)

    def units(self) -> tuple[Units, ...]:
        """Key heads of each layer with the query heads that share them, see `policy.blocks.Units`.

        A self-attending expert layer reads the text layer's keys, so both lose the same heads. A cross-attending one
        has keys of its own, made of the text layer's.
        """
        c, found = self.config, []
        experts = dict(zip(c.expert_layers, self.denoise.layers))
        for index in range(c.text_layers):
            text = self.prefix.layers[index] if index < len(self.prefix.layers) else self.prefix.last
            if isinstance(text, Skipped):
                continue
            reads = index in self.prefix.read
            expert = experts[index] if reads else None
            cross = self.prefix.cross[str(index)] if reads and str(index) in self.prefix.cross else None
            sharing = [layer for layer in (text, None if cross else expert) if layer is not None]
            found.append(self._heads(sharing, sharing, (cross.k, cross.v) if cross else ()))
            if cross:
                found.append(self._heads([cross], [expert], ()))
        return tuple(found)

    def blocks(self) -> tuple[Block, ...]:
        """Layers that can still be skipped: those of the vision tower; those of the action expert, with what is cached
        for them alone; and text layers, with the action expert's layer that reads their keys. The last text layer and
        its reader stay, and one layer of the vision tower."""
        encoder, prefix, read = self.vision.encoder, self.prefix, self.prefix.read
        tower = _spans("vision.encoder.layers", encoder.layers, encoder.norm)
        found = [Block((name,), (span,)) for name, span in tower.items()] if len(tower) > 1 else []
        spans = _spans("denoise.layers", self.denoise.layers, self.denoise.norm)
        spans |= _spans("prefix.layers", prefix.layers, prefix.last_norm)
        for index in range(len(prefix.layers)):
            text, with_it = f"prefix.layers.{index}", ()
            if index in read:
                if len(read) == 1:
                    continue
                with_it = (f"denoise.layers.{self.config.expert_layers.index(index)}",)
                found.append(Block(with_it, (spans[with_it[0]],), index))
            if text in spans:
                names = (text, *with_it)
                found.append(Block(names, tuple(spans[name] for name in names), index if with_it else None))
        return tuple(found)

    def skip_(self, block: Block) -> Callable[[], None]:
        """Take one of `blocks` out; what is returned puts it back."""
        prefix, read = self.prefix, self.prefix.read
        names = [*block.names, *([f"prefix.cross.{block.read}"] if str(block.read) in prefix.cross else [])]
        taken = {name: self.get_submodule(name) for name in names}

        def put(modules: dict[str, nn.Module]) -> None:
            for name, module in modules.items():
                parent, _, key = name.rpartition(".")
                self.get_submodule(parent)._modules[key] = module

        def undo() -> None:
            put(taken)
            prefix.read = read

        put({name: Skipped() for name in names})
        prefix.read = tuple(index for index in read if index != block.read)
        return undo

    @property
    def reader(self) -> Narrowing:
        """What reads pictures among words."""
        return self.prefix

    @property
    def cache_length(self) -> int:
        """Tokens whose keys and values every flow step reads."""
        return self.prefix.length

    def round_cache_(self, store: nn.Module, load: nn.Module) -> None:
        """Have the cache cross as `store` makes it, for which `load` is the inverse."""
        self.prefix.store, self.denoise.load = store, load

    def _heads(self, keys: list, queries: list, readers: tuple[nn.Linear, ...]) -> Units:
        """Heads whose keys and values `keys` make and whose queries `queries` make."""
        width = self.config.head_dim
        group = width * self.config.heads // self.config.kv_heads
        queries = [layer for layer in queries if hasattr(layer, "q")]
        makers = [(projection, width) for layer in keys for projection in (layer.k, layer.v)]
        makers += [(layer.q, group) for layer in queries]
        reads = [(layer.out, group) for layer in queries] + [(layer, width) for layer in readers]
        return Units("heads", keys[0].k.out_features // width, tuple(makers), tuple(reads))

    def stages(self) -> tuple[Stage, ...]:
        """vision, prefix, time, denoise; batch 1, static shapes (see `policy.stages`)."""
        c = self.config
        kv_heads = self.prefix.last.k.out_features // c.head_dim  # fewer than configured once some are taken out
        kv = (len(self.prefix.read), 1, kv_heads, self.prefix.length, c.head_dim)
        rope = (1, c.chunk_size, c.head_dim // 2)
        cache = (
            TensorSpec("prefix_keys", kv),
            TensorSpec("prefix_values", kv),
            TensorSpec("prefix_mask", (1, self.prefix.length)),
            TensorSpec("rope_cos", rope),
            TensorSpec("rope_sin", rope),
        )
        if self.prefix.store is not None:
            cache = self.prefix.store.tensors(cache)
        actions = (1, c.chunk_size, c.max_action_dim)
        condition = TensorSpec("time_condition", (1, c.expert_width))
        conditions = TensorSpec("time_condition", (1, c.chunk_size, c.expert_width)) if c.trained_prefix else condition
        observation = (
            TensorSpec("image_tokens", (1, c.cameras * c.image_tokens, c.text_width)),
            TensorSpec("lang_tokens", (1, c.language_length), "int64"),
            TensorSpec("lang_mask", (1, c.language_length), "bool"),
            TensorSpec("state", (1, c.max_state_dim)),
        )
        image = TensorSpec("image", (1, 3, c.image_size, c.image_size))
        tokens = TensorSpec("image_tokens", (1, c.image_tokens, c.text_width))
        x, velocity = TensorSpec("x", actions), TensorSpec("velocity", actions)
        return (
            Stage("vision", self.vision, (image,), (tokens,)),
            Stage("prefix", self.prefix, observation, cache),
            Stage("time", self.time, (TensorSpec("time", (1,)),), (condition,)),
            Stage("denoise", self.denoise, (x, conditions, *cache), (velocity,)),
        )
