"""The shapes of a policy, and what each of its stages computes.

    vision   once per camera       towers -> connector -> image tokens
    prefix   once per observation  language model over image, instruction and state -> keys and values (flow policies)
    denoise  once per flow step    action expert over the chunk
    prefill  once per observation  the same language model (policies whose actions are tokens)
    decode   once per token, or per pass over several

`works` turns shapes and a `Workload` into the operations of each stage. Layers are named as `policy.smolvla` names
them, so that recipes match; a test holds the list to that of a real policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vla_edge.engine.operations import Decoder, Operation, Pointwise, Product, StageWork, encoder_layer
from vla_edge.engine.workload import Workload
from vla_edge.policy import draft_shapes
from vla_edge.policy.bins import BINS


@dataclass(frozen=True)
class Tower:
    """A vision transformer: `tokens` patches of `patch_inputs` numbers each."""

    layers: int
    width: int
    hidden: int
    heads: int
    tokens: int
    patch_inputs: int


@dataclass(frozen=True)
class Expert:
    """A flow policy's action head.

    Attributes:
        shape, layers: of its transformer.
        cross: indices of the layers that attend to keys and values which the prefix stage projects for them.
        cross_inputs: width those projections read; 0 for the language model's keys and values.
        sees_prefix: whether the other layers see the language model's keys beside their own.
        extra_tokens: rows beside the chunk, such as the state. outer: whether they, too, go through what follows.
        inputs, outputs: products before and after the layers, by name.
        time: products of flow time alone, done once when an engine is loaded.
    """

    shape: Decoder
    layers: int
    cross: tuple[int, ...] = ()
    cross_inputs: int = 0
    sees_prefix: bool = True
    extra_tokens: int = 0
    outer: bool = True
    inputs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    outputs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    time: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """Shapes of a policy.

    Attributes:
        name: of it. kind: "flow" or "tokens". source: where the shapes are published.
        towers: name -> vision transformer, each sees every camera.
        connector: (inputs, outputs) of the products that each of `image_tokens` goes through. connector_name: of them.
        mergers: the same where they have names of their own.
        image_tokens: of one camera as the language model sees them. marker_tokens: around each camera's.
        language, language_layers, vocabulary: of the language model.
        every: an expert layer stands beside every n-th language layer.
        adapter: (layers, width, hidden, heads) of a transformer over the language model's output, or none.
        prompt_tokens, state_tokens, cameras, chunk, steps: what an inference has unless a `Workload` says otherwise.
        executed: actions of a chunk, where a flow leads more rows to actions; all of them when 0.
        state_inputs: width of the state that is projected to a token.
        action_dim: numbers of one action, and tokens of one in policies of kind "tokens".
        parallel: whether all action tokens are predicted in one pass, as OpenVLA-OFT is trained to.
        head: products after the language model, by name; each runs on the rows of one action, `chunk` times.
        state: products of one row that make a token of the state, by name, beside or instead of that of `state_inputs`.
        reader: what the stage of the language model is called there. scored: words of which it gives scores; the whole
            vocabulary when None.
        expert: of flow policies.
    """

    name: str
    kind: str
    source: str
    towers: Mapping[str, Tower]
    connector: tuple[tuple[int, int], ...]
    image_tokens: int
    language: Decoder
    language_layers: int
    vocabulary: int
    cameras: int = 1
    prompt_tokens: int = 20
    chunk: int = 1
    action_dim: int = 7
    steps: int = 1
    marker_tokens: int = 0
    state_tokens: int = 0
    state_inputs: int = 32
    every: int = 1
    parallel: bool = False
    adapter: tuple[int, int, int, int] | None = None
    head: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    state: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    reader: str = "prefill"
    scored: int | None = None
    connector_name: str = "connector"
    mergers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    executed: int = 0
    expert: Expert | None = None

    prunes_vision = True

    @property
    def is_flow(self) -> bool:
        return self.kind == "flow"

    @property
    def decodes(self) -> bool:
        """Whether its actions are tokens."""
        return self.kind == "tokens"

    @property
    def embedding_numbers(self) -> int:
        """Of the table of words."""
        return self.vocabulary * self.language.width

    @property
    def language_weights(self) -> int:
        """Of the language model's feed-forwards, which are most of it."""
        return self.language_layers * self.language.width * self.language.hidden * (3 if self.language.gated else 2)

    def works(self, workload: Workload) -> tuple[StageWork, ...]:
        """Every stage of one inference."""
        workload.check(self)
        vision = self._vision(workload)
        language = self._flow(workload) if self.is_flow else self._tokens(workload)
        return (*vision, *language)

    def prefix_tokens(self, workload: Workload) -> int:
        """P: what the language model goes on with of one observation."""
        seen = round(self.image_tokens * workload.keep_vision)
        return workload.cameras * (seen + self.marker_tokens) + workload.prompt_tokens + self.state_tokens

    def left_out(self, workload: Workload) -> int:
        """Image tokens that its first layers alone read."""
        return workload.cameras * (self.image_tokens - round(self.image_tokens * workload.keep_vision))

    def cache_numbers(self, workload: Workload) -> int:
        """Keys and values of one observation, and of the tokens that follow it."""
        tokens = self.prefix_tokens(workload)
        if not self.is_flow:
            return (tokens + workload.action_tokens(self)) * 2 * self.language.kv_width * self.language_layers
        expert = self.expert
        own = expert.layers - len(expert.cross) if expert.sees_prefix else 0
        return 2 * tokens * (own * self.language.kv_width + len(expert.cross) * expert.shape.kv_width)

    def _vision(self, workload: Workload) -> tuple[StageWork, ...]:
        operations: list[Operation] = []
        for name, tower in self.towers.items():
            place = f"vision.{name}"
            operations.append(Product(f"{place}.patch_embedding", tower.tokens, tower.patch_inputs, tower.width))
            for index in range(tower.layers):
                operations += encoder_layer(
                    f"{place}.layers.{index}", tower.tokens, tower.width, tower.hidden, tower.heads
                )
            # pixels put in order, positions added, the last norm
            pixels = tower.tokens * tower.patch_inputs
            operations.append(Pointwise(tower.tokens * tower.width, 2 * pixels + 3 * tower.tokens * tower.width, 4))
        several = len(self.connector) > 1
        names = (f"{self.connector_name}.{i}" if several else self.connector_name for i in range(len(self.connector)))
        for name, (inputs, outputs) in (*zip(names, self.connector), *self.mergers.items()):
            operations += [
                Product(f"vision.{name}", self.image_tokens, inputs, outputs), Pointwise(0, 2 * self.image_tokens * inputs, 1)
            ]  # fmt: skip
        return (StageWork("vision", workload.cameras, "camera", tuple(operations)),) if operations else ()

    def _flow(self, workload: Workload) -> tuple[StageWork, ...]:
        expert, tokens = self.expert, self.prefix_tokens(workload)
        prefix: list[Operation] = []
        if self.state_tokens:
            prefix.append(Product("prefix.state_proj", self.state_tokens, self.state_inputs, self.language.width))
        prefix += [Product(f"prefix.{name}", 1, *shape) for name, shape in self.state.items()]
        whole = self.language_layers - (0 if self.adapter else 1)
        for index in range(whole):
            seen = tokens + (self.left_out(workload) if index < workload.keep_after else 0)
            prefix += self.language.layer(f"prefix.layers.{index}", seen, seen)
        if self.adapter:
            layers, width, hidden, heads = self.adapter
            for index in range(layers):
                prefix += encoder_layer(f"prefix.adapter.{index}", tokens, width, hidden, heads)
        else:  # nothing reads what the last layer gives, only its keys and values
            prefix += self.language.keys_and_values("prefix.last", tokens, self.language.width)
        # embeddings joined, tables and mask made, keys and values gathered
        joined = tokens * (4 * self.language.width + 4 * self.language.head_dim + tokens)
        prefix.append(Pointwise(0, joined + 2 * self.cache_numbers(workload), 16))
        for index in expert.cross:
            inputs = expert.cross_inputs or self.language.kv_width
            name = f"prefix.cross.{index * self.every}"
            prefix += expert.shape.keys_and_values(name, tokens, inputs)
        rows = workload.chunk + expert.extra_tokens
        outer = rows if expert.outer else workload.chunk
        denoise = [Product(f"denoise.{name}", outer, *shape) for name, shape in expert.inputs.items()]
        for index in range(expert.layers):
            cross = index in expert.cross
            keys = tokens if cross else rows + (tokens if expert.sees_prefix else 0)
            denoise += expert.shape.layer(f"denoise.layers.{index}", rows, keys, own_keys=not cross)
            if not cross and expert.sees_prefix:  # keys and values of the prefix and of its own, one after the other
                denoise.append(Pointwise(0, 2 * keys * 2 * expert.shape.kv_width, 2))
        denoise += [Product(f"denoise.{name}", outer, *shape) for name, shape in expert.outputs.items()]
        # what time adds, the last norm, the mask
        width = expert.shape.width
        denoise.append(Pointwise(2 * rows * width, rows * (2 * width + rows + tokens), 8))
        time = tuple(Product(f"time.{name}", 1, *shape) for name, shape in expert.time.items())
        return (
            StageWork("prefix", 1, "observation", tuple(prefix)),
            *((StageWork("time", 0, "engine", time),) if time else ()),
            StageWork("denoise", workload.steps, "flow step", tuple(denoise)),
        )

    def _tokens(self, workload: Workload) -> tuple[StageWork, ...]:
        scheme, actions = workload.scheme(self), workload.action_tokens(self)
        tokens = self.prefix_tokens(workload)
        seen = tokens + (actions if scheme.in_prefill else 0)
        head = tuple(
            Product(f"{self.reader}.{name}", rows, *shape)
            for rows, layers in ((workload.chunk, self.head), (1, self.state))
            for name, shape in layers.items()
        )
        prefill = self._pass(
            seen, seen, actions if scheme.in_prefill else 1, self.left_out(workload), workload.keep_after
        )
        stages = [StageWork(self.reader, 1, "observation", (*prefill, *head))]
        if scheme.passes:
            keys = tokens + actions / 2  # on average, as the cache grows
            stages.append(
                StageWork("decode", scheme.passes, scheme.per, self._pass(scheme.rows, keys, scheme.rows))
            )
        if scheme.drafts:
            stages.append(StageWork("draft", scheme.drafts, "pass", self._draft(actions, workload.draft)))
        return tuple(stages)

    def _draft(self, places: int, proposed: int) -> tuple[Operation, ...]:
        """A block draft (`policy.openvla_draft`) over all places of a chunk and what the language model found."""
        width, heads, rows = draft_shapes.WIDTH, draft_shapes.WIDTH // draft_shapes.HEAD_DIM, places + 1
        layer = Decoder(width, draft_shapes.HIDDEN * width, heads, heads, draft_shapes.HEAD_DIM)
        layers = [layer.layer(f"draft.layers.{index}", rows, rows) for index in range(draft_shapes.LAYERS)]
        return (
            Product("draft.fuse", 1, self.language.width, width), *sum(layers, ()),
            Product("draft.head", proposed, width, BINS),
        )  # fmt: skip

    def _pass(self, rows: int, keys: float, logits: int, more: int = 0, first: int = 0) -> tuple[Operation, ...]:
        """Over all layers, of which the `first` have so many rows `more`."""
        layers: list[Operation] = []
        for index in range(self.language_layers):
            extra = more if index < first else 0
            layers += self.language.layer(f"{self.reader}.layers.{index}", rows + extra, keys + extra)
        return (*layers, *((self._logits(logits),) if self._scored else ()))

    @property
    def _scored(self) -> int:
        return self.vocabulary if self.scored is None else self.scored

    def _logits(self, rows: int) -> Product:
        return Product(f"{self.reader}.head", rows, self.language.width, self._scored)

    def part(self, layer: str) -> str:
        """Of the engine that a layer belongs to: "vision", "language body", "action head" or "draft"."""
        stage, _, rest = layer.partition(".")
        if stage in ("denoise", "time") or stage == self.reader and rest in self.head:
            return "action head"
        return stage if stage in ("vision", "draft") else "language body"
