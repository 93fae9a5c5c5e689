"""Write a random ACT or diffusion policy as LeRobot saves it, and what LeRobot makes of a few observations with it.

    python tools/parity/generate_baselines.py --variant act --output test/parity/baselines/act

Nothing of vla_edge is imported. The classes are LeRobot's, torchvision's and diffusers' own; only the channels of the
ResNet, which has no option for them, are set here.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

# torchvision's wheels are built for CUDA; beside a CPU torch the operators this part describes do not exist
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature  # noqa: E402
from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors  # noqa: E402
from lerobot.policies.utils import prepare_observation_for_inference  # noqa: E402
from random_policies import (  # noqa: E402
    ACTION,
    STATE,
    Camera,
    asked,
    cropped,
    picture,
    randomize_,
    statistics,
    write_robot_facts,
)

OBSERVATIONS, PERIOD_NS = 3, 50_000_000


@dataclass(frozen=True)
class Variant:
    """Options of one reference policy; `options` are LeRobot's own."""

    family: str
    cameras: dict[str, Camera]
    visual: str
    state: str
    action: str
    channels: int
    options: dict = field(default_factory=dict)
    joints: int = 5


ACT = {
    "vision_backbone": "resnet18", "pretrained_backbone_weights": None, "dim_model": 32, "n_heads": 4,
    "dim_feedforward": 48, "n_encoder_layers": 2, "chunk_size": 7, "n_action_steps": 7, "latent_dim": 4,
    "n_vae_encoder_layers": 1,
}  # fmt: skip
DIFFUSION = {
    "vision_backbone": "resnet18", "horizon": 8, "n_action_steps": 5, "down_dims": (16, 24), "kernel_size": 3,
    "n_groups": 4, "diffusion_step_embed_dim": 12, "spatial_softmax_num_keypoints": 6,
}  # fmt: skip
VARIANTS = {
    # the published ACT: norms after the sums, ReLU, statistics of each camera; two cameras
    "act": Variant(
        "act", {"head": Camera(80, 100, (5, 3, 70, 90)), "wrist": Camera(70, 90, (0, 0, 70, 90))},
        "MEAN_STD", "MEAN_STD", "MEAN_STD", 8, {**ACT, "n_decoder_layers": 1},
    ),
    # everything the other way round: norms first, GELU, two layers in the decoder, no latent to be learned, ResNet-34
    "act_norms_first": Variant(
        "act", {"head": Camera(64, 96, (0, 0, 64, 96))}, "IDENTITY", "MIN_MAX", "QUANTILES", 8,
        {**ACT, "n_decoder_layers": 2, "pre_norm": True, "feedforward_activation": "gelu", "use_vae": False,
         "vision_backbone": "resnet34"},
    ),
    # the published diffusion policy: all noise levels, new noise in every step, a crop, group normalization
    "diffusion": Variant(
        "diffusion", {"head": Camera(70, 90, (0, 0, 70, 90)), "wrist": Camera(75, 99, (5, 9, 70, 90))},
        "MEAN_STD", "MIN_MAX", "MIN_MAX", 16, {**DIFFUSION, "crop_shape": (61, 64), "num_train_timesteps": 12},
    ),
    # fewer steps, without new noise, three observations, batch normalization, shifts alone, another schedule
    "diffusion_ddim": Variant(
        "diffusion", {"head": Camera(64, 96, (0, 0, 64, 96))}, "MIN_MAX", "MEAN_STD", "QUANTILES", 8,
        {**DIFFUSION, "noise_scheduler_type": "DDIM", "num_train_timesteps": 50, "num_inference_steps": 7,
         "beta_schedule": "linear", "use_group_norm": False, "use_film_scale_modulation": False, "n_obs_steps": 3,
         "clip_sample_range": 1.5, "down_dims": (16, 24, 24)},
    ),
    # the network tells the actions and not the noise, and they are not held within bounds
    "diffusion_sample": Variant(
        "diffusion", {"head": Camera(64, 64, (0, 0, 64, 64))}, "IDENTITY", "IDENTITY", "MEAN_STD", 8,
        {**DIFFUSION, "num_train_timesteps": 40, "num_inference_steps": 5, "beta_schedule": "scaled_linear",
         "prediction_type": "sample", "clip_sample": False, "n_obs_steps": 1,
         "use_group_norm": False},
    ),
}  # fmt: skip


def main() -> None:
    arguments = asked(__doc__, VARIANTS)
    variant, output = VARIANTS[arguments.variant], arguments.output
    checkpoint = output / "checkpoint"
    narrow_resnets(variant.channels)
    write_policy(checkpoint, variant, np.random.default_rng(arguments.seed))
    write_robot_facts(checkpoint / "vla_edge.json", variant.joints, True, variant.cameras)
    np.savez_compressed(output / "reference.npz", **references(checkpoint, variant, np.random.default_rng(1)))
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>9} {path.relative_to(output)}")


def narrow_resnets(channels: int) -> None:
    """torchvision's ResNets of the same layers with `channels` where the originals have 64."""
    from torchvision.models.resnet import BasicBlock, ResNet

    class Narrow(ResNet):
        def __setattr__(self, name, value):
            first = name == "inplanes" and "inplanes" not in self.__dict__
            super().__setattr__(name, channels if first else value)

        def _make_layer(self, block, planes, *given, **named):
            return super()._make_layer(block, planes * channels // 64, *given, **named)

    def made(layers):
        def make(weights=None, **options):
            network = Narrow(BasicBlock, layers, **options)
            network.fc = torch.nn.Linear(8 * channels, 1)
            return network

        return make

    torchvision.models.resnet18, torchvision.models.resnet34 = made([2, 2, 2, 2]), made([3, 4, 6, 3])


def write_policy(directory: Path, variant: Variant, rng: np.random.Generator) -> None:
    """config.json, model.safetensors and both processors, saved by LeRobot."""
    features = {STATE: PolicyFeature(FeatureType.STATE, (variant.joints,))}
    stats = statistics(variant.joints, rng)
    for name, camera in variant.cameras.items():
        key = f"observation.images.{name}"
        features[key] = PolicyFeature(FeatureType.VISUAL, (3, *camera.crop[2:]))
        low, high = rng.uniform(0, 0.2, (3, 1, 1)), rng.uniform(0.8, 1, (3, 1, 1))
        found = {"mean": (low + high) / 2, "std": rng.uniform(0.15, 0.3, (3, 1, 1)), "min": low, "max": high}
        stats[key] = {kind: torch.tensor(value, dtype=torch.float32) for kind, value in found.items()}
    config = make_policy_config(
        variant.family,
        input_features=features,
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (variant.joints,))},
        normalization_mapping={
            "VISUAL": NormalizationMode(variant.visual),
            "STATE": NormalizationMode(variant.state),
            "ACTION": NormalizationMode(variant.action),
        },
        device="cpu",
        **variant.options,
    )
    policy = get_policy_class(variant.family)(config)
    randomize_(policy)
    randomize_norms_(policy)
    policy.save_pretrained(directory)
    for processor in make_pre_post_processors(config, dataset_stats=stats):
        processor.save_pretrained(directory)


@torch.no_grad()
def randomize_norms_(policy: torch.nn.Module) -> None:
    """Norms about one, also those that are buffers or whose names do not tell, and moments as after training."""
    for module in policy.modules():
        if type(module).__name__ in ("FrozenBatchNorm2d", "BatchNorm2d", "GroupNorm", "LayerNorm"):
            module.weight.copy_(1 + 0.2 * torch.randn_like(module.weight))
            module.bias.copy_(0.2 * torch.randn_like(module.bias))
        if hasattr(module, "running_var"):
            module.running_mean.copy_(0.3 * torch.randn_like(module.running_mean))
            module.running_var.copy_(1 + torch.rand_like(module.running_var))


@torch.no_grad()
def references(checkpoint: Path, variant: Variant, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`<index>.<name>` -> array, for a few observations; the policy is loaded from disk again.

    Of a policy that reads several observations at a time, they follow each other: of the first there is no earlier one.
    """
    policy = get_policy_class(variant.family).from_pretrained(checkpoint, strict=True).eval()
    before, after = make_pre_post_processors(policy.config, pretrained_path=str(checkpoint))
    arrays: dict[str, np.ndarray] = {}
    for index in range(OBSERVATIONS):
        frames = {name: picture(camera.height, camera.width, rng) for name, camera in variant.cameras.items()}
        state = rng.normal(0, 0.5, variant.joints).astype(np.float32)
        state[-1] = 0.25  # as its statistics: LeRobot divides by 1e-8 there
        shown = {f"observation.images.{name}": cropped(frames[name], c).copy() for name, c in variant.cameras.items()}
        batch = before(prepare_observation_for_inference({**shown, STATE: state}, torch.device("cpu")))
        found = {"positions": state, "state": batch[STATE]}
        for name in variant.cameras:
            found |= {f"frame.{name}": frames[name], f"image.{name}": batch[f"observation.images.{name}"][:, :, ::16]}
        if variant.family == "act":
            raw = policy.predict_action_chunk(dict(batch))
        else:
            raw, found["noise"] = diffused(policy, dict(batch), variant.joints, rng)
        found["actions"] = after(raw.clone())
        arrays |= {f"{index}.{name}": np.asarray(value) for name, value in found.items()}
    return arrays


def diffused(policy, batch: dict, joints: int, rng: np.random.Generator) -> tuple[torch.Tensor, np.ndarray]:
    """The chunk by `select_action`, which keeps the observations, and the noise it was given in each step."""
    from diffusers.schedulers import scheduling_ddpm

    noise = rng.standard_normal((policy.diffusion.num_inference_steps, policy.config.horizon, joints), dtype=np.float32)
    added = iter(noise[1:])
    original = scheduling_ddpm.randn_tensor
    scheduling_ddpm.randn_tensor = lambda shape, **_: torch.from_numpy(next(added).copy()).reshape(shape)
    try:
        policy._queues[ACTION].clear()
        first = policy.select_action(batch, noise=torch.from_numpy(noise[:1].copy()))
    finally:
        scheduling_ddpm.randn_tensor = original
    if policy.config.noise_scheduler_type == "DDIM":
        noise = noise[:1]
    else:
        assert next(added, None) is None
    return torch.stack([first, *policy._queues[ACTION]], dim=1), noise


if __name__ == "__main__":
    main()
