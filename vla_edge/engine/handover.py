"""A policy that writes its actions as tokens -> what runtimes of language models take, and the facts that go with it.

    policy.json  vision.onnx  language/ (a Hugging Face Llama)  action_tokens/vocab_map.safetensors

The recipe is carried out as for a bundle, and an engine of the very same layers has to pass verification here first.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from vla_edge.compress.apply import weight_grid
from vla_edge.compress.pipeline import check_recipe
from vla_edge.compress.plan import grouped_by_stage
from vla_edge.compress.recipe import Recipe, load_recipe
from vla_edge.compress.steps import FixedPoint, KVCache, LowRankStep, PruneTokens, Quantize
from vla_edge.engine.backends import place
from vla_edge.engine.build import Progress, build
from vla_edge.engine.bundle import Bundle
from vla_edge.engine.compile import STAND_IN
from vla_edge.engine.language import language_of
from vla_edge.engine.llama_directory import write_action_tokens, write_llama
from vla_edge.engine.packed_layers import Grid, Layout, LayoutError, get_layout
from vla_edge.files import whole_directory
from vla_edge.policy.bins import bin_values
from vla_edge.policy.checkpoint import Checkpoint, load_checkpoint

LANGUAGE, TOKENS, FACTS = "language", "action_tokens", "policy.json"
SCHEMA = 1


@dataclass(frozen=True)
class Handover:
    """What was written.

    Attributes:
        directory: all of it. bytes: of its files. facts: what `policy.json` says.
    """

    directory: Path
    bytes: int
    facts: dict


def hand_over(
    checkpoint: str | Path,
    output: str | Path,
    layout: str,
    recipe: str | Path | Recipe = "int4-edge-llm",
    calibration=None,
    progress: Progress | None = None,
    demonstrations: Sequence[str | Path] = (),
    build_memory_mb: float | None = None,
) -> Handover:
    """Write `output`, which must not exist and then is there as a whole or not at all.

    Args:
        checkpoint: directory of an OpenVLA. layout: of the language model's layers, one of `packed_layers.LAYOUTS`.
        recipe, calibration, progress, demonstrations, build_memory_mb: as of `build.build`.

    Raises:
        LayoutError: `output` exists, the policy writes no tokens, or the layout cannot hold what the recipe makes of it;
            before anything is compressed where the recipe tells.
        VlaEdgeError: as `build.build`.
    """
    chosen = get_layout(layout)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    loaded, output = load_checkpoint(checkpoint), Path(output).expanduser().resolve()
    if output.exists():
        raise LayoutError(f"{output} exists already; choose another output, or take it away")
    first = _first_token(loaded, recipe, chosen)
    engine = output.with_name(f".{output.name}.engine")
    with whole_directory(output, LayoutError) as directory:

        def write(exported, compressed, ready) -> None:
            stage = next(stage for stage in exported if stage.interface.name == "vision")
            place(stage.file, directory, stage.interface)
            _write_language(directory / LANGUAGE, compressed, ready, chosen, first, loaded.tokenizer_path.parent)
            write_action_tokens(directory / TOKENS, first)

        try:
            bundle = build(
                loaded.directory, recipe, STAND_IN, engine, calibration, progress, True, None, demonstrations, None,
                build_memory_mb, write,
            )  # fmt: skip
            facts = _facts(Bundle.load(bundle), layout, first)
        finally:
            shutil.rmtree(engine, ignore_errors=True)
        (directory / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return Handover(output, size, facts)


def _first_token(checkpoint: Checkpoint, recipe: Recipe, layout: Layout) -> int:
    """Id of the first token of actions, of a policy and a recipe that can be handed over.

    Raises:
        LayoutError: they cannot.
    """
    from vla_edge.policy.openvla_checkpoint import first_action_token
    from vla_edge.policy.piecewise import PiecewisePolicy

    policy = PiecewisePolicy(checkpoint).policy  # shapes, no values
    if not getattr(policy, "can_generate", False):
        raise LayoutError(
            f"{checkpoint.directory} is a {checkpoint.spec.family} that writes no tokens one after the other, so it has no "
            "language model that other runtimes could run; hand over an OpenVLA, or build a bundle"
        )
    for step in recipe.steps:
        if isinstance(step, FixedPoint | KVCache | PruneTokens):
            raise LayoutError(f"recipe {recipe.name} says how tokens are read or written here ({step.key}); take that out")
    grids = {}
    for name, step in check_recipe(recipe, policy, checkpoint).items():
        if not name.startswith("prefill.layers."):
            continue
        if isinstance(step, LowRankStep) or (isinstance(step, Quantize) and (step.activations or step.low_rank)):
            what = "rounds its inputs" if getattr(step, "activations", None) else "has a low-rank branch"
            raise LayoutError(
                f"{name} {what} in recipe {recipe.name}, which is not stored with weights; quantize it with {layout.recipe}"
            )
        if isinstance(step, Quantize):
            module = policy.get_submodule(name)
            shape = module.out_features, module.in_features
            grids[name] = Grid(shape, step.weights, weight_grid(step, module.in_features)[1])
    layout.check(grids)
    return first_action_token(checkpoint, policy.config.vocabulary)


def _write_language(directory: Path, compressed, ready, layout: Layout, first: int, tokenizer: Path) -> None:
    policy, layers = compressed.policy, grouped_by_stage(compressed.layers).get("prefill", {})
    directory.mkdir()
    with ExitStack() as stack:
        for stage in policy.stages():
            if stage.name != "vision":
                stack.enter_context(ready(stage))
        write_llama(directory, language_of(policy.prefill, policy.decode.words, layers), layout, first, tokenizer)


def _facts(bundle: Bundle, layout: str, first: int) -> dict:
    """What a program needs to turn pictures and words into a prompt, and tokens into actions; and what was measured."""
    manifest = bundle.manifest
    vision = next(entry for entry in bundle.stages if entry.interface.name == "vision").to_dict()
    prompt = next(entry for entry in bundle.stages if entry.interface.name == "prefill").interface.inputs
    return {
        "schema": SCHEMA,
        "name": manifest["name"],
        "layout": layout,
        "checkpoint": manifest["checkpoint"],
        "policy": manifest["policy"],
        "joint_names": manifest["joint_names"],
        "dt": manifest["dt"],
        "recipe": manifest["recipe"],
        "vision": {"pixels": [-1, 1], **{side: vision[side] for side in ("inputs", "outputs")}},
        "prompt": {
            "order": ["the first word", "image tokens of every camera", "the rest of the words"],
            "image_tokens": prompt[0].shape[1],
            "words": prompt[1].shape[1],
        },
        "action_tokens": {"first": first, "values": bin_values().tolist(), "written": len(manifest["joint_names"])},
        "layers": {name: row for entry in bundle.stages for name, row in _rows(entry)},
        "calibration": manifest["calibration"],
        "verification": {**manifest["verification"], "by": f"{STAND_IN}, on the same layers"},
        "versions": manifest["versions"],
    }


def _rows(entry):
    """Layers of one stage; those that two stages share once."""
    if entry.interface.name in ("vision", "prefill"):
        for name, row in entry.layers.items():
            yield f"{entry.interface.name}.{name}", dict(row)
