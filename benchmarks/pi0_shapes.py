"""A checkpoint of pi0's own shapes, 3.2 billion values, with random weights in bfloat16 and shards, as openpi's conversion to
PyTorch names them, and a build of it: for timing and memory, never for a robot. Smaller ones have the same layout.

    python -m benchmarks.pi0_shapes DIRECTORY --memory-mb 6000            writes it, builds it in pieces, tells the peak
    python -m benchmarks.pi0_shapes DIRECTORY --middle --memory-mb 3800   the same with 280 million values
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.openvla_shapes import write_once, write_words

JOINTS = tuple(f"joint_{index}" for index in range(14))
CAMERAS = ("head", "left_wrist", "right_wrist")
WORDS = ("touch", "push", "the", "ball", "red", "green", "cube", "with", "your", "left", "right", "hand")


@dataclass(frozen=True)
class Shapes:
    """Of a checkpoint; the defaults are those of openpi's pi0_base: SigLIP So400m/14, Gemma 2B and a 300M action expert."""

    vision: tuple[int, int, int] = (1152, 4304, 27)  # width, hidden, layers
    text: tuple[int, int] = (2048, 16384)  # width, hidden
    expert: tuple[int, int] = (1024, 4096)
    layers: int = 18  # of text and expert alike
    heads: int = 8
    head_dim: int = 256
    vocabulary: int = 257_152
    cameras: int = len(CAMERAS)

    def tensors(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """Shapes by name, a part of the model at a time."""
        yield from _vision("paligemma_with_expert.paligemma.model.", *self.vision, self.text[0])
        models = {
            "paligemma_with_expert.paligemma.model.language_model": self.text,
            "paligemma_with_expert.gemma_expert.model": self.expert,
        }
        yield {f"{next(iter(models))}.embed_tokens.weight": (self.vocabulary, self.text[0])}
        for model, (width, hidden) in models.items():
            for number in range(self.layers):
                yield self._gemma(f"{model}.layers.{number}", width, hidden)
            yield {f"{model}.norm.weight": (width,)}
        width = self.expert[0]
        linear = {
            "state_proj": (width, 32), "action_in_proj": (width, 32), "action_time_mlp_in": (width, 2 * width),
            "action_time_mlp_out": (width, width), "action_out_proj": (32, width),
        }  # fmt: skip
        for name, shape in linear.items():
            yield {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    def _gemma(self, layer: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
        wide = self.heads * self.head_dim
        attention = {"q": (wide, width), "k": (self.head_dim, width), "v": (self.head_dim, width), "o": (width, wide)}
        return {
            **{f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")},
            **{f"{layer}.self_attn.{part}_proj.weight": shape for part, shape in attention.items()},
            **{f"{layer}.mlp.{part}_proj.weight": (hidden, width) for part in ("gate", "up")},
            f"{layer}.mlp.down_proj.weight": (width, hidden),
        }


MIDDLE = Shapes((512, 2048, 8), (512, 6144), (384, 1536), 10, 8, 64, cameras=1)


def _vision(model: str, width: int, hidden: int, layers: int, text: int) -> Iterator[dict[str, tuple[int, ...]]]:
    tower, projector = f"{model}vision_tower.vision_model.", f"{model}multi_modal_projector.linear."
    yield {
        f"{tower}embeddings.patch_embedding.weight": (width, 3, 14, 14), f"{tower}embeddings.patch_embedding.bias": (width,),
        f"{tower}embeddings.position_embedding.weight": (256, width),
        f"{tower}post_layernorm.weight": (width,), f"{tower}post_layernorm.bias": (width,),
        f"{projector}weight": (text, width), f"{projector}bias": (text,),
    }  # fmt: skip
    linear = {f"self_attn.{part}": (width, width) for part in ("q_proj", "k_proj", "v_proj", "out_proj")}
    linear |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden), "layer_norm1": (width,), "layer_norm2": (width,)}
    for number in range(layers):
        yield {
            f"{tower}encoder.layers.{number}.{name}.{kind}": shape if kind == "weight" else shape[:1]
            for name, shape in linear.items() for kind in ("weight", "bias")
        }  # fmt: skip


def write_pi0(directory: Path, shapes: Shapes = Shapes()) -> Path:
    """The checkpoint `directory`, written once."""
    return write_once(directory, shapes.tensors, lambda: _write_small(directory, shapes))


def _write_small(directory: Path, shapes: Shapes) -> None:
    write_words(directory, ("<pad>", "<eos>", "<bos>", "<unk>", "\n", *WORDS))
    numbers = {"mean": [0.0] * len(JOINTS), "std": [0.3] * len(JOINTS), "q01": [-0.6] * len(JOINTS), "q99": [0.6] * len(JOINTS)}
    statistics = directory / "assets" / "random" / "norm_stats.json"
    statistics.parent.mkdir(parents=True, exist_ok=True)
    config = {
        "action_dim": 32, "action_horizon": 50, "paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m",
        "precision": "bfloat16",
    }  # fmt: skip
    seen = {"height": 224, "width": 224, "crop": [0, 0, 224, 224]}
    robot = {
        "joint_names": list(JOINTS), "dt": 0.02, "relative_actions": True,
        "cameras": dict.fromkeys(CAMERAS[: shapes.cameras], seen),
    }  # fmt: skip
    for path, content in (
        (statistics, {"norm_stats": {"state": numbers, "actions": numbers}}),
        (directory / "config.json", config),
        (directory / "vla_edge.json", robot),
    ):
        path.write_text(json.dumps(content, indent=2))


def build_it(directory: Path, recipe_name: str, memory_mb: float, frames: int) -> dict:
    """Build the checkpoint on random observations in this process, and what that took."""
    from dataclasses import replace

    from benchmarks.smolvla_shapes import observations
    from vla_edge.compress.calibrate import collect
    from vla_edge.compress.recipe import Accept, load_recipe
    from vla_edge.engine.build import build
    from vla_edge.engine.piecewise import whole_memory
    from vla_edge.policy.checkpoint import load_checkpoint
    from vla_edge.progress import Bar

    checkpoint = load_checkpoint(directory)
    recipe = replace(load_recipe(recipe_name), accept=Accept())  # random weights say nothing of accuracy
    data = collect(observations(checkpoint.spec, 4 * frames), "random observations", frames=frames, held_out=2)
    begin = time.monotonic()
    path = build(directory, recipe, "onnxruntime", directory.parent / "bundle", data, Bar(), build_memory_mb=memory_mb)
    return {
        "bundle": str(path), "bundle_bytes": sum(file.stat().st_size for file in path.iterdir()), "frames": frames,
        "whole_bytes": whole_memory(checkpoint, recipe), "minutes": (time.monotonic() - begin) / 60,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("directory", type=Path, help="of the checkpoint; the bundle comes beside it")
    parser.add_argument("--middle", action="store_true", help="280 million values")
    parser.add_argument("--memory-mb", type=float, help="build it too, within so much")
    parser.add_argument("--recipe", default="int4-layerwise")
    parser.add_argument("--frames", type=int, default=20, help="to calibrate on: with 3 cameras 16,320 tokens")
    options = parser.parse_args(arguments)
    write_pi0(options.directory, MIDDLE if options.middle else Shapes())
    if options.memory_mb:
        print(json.dumps(build_it(options.directory, options.recipe, options.memory_mb, options.frames), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
