"""Plans for people, and as plain types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from vla_edge.engine.plan import Plan
from vla_edge.engine.plan_search import Candidate
from vla_edge.engine.refusals import TRAINING


def plan_text(plan: Plan) -> str:
    """A table of stages, and the arithmetic below it."""
    lines = [
        f"{plan.architecture} by {plan.recipe} on {plan.device}, {plan.runtime}: {plan.total_ms:.1f} ms a chunk, "
        f"{plan.chunk_rate_hz:.2f} chunks/s, {_actions(plan)}",
        "",
        f"  {'stage':10}{'calls':>7}  {'per':12}{'ms a call':>10}{'ms':>9}{'GFLOP':>9}{'MB':>8}  goes into",
    ]
    for stage in plan.stages:
        top = sorted(stage.spent_ms.items(), key=lambda item: -item[1])[:3]
        words = ", ".join(f"{label} {100 * ms / stage.ms:.0f} %" for label, ms in top if ms > 0.05 * stage.ms)
        lines.append(
            f"  {stage.name:10}{stage.calls:7.3g}  {stage.per:12}{stage.call_ms:10.2f}{stage.ms:9.2f}{stage.gflop:9.1f}"
            f"{stage.weight_mb:8.0f}  {words}"
        )
    terms = " + ".join(f"{stage.calls:.3g} x {stage.call_ms:.1f}" for stage in plan.stages)
    memory = plan.memory
    parts = ", ".join(f"{part} {_size(count)}" for part, count in memory.weights.items())
    lines += [
        f"  {'host':10}{'':31}{plan.host_ms:9.2f}",
        "",
        f"  time        {terms} + {plan.host_ms:.1f} of the host = {plan.total_ms:.1f} ms",
        f"  rates       1000 / {plan.total_ms:.1f} = {plan.chunk_rate_hz:.2f} chunks/s; times {plan.actions} "
        f"action{'s' if plan.actions > 1 else ''} a chunk = {plan.action_rate_hz:.1f} actions/s",
        f"  engine      {_size(memory.engine)}: {parts}",
        f"  running     {_size(memory.running)} with {_size(memory.cache)} of keys and values and "
        f"{_size(memory.activations)} of activations; {_size(memory.available)} are there",
        f"  bottleneck  {plan.bottleneck}",
        f"  lever       {plan.lever}",
        *(f"  caution     {caution}" for caution in plan.cautions),
    ]
    return "\n".join(lines)


def plan_dict(plan: Plan) -> dict:
    """Plain types."""
    return {
        "architecture": plan.architecture,
        "device": plan.device,
        "runtime": plan.runtime,
        "recipe": plan.recipe,
        "workload": asdict(plan.workload),
        "total_ms": plan.total_ms,
        "chunk_rate_hz": plan.chunk_rate_hz,
        "action_rate_hz": plan.action_rate_hz,
        "host_ms": plan.host_ms,
        "stages": {
            stage.name: {
                "calls": stage.calls, "per": stage.per, "call_ms": stage.call_ms, "ms": stage.ms,
                "gflop": stage.gflop, "weight_mb": stage.weight_mb, "spent_ms": dict(stage.spent_ms),
            }
            for stage in plan.stages
        },
        "bytes": {
            "weights": dict(plan.memory.weights), "engine": plan.memory.engine, "cache": plan.memory.cache,
            "activations": plan.memory.activations, "running": plan.memory.running,
            "available": plan.memory.available,
        },
        "bottleneck": plan.bottleneck,
        "lever": plan.lever,
        "cautions": list(plan.cautions),
    }  # fmt: skip


def search_text(found: Sequence[Candidate], hz: float, everything: bool = False) -> str:
    """Candidates that reach `hz` chunks per second, least compressed first; and why others do not."""
    shown = [c for c in found if c.plan and (everything or c.reaches(hz))]
    if not any(candidate.reaches(hz) for candidate in found):
        planned = [candidate.plan for candidate in found if candidate.plan]
        if not planned:
            return "\n".join(["nothing can be built there:", *_reasons(found)])
        best = max(planned, key=lambda plan: plan.chunk_rate_hz)
        head = [
            f"nothing reaches {hz:g} chunks/s; the fastest is {best.recipe}, {_way(best)}: {best.chunk_rate_hz:.2f}. "
            f"It waits for {best.bottleneck}: {best.lever}"
        ]
    else:
        head = [f"{len([c for c in found if c.reaches(hz)])} of {len(found)} combinations reach {hz:g} chunks/s"]
    lines = [
        *head,
        "",
        f"  {'recipe':18}{'how':54}{'chunks/s':>9}{'actions/s':>10}{'ms':>8}{'body GB':>9}{'engine GB':>10}  waits for",
    ]
    for candidate in shown:
        plan = candidate.plan
        mark = "*" if candidate.reaches(hz) else " "
        lines.append(
            f"{mark} {candidate.recipe:18}{_way(plan):54}{plan.chunk_rate_hz:9.2f}{plan.action_rate_hz:10.1f}"
            f"{plan.total_ms:8.1f}{plan.memory.weights.get('language body', 0) / 1e9:9.2f}"
            f"{plan.memory.engine / 1e9:10.2f}  {plan.bottleneck}"
        )
    return "\n".join([*lines, *_reasons(found)])


def search_dict(found: Sequence[Candidate], hz: float) -> list[dict]:
    """Plain types, every candidate."""
    return [
        {
            "recipe": candidate.recipe,
            "workload": asdict(candidate.workload),
            "reaches": candidate.reaches(hz),
            "reason": candidate.reason or None,
            "plan": plan_dict(candidate.plan) if candidate.plan else None,
        }
        for candidate in found
    ]


def _reasons(found: Sequence[Candidate]) -> list[str]:
    reasons = dict.fromkeys(candidate.reason for candidate in found if candidate.reason)
    return ["", *(f"  not planned: {reason}" for reason in reasons)] if reasons else []


def _way(plan: Plan) -> str:
    workload = plan.workload
    denoise = [stage for stage in plan.stages if stage.name == "denoise"]
    decodes = workload.decoding != "autoregressive" or any(stage.name == "decode" for stage in plan.stages)
    one_pass = workload.decoding if decodes else "one pass"
    words = f"{workload.steps} {denoise[0].per}{'s' if workload.steps > 1 else ''}" if denoise else one_pass
    words += " (after training for it)" if any(TRAINING in caution for caution in plan.cautions) else ""
    return words + (f", {100 * workload.keep_vision:.0f} % of vision tokens" if workload.keep_vision < 1 else "")


def _actions(plan: Plan) -> str:
    return f"{plan.action_rate_hz:.1f} actions/s ({plan.actions} a chunk)"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
