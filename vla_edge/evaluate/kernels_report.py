"""The section of a report about the kernels of TensorRT's plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vla_edge.engine.kernels import Kernel
from vla_edge.evaluate.page import Page, folded, subheading, table

SLOWEST = 12  # of a stage, shown at once
COLUMNS = ("Kernel", "ms", "Share, %", "Precision", "Type", "Chosen kernel")


def add_kernels(page: Page, kernels: Mapping[str, Sequence[Kernel]]) -> None:
    """Adds the slowest kernels of each stage, and all in their order on request; nothing without any."""
    if not kernels:
        return
    parts = []
    for stage, found in kernels.items():
        timed = sorted((kernel for kernel in found if kernel.ms is not None), key=lambda kernel: -kernel.ms)
        total = sum(kernel.ms for kernel in timed)
        told = f"{stage}: {len(found)} kernels" + (f", {total:.3f} ms" if timed else ", not timed")
        parts.append(subheading(told))
        if timed:
            parts.append(table(COLUMNS, (_row(kernel, total) for kernel in timed[:SLOWEST]), numeric=(1, 2)))
        whole = table(COLUMNS, (_row(kernel, total) for kernel in found), numeric=(1, 2))
        parts.append(folded(f"All of {stage} in the order in which they run", whole))
    page.section(
        "Kernels",
        "Of TensorRT's plans, slowest first, as its inspector and its profiler told on the GPU that built them. They are "
        "timed one by one, not as the graph that an engine replays, so their sum is more than a call takes.",
        *parts,
    )


def _row(kernel: Kernel, total: float) -> tuple[str, ...]:
    timed = ("", "") if kernel.ms is None else (f"{kernel.ms:.4f}", f"{100 * kernel.ms / total:.1f}" if total else "")
    return kernel.name, *timed, kernel.precision, kernel.kind, kernel.tactic
