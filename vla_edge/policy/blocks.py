"""Transformer blocks shared by every policy family.

Every large product is a `torch.nn.Linear`, attention is written as plain matrix products and softmax, and shapes are
static: what is written here is what the exporter, the quantizers and every runtime see.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_edge.policy.chain import Chain, numbered

MASKED = -1e4  # additive; exp(-1e4) is 0 in float32 and the value itself still fits float16


def padding_bias(mask: Tensor) -> Tensor:
    """(B, P), 1 where a token is real -> what is added to every row's scores of these tokens, (B, 1, 1, P)."""
    return ((1 - mask) * MASKED)[:, None, None]


def causal_bias(length: int) -> Tensor:
    """(length, length), what is added to scores where a token sees itself and those before it."""
    return torch.triu(torch.full((length, length), MASKED), diagonal=1)


class Fold(NamedTuple):
    """A tensor whose channels may be divided where it is made, if they are multiplied where it is read.

    Attributes:
        producer: makes the tensor: a norm with weights, or a linear layer whose outputs reach the consumers channel by
            channel.
        consumers: the linear layers that read it; nothing else does.
    """

    producer: nn.Module
    consumers: tuple[nn.Linear, ...]


class Units(NamedTuple):
    """Parallel parts of a block, any of which can be taken out: channels of a feed-forward, heads of an attention.

    Attributes:
        kind: "channels" or "heads".
        count: how many there are.
        makers: (layer, n): outputs i * n to (i + 1) * n of the layer belong to unit i.
        readers: (layer, n): inputs i * n to (i + 1) * n of the layer come from unit i, and all its inputs do.
    """

    kind: str
    count: int
    makers: tuple[tuple[nn.Linear, int], ...]
    readers: tuple[tuple[nn.Linear, int], ...]


class Block(NamedTuple):
    """Layers that can be skipped together, because what goes into them can take the place of what comes out.

    Attributes:
        names: of the layers, as paths in the policy.
        spans: for each of them the norm that reads what goes into it, and the one that reads what comes out.
        read: the text layer whose keys and values the action expert does without then; None where it reads on.
    """

    names: tuple[str, ...]
    spans: tuple[tuple[nn.Module, nn.Module], ...]
    read: int | None = None


class Skipped(nn.Module):
    """In the place of a layer that was taken out, so that the others keep their names."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def units_in(module: nn.Module) -> list[Units]:
    """Those of every block in `module`; a block that can be made smaller has a method `units`."""
    return [units for block in module.modules() if hasattr(block, "units") for units in block.units()]


def folds_in(module: nn.Module) -> list[Fold]:
    """Those of every block in `module`; a block whose channels can be rescaled has a method `folds`."""
    return [fold for block in module.modules() if hasattr(block, "folds") for fold in block.folds()]


class RMSNorm(nn.Module):
    """Root mean square normalization (Zhang & Sennrich, 2019)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


class GatedMLP(nn.Module):
    """Gated feed-forward (Shazeer, 2020): SwiGLU, or GeGLU with another activation, a key of `ACTIVATIONS`."""

    def __init__(self, width: int, hidden: int, activation: str = "silu"):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))

    def folds(self) -> tuple[Fold, ...]:
        """See `Fold`."""
        return (Fold(self.up, (self.down,)),)

    def units(self) -> tuple[Units, ...]:
        """See `Units`."""
        return (Units("channels", self.up.out_features, ((self.gate, 1), (self.up, 1)), ((self.down, 1),)),)


class MLP(nn.Module):
    """Two-layer feed-forward, by default with tanh-approximated GELU, as in SigLIP."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu_tanh"):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))

    def units(self) -> tuple[Units, ...]:
        """See `Units`."""
        return (Units("channels", self.up.out_features, ((self.up, 1),), ((self.down, 1),)),)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Grouped-query attention (Ainslie et al., 2023).

    Args:
        q: (B, H, T, hd). k, v: (B, KVH, P, hd), H a multiple of KVH.
        bias: additive, broadcastable to (B, H, T, P).

    Returns:
        (B, T, H * hd) output and (B, H, T, P) probabilities.
    """
    probabilities = attention_weights(q, k, bias)
    batch, heads, length, head_dim = q.shape
    groups = heads // k.shape[1]
    out = probabilities.reshape(batch, k.shape[1], groups * length, k.shape[2]) @ v
    out = out.reshape(batch, heads, length, head_dim).transpose(1, 2).reshape(batch, length, heads * head_dim)
    return out, probabilities


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, H, T, P) probabilities of `attend`."""
    batch, heads, length, head_dim = q.shape
    groups = heads // k.shape[1]
    if groups > 1:
        # fold the group into the query rows: one product per key head, and keys are never copied
        q = q.reshape(batch, k.shape[1], groups * length, head_dim)
    scores = (q @ k.transpose(-1, -2)).mul(head_dim**-0.5).reshape(batch, heads, length, k.shape[2])
    return (scores if bias is None else scores + bias).softmax(-1)


def attention_columns(q: Tensor, k: Tensor, bias: Tensor, weight: Tensor, rows: int = 256) -> Tensor:
    """How much each key is looked at, by head: the columns of `attention_weights`, summed without holding the matrix.

    Args:
        q, k: as of `attend`. bias: (B or 1, 1, T or 1, P), additive.
        weight: (B, T) of each query. rows: queries whose probabilities are in memory at a time.

    Returns:
        (B, H, P) weighted sums over the queries.
    """
    total = torch.zeros(())
    for begin in range(0, q.shape[2], rows):
        end = begin + rows
        looks = attention_weights(q[:, :, begin:end], k, bias if bias.shape[2] == 1 else bias[:, :, begin:end])
        total = total + (looks * weight[:, None, begin:end, None]).sum(2)
    return total


def attend_cached(
    q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, bias: Tensor, own_bias: Tensor
) -> Tensor:
    """Attention of R tokens to a cache and to O tokens behind it, they themselves among them; the cache is read where it
    lies instead of being joined with what is behind.

    Args:
        q: (1, H, R, hd). k, v: (1, KVH, S, hd). own_k, own_v: (1, KVH, O, hd).
        bias: additive, (1, 1, 1, S), of the cache. own_bias: additive, (R, O), of what is behind it.

    Returns:
        (1, R, H * hd).
    """
    _, heads, rows, head_dim = q.shape
    kv_heads = k.shape[1]
    q = q.reshape(1, kv_heads, heads // kv_heads * rows, head_dim) * head_dim**-0.5
    behind = own_k.shape[2]
    own = (q @ own_k.transpose(-1, -2)).reshape(1, heads, rows, behind) + own_bias
    own = own.reshape(1, kv_heads, heads // kv_heads * rows, behind)
    probabilities = torch.cat([q @ k.transpose(-1, -2) + bias, own], dim=-1).softmax(-1)
    out = probabilities[..., :-behind] @ v + probabilities[..., -behind:] @ own_v
    return out.reshape(1, heads, rows, head_dim).transpose(1, 2).reshape(1, rows, heads * head_dim)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, H * hd) -> (B, H, T, hd)."""
    batch, length, width = x.shape
    return x.view(batch, length, width // head_dim, head_dim).transpose(1, 2)


def rotary(positions: Tensor, head_dim: int, wavelength: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary embedding (Su et al., 2021), each (..., T, hd / 2), for positions (..., T)."""
    exponents = torch.arange(head_dim // 2, dtype=torch.float32, device=positions.device) * (2.0 / head_dim)
    radians = positions.to(torch.float32)[..., None] / wavelength**exponents
    return radians.cos(), radians.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, H, T, hd) by cos, sin (B or 1, T, hd / 2)."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class KeyValue(nn.Module):
    """Key and value projections, kept apart from a layer where they run in another stage than its queries.

    Args:
        width: of the input. kv_heads, head_dim: of the output. bias: whether something is added.
    """

    def __init__(self, width: int, kv_heads: int, head_dim: int, bias: bool = False):
        super().__init__()
        self.head_dim = head_dim
        self.k = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.v = nn.Linear(width, kv_heads * head_dim, bias=bias)

    def project(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P, width) twice -> (B, KVH, P, hd) twice."""
        return split_heads(self.k(k), self.head_dim), split_heads(self.v(v), self.head_dim)


class QueryLayer(nn.Module):
    """A Llama-style layer without keys and values: RMSNorm, queries, output, RMSNorm, gated feed-forward."""

    def __init__(self, width: int, hidden: int, heads: int, head_dim: int, eps: float, activation: str = "silu"):
        super().__init__()
        self.head_dim = head_dim
        self.attention_norm = RMSNorm(width, eps)
        self.q = nn.Linear(width, heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.mlp_norm = RMSNorm(width, eps)
        self.mlp = GatedMLP(width, hidden, activation)

    def queries(self, x: Tensor) -> Tensor:
        """Normalized input (B, T, width) -> (B, H, T, hd)."""
        return split_heads(self.q(x), self.head_dim)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual, then the feed-forward half: (B, T, width)."""
        x = x + self.out(attended)
        return x + self.mlp(self.mlp_norm(x))

    def folds(self) -> tuple[Fold, ...]:
        """Values are read by other layers too, so what they feed cannot be rescaled here."""
        return Fold(self.attention_norm, self._readers()), Fold(self.mlp_norm, (self.mlp.gate, self.mlp.up))

    def _readers(self) -> tuple[nn.Linear, ...]:
        return (self.q,)


class DecoderLayer(QueryLayer):
    """A whole Llama-style layer with grouped-query self-attention."""

    def __init__(
        self, width: int, hidden: int, heads: int, kv_heads: int, head_dim: int, eps: float, activation: str = "silu"
    ):
        super().__init__(width, hidden, heads, head_dim, eps, activation)
        self.k = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v = nn.Linear(width, kv_heads * head_dim, bias=False)

    def project(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P, width) twice -> keys and values (B, KVH, P, hd)."""
        return split_heads(self.k(k), self.head_dim), split_heads(self.v(v), self.head_dim)

    def _readers(self) -> tuple[nn.Linear, ...]:
        return self.q, self.k, self.v


class EncoderLayer(nn.Module):
    """A pre-norm vision transformer layer (Dosovitskiy et al., 2020; SigLIP's variant)."""

    def __init__(self, width: int, hidden: int, heads: int, eps: float, activation: str = "gelu_tanh"):
        super().__init__()
        self.head_dim = width // heads
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, hidden, activation)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, T, width) -> (B, T, width); `bias` of the attention is additive, as of `attend`."""
        normed = self.attention_norm(x)
        q, k, v = (split_heads(project(normed), self.head_dim) for project in (self.q, self.k, self.v))
        x = x + self.out(attend(q, k, v, bias)[0])
        return x + self.mlp(self.mlp_norm(x))

    def folds(self) -> tuple[Fold, ...]:
        return (
            Fold(self.attention_norm, (self.q, self.k, self.v)),
            Fold(self.v, (self.out,)),  # attention mixes tokens and never channels
            Fold(self.mlp_norm, (self.mlp.up,)),
        )

    def units(self) -> tuple[Units, ...]:
        """See `Units`."""
        width = self.head_dim
        makers = tuple((layer, width) for layer in (self.q, self.k, self.v))
        return (Units("heads", self.q.out_features // width, makers, ((self.out, width),)),)


class VisionTransformer(nn.Module):
    """Square image -> patch embeddings -> encoder layers -> final norm.

    The patch convolution has stride equal to its kernel, so it is written as the linear layer that it is.

    Args:
        image_size, patch_size: pixels.
        registers: learned tokens that go through the layers beside the patches and are dropped after them.
        final_norm: whether there is one.
    """

    def __init__(
        self, image_size: int, patch_size: int, width: int, hidden: int, layers: int, heads: int, eps: float,
        activation: str = "gelu_tanh", registers: int = 0, final_norm: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.patch_embedding = nn.Linear(3 * patch_size**2, width)
        self.position_embedding = nn.Embedding(self.grid**2, width)
        self.registers = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.layers = nn.ModuleList(EncoderLayer(width, hidden, heads, eps, activation) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=eps) if final_norm else nn.Identity()

    def embed(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> what the layers read, (B, registers + grid**2, width)."""
        batch, patch, grid = image.shape[0], self.patch_size, self.grid
        patches = image.view(batch, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        x = self.patch_embedding(patches.reshape(batch, grid**2, 3 * patch**2)) + self.position_embedding.weight
        if self.registers is not None:
            x = torch.cat([self.registers.expand(batch, -1, -1), x], dim=1)
        return x

    def finish(self, x: Tensor) -> Tensor:
        """What the layers give -> (B, grid**2, width)."""
        return self.norm(x[:, -(self.grid**2) :])

    def parts(self, path: str) -> tuple[tuple[str, ...], ...]:
        """What `embed`, each layer and `finish` need, as paths in the module that has this at `path`."""
        embeddings = tuple(f"{path}.{name}" for name in ("patch_embedding", "position_embedding", "registers"))
        return embeddings, *numbered(f"{path}.layers", self.layers), (f"{path}.norm",)


class SeeingTower(Chain):
    """image (B, 3, H, W) in [-1, 1] -> image_tokens (B, N, width): a vision transformer, and what makes words of what it
    has seen (`words`)."""

    encoder: VisionTransformer
    WORDS: ClassVar[tuple[str, ...]]  # the layers that do

    def words(self, seen: Tensor) -> Tensor:
        """(B, grid**2, width of the transformer) -> (B, N, width)."""
        raise NotImplementedError

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """See `Chain`."""
        *parts, norm = self.encoder.parts("encoder")
        return *parts, (*norm, *self.WORDS)

    def piece(self, number: int, handed: tuple[Tensor, ...], inputs: Sequence) -> tuple[tuple[Tensor, ...], tuple]:
        """See `Chain`."""
        if number == 0:
            return (self.encoder.embed(*inputs),), ()
        (x,) = handed
        if number <= len(self.encoder.layers):
            return (self.encoder.layers[number - 1](x),), ()
        return (self.words(self.encoder.finish(x)),), ()


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """(B, g*g, D) -> (B, (g/f)**2, D*f*f): each f x f neighbourhood of tokens becomes one wide token (Idefics3)."""
    batch, length, width = x.shape
    grid = int(length**0.5)
    x = x.view(batch, grid // factor, factor, grid // factor, factor, width).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, (grid // factor) ** 2, width * factor**2)


def sinusoid(time: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """Sine-cosine embedding (B, width) of flow time (B,), periods spaced geometrically (openpi's convention)."""
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    period = min_period * (max_period / min_period) ** fraction
    phase = time.to(torch.float64)[:, None] * (2 * torch.pi / period)
    return torch.cat([phase.sin(), phase.cos()], dim=-1).to(torch.float32)
