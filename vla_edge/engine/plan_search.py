"""Which recipes, decodings and flow steps reach a rate on a device, the least compressed first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vla_edge.compress.recipe import Recipe, RecipeError, load_recipe
from vla_edge.engine.architectures import Architecture
from vla_edge.engine.cost import CostError
from vla_edge.engine.devices import Device
from vla_edge.engine.plan import Plan, PlanError, predict
from vla_edge.engine.workload import Workload

# By how much they take from the policy: the first that reaches a rate costs the least precision.
RECIPES = ("fp32", "bf16", "int8-weight-only", "fp8", "w8a8-smoothquant", "int8-static", "int4-gptq", "nvfp4", "w4a8")
DECODINGS = ("autoregressive", "speculative", "fixed-point", "parallel")
KEPT = (1.0, 0.5)  # share of vision tokens


@dataclass(frozen=True)
class Candidate:
    """One combination: its plan, or why there is none."""

    recipe: str
    workload: Workload
    plan: Plan | None
    reason: str = ""

    def reaches(self, hz: float) -> bool:
        """Whether its chunk rate is at least `hz`."""
        return self.plan is not None and self.plan.chunk_rate_hz >= hz


def candidates(
    architecture: Architecture,
    device: Device,
    workload: Workload,
    runtime: str | None = None,
    group: int | None = None,
    recipes: Sequence[str | Recipe] = RECIPES,
) -> Iterator[Candidate]:
    """Every combination of recipe with what can be asked of the architecture, in the order of `RECIPES`.

    For policies that decode tokens these are the decodings; for flow policies the flow steps, halved down to 1; for
    both, all vision tokens or half of them.
    """
    for name in recipes:
        recipe = name if isinstance(name, Recipe) else load_recipe(name)
        fewer = [k for k in KEPT if k < workload.keep_vision] if architecture.prunes_vision else []
        for kept in (workload.keep_vision, *fewer):
            for changed in _variants(architecture, workload, kept):
                try:
                    plan = predict(architecture, recipe, device, changed, runtime, group)
                except (PlanError, RecipeError, CostError) as error:
                    yield Candidate(recipe.name, changed, None, str(error))
                else:
                    yield Candidate(recipe.name, changed, plan)


def _variants(architecture: Architecture, workload: Workload, kept: float) -> Iterator[Workload]:
    base = replace(workload, keep_vision=kept)
    if architecture.is_flow:
        steps = workload.steps
        while steps:
            yield replace(base, steps=steps)
            steps //= 2
    elif not architecture.decodes:
        yield base
    else:
        for decoding in ("parallel",) if architecture.parallel else DECODINGS:
            yield replace(base, decoding=decoding)
