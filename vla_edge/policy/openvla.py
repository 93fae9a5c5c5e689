"""OpenVLA (Kim et al., 2024, arXiv:2406.09246) and OpenVLA-OFT (Kim et al., 2025, arXiv:2502.19645).

DINOv2 and SigLIP see the same picture, their features side by side are projected to words, and Llama reads the first
word, the pictures and the rest of the prompt. OpenVLA then writes its action as tokens, one of 256 bins each
(`openvla_tokens`), of which a draft may propose some (`openvla_draft`). OFT reads all places of a whole chunk in one pass,
looking in both directions, and a small network makes numbers of what it finds there: one stage, `act`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla_edge.policy.bins import BINS, bin_values
from vla_edge.policy.blocks import ACTIVATIONS, Fold, VisionTransformer, padding_bias, rotary
from vla_edge.policy.chain import Chain
from vla_edge.policy.draft_shapes import TOKENS, DraftConfig
from vla_edge.policy.narrow import Narrowing, taken
from vla_edge.policy.openvla_draft import make_draft
from vla_edge.policy.openvla_tokens import BlockPrefill, Decode, Generate, Prefill, Reader, Revise, through
from vla_edge.policy.stages import Stage, TensorSpec

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
VISION_EPS = 1e-6
STOP = 2  # Llama's end of a sentence


@dataclass(frozen=True)
class TowerConfig:
    """Shapes of one vision transformer.

    Attributes:
        layers: that are run; the last of the original is not.
        mean, std: per channel, by which pixels in [0, 1] are scaled for it.
    """

    patch_size: int
    width: int
    hidden: int
    layers: int
    heads: int
    registers: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class OpenVLAConfig:
    """Shapes of an OpenVLA.

    Attributes:
        towers: whose features lie side by side.
        projector: widths of the projector's layers between the features and the words.
        action_dim: A values of an action. chunk_size: T actions.
        head_hidden, head_blocks: of OFT's head; 0 where actions are tokens.
        proprio_dim: values of the state that are read, 0 where none is.
        draft: what proposes tokens, where the checkpoint has something that does.
    """

    cameras: int
    image_size: int
    towers: tuple[TowerConfig, ...]
    projector: tuple[int, ...]
    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    eps: float
    wavelength: float
    language_length: int
    action_dim: int
    chunk_size: int
    head_hidden: int = 0
    head_blocks: int = 0
    proprio_dim: int = 0
    draft: DraftConfig | None = None

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.heads

    @property
    def image_tokens(self) -> int:
        """Tokens of one camera."""
        return (self.image_size // self.towers[0].patch_size) ** 2

    @property
    def text_layers(self) -> int:
        """Layers of the language model."""
        return self.layers

    @property
    def prompt_length(self) -> int:
        """P: pictures, state and prompt."""
        return self.cameras * self.image_tokens + self.language_length + bool(self.proprio_dim)

    @property
    def tokens(self) -> int:
        """Places of one chunk."""
        return self.chunk_size * self.action_dim


class VisionTower(Chain):
    """image (B, 3, H, W) in [-1, 1] -> image_tokens (B, N, width)."""

    def __init__(self, c: OpenVLAConfig):
        super().__init__()
        self.encoders = nn.ModuleList(
            VisionTransformer(
                c.image_size, t.patch_size, t.width, t.hidden, t.layers, t.heads, VISION_EPS, "gelu", t.registers, False
            )
            for t in c.towers
        )
        widths = (sum(t.width for t in c.towers), *c.projector, c.width)
        self.projector = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:]))
        for index, tower in enumerate(c.towers):
            mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (tower.mean, tower.std))
            # pixels come as 2 x - 1 of x in [0, 1]
            self.register_buffer(f"scale{index}", 0.5 / std, persistent=False)
            self.register_buffer(f"shift{index}", (0.5 - mean) / std, persistent=False)

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """See `Chain`: the encoders' layers one after the other."""
        parts = [encoder.parts(f"encoders.{i}") for i, encoder in enumerate(self.encoders)]
        first, last = (sum((part[place] for part in parts), ()) for place in (0, -1))
        return first, *(layer for part in parts for layer in part[1:-1]), (*last, "projector")

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`; handed on is what each encoder has seen so far."""
        if number == 0:
            (image,) = inputs
            views = (image * getattr(self, f"scale{i}") + getattr(self, f"shift{i}") for i in range(len(self.encoders)))
            return tuple(encoder.embed(view) for encoder, view in zip(self.encoders, views)), ()
        place = number - 1
        for index, encoder in enumerate(self.encoders):
            if place < len(encoder.layers):
                return (*handed[:index], encoder.layers[place](handed[index]), *handed[index + 1 :]), ()
            place -= len(encoder.layers)
        x = torch.cat([encoder.finish(seen) for encoder, seen in zip(self.encoders, handed)], dim=-1)
        for index, layer in enumerate(self.projector):
            x = layer(x if index == 0 else ACTIVATIONS["gelu"](x))
        return (x,), ()


class ResidualBlock(nn.Module):
    """Norm, linear layer, ReLU, and what came in."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)).relu()

    def folds(self) -> tuple[Fold, ...]:
        return (Fold(self.norm, (self.linear,)),)


class ActionHead(nn.Module):
    """What was found at the A places of an action (B, T, A * width) -> the action (B, T, A)."""

    def __init__(self, c: OpenVLAConfig):
        super().__init__()
        wide = c.width * c.action_dim
        self.norm_in, self.linear_in = nn.LayerNorm(wide), nn.Linear(wide, c.head_hidden)
        self.blocks = nn.ModuleList(ResidualBlock(c.head_hidden) for _ in range(c.head_blocks))
        self.norm_out, self.linear_out = nn.LayerNorm(c.head_hidden), nn.Linear(c.head_hidden, c.action_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_in(self.norm_in(x)).relu()
        for block in self.blocks:
            x = block(x)
        return self.linear_out(self.norm_out(x))

    def folds(self) -> tuple[Fold, ...]:
        return Fold(self.norm_in, (self.linear_in,)), Fold(self.norm_out, (self.linear_out,))


class Act(Reader):
    """Prompt (and state) -> the whole chunk at once (B, T, A), normalized."""

    BEGIN = ("embedding", "state_in", "state_out")

    def __init__(self, c: OpenVLAConfig):
        super().__init__(c, behind=c.tokens + 1)
        self.head = ActionHead(c)
        self.state_in = nn.Linear(c.proprio_dim, c.width) if c.proprio_dim else None
        self.state_out = nn.Linear(c.width, c.width) if c.proprio_dim else None

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Narrowing`."""
        if number == 0:
            x, mask, last = self.places(*inputs)
            rope = rotary(mask.cumsum(1) - 1, self.head_dim, self.config.wavelength)
            return (x, *rope, mask, padding_bias(mask), last), ()
        x, cos, sin, mask, bias, last = handed
        if number > len(self.layers):
            places = slice(self.config.prompt_length - self.left_out, -2)
            return (self.actions(torch.cat([x.index_select(1, last), x[:, places]], dim=1)),), ()
        x, q, k, *_ = through(self.layers[number - 1], x, cos, sin, bias)
        if number - 1 != self.narrows_at:
            return (x, cos, sin, mask, bias, last), ()
        kept, mask = self.choose(q, k, bias, mask)
        x, cos, sin = (taken(tensor, kept, 1) for tensor in (x, cos, sin))
        return (kept, x, cos, sin, mask, padding_bias(mask), last - self.left_out), ()

    def places(
        self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Everything that is read (B, P + T * A + 1, width), a mask of what of it is real, and the place (B,) of the
        last word. Each value is told by the place before its own, as if it were the next word."""
        c = self.config
        if self.state_in is not None:
            token = self.state_out(ACTIVATIONS["gelu"](self.state_in(state)))
            image_tokens = torch.cat([image_tokens, token[:, None]], dim=1)
        x = self.prompt(image_tokens, lang_tokens)
        # the places of actions are empty, and the end of the sentence closes them
        end = self.embedding(torch.full((x.shape[0], 1), STOP, dtype=torch.int64, device=x.device))
        x = torch.cat([x, x.new_zeros(x.shape[0], c.tokens, c.width), end], dim=1)
        real = x.new_ones(x.shape[0], image_tokens.shape[1])
        words = lang_mask.to(x.dtype)
        rest = x.new_ones(x.shape[0], c.tokens + 1)
        mask = torch.cat([words[:, :1], real, words[:, 1:], rest], dim=1)
        return x, mask, image_tokens.shape[1] + lang_mask.to(torch.int64).sum(1) - 1

    def actions(self, found: Tensor) -> Tensor:
        """What was found at the places that tell (B, T * A, width) -> normalized actions (B, T, A)."""
        c = self.config
        return self.head(self.norm(found).reshape(-1, c.chunk_size, c.action_dim * c.width))


class OpenVLA(nn.Module):
    """The whole policy, made of its stages."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config)
        if config.head_hidden:
            self.act = Act(config)
        else:
            self.prefill = Prefill(config)
            self.decode = Decode(self.prefill)
        # these decode in the place of `decode`: all tokens guessed, or a window that was drafted
        self.revise: Revise | None = None
        self.verify: Decode | None = None
        self.draft = None if config.draft is None else make_draft(config.draft)
        if self.draft is not None:
            self.speculate_()
        self.generates = False  # one stage reads the prompt and writes all tokens

    @property
    def reader(self) -> Narrowing:
        """What reads pictures among words."""
        return self.act if self.config.head_hidden else self.prefill

    @property
    def can_revise(self) -> bool:
        """Whether there are tokens, one after the other, to be guessed, and revised or verified together."""
        return not self.config.head_hidden and self.config.tokens > 2

    @property
    def most_drafted(self) -> int:
        """Tokens that can be proposed at a time: the prompt tells the first of a chunk, and nothing follows the last."""
        return self.config.tokens - 2

    @property
    def matched(self) -> str:
        """See `stages.StagedPolicy`."""
        return "actions" if self.config.head_hidden else "scores"

    @property
    def can_generate(self) -> bool:
        """Whether one stage can write all tokens: a recipe has not changed how they are written."""
        plain = not self.config.head_hidden and self.revise is None and isinstance(self.prefill, Prefill)
        plain = plain and (self.verify is None or self.draft is not None)
        return plain and self.prefill.store is None and self.prefill.choice is None

    def revise_(self) -> None:
        """From now on all tokens are guessed and revised together."""
        self.one_by_one_()
        self.revise = Revise(self.decode)

    def speculate_(self, tokens: int | None = None, trained: bool = True) -> None:
        """From now on a draft proposes tokens, and a pass verifies them.

        Args:
            tokens: at a time, 1 to what the draft can and to `most_drafted`; what the draft has, or `draft_shapes.TOKENS`, when
                None.
            trained: the draft is the checkpoint's; otherwise it is for whoever runs the stages to propose.
        """
        draft = self.draft if trained else None
        self.one_by_one_()
        if draft is not None:
            self.draft, self.prefill.tells = draft, True
            draft.propose_(tokens or draft.tokens)
        count = tokens or min(TOKENS, self.most_drafted) if draft is None else draft.tokens
        self.verify = Decode(self.prefill, 1 + count, self.decode.words)

    def one_by_one_(self) -> None:
        """From now on each token is decoded in a pass of its own."""
        self.revise = self.verify = self.draft = None
        self.prefill.tells = False

    def read_blocks_(self, block: int) -> None:
        """From now on the prompt is read `block` places at a time, at most as many as it has."""
        self.prefill = BlockPrefill(self.prefill, min(block, self.config.prompt_length))

    @property
    def cache_length(self) -> int:
        """Tokens whose keys and values every token of the chunk reads; 0 where the chunk is read at once."""
        return 0 if self.config.head_hidden else self.prefill.length

    def round_cache_(self, store: nn.Module, load: nn.Module) -> None:
        """Have the prompt's cache cross as `store` makes it, for which `load` is the inverse."""
        self.prefill.store = store
        for reader in (self.decode, self.verify, self.revise):
            if reader is not None:
                reader.load = load

    def chunk(self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor, state: Tensor) -> Tensor:
        """Normalized actions (1, T, A), differentiable: of tokens the mean of the bins by their probabilities, each
        after the tokens that were chosen before it."""
        c = self.config
        if c.head_hidden:
            return self.act(image_tokens, lang_tokens, lang_mask, state[:, : c.proprio_dim])[0]
        scores = self.greedy(image_tokens, lang_tokens, lang_mask)
        means = scores.softmax(-1) @ torch.as_tensor(bin_values(), dtype=scores.dtype)
        return means.reshape(1, c.chunk_size, c.action_dim)

    def greedy(self, image_tokens: Tensor, lang_tokens: Tensor, lang_mask: Tensor) -> Tensor:
        """Scores (1, T * A, 256) of all tokens of one observation, each after the likeliest tokens before it."""
        return Generate(self.prefill, self.decode)(image_tokens, lang_tokens, lang_mask)[0]

    def say(self, *observed: Tensor, **asked):
        """For training, see `openvla_training.say`."""
        from vla_edge.policy.openvla_training import say

        return say(self, *observed, **asked)

    def stages(self) -> tuple[Stage, ...]:
        """vision, then prefill and decode, or generate, or act; batch 1, static shapes (see `policy.stages`)."""
        c = self.config
        image = TensorSpec("image", (1, 3, c.image_size, c.image_size))
        tokens = TensorSpec("image_tokens", (1, c.image_tokens, c.width))
        vision = Stage("vision", self.vision, (image,), (tokens,))
        prompt = (
            TensorSpec("image_tokens", (1, c.cameras * c.image_tokens, c.width)),
            TensorSpec("lang_tokens", (1, c.language_length), "int64"),
            TensorSpec("lang_mask", (1, c.language_length), "bool"),
        )
        if c.head_hidden:
            state = (TensorSpec("state", (1, c.proprio_dim)),) if c.proprio_dim else ()
            actions = TensorSpec("actions", (1, c.chunk_size, c.action_dim))
            return vision, Stage("act", self.act, (*prompt, *state), (actions,))
        if self.generates:
            every = TensorSpec("token_scores", (1, c.tokens, BINS))
            return vision, Stage("generate", Generate(self.prefill, self.decode), prompt, (every,), shares="prefill")
        return vision, *token_stages(self, prompt)


def token_stages(policy: OpenVLA, prompt: Sequence[TensorSpec]) -> tuple[Stage, ...]:
    """What reads the prompt and what decodes, as the policy is to do it."""
    c = policy.config

    def pair(name: str, tokens: int) -> tuple[TensorSpec, TensorSpec]:
        shape = (c.layers, 1, c.kv_heads, tokens, c.head_dim)
        return tuple(TensorSpec(f"{name}_{kind}", shape) for kind in ("keys", "values"))

    def whole(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name, shape, "int64")

    step, position, scores = whole("step", 1), whole("position", 1), TensorSpec("scores", (1, BINS))
    length = policy.cache_length
    mask = TensorSpec("cache_mask", (1, length))
    cache = made = (*pair("cache", length), mask)
    if policy.prefill.store is not None:
        cache = made = policy.prefill.store.tensors(cache)
    if isinstance(policy.prefill, BlockPrefill):
        prompt = (*prompt, whole("begin", 1), *cache[:2])
        made = (*pair("block", policy.prefill.block), mask)
    feature = (TensorSpec("prompt_feature", (1, c.width)),) if policy.prefill.tells else ()
    prefill = Stage("prefill", policy.prefill, prompt, (scores, *feature, position, *made))
    if policy.revise is not None:
        rows = c.tokens - 1
        revised = TensorSpec("row_scores", (1, rows, BINS))
        return prefill, Stage(
            "revise", policy.revise, (whole("tokens", 1, rows), position, *cache), (revised,), shares="prefill"
        )
    behind = (step, position, *pair("tail", c.tokens - 1), *cache)
    if policy.verify is None:
        made = (scores, *pair("new", 1))
        return prefill, Stage("decode", policy.decode, (whole("token", 1, 1), *behind), made, shares="prefill")
    rows = policy.verify.rows
    features = (TensorSpec("row_features", (1, rows, c.width)),) if policy.prefill.tells else ()
    made = (TensorSpec("row_scores", (1, rows, BINS)), *features, *pair("new", rows))
    verify = Stage("verify", policy.verify, (whole("drafted", 1, rows), *behind), made, shares="prefill")
    if policy.draft is None:
        return prefill, verify
    known = {"feature": TensorSpec("feature", (1, c.width)), "step": step, "known": whole("known", 1, c.tokens)}
    proposed = TensorSpec("draft_scores", (1, policy.draft.tokens, BINS))
    return prefill, verify, Stage("draft", policy.draft, tuple(known[name] for name in policy.draft.INPUTS), (proposed,))
