"""A GR00T N1.5 out of Isaac-GR00T's Hugging Face directory or LeRobot's `pretrained_model/`.

Both use the same names, but for a `_groot_model.` in front of LeRobot's. Sizes are those of the tensors; heads, which no
tensor tells, those of the backbone's config.json and of the action head's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vla_edge.policy.checkpoint_files import CheckpointError, Document, read_json, read_tokenizer
from vla_edge.policy.families import Description
from vla_edge.policy.groot_layout import (
    IMAGE,
    backbone_directory,
    embodiment,
    groot_spec,
    head_config,
    tokenizer_path,
)
from vla_edge.policy.lerobot_layout import check_options
from vla_edge.policy.weights import OnDemand, Weights

if TYPE_CHECKING:
    from vla_edge.policy.checkpoint import Checkpoint
    from vla_edge.policy.groot import GrootConfig
    from vla_edge.policy.spec import PolicySpec

# what transformers and diffusers leave out of a config.json
_VISION_DEFAULTS = {"num_attention_heads": 12, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
_TEXT_DEFAULTS = {"head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None}
_BACKBONE_OPTIONS = {"select_layer": -1, "pad2square": False, "downsample_ratio": 0.5}
_DIT_DEFAULTS = {"positional_embeddings": "sinusoidal", "interleave_self_attention": False}
_DIT_OPTIONS = {
    "norm_type": "ada_norm", "activation_fn": "gelu-approximate", "attention_bias": True, "upcast_attention": False,
    "norm_elementwise_affine": False, "norm_eps": 1e-5, "positional_embeddings": None, "interleave_self_attention": True,
}  # fmt: skip

_EAGLE, HEAD = "backbone.eagle_model.", "action_head."
_VISION, _TEXT = f"{_EAGLE}vision_model.vision_model.", f"{_EAGLE}language_model.model."
DIT, ADAPTER = f"{HEAD}model.", f"{HEAD}vl_self_attention.transformer_blocks."
_ENCODER_LAYER = {
    "attention_norm": "layer_norm1", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "out": "self_attn.out_proj", "mlp_norm": "layer_norm2", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
}  # fmt: skip
TEXT_LAYER = {
    "attention_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}  # fmt: skip
_BLOCK = {
    "attention_norm": "norm1", "q": "attn1.to_q", "k": "attn1.to_k", "v": "attn1.to_v", "out": "attn1.to_out.0",
    "mlp_norm": "norm3", "mlp.up": "ff.net.0.proj", "mlp.down": "ff.net.2",
}  # fmt: skip
_SINGLE = {
    "vision.encoder.patch_embedding": f"{_VISION}embeddings.patch_embedding",
    "vision.encoder.position_embedding": f"{_VISION}embeddings.position_embedding",
    "vision.encoder.norm": f"{_VISION}post_layernorm",
    "vision.connector": f"{_EAGLE}mlp1.0",
    "vision.connector_norm": f"{_EAGLE}mlp1.0",
    "prefix.embedding": f"{_TEXT}embed_tokens",
    "prefix.norm": f"{_TEXT}norm",
}
_HEAD_SINGLE = {
    "prefix.adapter_norm": f"{HEAD}vlln",
    "time.mlp_in": f"{DIT}timestep_encoder.timestep_embedder.linear_1",
    "time.mlp_out": f"{DIT}timestep_encoder.timestep_embedder.linear_2",
    "denoise.proj_out": f"{DIT}proj_out_2",
}
OWN = {
    "prefix.state_in": "state_encoder.layer1", "prefix.state_out": "state_encoder.layer2",
    "denoise.action_in": "action_encoder.W1", "denoise.mlp_in": "action_encoder.W2", "time.action": "action_encoder.W2",
    "denoise.mlp_out": "action_encoder.W3", "denoise.decoder": "action_decoder.layer1",
    "denoise.action_out": "action_decoder.layer2",
}  # fmt: skip
"""The embodiment's own: weight (embodiments, inputs, outputs) and bias (embodiments, outputs)."""
TABLES = {"denoise.places": f"{HEAD}position_embedding.weight", "denoise.future": f"{HEAD}future_tokens.weight"}


def describe(directory: Path, config: Document) -> Description:
    """See `families`."""
    if (version := str(config.get("model_version", "n1.5"))).lower() not in ("n1.5", "gr00t_n1_5"):
        raise CheckpointError(f"{config.path} is of GR00T {version}; this version loads N1.5")
    backbone = backbone_directory(directory, config)
    return Description(
        groot_spec(directory, config, backbone), tokenizer_path(backbone), read_json(backbone / "config.json")
    )


def build(checkpoint: Checkpoint, weights: Weights):
    """See `families`."""
    from vla_edge.policy.groot import Groot

    return Groot(groot_config(checkpoint, plain(weights)))


def tensors(policy, checkpoint: Checkpoint, weights: Weights) -> OnDemand:
    """See `families`."""
    number = embodiment(checkpoint.directory, checkpoint.config)
    return embodied(policy, plain(weights), number, file_name, _shaped, _is_unused)


def embodied(
    policy, weights: Weights, number: int, name_of: Callable, shaped: Callable, is_unused: Callable[[str], bool]
) -> OnDemand:
    """Values for a policy's state dict, with the networks of embodiment `number`.

    Args:
        name_of: (our parameter, shapes) -> the original's. shaped: as of `head_shaped`. is_unused: of the files' tensors.

    Raises:
        CheckpointError: a tensor is missing or too much, or there is no such embodiment.
    """
    likes = policy.state_dict()
    spelled = {name: name_of(name, policy.config) for name in likes}
    weights.check(spelled.values(), is_unused)
    embodiments = weights.shape(f"{HEAD}state_encoder.layer1.W")[0]
    if not 0 <= number < embodiments:
        raise CheckpointError(f"embodiment {number} was asked for, and {weights.where} has {embodiments}; name another tag")

    def made(name: str):
        return shaped(name, weights[spelled[name]], likes[name], number)

    return OnDemand(likes, made)


def groot_config(checkpoint: Checkpoint, weights: Weights) -> GrootConfig:
    """Shapes for `Groot`.

    Raises:
        CheckpointError: a tensor is missing, or the shapes contradict a config.json or ask for what is not done here.
    """
    from vla_edge.policy.groot import GrootConfig

    spec, backbone = checkpoint.spec, checkpoint.backbone
    head = head_config(checkpoint.directory, checkpoint.config)
    _check(backbone, head)
    vision = Document(backbone.path, _VISION_DEFAULTS | backbone["vision_config"])
    text = Document(backbone.path, _TEXT_DEFAULTS | backbone["text_config"])
    dit, adapter = head["action_head_cfg"]["diffusion_model_cfg"], head["action_head_cfg"]["vl_self_attention_cfg"]
    language = text_sizes(weights, _TEXT, text.count("head_dim"), head["backbone_cfg"])
    vision_width, _, patch, _ = weights.shape(f"{_VISION}embeddings.patch_embedding.weight")
    tokens = fitting_tokenizer(checkpoint, language["vocabulary"])
    return GrootConfig(
        cameras=len(spec.cameras),
        image_size=spec.cameras[0].height,
        patch_size=patch,
        shuffle=2 if backbone.get("use_pixel_shuffle", True) else 1,
        vision_width=vision_width,
        vision_hidden=weights.shape(f"{_VISION}encoder.layers.0.mlp.fc1.weight")[0],
        vision_layers=weights.count(f"{_VISION}encoder.layers.{{}}.mlp.fc1.weight"),
        vision_heads=vision.count("num_attention_heads"),
        vision_eps=vision["layer_norm_eps"],
        connector=tuple(
            weights.shape(f"{_EAGLE}mlp1.{place}.weight")[::-1] for place in _connector(backbone.get("mlp_connector_layers", 2))
        ),
        **language,
        text_eps=text["rms_norm_eps"],
        wavelength=float(text["rope_theta"]),
        image_places=image_places(checkpoint, tokens, IMAGE, backbone["image_token_index"]),
        language_length=spec.tokenizer_max_length,
        future_tokens=weights.shape(TABLES["denoise.future"])[0],
        time_buckets=head["action_head_cfg"].get("num_timestep_buckets", 1000),
        chunk_size=spec.chunk_size,
        **head_sizes(weights, dit, adapter, spec),
    )


def text_sizes(weights: Weights, text: str, head_dim: int, backbone: Document) -> dict:
    """Entries of `GrootConfig` for the language model, whose tensors' names begin with `text`.

    Args:
        backbone: which of its layers the action head reads (select_layer).

    Raises:
        CheckpointError: it has not as many.
    """
    layers = weights.count(f"{text}layers.{{}}.mlp.up_proj.weight")
    if (selected := backbone.count("select_layer")) != layers:
        raise CheckpointError(
            f"{backbone.path} reads what layer {selected} of the language model gives, and {weights.where} has {layers} "
            "layers; take both from the same training run"
        )
    vocabulary, width = weights.shape(f"{text}embed_tokens.weight")
    return dict(
        vocabulary=vocabulary,
        text_width=width,
        text_hidden=weights.shape(f"{text}layers.0.mlp.up_proj.weight")[0],
        text_layers=layers,
        heads=weights.shape(f"{text}layers.0.self_attn.q_proj.weight")[0] // head_dim,
        kv_heads=weights.shape(f"{text}layers.0.self_attn.k_proj.weight")[0] // head_dim,
        head_dim=head_dim,
    )


def head_sizes(weights: Weights, dit: Document, adapter: Document, spec: PolicySpec) -> dict:
    """Entries of `GrootConfig` for the action head, of N1.5 or of N1.7.

    Args:
        dit, adapter: what config.json says of the diffusion transformer and of the layers over the language model's output.
    """
    return dict(
        adapter_layers=adapter.count("num_layers"),
        adapter_hidden=weights.shape(f"{ADAPTER}0.ff.net.0.proj.weight")[0],
        adapter_heads=adapter.count("num_attention_heads"),
        width=dit.count("num_attention_heads") * dit.count("attention_head_dim"),
        layers=dit.count("num_layers"),
        layers_hidden=weights.shape(f"{DIT}transformer_blocks.0.ff.net.0.proj.weight")[0],
        layers_heads=dit.count("num_attention_heads"),
        output_width=weights.shape(f"{DIT}proj_out_2.weight")[0],
        state_hidden=weights.shape(f"{HEAD}state_encoder.layer1.W")[2],
        decoder_hidden=weights.shape(f"{HEAD}action_decoder.layer1.W")[2],
        positions=TABLES["denoise.places"] in weights,
        max_state_dim=spec.max_state_dim,
        max_action_dim=spec.max_action_dim,
    )


def file_name(name: str, config: GrootConfig) -> str:
    """The original's name of our parameter."""
    module, _, kind = name.rpartition(".")
    if module in _SINGLE:
        return f"{_SINGLE[module]}.{kind}"
    if match := re.fullmatch(r"vision\.encoder\.layers\.(\d+)\.(.+)", module):
        return f"{_VISION}encoder.layers.{match[1]}.{_ENCODER_LAYER[match[2]]}.{kind}"
    if match := re.fullmatch(r"vision\.connector\.(\d)", module):
        return f"{_EAGLE}mlp1.{_connector(2)[int(match[1])]}.{kind}"
    if match := re.fullmatch(r"prefix\.layers\.(\d+)\.(.+)", module):
        return f"{_TEXT}layers.{match[1]}.{TEXT_LAYER[match[2]]}.{kind}"
    return head_name(name, config)


def head_name(name: str, config: GrootConfig) -> str:
    """The original's name of a parameter of ours that is of its action head, of N1.5 or of N1.7."""
    module, _, kind = name.rpartition(".")
    if name in TABLES:
        return TABLES[name]
    if module in OWN:
        return f"{HEAD}{OWN[module]}.{'W' if kind == 'weight' else 'b'}"
    if module in _HEAD_SINGLE:
        return f"{_HEAD_SINGLE[module]}.{kind}"
    if match := re.fullmatch(r"prefix\.adapter\.(\d+)\.(.+)", module):
        return f"{ADAPTER}{match[1]}.{_BLOCK[match[2]]}.{kind}"
    if match := re.fullmatch(r"(?:prefix\.cross|denoise\.layers)\.(\d+)\.(.+)", module):
        return f"{DIT}transformer_blocks.{match[1]}.{_BLOCK[match[2]]}.{kind}"
    if match := re.fullmatch(r"time\.norms\.(\d+)", module):
        last = int(match[1]) == config.layers
        return f"{DIT}{'proj_out_1' if last else f'transformer_blocks.{match[1]}.norm1.linear'}.{kind}"
    raise KeyError(name)


def _shaped(name: str, tensor, like, number: int):
    """Ours, out of what the file holds; `number` of the embodiment."""
    if name.endswith("patch_embedding.weight"):
        return tensor.reshape(like.shape)
    return head_shaped(name, tensor, like, number)


def head_shaped(name: str, tensor, like, number: int):
    """As `_shaped`, of what `head_name` names; others as they are."""
    module, _, kind = name.rpartition(".")
    if module in OWN:
        own = tensor[number]
        if kind == "bias":
            return own
        width = own.shape[0] // 2
        own = {"denoise.mlp_in": own[:width], "time.action": own[width:]}.get(module, own)
        return own.T.contiguous()
    if name == "denoise.places":
        return tensor[: like.shape[0]]
    return tensor


def _check(backbone: Document, head: Document) -> None:
    """Raises CheckpointError: an option is set that would change the arithmetic and is not written here."""
    check_options(backbone, _BACKBONE_OPTIONS)
    kind = (backbone["text_config"].get("architectures") or [""])[0]
    if kind != "Qwen3ForCausalLM":
        raise CheckpointError(f"{backbone.path} has the language model {kind!r}; this version loads Qwen3ForCausalLM")
    check_options(Document(backbone.path, _TEXT_DEFAULTS | backbone["text_config"]), {"rope_scaling": None})
    vision = Document(backbone.path, _VISION_DEFAULTS | backbone["vision_config"])
    check_options(vision, {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"})
    check_options(head["backbone_cfg"], {"reproject_vision": False, "project_to_dim": None})
    action = head["action_head_cfg"]
    check_options(action, {"use_vlln": True})
    check_head(action["diffusion_model_cfg"], action["vl_self_attention_cfg"])


def check_head(dit: Document, adapter: Document) -> None:
    """Nothing, when the action head's transformers (see `head_sizes`) are those that are written here.

    Raises:
        CheckpointError: an option is set that would change the arithmetic.
    """
    check_options(Document(dit.path, _DIT_DEFAULTS | dit), _DIT_OPTIONS)
    adapter = Document(adapter.path, _DIT_DEFAULTS | adapter)
    check_options(adapter, {"positional_embeddings": None, "attention_bias": True, "activation_fn": "gelu-approximate"})


def _connector(layers: int) -> tuple[int, ...]:
    """Where the linear layers are among those between vision and language: a norm and a GELU stand beside two."""
    return (0,) if layers == 1 else (1, 3)


def fitting_tokenizer(checkpoint: Checkpoint, vocabulary: int):
    """The checkpoint's.

    Raises:
        CheckpointError: it has more tokens than the weights.
    """
    tokens = read_tokenizer(checkpoint.tokenizer_path)
    if tokens.get_vocab_size() > vocabulary:
        raise CheckpointError(
            f"{checkpoint.tokenizer_path} has {tokens.get_vocab_size()} tokens and the weights {vocabulary}; copy the "
            "tokenizer the policy was trained with"
        )
    return tokens


def image_places(checkpoint: Checkpoint, tokens, token: str, number: int) -> tuple[int, ...]:
    """Where in the prompt's tokens the pictures stand, each as `token`.

    Raises:
        CheckpointError: the tokenizer gives it another number than the backbone, or the prompt has not one a camera.
    """
    image, spec = tokens.token_to_id(token), checkpoint.spec
    ids = tokens.encode(spec.prompt.format(instruction="")).ids
    places = tuple(place for place, each in enumerate(ids) if each == image)
    if image is None or len(places) != len(spec.cameras) or image != number:
        raise CheckpointError(
            f"{checkpoint.tokenizer_path} has not the token {token} of {checkpoint.backbone.path}; copy the tokenizer the "
            "policy was trained with"
        )
    return places


def plain(weights: Weights) -> Weights:
    """Under Isaac-GR00T's names."""
    return weights.renamed(own_name)


def own_name(name: str) -> str:
    """Isaac-GR00T's, of one of LeRobot's."""
    return name.removeprefix("_groot_model.")


def _is_unused(name: str) -> bool:
    """The pooling head of SigLIP and the head of the language model."""
    return name.startswith((f"{_VISION}head.", f"{_EAGLE}language_model.lm_head."))
