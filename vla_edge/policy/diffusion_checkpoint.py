"""A diffusion policy out of LeRobot's `pretrained_model/`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from vla_edge.policy.checkpoint_files import CheckpointError, Document
from vla_edge.policy.families import Description
from vla_edge.policy.lerobot_layout import backbone_blocks, check_options, wordless_spec
from vla_edge.policy.robot_facts import RobotFacts
from vla_edge.policy.spec import DiffusionSpec
from vla_edge.policy.weights import Weights

if TYPE_CHECKING:
    from vla_edge.policy.checkpoint import Checkpoint
    from vla_edge.policy.diffusion import DiffusionConfig

_SUPPORTED = {"use_separate_rgb_encoder_per_camera": False, "resize_shape": None, "use_peft": False}
_CHOICES = {"noise_scheduler_type": ("DDPM", "DDIM"), "prediction_type": ("epsilon", "sample")}
_BACKBONE = "rgb_encoder.backbone."
_STEM, _STAGES = (f"{_BACKBONE}0", f"{_BACKBONE}1"), tuple(f"{_BACKBONE}{index}" for index in range(4, 8))
_SINGLE = {
    "vision.keypoints": "rgb_encoder.pool.nets",
    "vision.out": "rgb_encoder.out",
    "time.mlp_in": "unet.diffusion_step_encoder.1",
    "time.mlp_out": "unet.diffusion_step_encoder.3",
    "denoise.last.convolution.linear": "unet.final_conv.0.block.0",
    "denoise.last.norm": "unet.final_conv.0.block.1",
    "denoise.action_out": "unet.final_conv.1",
}
_BLOCK = {
    "first.convolution.linear": "conv1.block.0", "first.norm": "conv1.block.1",
    "second.convolution.linear": "conv2.block.0", "second.norm": "conv2.block.1", "shortcut": "residual_conv",
}  # fmt: skip
# a table that is the same for every picture of a size, and how many batches there were
_UNUSED = re.compile(r"rgb_encoder\.pool\.pos_grid|.*\.num_batches_tracked")


def describe(directory: Path, config: Document) -> Description:
    """See `families`."""
    check_options(config, _SUPPORTED)
    for key, known in _CHOICES.items():
        if config[key] not in known:
            raise CheckpointError(f"{config.path} says {key} = {config[key]!r}; this version does {', '.join(known)}")
    observations, horizon, chunk_size = (config.count(key) for key in ("n_obs_steps", "horizon", "n_action_steps"))
    if observations - 1 + chunk_size > horizon:
        raise ValueError(
            f"a horizon of {horizon} rows does not hold {chunk_size} actions after {observations} observations"
        )
    diffusion = DiffusionSpec(
        sampler=config["noise_scheduler_type"],
        train_steps=config.count("num_train_timesteps"),
        betas=config["beta_schedule"],
        beta_start=float(config["beta_start"]),
        beta_end=float(config["beta_end"]),
        prediction=config["prediction_type"],
        clip=float(config["clip_sample_range"]) if config["clip_sample"] else None,
        horizon=horizon,
        first=observations - 1,
    )
    steps = diffusion.train_steps if config.get("num_inference_steps") is None else config.count("num_inference_steps")
    if steps > diffusion.train_steps:
        raise ValueError(f"num_inference_steps is {steps} of {diffusion.train_steps} noise levels")
    crop = config.get("crop_shape")
    spec = wordless_spec(
        directory, config, RobotFacts(directory), steps, chunk_size, None if crop is None else tuple(crop),
        observation_steps=observations, diffusion=diffusion,
    )  # fmt: skip
    return Description(spec)


def build(checkpoint: Checkpoint, weights: Weights):
    """See `families`."""
    from vla_edge.policy.diffusion import DiffusionPolicy

    return DiffusionPolicy(diffusion_config(checkpoint, _plain(weights)))


def tensors(policy, checkpoint: Checkpoint, weights: Weights) -> dict:
    """See `families`."""
    from vla_edge.policy.resnet import part_names, part_tensors, resnet_names

    plain, config = _plain(weights), policy.config
    parts, backbone = list(resnet_names(config.blocks, _STEM, _STAGES)), "vision.backbone."
    spelled = {name: file_name(name, config) for name in policy.state_dict() if not name.startswith(backbone)}
    wanted = [tensor for _, *names in parts for tensor in part_names(*names, config.grouped)]
    plain.check([*spelled.values(), *wanted], lambda name: _UNUSED.fullmatch(name) is not None)
    state = {}
    for ours, *names in parts:
        found = part_tensors(plain, *names, config.grouped)
        state |= {f"{backbone}{ours}.{kind}": tensor for kind, tensor in found.items()}
    for name, spelling in spelled.items():
        state[name] = _shaped(name, plain[spelling], config.level_width)
    return state


def diffusion_config(checkpoint: Checkpoint, weights: Weights) -> DiffusionConfig:
    """Shapes for `DiffusionPolicy`.

    Raises:
        CheckpointError: a tensor is missing. ValueError: the schedule is none, or lengths do not fit each other.
    """
    from vla_edge.policy.diffusion import DiffusionConfig
    from vla_edge.policy.schedule import signal_levels

    config, spec = checkpoint.config, checkpoint.spec
    signal_levels(spec.diffusion)
    count = weights.count("unet.down_modules.{}.0.conv1.block.0.weight")
    shapes = [weights.shape(f"unet.down_modules.{index}.0.conv1.block.0.weight") for index in range(count)]
    if spec.diffusion.horizon % 2 ** (count - 1):
        raise ValueError(f"a horizon of {spec.diffusion.horizon} rows cannot be halved {count - 1} times")
    widths, kernel = tuple(shape[0] for shape in shapes), shapes[0][2]
    film = weights.shape("unet.down_modules.0.0.cond_encoder.1.weight")[0]
    camera, channels = spec.cameras[0], weights.shape(f"{_STEM[0]}.weight")[0]
    return DiffusionConfig(
        cameras=len(spec.cameras),
        height=camera.height,
        width=camera.width,
        blocks=backbone_blocks(config),
        channels=channels,
        grouped=f"{_STEM[1]}.running_mean" not in weights,
        keypoints=weights.shape("rgb_encoder.pool.nets.weight")[0],
        observations=spec.observation_steps,
        state_dim=spec.max_state_dim,
        action_dim=spec.max_action_dim,
        widths=widths,
        kernel=kernel,
        groups=config.count("n_groups"),
        level_width=weights.shape("unet.diffusion_step_encoder.1.weight")[1],
        scales=film == 2 * widths[0],
        chunk_size=spec.chunk_size,
        diffusion=spec.diffusion,
    )


def file_name(name: str, config: DiffusionConfig) -> str:
    """LeRobot's name of our parameter, without the `diffusion.` in front (not of the backbone's)."""
    module, _, kind = name.rpartition(".")
    if module in _SINGLE:
        return f"{_SINGLE[module]}.{kind}"
    depth = len(config.widths)
    if match := re.fullmatch(r"(?:prefix|time)\.films\.(\d+)", module):
        return f"unet.{_block(int(match[1]), depth)}.cond_encoder.1.{kind}"
    if match := re.fullmatch(r"denoise\.blocks\.(\d+)\.(.+)", module):
        return f"unet.{_block(int(match[1]), depth)}.{_BLOCK[match[2]]}.{kind}"
    if match := re.fullmatch(r"denoise\.(down|up)s\.(\d+)(?:\.linear)?", module):
        return f"unet.{match[1]}_modules.{match[2]}.2.{kind}"
    raise KeyError(name)


def _block(index: int, depth: int) -> str:
    """Of our blocks in order the one that LeRobot has in a list of each direction."""
    if index < 2 * depth:
        return f"down_modules.{index // 2}.{index % 2}"
    if index < 2 * depth + 2:
        return f"mid_modules.{index % 2}"
    return f"up_modules.{index // 2 - depth - 1}.{index % 2}"


def _shaped(name: str, tensor, level_width: int):
    """Ours, out of what the file holds."""
    from vla_edge.policy.convolution import convolution_weight, upsampling_weight

    if name.startswith("prefix.films."):
        return tensor[:, level_width:]
    if name.startswith("time.films.") and tensor.ndim == 2:
        return tensor[:, :level_width]
    if name.startswith("denoise.ups.") and tensor.ndim == 3:
        return upsampling_weight(tensor)
    return convolution_weight(tensor) if tensor.ndim > 2 else tensor


def _plain(weights: Weights) -> Weights:
    """Without the name of the network within the policy."""
    return weights.renamed(lambda name: name.removeprefix("diffusion."))
