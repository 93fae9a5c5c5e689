"""Behaviour cloning of demonstrations with the flow-matching loss, in one resumable command:

    python -m vla_edge.learn.train --demonstrations out/demonstrations/touch --out out/train

The policy is of the world the demonstrations were recorded in: its joints, camera and words. `OUT/checkpoint` is the
policy so far; the rest of OUT is told in `fit`.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vla_edge.learn.dataset import Demonstrations
from vla_edge.learn.fit import Fit, FitConfig
from vla_edge.learn.losses import flow_matching_loss, pointer_loss
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.policy.checkpoint_writer import SPECIAL_TOKENS, write_checkpoint, write_tokenizer
from vla_edge.policy.smolvla import SmolVLA, SmolVLAConfig
from vla_edge.policy.spec import PolicySpec
from vla_edge.policy.tokenize import InstructionTokenizer
from vla_edge.sim.demonstrations import DemonstrationError, read_mark
from vla_edge.sim.worlds import World, world
from vla_edge.types import VlaEdgeError

PROMPT = "{instruction}\n"
NUM_STEPS = 10
LANGUAGE_LENGTH = 16
PADDED_JOINTS = 16
_OUTER = ("patch_embedding", "state_proj", "action_in", "action_out")
_WIDTHS = {
    "tabletop": {
        "vision_width": 128, "vision_hidden": 384, "vision_layers": 4, "vision_heads": 4, "text_width": 192,
        "text_hidden": 384, "heads": 6, "kv_heads": 3, "expert_width": 144, "expert_hidden": 512,
    },
    # one goal to a scene leaves little to find
    "metaworld": {
        "vision_width": 96, "vision_hidden": 256, "vision_layers": 3, "vision_heads": 3, "text_width": 128,
        "text_hidden": 256, "heads": 4, "kv_heads": 2, "expert_width": 96, "expert_hidden": 256,
    },
}  # fmt: skip


@dataclass(frozen=True)
class TrainConfig(FitConfig):
    """How the reference policy is trained.

    Attributes:
        draws: (noise, time) pairs per frame.
        pointer: weight of the pointer loss. pointer_layers: text layers it supervises.
        state_noise: in the unit of the joints. brightness: relative.
        prefix: most rows of a chunk that the policy learns to be given and to continue; 0 for none.
        shares: of each directory of demonstrations in a batch; in proportion to its frames when empty.
    """

    draws: int = 2
    pointer: float = 0.3
    pointer_layers: tuple[int, ...] = (1, 2)
    state_noise: float = 0.005
    brightness: float = 0.1
    prefix: int = 0
    shares: tuple[float, ...] = ()


def reference_shapes(shown: World) -> SmolVLAConfig:
    """A SmolVLA that two CPU cores can train in two hours: 3 M parameters for the tabletop, 1 M for Meta-World."""
    return SmolVLAConfig(
        cameras=1, image_size=shown.camera.height, patch_size=8, scale_factor=2, vision_eps=1e-6,
        vocabulary=len(SPECIAL_TOKENS) + len(shown.vocabulary), text_layers=4, head_dim=32, text_eps=1e-5,
        expert_every=1, self_attention_every=2, cross_attention=True, chunk_size=shown.chunk,
        max_state_dim=PADDED_JOINTS, max_action_dim=PADDED_JOINTS, language_length=LANGUAGE_LENGTH, min_period=4e-3,
        max_period=4.0, **_WIDTHS[shown.name],
    )  # fmt: skip


class Trainer(Fit):
    """Behaviour cloning of a policy from scratch, or on from the weights of another.

    Args:
        config: of the run. demonstrations: recordings, all of one world.
        out: where the run lives; `out/checkpoint` is the policy so far.
        shapes: of the policy; the reference policy's when None.
        start: checkpoint whose weights to begin with; random ones when None.

    Raises:
        DemonstrationError: there are none, they are damaged, or of several worlds.
        TrainingError: `out` holds a run of another configuration, or a damaged one.
    """

    def __init__(
        self,
        config: TrainConfig,
        demonstrations: list[Path],
        out: Path,
        shapes: SmolVLAConfig | None = None,
        start: Path | None = None,
    ):
        shown = _world_of(demonstrations)
        self._words = shown.vocabulary
        out.mkdir(parents=True, exist_ok=True)
        write_tokenizer(out, self._words, LANGUAGE_LENGTH)
        self.data = Demonstrations(
            demonstrations,
            InstructionTokenizer(out / "tokenizer.json", LANGUAGE_LENGTH, PROMPT),
            shares=config.shares,
        )
        torch.manual_seed(config.seed)
        if start is None:
            state, action = self.data.normalization()
            self.spec = PolicySpec(
                "smolvla", shown.joint_names, (shown.camera,), self.data.chunk_size, shown.dt, NUM_STEPS, PADDED_JOINTS,
                PADDED_JOINTS, LANGUAGE_LENGTH, PROMPT, relative_actions=True, state=state, action=action,
            )  # fmt: skip
            policy = SmolVLA(shapes or reference_shapes(shown))
            initialize(policy)
        else:
            # the weights mean what they do under the statistics they were trained with
            checkpoint = load_checkpoint(start)
            self.spec, policy = checkpoint.spec, load_policy(checkpoint).train().requires_grad_(True)
        self.spec = replace(self.spec, trained_prefix=config.prefix)
        super().__init__(config, policy, out, _OUTER)

    @property
    def policy(self) -> SmolVLA:
        """What is trained."""
        return self.module

    def losses(self, rng: np.random.Generator, generator: torch.Generator) -> dict[str, Tensor]:
        """Flow-matching loss and weighted pointer loss of the policy on a batch."""
        config, shapes = self.config, self.policy.config
        batch = self.data.draw(rng, config.batch)
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
        flow = flow_matching_loss(self.policy, cache, torch.from_numpy(actions), config.draws, generator, config.prefix)
        grid = math.isqrt(shapes.image_tokens)
        point = torch.from_numpy(batch.pointer.astype(np.float32))
        pointer = pointer_loss(attention, point, mask, config.pointer_layers, grid)
        return {"flow": flow, "pointer": config.pointer * pointer}

    def save(self) -> None:
        """Writes the averaged policy and what the run goes on from."""
        write_checkpoint(self.out / "checkpoint", self.average, self.spec, self._words)
        super().save()


def _world_of(demonstrations: list[Path]) -> World:
    names = {read_mark(directory)["world"] for directory in demonstrations}
    if len(names) != 1:
        raise DemonstrationError(
            f"a policy is trained in one world; these demonstrations are of {', '.join(sorted(names))}"
        )
    return world(names.pop())


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


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the policy of a simulated world by behaviour cloning.")
    parser.add_argument("--demonstrations", type=Path, nargs="+", default=[Path("out/demonstrations")])
    parser.add_argument("--out", type=Path, default=Path("out/train"))
    parser.add_argument("--shares", type=float, nargs="+", default=(), help="of each recording in a batch")
    parser.add_argument("--start", type=Path, help="checkpoint to go on from, in a new run")
    parser.add_argument("--save-every", type=int, default=200, help="steps")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves it to torch")
    numbers = [field for field in fields(TrainConfig) if field.type in ("int", "float")]
    for field in numbers:
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type={"int": int, "float": float}[field.type], default=field.default
        )
    options = parser.parse_args(arguments)
    from tqdm import tqdm

    if options.threads:
        torch.set_num_threads(options.threads)
    config = replace(TrainConfig(), **{field.name: getattr(options, field.name) for field in numbers})
    config = replace(config, shares=tuple(options.shares))
    try:
        trainer = Trainer(config, options.demonstrations, options.out, start=options.start)
        with tqdm(total=config.steps, initial=trainer.step, desc="training", unit="step") as bar:

            def progress(step: int, losses: dict[str, float]) -> None:
                bar.update(step - bar.n)
                if step % 10 == 0:
                    bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})

            trainer.train(options.save_every, progress)
    except VlaEdgeError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"trained {config.steps} steps; the policy is in {options.out / 'checkpoint'}")


if __name__ == "__main__":
    main()
