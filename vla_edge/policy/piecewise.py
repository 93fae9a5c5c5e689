"""A policy larger than memory: all of its modules, and the parameters of one piece at a time.

Parameters that are not in memory are on PyTorch's "meta" device: a shape, and no values. What is asked for is read from
the memory-mapped files, which are closed again, so that neither the tensors nor the pages they were read from stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
        self.checkpoint = checkpoint
        with on_meta():
            self.policy = build_policy(checkpoint).eval().requires_grad_(False)
        self._tensors(Weights(checkpoint.weights))  # whether all are there

    @contextmanager
    def holding(self, stage: str, piece: Iterable[str]) -> Iterator[None]:
        """A context in which the parameters of modules of a stage are in memory, in float32.

        Args:
            piece: paths of modules and parameters in the stage's module, one of `Chain.pieces`.

        Raises:
            CheckpointError: they are damaged, of another shape, or not finite.
        """
        paths = [f"{stage}.{part}" for part in piece]
        yield from self._in_memory([name for name in self.policy.state_dict() if belongs(name, paths)], {})

    @contextmanager
    def holding_rest(self, stage: str, changed: Mapping[str, object]) -> Iterator[None]:
        """A context with all parameters of a stage but those of its linear layers.

        Args:
            changed: parameter -> tensor, in the place of the checkpoint's.
        """
        from torch import nn

        names = [
            name for name in self.policy.state_dict()
            if name.startswith(f"{stage}.")
            and not isinstance(self.policy.get_submodule(name.rpartition(".")[0]), nn.Linear)
        ]  # fmt: skip
        yield from self._in_memory(names, changed)

    def _in_memory(self, names: list[str], changed: Mapping[str, object]) -> Iterator[None]:
        try:
            self.put(changed)
            self._load(names)
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

    def _load(self, names: Iterable[str]) -> None:
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
            # a copy in any case: what it was read from is a page of the file
            value = tensor.float() if tensor.is_floating_point() and tensor.element_size() != 4 else tensor.float().clone()
            check_finite(weights, name, value)
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
