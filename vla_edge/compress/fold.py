"""Channel scales moved from where a tensor is read to where it is made; the policy computes the same before and after.

What SmoothQuant and AWQ come down to when nothing is to be computed in addition on the robot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class InputGroup:
    """Linear layers that read one tensor.

    Attributes:
        names: "stage.path" of each.
        producer: the module that makes the tensor, where its channels can be rescaled; otherwise None.
    """

    names: tuple[str, ...]
    producer: object | None = None


def input_groups(modules: Mapping[str, object], stages: Iterable) -> list[InputGroup]:
    """Every layer of `modules` ("stage.path" -> `nn.Linear`) in exactly one group, in the order of the policy.

    Where `modules` are a part of the policy, it holds the producer of a tensor together with all that read it.
    """
    from vla_edge.policy.blocks import folds_in

    names = {id(module): name for name, module in modules.items()}
    groups, taken = [], set()
    for stage in (stage for stage in stages if stage.shares is None):
        for producer, consumers in folds_in(stage.module):
            if not all(id(layer) in names for layer in consumers):
                continue
            group = InputGroup(tuple(names[id(layer)] for layer in consumers), producer)
            groups.append(group)
            taken.update(group.names)
    groups += [InputGroup((name,)) for name in modules if name not in taken]
    order = {name: place for place, name in enumerate(modules)}
    return sorted(groups, key=lambda group: order[group.names[0]])


def rescale(group: InputGroup, modules: Mapping[str, object], scale: np.ndarray) -> None:
    """Multiply the columns of the group's layers by `scale` (in,) and divide the tensor they read by it, in place.

    Raises:
        ValueError: the group has no producer, or a scale is not positive.
    """
    import torch

    scale = torch.as_tensor(np.asarray(scale, np.float32))
    if group.producer is None or not bool((scale > 0).all() and scale.isfinite().all()):
        raise ValueError(f"the input of {', '.join(group.names)} cannot be rescaled by this")
    with torch.no_grad():
        weight = group.producer.weight
        weight.div_(scale[:, None] if weight.dim() == 2 else scale)
        if getattr(group.producer, "bias", None) is not None:
            group.producer.bias.div_(scale)
        for name in group.names:
            modules[name].weight.mul_(scale)
