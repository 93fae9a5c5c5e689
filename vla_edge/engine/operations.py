"""What a stage computes, as a list of operations with shapes: all that a prediction of its time looks at.

Layers are named as a recipe names them ("prefix.layers.3.mlp.up"), so that a recipe says what each product is done in.
Shapes are of batch 1. One operation is taken to be one kernel, or as many as it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """A linear layer: (rows, inputs) times the layer's (inputs, outputs)."""

    layer: str
    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.weights

    @property
    def weights(self) -> int:
        """How many the layer has."""
        return self.inputs * self.outputs

    @property
    def moved(self) -> int:
        """Numbers that come in and go out."""
        return self.rows * (self.inputs + self.outputs)


@dataclass(frozen=True)
class Convolution(Product):
    """The product that a convolution is: every place's patch, (rows, taps * channels), times the layer.

    Attributes:
        kernel: taps along each dimension. seen: numbers that it slides over.
    """

    kernel: tuple[int, ...]
    seen: int

    @property
    def moved(self) -> int:
        return self.seen + self.rows * self.outputs


@dataclass(frozen=True)
class Attention:
    """Queries of `rows` tokens over `keys` keys and values, which heads share in groups where `kv_heads` is less than
    `heads`. `masked`: whether something is added to the scores."""

    rows: int
    keys: float
    heads: int
    kv_heads: int
    head_dim: int
    masked: bool = False

    @property
    def flops(self) -> float:
        """Both products, scores and values."""
        return 2 * 2 * self.rows * self.keys * self.heads * self.head_dim

    @property
    def scores(self) -> float:
        """Numbers that the softmax runs over."""
        return self.rows * self.keys * self.heads

    @property
    def queries(self) -> int:
        """Numbers of the queries, and of what comes out."""
        return self.rows * self.heads * self.head_dim

    @property
    def cached(self) -> float:
        """Keys and values that are read."""
        return 2 * self.keys * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Pointwise:
    """Work on each number: `curved` go through norms and activations, `copied` are read or written by residuals, masks
    and copies. By `kernels` kernels; where it `joins`, by that of the work on each number before it, in runtimes that
    compile for a GPU."""

    curved: float
    copied: float
    kernels: int
    joins: bool = False

    @property
    def numbers(self) -> float:
        """Read and written in all."""
        return 2 * self.curved + self.copied


@dataclass(frozen=True)
class Rotation:
    """Rotary embedding of `tensors` tensors, of `numbers` numbers together."""

    numbers: int
    tensors: int


@dataclass(frozen=True)
class GroupNorm:
    """Group normalization of `numbers` numbers, which PyTorch and TensorRT do in one kernel and ONNX in ten operators."""

    numbers: int


Operation = Product | Attention | Pointwise | Rotation | GroupNorm


@dataclass(frozen=True)
class StageWork:
    """One stage of an inference.

    Attributes:
        name: as in `policy.stages`; autoregressive policies have vision, prefill and decode.
        calls: in one inference. per: what a call is for: "camera", "observation", "flow step", "token" or "pass".
        operations: of one call.
    """

    name: str
    calls: float
    per: str
    operations: tuple[Operation, ...]

    @property
    def products(self) -> Iterator[Product]:
        return (operation for operation in self.operations if isinstance(operation, Product))


def encoder_layer(name: str, rows: int, width: int, hidden: int, heads: int) -> tuple[Operation, ...]:
    """A pre-norm layer with a plain feed-forward, as of vision transformers."""
    return (
        *(Product(f"{name}.{part}", rows, width, width) for part in ("q", "k", "v")),
        Attention(rows, rows, heads, heads, width // heads),
        Product(f"{name}.out", rows, width, width),
        Product(f"{name}.mlp.up", rows, width, hidden),
        Product(f"{name}.mlp.down", rows, hidden, width),
        # two norms, an activation; two residuals (read, read, write)
        Pointwise(rows * (2 * width + hidden), rows * 6 * width, 5),
    )


@dataclass(frozen=True)
class Decoder:
    """Shapes of a layer of a language model or of an action expert.

    Attributes:
        gated: a feed-forward of three matrices (SwiGLU), otherwise two.
    """

    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    gated: bool = True

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def layer(self, name: str, rows: int, keys: float, own_keys: bool = True) -> tuple[Operation, ...]:
        """`rows` tokens that see `keys` keys, themselves included; without `own_keys`, only those of others."""
        queries = self.heads * self.head_dim
        made = ("k", "v") if own_keys else ()
        ups = ("gate", "up") if self.gated else ("up",)
        rotated = rows * (queries + (self.kv_width if own_keys else 0))
        return (
            Product(f"{name}.q", rows, self.width, queries),
            *(Product(f"{name}.{part}", rows, self.width, self.kv_width) for part in made),
            Rotation(rotated, 1 + len(made) // 2),
            Attention(rows, keys, self.heads, self.kv_heads, self.head_dim, masked=True),
            Product(f"{name}.out", rows, queries, self.width),
            *(Product(f"{name}.mlp.{part}", rows, self.width, self.hidden) for part in ups),
            Product(f"{name}.mlp.down", rows, self.hidden, self.width),
            # two norms, an activation; two residuals, and the product of gate and activation
            Pointwise(rows * (2 * self.width + self.hidden), rows * (6 * self.width + (len(ups) - 1) * self.hidden), 5),
        )

    def keys_and_values(self, name: str, rows: int, inputs: int) -> tuple[Operation, ...]:
        """The projections alone."""
        return tuple(Product(f"{name}.{part}", rows, inputs, self.kv_width) for part in ("k", "v"))


def layer_shapes(works: Sequence[StageWork]) -> dict[str, tuple[int, int]]:
    """Layer -> (inputs, outputs), each once however many stages use it."""
    return {product.layer: (product.inputs, product.outputs) for work in works for product in work.products}
