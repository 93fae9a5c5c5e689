"""A policy larger than memory: all of its modules, and the parameters of one piece at a time.

Parameters that are not in memory are on PyTorch's "meta" device: a shape, and no values. What is asked for is read from
the memory-mapped files, which are closed again, so that neither the tensors nor the pages they were read from stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

from vla_edge.policy.chain import belongs
from vla_edge.policy.checkpoint import Checkpoint, build_policy, check_finite, unfit
from vla_edge.policy.weights import Weights


class PiecewisePolicy:
    """The policy of a checkpoint, of which nothing is in memory yet.

    Attributes:
        checkpoint: where values come from.
        policy: its modules in eval mode; a stage of that name is an attribute of that name.

    Raises:
        CheckpointError: as `load_policy`, but for values, which are checked when they are read.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self._finite = checkpoint, set()
        with on_meta():
            self.policy = build_policy(checkpoint).eval().requires_grad_(False)
        self._tensors(Weights(checkpoint.weights))  # whether all are there

    @property
    def in_bfloat16(self) -> bool:
        """Whether the checkpoint's weights are stored in bfloat16."""
        return Weights(self.checkpoint.weights).matrices_in("BF16")

    @contextmanager
    def holding(self, stage: str, piece: Iterable[str], stored: bool = False) -> Iterator[None]:
        """A context in which the parameters of modules of a stage are in memory, in float32.

        Args:
            piece: paths of modules and parameters in the stage's module, one of `Chain.pieces`.
            stored: weights of linear layers stay in the precision they are stored in.

        Raises:
            CheckpointError: they are damaged, of another shape, or not finite.
        """
        paths = [f"{stage}.{part}" for part in piece]
        names = [name for name in self.policy.state_dict() if belongs(name, paths)]
        yield from self._in_memory(names, {}, {name for name in names if stored and self._is_product(name)})

    @contextmanager
    def holding_rest(self, stage: str, changed: Mapping[str, object]) -> Iterator[None]:
        """A context with all parameters of a stage but those of its linear layers.

        Args:
            changed: parameter -> tensor, in the place of the checkpoint's.
        """
        names = [name for name in self.policy.state_dict() if name.startswith(f"{stage}.") and self._linear(name) is None]
        yield from self._in_memory(names, changed)

    def _linear(self, name: str):
        """The linear layer that a parameter is of, if it is of one."""
        from torch import nn

        module = self.policy.get_submodule(name.rpartition(".")[0])
        return module if isinstance(module, nn.Linear) else None

    def _is_product(self, name: str) -> bool:
        return name.endswith(".weight") and self._linear(name) is not None

    def _in_memory(self, names: list[str], changed: Mapping[str, object], stored: Collection[str] = ()) -> Iterator[None]:
        try:
            self.put(changed)
            self._load(names, stored)
            yield
        finally:
            self.drop([*names, *changed])

    def put(self, values: Mapping[str, object]) -> None:
        """Parameter -> tensor, in the place of those that are there."""
        from torch import nn

        for name, tensor in values.items():
            owner, _, leaf = name.rpartition(".")
            module = self.policy.get_submodule(owner)
            # one of a module that two stages share is one parameter under two names
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def drop(self, names: Iterable[str]) -> None:
        """Forget the values of parameters."""
        self.put({name: self.policy.get_parameter(name).data.to("meta") for name in names})

    def _load(self, names: Iterable[str], stored: Collection[str]) -> None:
        import torch

        weights = Weights(self.checkpoint.weights)
        found = self._tensors(weights)
        for name in names:
            if not self.policy.get_parameter(name).is_meta:
                continue  # under another name, of a stage that shares it
            try:
                tensor = found[name]
                expected = self.policy.get_parameter(name).shape
                if tensor.shape != expected:
                    raise ValueError(f"{name} is of shape {tuple(tensor.shape)} and not {tuple(expected)}")
            except (IndexError, RuntimeError, ValueError) as error:
                raise unfit(weights, error) from error
            wanted = tensor.dtype if name in stored else torch.float32
            # a copy in any case: what it was read from is a page of the file
            value = tensor.to(wanted, copy=True)
            if name not in self._finite:
                check_finite(weights, name, value)
                self._finite.add(name)
            self.put({name: value})

    def _tensors(self, weights: Weights) -> Mapping:
        return self.checkpoint.family.module.tensors(self.policy, self.checkpoint, weights)


@contextmanager
def on_meta() -> Iterator[None]:
    """A context in which modules register parameters as shapes without values; buffers, which no file holds, keep theirs."""
    from torch import nn
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def without_values(_module, _name: str, parameter):
        return None if parameter is None else nn.Parameter(parameter.data.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(without_values)
    try:
        yield
    finally:
        handle.remove()
