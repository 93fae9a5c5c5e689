"""Blocks of layers that tell what things cost on a computer. None has a product of a shipped policy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vla_edge.engine.counted import count_stage
from vla_edge.engine.operations import Attention, Decoder, Operation, Pointwise, Product, StageWork, encoder_layer
from vla_edge.engine.cost import OWN, PACKED, ROUNDED
from vla_edge.engine.native import library
from vla_edge.engine.precision import LayerPrecision


@dataclass(frozen=True)
class Variant:
    """How a block is stored, and how it is multiplied: `options` of the ONNX Runtime backend, which `way` is the name
    of."""

    precision: LayerPrecision
    way: str = PACKED
    options: tuple[tuple[str, object], ...] = (("fold_weights", False),)


FINE = 16  # inputs in a group
VARIANTS = {
    "float32": Variant(LayerPrecision("float32")),
    "int8": Variant(LayerPrecision("int8", "int8-dynamic")),
    "int4": Variant(LayerPrecision("int4", group=64)),
    "int4 rounded": Variant(LayerPrecision("int4", group=64), ROUNDED, (("fold_weights", False), ("dynamic", True))),
    "int8 own": Variant(LayerPrecision("int8", "int8-dynamic"), OWN, (("own_kernels", True),)),
    "int4 own": Variant(LayerPrecision("int4", group=64), OWN, (("own_kernels", True),)),
    "int4 own, fine groups": Variant(LayerPrecision("int4", group=FINE), OWN, (("own_kernels", True),)),
}
LARGE = 5e7  # weights


@dataclass(frozen=True)
class Block:
    """Layers of one size.

    Attributes:
        kind: "encoder" or "decoder"; "products" alone, some with more bytes than caches hold; "pointwise" (norm,
            activation, residual) or "attention" alone, which tell apart what layers always have together; "residual" of
            a ResNet, over as many places as a square of `rows` has, or "grouped" with group normalization; "part" of a
            U-Net over time.
    """

    kind: str
    layers: int
    rows: int
    width: int
    hidden: int
    heads: int = 1
    kv_heads: int = 1

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.width, self.hidden, self.heads, self.kv_heads, self.width // self.heads)

    @property
    def variants(self) -> tuple[str, ...]:
        """That it is run in: convolutions stay what they are in float32 alone, and become products else; attention alone
        has our kernel too, which comes with rounded weights; blocks that are there to hold more weights in 4 bits than
        caches do would be too large in more."""
        able = {"attention": ("float32", "int8 own")}.get(self.kind, ("float32",))
        if self.kind in ("encoder", "decoder", "products"):
            able = tuple(VARIANTS)
        large = 2 * self.layers * self.width * self.hidden > LARGE
        return tuple(
            name for name, variant in VARIANTS.items()
            if name in able and (not large or variant.precision.weights == "int4") and (variant.way != OWN or library() is not None)
            and (self.kind == "products" or variant.precision.group != FINE)
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its input."""
        side = math.isqrt(self.rows)
        return (1, side, side, self.width) if self.kind in ("residual", "grouped") else (1, self.rows, self.width)

    def work(self) -> StageWork:
        """What one call computes."""
        if self.kind in ("residual", "grouped", "part"):
            return StageWork("block", 1, "call", count_stage(block_stage(self), named=False))
        operations: list[Operation] = []
        size = self.rows * self.width
        for index in range(self.layers):
            name = f"layers.{index}"
            if self.kind == "encoder":
                operations += encoder_layer(name, self.rows, self.width, self.hidden, self.heads)
            elif self.kind == "decoder":
                operations += self.decoder.layer(name, self.rows, self.rows)
            elif self.kind == "pointwise":
                operations.append(Pointwise(2 * size, 3 * size, 3))
            elif self.kind == "attention":
                operations += [
                    Pointwise(0, 6 * size, 3),  # queries, keys and values are told apart by a sum each
                    Attention(self.rows, self.rows, self.heads, self.kv_heads, self.width // self.heads),
                ]
            else:
                operations += [
                    Product(f"{name}.0", self.rows, self.width, self.hidden),
                    Product(f"{name}.1", self.rows, self.hidden, self.width),
                ]
        return StageWork("block", 1, "call", tuple(operations))


BLOCKS = (
    Block("encoder", 3, 100, 96, 288, 3),
    Block("encoder", 2, 256, 160, 640, 5),
    Block("encoder", 1, 196, 384, 1152, 6),
    Block("encoder", 2, 52, 480, 1344, 8),
    Block("decoder", 1, 80, 224, 448, 7, 7),
    Block("decoder", 4, 40, 128, 256, 4, 2),
    Block("decoder", 2, 24, 256, 512, 8, 4),
    Block("decoder", 1, 128, 384, 1024, 6, 2),
    Block("encoder", 1, 224, 1024, 4096, 16),
    Block("decoder", 1, 176, 1536, 6144, 6, 1),
    Block("products", 3, 36, 192, 448),
    Block("products", 10, 4, 64, 128),
    Block("products", 2, 1, 448, 1536),
    Block("products", 1, 1, 2048, 8192),
    Block("products", 2, 1, 3072, 8192),
    Block("products", 2, 5, 3072, 8192),
    Block("products", 3, 44, 640, 1088),
    Block("products", 1, 72, 1280, 3840),
    Block("products", 1, 20, 1536, 4608),
    Block("products", 1, 192, 1152, 3712),
    Block("products", 1, 96, 2304, 6144),
    Block("pointwise", 3, 90, 320, 0),
    Block("pointwise", 6, 20, 112, 0),
    Block("attention", 2, 112, 192, 0, 6, 6),
    Block("attention", 3, 48, 96, 0, 2, 2),
    Block("attention", 1, 224, 1280, 0, 16, 16),
    Block("attention", 1, 288, 512, 0, 2, 2),
    Block("residual", 2, 24 * 24, 48, 0),
    Block("residual", 1, 12 * 12, 160, 0),
    Block("grouped", 1, 30 * 30, 48, 0),
    Block("grouped", 1, 10 * 10, 144, 0),
    Block("part", 2, 24, 96, 0),
    Block("part", 1, 12, 320, 0),
    Block("part", 2, 6, 256, 0),
    Block("part", 16, 4, 448, 0),
)


def block_layers(module, variant: str, runtime) -> dict:
    """Layer -> what is exported for it."""
    from torch import nn

    from vla_edge.compress.apply import compress_layer
    from vla_edge.compress.steps import Keep, Quantize

    precision = VARIANTS[variant].precision
    step = {
        "float32": Keep(("*",)),
        "int8": Quantize(("*",), "int8", "int8-dynamic", reduce_range="auto"),
        "int4": Quantize(("*",), "int4", group_size=precision.group),
    }[precision.weights]
    reduced = runtime.gains_by_reduced_range()
    return {
        name: compress_layer(name, layer, step, reduce_range=reduced)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }


def block_stage(block: Block):
    """The block as a stage of random weights."""
    import torch
    from torch import nn

    from vla_edge.policy.blocks import DecoderLayer, EncoderLayer, attend, causal_bias, rotary, rotate, split_heads
    from vla_edge.policy.diffusion import Part
    from vla_edge.policy.resnet import BasicBlock
    from vla_edge.policy.stages import Stage, TensorSpec

    torch.manual_seed(0)
    shape = block.decoder

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            make = {
                "encoder": lambda: EncoderLayer(block.width, block.hidden, block.heads, 1e-6),
                "decoder": lambda: DecoderLayer(
                    block.width, block.hidden, block.heads, block.kv_heads, shape.head_dim, 1e-6
                ),
                "products": lambda: nn.Sequential(
                    nn.Linear(block.width, block.hidden, bias=False), nn.Linear(block.hidden, block.width, bias=False)
                ),
                "pointwise": lambda: nn.Sequential(nn.LayerNorm(block.width), nn.GELU(approximate="tanh")),
                "attention": nn.Identity,
                "residual": lambda: BasicBlock(block.width, block.width, 1, grouped=False),
                "grouped": lambda: BasicBlock(block.width, block.width, 1, grouped=True),
                "part": lambda: Part(block.width, block.width, 5, groups=8),
            }[block.kind]
            self.layers = nn.ModuleList(make() for _ in range(block.layers))
            cos, sin = rotary(torch.arange(block.rows)[None], shape.head_dim)
            mask = causal_bias(block.rows)[None, None]
            for name, table in (("cos", cos), ("sin", sin), ("mask", mask)):
                self.register_buffer(name, table, persistent=False)

        def forward(self, x):
            for layer in self.layers:
                x = self.step(layer, x)
            return (x,)

        def step(self, layer, x):
            if block.kind == "pointwise":
                return x + layer(x)
            if block.kind == "attention":
                q, k, v = (split_heads(x + shift, shape.head_dim) for shift in (0.1, 0.2, 0.3))
                return attend(q, k, v)[0]
            if block.kind != "decoder":
                return layer(x)
            normed = layer.attention_norm(x)
            k, v = layer.project(normed, normed)
            q, k = (rotate(tensor, self.cos, self.sin) for tensor in (layer.queries(normed), k))
            return layer.finish(x, attend(q, k, v, self.mask)[0])

    return Stage("block", Layers().eval(), (TensorSpec("x", block.shape),), (TensorSpec("y", block.shape),))
