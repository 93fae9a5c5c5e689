"""Recipe x policy -> what each layer gets, settled before any work starts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from vla_edge.compress import flow_steps
from vla_edge.compress.decoding import check_decoding
from vla_edge.compress.recipe import Recipe, RecipeError
from vla_edge.compress.steps import (
    Decoding,
    FewSteps,
    Finetune,
    FlowSteps,
    Keep,
    KVCache,
    LowRankStep,
    Prune,
    PruneTokens,
    Quantize,
    Shrink,
    Smooth,
    Storage,
    Training,
    VisionCacheStep,
    factors_convolutions,
)
from vla_edge.policy.weights import OnDemand

OPTIONAL = "?"  # at the end of a target
_ONCE = PruneTokens | KVCache | FlowSteps | VisionCacheStep | Decoding


def plan_layers(recipe: Recipe, layers: Sequence[str]) -> dict[str, Storage]:
    """ "stage.path" of every linear layer -> the step that says how it is stored.

    A `keep` step takes layers out of `quantize` and `lowrank` steps, as their exception; apart from that a layer may
    fall under one step only. Factors of convolutions are layers by then, of which `keep` says how they are stored.

    Raises:
        RecipeError: a target matches no layer, two steps want the same layer, or a `keep` leaves another step nothing.
    """
    owners: dict[str, int] = {}
    matched = [
        _matches(getattr(step, "targets", ()), layers, f"recipe {recipe.name}, step {i}")
        for i, step in enumerate(recipe.steps, 1)
    ]
    for number, (step, names) in enumerate(zip(recipe.steps, matched), 1):
        if isinstance(step, Keep):
            _claim(owners, names, number, recipe)
    for number, (step, names) in enumerate(zip(recipe.steps, matched), 1):
        if isinstance(step, Quantize | LowRankStep) and not factors_convolutions(step):
            left = [name for name in names if not isinstance(_step(recipe, owners.get(name)), Keep)]
            if names and not left:
                raise RecipeError(
                    f"recipe {recipe.name}: step {number} ({step.key}) is only about layers that another step keeps; "
                    "drop one"
                )
            _claim(owners, left, number, recipe)
    rest = Keep(("*",))
    return {name: _step(recipe, owners[name]) if name in owners else rest for name in layers}


def check_order(recipe: Recipe) -> None:
    """Nothing, when every step comes where it can be carried out.

    Raises:
        RecipeError: layers are rounded, factored or trained, and something that undoes it follows.
    """
    rounded = trained = None
    for number, step in enumerate(recipe.steps, 1):
        where = f"recipe {recipe.name}, step {number} ({step.key})"
        before = recipe.steps[: number - 1]
        if not all(_may_be_before(earlier, step) for earlier in before):
            raise RecipeError(f"{where} changes the shapes that earlier steps work on; put it first")
        if isinstance(step, _ONCE) and any(type(earlier) is type(step) for earlier in before):
            raise RecipeError(f"{where} is there twice; drop one")
        if isinstance(step, FlowSteps) and (before or any(isinstance(other, FewSteps) for other in recipe.steps)):
            raise RecipeError(f"{where} comes before all others and without few_steps; put it first, or drop one")
        if isinstance(step, Training) and any(isinstance(earlier, KVCache) for earlier in before):
            raise RecipeError(f"{where} does not train through the cache's rounding; put it before kv_cache")
        if rounded and isinstance(step, FewSteps | Prune):
            raise RecipeError(f"{where} changes weights that step {rounded} has fixed; put it before")
        if rounded and trained and trained > rounded and not isinstance(step, Training | VisionCacheStep):
            raise RecipeError(
                f"{where} follows training through the rounding of step {rounded}; put it before {trained}"
            )
        if isinstance(step, Finetune) and any(isinstance(earlier, FewSteps) for earlier in recipe.steps[:number]):
            raise RecipeError(f"{where} would teach it to take many flow steps again; put it before few_steps")
        if isinstance(step, Training):
            trained = number
            if any(isinstance(e, LowRankStep) and not factors_convolutions(e) for e in recipe.steps[:number]):
                raise RecipeError(f"{where} does not train the factors of a step before it; put it before that")
        if isinstance(step, Quantize | LowRankStep) and not factors_convolutions(step):
            rounded = rounded or number


def _may_be_before(earlier, step) -> bool:
    """Whether a step that changes shapes leaves an earlier one what it works on."""
    if isinstance(step, Shrink):
        return isinstance(earlier, Shrink | FlowSteps)
    if isinstance(step, PruneTokens) or factors_convolutions(step):
        return isinstance(earlier, Shrink | PruneTokens | FlowSteps) or factors_convolutions(earlier)
    return True


def check_kind(recipe: Recipe, policy, num_steps: int) -> None:
    """Nothing, when every step is for policies of this kind.

    Args:
        num_steps: flow steps of the checkpoint.

    Raises:
        RecipeError: flow steps are asked of a policy without a flow, or in a number it has not; tokens of one that
            writes none.
    """
    check_decoding(recipe, policy)
    for number, step in enumerate(recipe.steps, 1):
        where = f"recipe {recipe.name}, step {number} ({step.key})"
        if isinstance(step, FlowSteps | FewSteps) and policy.matched != "velocity":
            raise RecipeError(f"{where} is for flow policies, and this one has no flow; take it out")
        if isinstance(step, Training) and policy.matched is None:
            raise RecipeError(f"{where}: a policy of this family cannot be trained against a teacher; take it out")
        if isinstance(step, FlowSteps) and step.evaluations:
            flow_steps.check(step.num_steps or num_steps, step.evaluations)
        if isinstance(step, FewSteps) and num_steps % step.num_steps:
            raise RecipeError(f"{where}: {step.num_steps} flow steps do not divide the checkpoint's {num_steps}")
        if isinstance(step, Finetune) and step.temperature is not None and policy.matched != "scores":
            raise RecipeError(f"{where}: temperature is for policies that write their actions as tokens; leave it out")


def check_shapes(recipe: Recipe, policy) -> None:
    """Nothing, when the steps about whole layers and about tokens fit the policy.

    Raises:
        RecipeError: more layers than can go; a share that leaves no token, or all; layers that are not there; channels
            that do not fill bytes.
    """
    for kind, able, what in ((Shrink, "skip_", "take whole layers out of"), (PruneTokens, "reader", "leave image tokens out of")):
        asked = [step for step in recipe.steps if isinstance(step, kind) and getattr(step, "blocks", True)]
        if asked and not hasattr(policy, able):
            raise RecipeError(
                f"recipe {recipe.name}: {asked[0].key} is to {what} the policy, which cannot be done to this family; leave "
                "that out"
            )
    config, left = policy.config, getattr(policy, "cache_length", 0)
    if not left and any(isinstance(step, KVCache) for step in recipe.steps):
        raise RecipeError(
            f"recipe {recipe.name}: kv_cache is for policies that read their keys and values again, at every flow step of "
            "SmolVLA and GR00T or every token of OpenVLA; leave it out"
        )
    for number, step in enumerate(recipe.steps, 1):
        where = f"recipe {recipe.name}, step {number} ({step.key})"
        if isinstance(step, Shrink) and step.blocks:
            layers, count = _removable(step, policy), skipped_layers(step, policy)
            if not 0 < count <= len(layers):
                raise RecipeError(
                    f"{where}: blocks is {step.blocks!r}, which is {count} layers; {len(layers)} of its targets can be "
                    "skipped (of the vision tower one stays, and so do the last text layer and its reader)"
                )
        if isinstance(step, PruneTokens):
            tokens = len(policy.reader.image_places)
            if not 0 < step.kept(tokens) < tokens:
                raise RecipeError(
                    f"{where}: keep is {step.keep:g}, which leaves {step.kept(tokens)} of {tokens} image tokens; at "
                    "least one must stay, and one must go"
                )
            if step.after >= config.text_layers:
                raise RecipeError(
                    f"{where}: after is {step.after}, and the policy has {config.text_layers} text layers; allowed is "
                    f"1 to {config.text_layers - 1}"
                )
            left -= tokens - step.kept(tokens)
        if isinstance(step, KVCache):
            if step.salient and not 0 < step.salient_tokens(left) < left:
                raise RecipeError(
                    f"{where}: salient is {step.salient:g}, which is {step.salient_tokens(left)} of {left} tokens; at "
                    "least one must be salient, and one not"
                )
            if step.bits == 4 and config.head_dim % 2:
                raise RecipeError(f"{where}: heads of {config.head_dim} channels do not fill bytes in 4 bits; take 8")


def check_factors(recipe: Recipe, policy) -> None:
    """Nothing, when every step about convolutions finds some, that no other step factors.

    Raises:
        RecipeError: it finds none, or another does.
    """
    from vla_edge.compress.factor.replace import factorable, meant

    there = list(factorable(policy.stages())) if any(map(factors_convolutions, recipe.steps)) else []
    for number, step in enumerate(recipe.steps, 1):
        where = f"recipe {recipe.name}, step {number} (lowrank)"
        mine = [name for name in there if isinstance(step, LowRankStep) and meant(step, name)]
        if factors_convolutions(step) and not mine:
            known = f"there are {there[0]} and {len(there) - 1} more" if there else "this policy has none"
            raise RecipeError(
                f"{where}: method {step.method} is for convolutions of more than one tap, and its targets hold none "
                f"({known}); take method svd where smaller, or other targets"
            )
        for other in recipe.steps[: number - 1]:
            twice = [name for name in mine if isinstance(other, LowRankStep) and meant(other, name)]
            if twice:
                raise RecipeError(f"{where} factors {twice[0]}, as another step does; make their targets disjoint")


def removable_blocks(step: Shrink, policy) -> list:
    """The `policy.blocks.Block`s that its targets cover, of the policy as it is."""
    from vla_edge.engine.trace import policy_layers

    layers = list(policy_layers(policy.stages()))

    def inside(name: str) -> list[str]:
        return [layer for layer in layers if layer.startswith(f"{name}.")]

    return [block for block in policy.blocks() if all(covers(step.targets, inside(name)) for name in block.names)]


def skipped_layers(step: Shrink, policy) -> int:
    """How many layers of the policy, as it is, the step takes out as a whole."""
    return round(step.blocks * len(_removable(step, policy))) if isinstance(step.blocks, float) else step.blocks


def _removable(step: Shrink, policy) -> set[str]:
    names = {name for block in removable_blocks(step, policy) for name in block.names}
    tower = {name for block in policy.blocks() for name in block.names if name.startswith("vision.")}
    return names - {max(tower)} if tower and tower <= names else names  # one has to stay


def covers(targets: Sequence[str], layers: Sequence[str]) -> bool:
    """Whether every one of `layers` is meant by one of `targets`."""
    return all(any(matches(target, layer) for target in targets) for layer in layers)


def still_there(steps: Sequence, layers: Sequence[str]) -> list:
    """`steps` without targets that meant layers which have been taken out since the recipe was checked."""
    left = []
    for step in steps:
        if hasattr(step, "targets"):
            targets = tuple(t for t in step.targets if any(matches(t, layer) for layer in layers))
            step = replace(step, targets=targets)
        if getattr(step, "targets", True):
            left.append(step)
    return left


def plan_smoothing(recipe: Recipe, plan: Mapping[str, Storage]) -> dict[str, Smooth]:
    """ "stage.path" -> the `smooth` step whose target it is, for the layers that have one.

    Args:
        plan: result of `plan_layers`.

    Raises:
        RecipeError: two steps smooth the same layer, or a layer is smoothed that is not quantized or is quantized by
            awq, which finds scales of its own, or by another library.
    """
    found = _preparation(recipe, plan, Smooth, "smooths")
    for name, step in found.items():
        storage, where = plan[name], f"recipe {recipe.name}, step {recipe.steps.index(step) + 1}"
        if not isinstance(storage, Quantize):
            raise RecipeError(f"{where} smooths {name}, which is not quantized; leave it out")
        if storage.scales_channels:
            raise RecipeError(f"{where} smooths {name}, for which awq finds scales itself; drop one")
        _ours(storage, where, "smooths", name)
    return found


def plan_pruning(
    recipe: Recipe, plan: Mapping[str, Storage], widths: Mapping[str, int] | None = None
) -> dict[str, Prune]:
    """ "stage.path" -> the `prune` step whose target it is, for the layers that have one.

    Args:
        plan: result of `plan_layers`. widths: inputs of each layer, where they are known.

    Raises:
        RecipeError: two steps prune the same layer, its factors take its place, another library compresses it, or 2:4
            does not divide its inputs.
    """
    found = _preparation(recipe, plan, Prune, "prunes")
    for name, step in found.items():
        where = f"recipe {recipe.name}, step {recipe.steps.index(step) + 1}"
        _ours(plan[name], where, "prunes", name)
        if isinstance(plan[name], LowRankStep):
            raise RecipeError(f"{where} prunes {name}, which another step puts factors in the place of; drop one")
        if widths and step.pattern == "2:4" and widths[name] % 4:
            raise RecipeError(f"{where} prunes {name} to 2:4, and its {widths[name]} inputs are no fours; leave it out")
    return found


def _ours(storage: Storage, where: str, does: str, name: str) -> None:
    if isinstance(storage, Quantize) and storage.provider:
        raise RecipeError(f"{where} {does} {name}, which {storage.provider} compresses as it was; drop one")


def _preparation(recipe: Recipe, plan: Mapping[str, Storage], kind: type, does: str) -> dict:
    """Layer -> the step of `kind` whose target it is."""
    found = {}
    for number, step in enumerate(recipe.steps, 1):
        if not isinstance(step, kind):
            continue
        where = f"recipe {recipe.name}, step {number}"
        for name in _matches(step.targets, list(plan), where):
            if name in found:
                raise RecipeError(f"{where} {does} {name}, as another step does; make their targets disjoint")
            found[name] = step
    return found


def _step(recipe: Recipe, number: int | None):
    return None if number is None else recipe.steps[number - 1]


def _claim(owners: dict[str, int], names: Sequence[str], number: int, recipe: Recipe) -> None:
    for name in names:
        if name in owners:
            raise RecipeError(
                f"recipe {recipe.name}: steps {owners[name]} and {number} both say what becomes of {name}; "
                "make their targets disjoint"
            )
        owners[name] = number


def _matches(targets: Sequence[str], layers: Sequence[str], where: str) -> list[str]:
    found: dict[str, None] = {}
    for target in targets:
        hits = [name for name in layers if matches(target, name)]
        if not hits and not target.endswith(OPTIONAL):
            raise RecipeError(
                f"{where}: target {target!r} matches no layer; did you mean {_nearest(target, layers)!r}?"
            )
        found.update(dict.fromkeys(hits))
    return list(found)


def matches(target: str, layer: str) -> bool:
    """Whether `target` is the layer, a part of the policy that contains it, or a pattern of either."""
    target = target.removesuffix(OPTIONAL)
    return fnmatchcase(layer, target) or fnmatchcase(layer, f"{target}.*")


def _nearest(target: str, layers: Sequence[str]) -> str:
    places: dict[str, None] = {}
    for layer in layers:
        parts = layer.split(".")
        places.update(dict.fromkeys(".".join(parts[:n]) for n in range(1, len(parts) + 1)))
    return difflib.get_close_matches(target, places, n=1, cutoff=0.0)[0]


def grouped_by_stage(plan: Mapping[str, object]) -> dict[str, OnDemand]:
    """stage -> layer within the stage -> what was planned, looked up when it is asked for."""
    stages: dict[str, list[str]] = {}
    for name in plan:
        stage, _, layer = name.partition(".")
        stages.setdefault(stage, []).append(layer)
    return {
        stage: OnDemand(layers, lambda layer, stage=stage: plan[f"{stage}.{layer}"]) for stage, layers in stages.items()
    }
