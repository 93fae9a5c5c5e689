"""How a policy that writes its actions as tokens reads its prompt and decodes, as steps of a recipe say."""

from __future__ import annotations

from vla_edge.compress.recipe import Recipe, RecipeError
from vla_edge.compress.steps import Decoding, FixedPoint, KVCache, PrefillBlocks, PruneTokens, Speculate

_APART = (
    (Speculate, FixedPoint, "decode in different ways"),
    (PrefillBlocks, KVCache, "cannot go together: the cache is rounded as a whole"),
    (PrefillBlocks, PruneTokens, "cannot go together: which image tokens stay is known when all of the prompt was read"),
)


def decode_(step: Decoding, policy) -> dict[str, int]:
    """Have `policy` do what the step says; returns what changes of its `PolicySpec`."""
    if isinstance(step, PrefillBlocks):
        policy.read_blocks_(step.size)
        return {}
    if isinstance(step, FixedPoint):
        policy.revise_()
        return {"most_passes": step.most_passes or 0}
    if step.draft == "none":
        policy.one_by_one_()
        return {}
    trained = policy.draft is not None and step.draft != "history"
    policy.speculate_(step.tokens, trained)
    return {"draft_chunks": 0 if trained else step.chunks, "draft_tolerance": step.tolerance}


def check_decoding(recipe: Recipe, policy) -> None:
    """Nothing, when the policy can decode as the recipe says.

    Raises:
        RecipeError: it writes no tokens, or too few; a draft is asked for that it does not have; two steps exclude each other.
    """
    kinds = {type(step): number for number, step in enumerate(recipe.steps, 1)}
    for one, other, why in _APART:
        if one in kinds and other in kinds:
            raise RecipeError(
                f"recipe {recipe.name}, steps {kinds[one]} ({one.key}) and {kinds[other]} ({other.key}) {why}; drop one"
            )
    for number, step in enumerate(recipe.steps, 1):
        where = f"recipe {recipe.name}, step {number} ({step.key})"
        if isinstance(step, Decoding) and not getattr(policy, "can_revise", False):
            raise RecipeError(
                f"{where}: {step.key} is for policies that write three tokens or more, one after the other; take it out"
            )
        if not isinstance(step, Speculate):
            continue
        if step.draft == "trained" and policy.draft is None:
            raise RecipeError(f"{where}: the checkpoint has no draft; train one with vla-edge draft, or take draft: history")
        trained = policy.draft if step.draft in ("auto", "trained") else None
        most = min(policy.most_drafted, policy.most_drafted if trained is None else trained.config.most_tokens)
        if step.tokens is not None and step.tokens > most:
            raise RecipeError(f"{where}: tokens is {step.tokens}, allowed is 1 to {most}: what a pass can verify here")
