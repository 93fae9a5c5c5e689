"""The shapes of a checkpoint, of each family: what `Architecture` describes, or what `counted` counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from vla_edge.engine.architectures import Architecture, Expert, Tower
from vla_edge.engine.counted import CountedPolicy, counted_policy
from vla_edge.engine.operations import Decoder


def architecture_of(checkpoint: str | Path) -> Architecture | CountedPolicy:
    """The shapes of a checkpoint, of which no weight is read.

    Raises:
        CheckpointError: it cannot be read, or is of a family that is not supported.
    """
    from vla_edge.policy.checkpoint import build_policy, load_checkpoint
    from vla_edge.policy.piecewise import on_meta

    loaded = load_checkpoint(checkpoint)
    with on_meta():
        policy = build_policy(loaded)
    name = loaded.directory.parent.name or loaded.directory.name
    shapes = _SHAPES.get(loaded.spec.family)
    if shapes is None:
        return counted_policy(name, loaded, policy)
    told = dict(
        name=name,
        source=str(loaded.directory),
        cameras=len(loaded.spec.cameras),
        prompt_tokens=loaded.spec.tokenizer_max_length,
        chunk=loaded.spec.chunk_size,
        action_dim=len(loaded.spec.joint_names),
        steps=loaded.spec.num_steps,
    )
    told |= shapes(policy.config)
    return Architecture(**told, executed=loaded.spec.chunk_size if told["chunk"] != loaded.spec.chunk_size else 0)


def _smolvla(c) -> dict:
    width, expert_layers = c.expert_width, range(len(c.expert_layers))
    return dict(
        kind="flow",
        towers={
            "encoder": Tower(
                c.vision_layers, c.vision_width, c.vision_hidden, c.vision_heads, (c.image_size // c.patch_size) ** 2,
                3 * c.patch_size**2,
            )
        },
        connector=((c.vision_width * c.scale_factor**2, c.text_width),),
        image_tokens=c.image_tokens,
        language=Decoder(c.text_width, c.text_hidden, c.heads, c.kv_heads, c.head_dim),
        language_layers=c.text_layers,
        vocabulary=c.vocabulary,
        marker_tokens=len(c.image_start_ids) + len(c.image_end_ids),
        state_tokens=1,
        state_inputs=c.max_state_dim,
        every=c.expert_every,
        expert=Expert(
            Decoder(width, c.expert_hidden, c.heads, c.kv_heads, c.head_dim),
            len(expert_layers),
            cross=tuple(i for i in expert_layers if c.is_cross(c.expert_layers[i])),
            inputs={
                "action_in": (c.max_action_dim, width), "mlp_in": (width, width), "mlp_out": (width, width),
            },
            outputs={"action_out": (width, c.max_action_dim)},
            time={"mlp_in": (width, width)},
        ),
    )  # fmt: skip


def _pi(c) -> dict:
    """What pi0 and pi0.5 share."""
    return dict(
        kind="flow",
        towers={
            "encoder": Tower(
                c.vision_layers, c.vision_width, c.vision_hidden, c.vision_heads, c.image_tokens, 3 * c.patch_size**2
            )
        },
        connector=((c.vision_width, c.text_width),),
        connector_name="projector",
        image_tokens=c.image_tokens,
        language=Decoder(c.text_width, c.text_hidden, c.heads, c.kv_heads, c.head_dim),
        language_layers=c.text_layers,
        vocabulary=c.vocabulary,
        state={"state_proj": (c.max_state_dim, c.expert_width)},
    )


def _pi0(c) -> dict:
    square = (c.expert_width, c.expert_width)
    inputs = {"action_in": (c.max_action_dim, c.expert_width), "mlp_in": square, "mlp_out": square}
    return _pi(c) | {"expert": _pi_expert(c, extra_tokens=1, inputs=inputs, time={"mlp_in": square})}


def _pi05(c) -> dict:
    square = (c.expert_width, c.expert_width)
    norms = {f"norms.{index}": (c.expert_width, 3 * c.expert_width) for index in range(2 * c.text_layers + 1)}
    inputs = {"action_in": (c.max_action_dim, c.expert_width)}
    expert = _pi_expert(c, inputs=inputs, time={"mlp_in": square, "mlp_out": square, **norms})
    return _pi(c) | {"state": {}, "expert": expert}  # the state is in the prompt


def _pi_expert(c, **more) -> Expert:
    shape = Decoder(c.expert_width, c.expert_hidden, c.heads, c.kv_heads, c.head_dim)
    return Expert(shape, c.text_layers, outputs={"action_out": (c.expert_width, c.max_action_dim)}, **more)


def _groot(c) -> dict:
    from vla_edge.policy.groot import TIME_CHANNELS

    width = c.width
    return dict(
        kind="flow",
        towers={
            "encoder": Tower(
                c.vision_layers, c.vision_width, c.vision_hidden, c.vision_heads, (c.image_size // c.patch_size) ** 2,
                3 * c.patch_size**2,
            )
        },
        connector=c.connector,
        image_tokens=c.image_tokens,
        language=Decoder(c.text_width, c.text_hidden, c.heads, c.kv_heads, c.head_dim),
        language_layers=c.text_layers,
        vocabulary=c.vocabulary,
        prompt_tokens=c.language_length - c.cameras,  # in whose places the pictures stand
        state={"state_in": (c.max_state_dim, c.state_hidden), "state_out": (c.state_hidden, width)},
        adapter=(c.adapter_layers, c.text_width, c.adapter_hidden, c.adapter_heads),
        expert=Expert(
            Decoder(width, c.layers_hidden, c.layers_heads, c.layers_heads, width // c.layers_heads, gated=False),
            c.layers,
            cross=c.cross_layers,
            cross_inputs=c.text_width,
            sees_prefix=False,
            extra_tokens=1 + c.future_tokens,
            outer=False,
            inputs={"action_in": (c.max_action_dim, width), "mlp_in": (width, width), "mlp_out": (width, width)},
            outputs={
                "proj_out": (width, c.output_width), "decoder": (c.output_width, c.decoder_hidden),
                "action_out": (c.decoder_hidden, c.max_action_dim),
            },
            time={
                "mlp_in": (TIME_CHANNELS, width), "mlp_out": (width, width), "action": (width, width),
                **{f"norms.{index}": (width, 2 * width) for index in range(c.layers + 1)},
            },
        ),
    )  # fmt: skip


def _groot17(c) -> dict:
    patches = 4 * c.image_tokens
    tower = Tower(c.vision_layers, c.vision_width, c.vision_hidden, c.vision_heads, patches, 3 * c.patch_size**2)
    places = ("merger", *(f"deep_mergers.{index}" for index in range(len(c.deep))))
    mergers = {f"{place}.{part}": size for place in places for part, size in zip(("up", "down"), c.connector)}
    # what is told and what is seen are a token each to the action head, whichever a layer looks at
    return _groot(c) | {"towers": {"encoder": tower}, "connector": (), "mergers": mergers, "chunk": c.chunk_size}


def _openvla(c) -> dict:
    from vla_edge.policy.bins import BINS

    widths = (sum(tower.width for tower in c.towers), *c.projector, c.width)
    head: dict[str, tuple[int, int]] = {}
    if c.head_hidden:
        blocks = {f"head.blocks.{index}.linear": (c.head_hidden, c.head_hidden) for index in range(c.head_blocks)}
        head = {
            "head.linear_in": (c.width * c.action_dim, c.head_hidden), **blocks,
            "head.linear_out": (c.head_hidden, c.action_dim),
        }  # fmt: skip
    return dict(
        kind="tokens",
        towers={
            f"encoders.{index}": Tower(
                t.layers, t.width, t.hidden, t.heads, c.image_tokens + t.registers, 3 * t.patch_size**2
            )
            for index, t in enumerate(c.towers)
        },
        connector=tuple(zip(widths, widths[1:])),
        connector_name="projector",
        image_tokens=c.image_tokens,
        language=Decoder(c.width, c.hidden, c.heads, c.kv_heads, c.head_dim),
        language_layers=c.layers,
        vocabulary=c.vocabulary,
        scored=0 if c.head_hidden else BINS,
        reader="act" if c.head_hidden else "prefill",
        state_tokens=int(c.proprio_dim > 0),
        state={"state_in": (c.proprio_dim, c.width), "state_out": (c.width, c.width)} if c.proprio_dim else {},
        parallel=c.head_hidden > 0,
        head=head,
    )


_SHAPES: Mapping[str, Callable[..., dict]] = {
    "smolvla": _smolvla, "pi0": _pi0, "pi05": _pi05, "openvla": _openvla, "groot": _groot,
    "groot17": _groot17,
}  # fmt: skip
