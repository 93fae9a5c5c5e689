"""A whole recipe on one policy: what takes parts out, what trains, and what rounds, in the order the recipe says."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from vla_edge.compress import flow_steps
from vla_edge.compress.apply import Tell, compress_policy
from vla_edge.compress.calibrate import CalibrationData, never_reached, watch_inputs
from vla_edge.compress.decoding import decode_
from vla_edge.compress.factor.replace import FactoredLayer, Race, factor_convolutions
from vla_edge.compress.importance import weighed_inputs
from vla_edge.compress.plan import (
    check_factors,
    check_kind,
    check_order,
    check_shapes,
    covers,
    plan_layers,
    plan_pruning,
    plan_smoothing,
    removable_blocks,
    skipped_layers,
    still_there,
)
from vla_edge.compress.providers import get_provider, trained_by_providers
from vla_edge.compress.quantize.weights import CompressedLinear
from vla_edge.compress.recipe import Recipe, RecipeError
from vla_edge.compress.statistics import InputStatistics
from vla_edge.compress.stored import stored_layers
from vla_edge.compress.steps import (
    Decoding,
    FewSteps,
    Finetune,
    FlowSteps,
    Keep,
    KVCache,
    PrefillBlocks,
    Prune,
    PruneTokens,
    Quantize,
    Shrink,
    Storage,
    Training,
    VisionCacheStep,
    factors_convolutions,
)
from vla_edge.files import write_whole
from vla_edge.types import Observation

_SAVE_EVERY = 50


@dataclass(frozen=True)
class Compressed:
    """What a recipe makes of a policy.

    Attributes:
        policy: the policy that the layers belong to; the one that was given unless the recipe changes it.
        layers: "stage.path" -> what becomes of each of its linear layers.
        num_steps: flow steps it is meant to take. evaluated: those that ask the network; all when empty.
        vision_cache: see `policy.spec.PolicySpec`. decoding: what else of it is to change, by field.
        factored: convolutions that were to have factors, by the name of their layer.
    """

    policy: object
    layers: Mapping[str, CompressedLinear]
    num_steps: int
    evaluated: tuple[int, ...] = ()
    vision_cache: float = 0.0
    decoding: Mapping[str, int] = field(default_factory=dict)
    factored: Mapping[str, FactoredLayer] = field(default_factory=dict)


def carry_out(
    recipe: Recipe,
    policy,
    checkpoint,
    data: CalibrationData,
    tell: Tell,
    reduce_range: bool = False,
    demonstrations: Sequence[str | Path] = (),
    recording: Sequence[Observation] | None = None,
    work: Path | None = None,
    race: Callable[[object, object, tuple[int, ...], Storage], float] | None = None,
) -> Compressed:
    """Everything the recipe says; `policy` itself stays as it is.

    Args:
        checkpoint: that `policy` was loaded from.
        tell: called with the fraction done and what is being done.
        reduce_range: what `reduce_range: auto` means on the machine the engine is for.
        demonstrations: directories to train on, before those of the recipe.
        recording: observations to train on where there are no demonstrations; those of `data` when None.
        work: where training goes on from when it was interrupted; needed by recipes that train.
        race: of a convolution, its factors, the size of what they are given and how both are stored: the time of the
            factors over that of the convolution; None where the engine's device is not here.

    Raises:
        RecipeError, CalibrationError, DemonstrationError, TrainingError: what is wrong; what can be known before the
            work is found before it.
    """
    from vla_edge.engine.runner import Runner
    from vla_edge.engine.trace import policy_layers

    check_recipe(recipe, policy, checkpoint)
    original, stored = policy, stored_layers(policy, checkpoint)
    if stored and any(isinstance(step, Training | Prune | Shrink) or factors_convolutions(step) for step in recipe.steps):
        raise RecipeError(
            f"recipe {recipe.name} changes weights, and those of {checkpoint.directory} are rounded already; take such "
            "steps out, or give the weights they were made from"
        )
    frames = None
    if recipe.trains:
        if work is None:
            raise RecipeError(f"recipe {recipe.name} trains, and there is no directory to keep that in")
        tell(0.0, "reading what to train on")
        frames = _frames(recipe, original, checkpoint, demonstrations, recording or data.observations)
    if recipe.changes_policy:
        policy = copy.deepcopy(policy)
    num_steps, evaluated, vision_cache = checkpoint.spec.num_steps, (), 0.0
    decoding: dict[str, int] = {}
    layers, pruned, factored = {}, set(), {}
    others: dict[str, Callable] = {}  # layers that a provider trains through its own rounding
    pending: list = []
    fixed = False  # layers are rounded, and what follows is trained through that
    alone = Shrink | PruneTokens | FlowSteps | Training
    share = 1.0 / (1 + sum(isinstance(step, alone) or factors_convolutions(step) for step in recipe.steps))
    done = 0

    def part(fraction: float, what: str) -> None:
        tell(min(1.0, share * (done + fraction)), what)

    def compress(steps: list) -> dict[str, CompressedLinear]:
        stages = policy.stages()
        modules = policy_layers(stages)
        gathered = replace(recipe, steps=tuple(still_there(steps, list(modules))))
        plan = plan_layers(gathered, list(modules))
        runner = Runner.from_policy(policy, checkpoint, num_steps)
        given = _provided(plan, policy, checkpoint, num_steps, data.observations) | stored
        found = compress_policy(
            gathered, plan, modules, stages, runner, data.observations, part, reduce_range, pruned, given,
            lambda groups, progress: weighed_inputs(policy, checkpoint, groups, data.observations, progress),
        )  # fmt: skip
        pruned.update(plan_pruning(gathered, plan))
        others.update(trained_by_providers(plan))
        return found

    for number, step in enumerate(recipe.steps):
        if isinstance(step, Shrink):
            part(0.0, "taking out layers, heads and channels")
            _shrink(recipe, step, policy, checkpoint, num_steps, data.observations, part)
        elif isinstance(step, PruneTokens):
            from vla_edge.compress.prune.tokens import prune_tokens_

            prune_tokens_(
                step, policy, checkpoint, data.observations, lambda f: part(f, "seeing which image tokens matter")
            )
        elif factors_convolutions(step):
            runner = Runner.from_policy(policy, checkpoint, num_steps)
            kept = work / f"{number}-{_question(recipe, checkpoint, number, len(frames))}.json" if recipe.trains else None
            raced = None if race is None else _raced(race, policy, recipe, number, kept)
            factored |= factor_convolutions(step, policy, runner, data.observations, part, raced)
        elif isinstance(step, FlowSteps):
            num_steps = step.num_steps or num_steps
            if step.evaluations:
                runner = Runner.from_policy(policy, checkpoint, num_steps)
                evaluated = flow_steps.best_steps(
                    runner, num_steps, step.evaluations, data.observations,
                    lambda f: part(f, "seeing which flow steps have to ask the network"),
                )  # fmt: skip
        elif isinstance(step, Decoding):
            if not isinstance(step, PrefillBlocks):
                decoding |= decode_(step, policy)
            continue
        elif isinstance(step, VisionCacheStep):
            vision_cache = step.change
            continue
        elif isinstance(step, Training):
            rounded = any(isinstance(earlier, Quantize) for earlier in pending)
            now = pending if rounded else [earlier for earlier in pending if isinstance(earlier, Prune)]
            pending = [earlier for earlier in pending if earlier not in now]
            if now:
                layers = compress(now)
            run = work / f"{number}-{_question(recipe, checkpoint, number, len(frames))}"
            layers = _train(step, policy, original, frames, layers, pruned, others, num_steps, run, part)
            if isinstance(step, FewSteps):
                num_steps = step.num_steps
            fixed = fixed or rounded
        else:
            pending.append(step)
            continue
        done += 1
    if not fixed:
        layers = compress(pending)
    for step in recipe.steps:  # last: nothing that looks at the policy has to see through these
        if isinstance(step, KVCache):
            _round_cache(step, policy)
        elif isinstance(step, PrefillBlocks):
            decode_(step, policy)
    policy.requires_grad_(False)
    return Compressed(policy, layers, num_steps, evaluated, vision_cache, decoding, factored)


def check_recipe(recipe: Recipe, policy, checkpoint) -> dict[str, Storage]:
    """The plan of all layers, when the recipe can be carried out on the policy.

    Raises:
        RecipeError: why it cannot; a library that it asks for may be missing.
    """
    from vla_edge.engine.trace import policy_layers

    check_order(recipe)
    check_kind(recipe, policy, checkpoint.spec.num_steps)
    check_shapes(recipe, policy)
    for step in recipe.steps:
        if isinstance(step, Quantize) and step.provider:
            get_provider(step)
    plan = plan_layers(recipe, list(policy_layers(policy.stages())))
    check_factors(recipe, policy)
    plan_pruning(recipe, plan)
    plan_smoothing(recipe, plan)
    return plan


def _provided(plan, policy, checkpoint, num_steps: int, observations) -> dict[str, CompressedLinear]:
    """The layers that other libraries are to compress, compressed."""
    from vla_edge.engine.runner import Runner
    from vla_edge.engine.trace import policy_layers

    layers: dict[str, CompressedLinear] = {}
    for step in dict.fromkeys(step for step in plan.values() if isinstance(step, Quantize) and step.provider):
        provider = get_provider(step)
        theirs = copy.deepcopy(policy)  # they work in place
        modules = policy_layers(theirs.stages())
        runner = Runner.from_policy(theirs, checkpoint, num_steps)
        mine = {name: modules[name] for name, own in plan.items() if own is step}

        def run(runner=runner, mine=mine) -> None:
            reached: set[str] = set()
            hooks = [
                module.register_forward_pre_hook(lambda *_, name=name: reached.add(name))
                for name, module in mine.items()
            ]
            runner.set_num_steps(runner.num_steps)  # what is computed then is to be seen too
            for observation in observations:
                runner.infer(observation)
            for hook in hooks:
                hook.remove()
            for name in mine:
                if name not in reached:
                    raise never_reached(name)

        with redirect_stdout(sys.stderr):  # what libraries report; standard output is for results
            layers |= provider.quantize(theirs, mine, step, run)
    return layers


def _shrink(recipe: Recipe, step: Shrink, policy, checkpoint, num_steps: int, observations, part) -> None:
    from vla_edge.compress.prune.blocks import skip_blocks
    from vla_edge.engine.runner import Runner

    def runner() -> Runner:
        return Runner.from_policy(policy, checkpoint, num_steps)

    share = 0.0
    if count := skipped_layers(step, policy):
        share = 0.5 if step.channels or step.heads else 1.0
        told = "seeing which layers are missed"
        gone = skip_blocks(
            policy, count, lambda: removable_blocks(step, policy), step.by, runner, observations,
            lambda f: part(share * f, told),
        )  # fmt: skip
        if len(gone) < count:
            raise RecipeError(
                f"recipe {recipe.name}: a shrink step is to take {count} layers out and only {', '.join(gone)} can go"
            )
    if step.channels or step.heads:
        shrink_units(
            step, policy, runner(), observations, lambda f, what: part(share + (1 - share) * f, what), recipe.name
        )


def shrink_units(step: Shrink, policy, runner, observations: Sequence[Observation], tell: Tell, recipe: str) -> None:
    """Take the heads and channels that `step` says out of `policy`, in place.

    Args:
        runner: a `Runner` in PyTorch of this `policy`. recipe: its name, for errors.

    Raises:
        RecipeError: nothing would go. CalibrationError: a block is never reached.
    """
    from vla_edge.compress.prune.structured import shrink
    from vla_edge.engine.trace import policy_layers
    from vla_edge.policy.blocks import units_in

    modules = policy_layers(policy.stages())
    names = {id(module): name for name, module in modules.items()}

    def covered(units) -> bool:
        layers = [names[id(layer)] for layer, _ in (*units.makers, *units.readers)]
        return covers(step.targets, layers)

    shares = {"channels": step.channels, "heads": step.heads}
    chosen = [units for units in units_in(policy) if shares[units.kind] and covered(units)]
    if not any(round(shares[units.kind] * units.count) for units in chosen):
        raise RecipeError(
            f"recipe {recipe}: a shrink step takes nothing out: its targets cover no whole block, or its shares "
            "are less than half a unit; a text layer's heads are also those of the action expert beside it"
        )
    readers = {names[id(layer)]: layer for units in chosen for layer, _ in units.readers}
    seen = watch_inputs(
        runner, readers, lambda _: InputStatistics(), observations, lambda f: tell(0.9 * f, "seeing what is missed")
    )
    for name, statistics in seen.items():
        if not statistics.count:
            raise never_reached(name)
    shrink(chosen, shares, {id(readers[name]): statistics for name, statistics in seen.items()})


def _raced(race, policy, recipe: Recipe, number: int, file: Path | None) -> Race:
    """`race` of layers by name, each stored as the steps from `number` on have it.

    Args:
        file: keeps what was measured: a build that goes on where it was interrupted has the same factors again.
    """
    from vla_edge.engine.trace import policy_layers

    names = list(policy_layers(policy.stages()))
    later = [step for step in still_there(recipe.steps[number:], names) if isinstance(step, Keep | Quantize)]
    plan = plan_layers(replace(recipe, steps=tuple(later)), names)
    known = json.loads(file.read_text()) if file is not None and file.is_file() else {}

    def raced(name: str, convolution, factors, size: tuple[int, ...]) -> float:
        if name not in known:
            known[name] = race(convolution, factors, size, plan[name])
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, json.dumps(known).encode())
        return known[name]

    return raced


def _round_cache(step: KVCache, policy) -> None:
    from vla_edge.compress.quantize.kv_cache import CacheLoad, CacheStore

    policy.round_cache_(CacheStore(step, policy.cache_length), CacheLoad(step, policy.cache_length))


def _train(
    step: Training, policy, original, frames, layers, pruned, others, num_steps: int, run: Path, part
) -> dict[str, CompressedLinear]:
    """Train `policy` in place; returns its layers as they are now, empty where nothing constrained them."""
    import torch

    from vla_edge.learn import match
    from vla_edge.learn.constrained import constrain, release

    def progress(number: int, losses: Mapping[str, float]) -> None:
        told = ", ".join(f"{name} {value:.4f}" for name, value in losses.items() if name != "norm")
        part(number / step.steps, f"training ({told})")

    torch.manual_seed(step.seed)
    few = isinstance(step, FewSteps)
    # with many steps, a policy leads itself; whatever else it has lost, only the one it was made from still knows
    teacher = copy.deepcopy(policy) if few else original
    constrain(policy, layers, pruned, others)
    shared = dict(steps=step.steps, batch=step.batch, rate=step.rate, seed=step.seed, warmup=min(20, step.steps))
    if few:
        config = match.FewStepsConfig(**shared, num_steps=step.num_steps, teacher_steps=num_steps)
        fit = match.FewSteps(config, policy, teacher, frames, run)
    else:
        weights = dict(features=step.features, attention=step.attention, shown=step.shown)
        config = match.MatchConfig(**shared, **weights, temperature=step.temperature or 1.0)
        fit = match.Match(config, policy, teacher, frames, run)
    fit.train(_SAVE_EVERY, progress)
    fit.module.load_state_dict(fit.average.state_dict())
    return release(policy)


def _frames(recipe: Recipe, policy, checkpoint, demonstrations, observations):
    """What to train on, with actions."""
    from vla_edge.learn.frames import from_demonstrations, from_observations
    from vla_edge.learn.outputs import with_actions_of

    spec, tokenizer = checkpoint.spec, checkpoint.tokenizer_path
    named = [path for step in recipe.steps if isinstance(step, Training) for path in step.demonstrations]
    directories = list(dict.fromkeys(map(str, [*demonstrations, *([] if demonstrations else named)])))
    if directories:
        if (rows := getattr(policy.config, "chunk_size", spec.chunk_size)) != spec.chunk_size:
            raise RecipeError(
                f"recipe {recipe.name}: the policy makes {rows} rows of which {spec.chunk_size} are the chunk, and what is "
                "shown has no others; train it without demonstrations"
            )
        return from_demonstrations(directories, spec, tokenizer)
    if any(isinstance(step, Finetune) and step.shown for step in recipe.steps):
        raise RecipeError(f"recipe {recipe.name} trains on actions that were shown; give it demonstrations")
    return with_actions_of(policy, from_observations(observations, spec, tokenizer), spec.num_steps)


def _question(recipe: Recipe, checkpoint, number: int, frames: int) -> str:
    """What a training run depends on, in short: an interrupted one goes on only where nothing of it has changed."""
    steps = [[step.key, asdict(step)] for step in recipe.steps[: number + 1]]
    return hashlib.sha256(json.dumps([checkpoint.fingerprint, steps, frames]).encode()).hexdigest()[:12]
