"""What runs in a compiled plan, kernel by kernel, as TensorRT's engine inspector and its profiler told when it was built.

The file beside a plan is what the inspector gives as JSON (`Layers`, in the order in which they run), and under
`MILLISECONDS` how long each took on the GPU that built it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vla_edge.engine.bundle import Bundle

KERNELS = ".kernels.json"  # in the place of a plan's own ending
MILLISECONDS = "MedianMs"  # layer -> ms
# How the inspector's formats name types: alone ("Half"), or within a sentence ("Row major Int8 format"). Shorter names are
# parts of longer ones, so these are tried in order.
_TYPES = (
    ("bfloat16", r"b(?:rain)?f(?:loat)?16"), ("float16", r"half|f(?:loat|p)16"), ("fp8", r"fp8|e4m3"),
    ("fp4", r"fp4|e2m1"), ("int8", r"int8"), ("int4", r"int4"), ("int32", r"int32"), ("int64", r"int64"),
    ("bool", r"bool"), ("float32", r"float|fp32"),
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One layer of a plan: operators that were fused into a kernel, or a few kernels of one name.

    Attributes:
        kind: as the library calls it. tactic: the kernel that was chosen, empty where it does not tell.
        inputs, outputs: types of its tensors, each once.
        ms: on the GPU that built the plan; None where it was not timed.
    """

    name: str
    kind: str = ""
    tactic: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    ms: float | None = None

    @property
    def precision(self) -> str:
        """What it reads and gives, in words."""
        read, given = "+".join(self.inputs), "+".join(self.outputs)
        return read if read == given else " to ".join(filter(None, (read, given)))


def kernels_beside(plan: Path) -> tuple[Kernel, ...]:
    """Of one plan, in the order in which they run; none where nothing was told."""
    path = plan.with_suffix(KERNELS)
    if not path.is_file():
        return ()
    told = json.loads(path.read_text(encoding="utf-8"))
    ms = told.get(MILLISECONDS, {})
    # without its details a layer is its name alone
    rows = [row if isinstance(row, Mapping) else {"Name": row} for row in told.get("Layers", [])]
    return tuple(
        Kernel(
            row["Name"], row.get("LayerType", ""), row.get("TacticName", ""), _types(row.get("Inputs", ())),
            _types(row.get("Outputs", ())), ms.get(row["Name"]),
        )
        for row in rows
    )  # fmt: skip


def kernels_of(bundle: Bundle) -> dict[str, tuple[Kernel, ...]]:
    """Stage -> its kernels, of those stages that are plans which tell."""
    found = {stage.interface.name: kernels_beside(bundle.directory / stage.file) for stage in bundle.stages}
    return {name: kernels for name, kernels in found.items() if kernels}


def _types(tensors) -> tuple[str, ...]:
    named = (_type(tensor.get("Format/Datatype", "")) for tensor in tensors)
    return tuple(dict.fromkeys(filter(None, named)))


def _type(told: str) -> str:
    return next((name for name, pattern in _TYPES if re.search(pattern, told, re.IGNORECASE)), "")
