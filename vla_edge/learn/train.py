"""Behaviour cloning of demonstrations with the flow-matching loss, in one resumable command:

    python -m vla_edge.learn.train --demonstrations out/demonstrations/touch --out out/train

`OUT/checkpoint` is the policy so far, `OUT/state.pt` what training goes on from, `OUT/log.jsonl` its losses. Every step
draws its frames, noise and times from (seed, step), so an interrupted run goes on with what it would have seen.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from vla_edge.learn.dataset import Batch, Demonstrations
from vla_edge.learn.losses import flow_matching_loss, pointer_loss
from vla_edge.learn.muon import Muon
from vla_edge.policy.checkpoint_writer import SPECIAL_TOKENS, write_checkpoint, write_tokenizer
from vla_edge.policy.smolvla import SmolVLA, SmolVLAConfig
from vla_edge.policy.spec import CameraSpec, PolicySpec
from vla_edge.policy.tokenize import InstructionTokenizer
from vla_edge.robots.g1 import DRIVEN_JOINTS
from vla_edge.sim.expert import DT
from vla_edge.sim.tasks import vocabulary
from vla_edge.types import VlaEdgeError

PROMPT = "{instruction}\n"
NUM_STEPS = 10
LANGUAGE_LENGTH = 16
PADDED_JOINTS = 16
_OUTER = ("patch_embedding", "state_proj", "action_in", "action_out")
CAMERA = CameraSpec("head", "observation.images.head", 480, 640, (0, 80, 480, 480), 96, 96)


class TrainingError(VlaEdgeError):
    """Training cannot start or go on."""


@dataclass(frozen=True)
class TrainConfig:
    """How the reference policy is trained; what cannot change within a run.

    Attributes:
        steps: optimizer steps. batch: frames each. draws: (noise, time) pairs per frame.
        rate: peak learning rate, after `warmup` steps and before a cosine down to zero. decay: of matrices.
        average: decay of the moving average of the weights, which is what is shipped.
        pointer: weight of the pointer loss. pointer_layers: text layers it supervises.
        state_noise: rad. brightness: relative.
    """

    steps: int = 2350
    batch: int = 64
    draws: int = 2
    rate: float = 2e-3
    warmup: int = 150
    decay: float = 0.02
    clip: float = 1.0
    average: float = 0.998
    pointer: float = 0.3
    pointer_layers: tuple[int, ...] = (1, 2)
    state_noise: float = 0.005
    brightness: float = 0.1
    seed: int = 0


def reference_shapes() -> SmolVLAConfig:
    """A SmolVLA that two CPU cores can train in under two hours: 36 image tokens of 16 px, about 3 M parameters."""
    return SmolVLAConfig(
        cameras=1, image_size=CAMERA.height, patch_size=8, scale_factor=2,
        vision_width=128, vision_hidden=384, vision_layers=4, vision_heads=4, vision_eps=1e-6,
        vocabulary=len(SPECIAL_TOKENS) + len(vocabulary()), text_width=192, text_hidden=384, text_layers=4, heads=6, kv_heads=3, head_dim=32,
        text_eps=1e-5, expert_width=144, expert_hidden=512, expert_every=1, self_attention_every=2,
        cross_attention=True, chunk_size=32, max_state_dim=PADDED_JOINTS, max_action_dim=PADDED_JOINTS,
        language_length=LANGUAGE_LENGTH, min_period=4e-3, max_period=4.0,
    )  # fmt: skip


class Trainer:
    """One run: policy, its average, optimizers and the demonstrations.

    Args:
        config: of the run. demonstrations: recordings. out: where the run lives.
        shapes: of the policy; the reference policy's when None.

    Raises:
        TrainingError: `out` holds a run of another configuration, or a damaged one.
    """

    def __init__(
        self, config: TrainConfig, demonstrations: list[Path], out: Path, shapes: SmolVLAConfig | None = None
    ):
        self.config, self.out, self.step = config, out, 0
        self._words = vocabulary()
        out.mkdir(parents=True, exist_ok=True)
        write_tokenizer(out, self._words, LANGUAGE_LENGTH)
        self.data = Demonstrations(
            demonstrations, InstructionTokenizer(out / "tokenizer.json", LANGUAGE_LENGTH, PROMPT)
        )
        state, action = self.data.normalization()
        self.spec = PolicySpec(
            "smolvla", DRIVEN_JOINTS, (CAMERA,), self.data.chunk_size, DT, NUM_STEPS, PADDED_JOINTS, PADDED_JOINTS,
            LANGUAGE_LENGTH, PROMPT, relative_actions=True, state=state, action=action,
        )  # fmt: skip
        torch.manual_seed(config.seed)
        self.policy = SmolVLA(shapes or reference_shapes())
        initialize(self.policy)
        self.average = copy.deepcopy(self.policy).requires_grad_(False)
        self.optimizers = optimizers(self.policy, config)
        self._resume()

    def train(self, save_every: int) -> None:
        """Runs to the last step, saving as it goes.

        Args:
            save_every: steps.
        """
        from tqdm import tqdm

        with (
            tqdm(total=self.config.steps, initial=self.step, desc="training", unit="step") as bar,
            open(self.out / "log.jsonl", "a", encoding="utf-8") as log,
        ):
            while self.step < self.config.steps:
                begin = time.perf_counter()
                losses = self.update()
                bar.update()
                if self.step % 10 == 0:
                    bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
                    log.write(json.dumps({"step": self.step, **losses, "s": time.perf_counter() - begin}) + "\n")
                    log.flush()
                if self.step % save_every == 0 or self.step == self.config.steps:
                    self.save()

    def update(self) -> dict[str, float]:
        """One optimizer step; returns its losses and the norm of the gradient."""
        config = self.config
        rng = np.random.default_rng([config.seed, self.step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.rate * schedule(self.step, config)
            optimizer.zero_grad(set_to_none=True)
        flow, pointer = self.losses(self.data.draw(rng, config.batch), rng, generator)
        (flow + config.pointer * pointer).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), config.clip)
        if not torch.isfinite(norm):
            raise TrainingError(f"the gradient of step {self.step} is not finite; lower the learning rate")
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        # the average follows closely at first, when the weights still move a lot
        keep = min(config.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.policy.parameters()):
                mean.lerp_(value, 1 - keep)
        return {"flow": flow.item(), "pointer": pointer.item(), "norm": norm.item()}

    def losses(self, batch: Batch, rng: np.random.Generator, generator: torch.Generator):
        """(flow-matching loss, pointer loss) of the policy on a batch."""
        config, shapes = self.config, self.policy.config
        size, padding = len(batch.state), PADDED_JOINTS - batch.state.shape[1]
        gain = 1 + config.brightness * rng.uniform(-1, 1, (size, 1, 1, 1)).astype(np.float32)
        images = np.ascontiguousarray(batch.images.transpose(0, 3, 1, 2), np.float32) * gain * np.float32(2 / 255) - 1
        noisy = batch.state + rng.normal(0, config.state_noise, batch.state.shape)
        state = np.pad(self.spec.state.normalize(noisy), ((0, 0), (0, padding)))
        actions = np.pad(self.spec.action.normalize(batch.action), ((0, 0), (0, 0), (0, padding)))

        mask = torch.from_numpy(batch.mask)
        tokens = self.policy.vision(torch.from_numpy(images))[0]
        cache, attention = self.policy.prefix.encode(
            tokens, torch.from_numpy(batch.tokens), mask, torch.from_numpy(state)
        )
        flow = flow_matching_loss(self.policy, cache, torch.from_numpy(actions), config.draws, generator)
        grid = math.isqrt(shapes.image_tokens)
        point = torch.from_numpy(batch.pointer.astype(np.float32))
        return flow, pointer_loss(attention, point, mask, config.pointer_layers, grid)

    def save(self) -> None:
        """Writes the averaged policy and what the run goes on from."""
        write_checkpoint(self.out / "checkpoint", self.average, self.spec, self._words)
        temporary = self.out / "state.pt.part"
        torch.save(
            {
                "config": asdict(self.config),
                "step": self.step,
                "policy": self.policy.state_dict(),
                "average": self.average.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            },
            temporary,
        )
        os.replace(temporary, self.out / "state.pt")

    def _resume(self) -> None:
        file = self.out / "state.pt"
        if not file.exists():
            return
        try:
            saved = torch.load(file, weights_only=True)
            different = {
                name: (value, saved["config"].get(name))
                for name, value in asdict(self.config).items()
                if saved["config"].get(name) != value
            }
            if different:
                raise TrainingError(f"{self.out} holds a run with other settings ({different}); choose another --out")
            self.policy.load_state_dict(saved["policy"])
            self.average.load_state_dict(saved["average"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.step = saved["step"]
        except TrainingError:
            raise
        except Exception as error:
            raise TrainingError(f"{file} cannot be read ({error}); delete it to begin again") from error


def initialize(policy: SmolVLA) -> None:
    """Normal weights of standard deviation 0.02 for tables, scaled by fan-in for products, zero biases; the layers that
    write to the residual stream start smaller with depth, as in GPT-2."""
    depth = policy.config.vision_layers + policy.config.text_layers
    for name, module in policy.named_modules():
        if isinstance(module, torch.nn.Linear):
            std = module.in_features**-0.5
            if name.endswith((".out", "mlp.down")):
                std /= math.sqrt(depth)
            torch.nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)
    torch.nn.init.normal_(policy.denoise.action_out.weight, std=0.02)


def schedule(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to zero at the last step."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(config.steps - config.warmup, 1)))


def optimizers(policy: SmolVLA, config: TrainConfig) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside, AdamW for what meets pixels, joints and words, and for everything else."""
    inside = {
        f"{name}.weight"
        for name, module in policy.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith(_OUTER)
    }
    matrices = [parameter for name, parameter in policy.named_parameters() if name in inside]
    others = [parameter for name, parameter in policy.named_parameters() if name not in inside]
    return (
        Muon(matrices, config.rate, weight_decay=config.decay),
        torch.optim.AdamW(others, config.rate, betas=(0.9, 0.98), weight_decay=0.0),
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the reference policy by behaviour cloning.")
    parser.add_argument("--demonstrations", type=Path, nargs="+", default=[Path("out/demonstrations")])
    parser.add_argument("--out", type=Path, default=Path("out/train"))
    parser.add_argument("--save-every", type=int, default=200, help="steps")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves it to torch")
    numbers = [field for field in fields(TrainConfig) if field.type in ("int", "float")]
    for field in numbers:
        parser.add_argument(f"--{field.name.replace('_', '-')}", type={"int": int, "float": float}[field.type], default=field.default)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    config = replace(TrainConfig(), **{field.name: getattr(options, field.name) for field in numbers})
    try:
        Trainer(config, options.demonstrations, options.out).train(options.save_every)
    except VlaEdgeError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"trained {config.steps} steps; the policy is in {options.out / 'checkpoint'}")


if __name__ == "__main__":
    main()
