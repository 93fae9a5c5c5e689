"""What the stages of a policy compute, counted by running its modules on tensors that hold nothing.

For policies whose shapes no formula here describes: ResNets, encoder-decoders, U-Nets. Layers, convolutions and attention
are counted as the modules that they are, everything else as the tensor operators that PyTorch dispatches. What depends on
weights alone is left out, as the exporter folds it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from vla_edge.engine.operations import Attention, Convolution, GroupNorm, Operation, Pointwise, Product, StageWork
from vla_edge.engine.workload import Workload, WorkloadError

# Operators that go number by number through a function; of all others what is counted is what they read and write.
_CURVED = ("gelu", "tanh", "softplus", "sigmoid", "silu", "mish", "exp", "sin", "cos", "_softmax", "native_layer_norm")
# Operators that only say how numbers are looked at; a runtime copies at most what it is asked to lay out anew.
_VIEWS = (
    "view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze", "t", "transpose", "permute", "detach", "alias",
    "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "clone", "_to_copy", "contiguous",
)  # fmt: skip


@dataclass(frozen=True)
class CountedPolicy:
    """A policy that is planned as it is: its cameras, words and chunk are those of its checkpoint, its steps are not.

    Attributes:
        stages: of one inference; those that are called once per denoising step have `steps` calls.
        steps: of denoising, 1 where there are none. pictures: that the vision stage sees at an inference.
    """

    name: str
    source: str
    stages: tuple[StageWork, ...]
    cameras: int
    chunk: int
    action_dim: int
    steps: int = 1
    is_flow: bool = False

    prompt_tokens = embedding_numbers = language_weights = executed = 0
    decodes = parallel = prunes_vision = False

    def works(self, workload: Workload) -> tuple[StageWork, ...]:
        """Every stage of one inference."""
        workload.check(self)
        for name in ("cameras", "chunk", "prompt_tokens"):
            asked, own = getattr(workload, name), getattr(self, name)
            if asked != own:
                raise WorkloadError(f"{name} is {asked!r}, and {self.name} was made for {own}; leave it out")
        if workload.keep_vision != 1 or workload.kv is not None:
            raise WorkloadError(f"{self.name} has no vision tokens to leave out and no cache; leave keep_vision and kv out")
        return tuple(
            StageWork(stage.name, workload.steps, stage.per, stage.operations) if stage.name == "denoise" else stage
            for stage in self.stages
        )

    def part(self, layer: str) -> str:
        """Of the engine that a layer belongs to: "vision" or "action head"."""
        return "vision" if layer.startswith("vision.") else "action head"

    def cache_numbers(self, workload: Workload) -> int:
        """None are kept."""
        return 0


def counted_policy(name: str, loaded, policy) -> CountedPolicy:
    """Of a checkpoint (`policy.checkpoint.Checkpoint`) and its policy, whose parameters may be on the device "meta"."""
    spec = loaded.spec
    calls = {
        "vision": (len(spec.cameras) * spec.observation_steps, "picture"), "time": (0, "engine"),
        "denoise": (spec.num_steps, "step"),
    }  # fmt: skip
    stages = tuple(
        StageWork(stage.name, *calls.get(stage.name, (1, "observation")), count_stage(stage)) for stage in policy.stages()
    )
    return CountedPolicy(
        name=name,
        source=str(loaded.directory),
        stages=stages,
        cameras=len(spec.cameras),
        chunk=spec.chunk_size,
        action_dim=len(spec.joint_names),
        steps=spec.num_steps,
        is_flow=spec.diffusion is not None,
    )


def count_stage(stage, named: bool = True) -> tuple[Operation, ...]:
    """Operations of one call, in order. A copy runs on the device "meta", where nothing is computed.

    Args:
        named: whether layers have the stage's name in front of their own.
    """
    import torch

    module = copy.deepcopy(stage.module).to("meta")
    inputs = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in stage.inputs]
    counter = _Counter(f"{stage.name}." if named else "", inputs)
    with torch.no_grad(), counter.watching(module), counter.dispatched():
        module(*inputs)
    return tuple(counter.found)


class _Counter:
    """Collects operations while modules run.

    Args:
        prefix: in front of the names of layers. inputs: tensors that are not known before a call.
    """

    def __init__(self, prefix: str, inputs: Sequence):
        self.found: list[Operation] = []
        self._prefix, self._inside = prefix, 0
        # the tensors themselves, so that no other gets the identity of one that is gone
        self._known = {id(tensor): tensor for tensor in inputs}

    @contextmanager
    def watching(self, module) -> Iterator[None]:
        """Counts the modules of the table below as what they are, and nothing that goes on inside of them."""
        from torch import nn

        from vla_edge.policy import act, convolution

        counts = {
            nn.Linear: self._layer, convolution.Convolution: self._convolution, convolution.GroupNorm: self._group_norm,
            act.Attention: self._attention,
        }  # fmt: skip
        hooks = []
        for name, child in module.named_modules():
            if type(child) in counts:
                hooks.append(child.register_forward_pre_hook(self._enter(name, counts[type(child)])))
                hooks.append(child.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def dispatched(self) -> Iterator[None]:
        """Counts operators."""
        from torch.utils._python_dispatch import TorchDispatchMode

        counter = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                counter._operator(function, (*args, *(kwargs or {}).values()), result)
                return result

        with Mode():
            yield

    def _enter(self, name: str, count):
        def hook(module, inputs):
            if not self._inside:  # what is always given the same is a layer of the file all the same
                count(f"{self._prefix}{name}", module, *inputs)
            self._inside += 1

        return hook

    def _leave(self, module, inputs, output) -> None:
        self._inside -= 1

    def _layer(self, name: str, layer, x) -> None:
        self.found.append(Product(name, x.numel() // layer.in_features, layer.in_features, layer.out_features))

    def _convolution(self, name: str, module, x) -> None:
        sizes = x.shape[1:-1]
        rows = x.shape[0]
        for size, taps, step, around in zip(sizes, module.kernel, module.stride, module.padding):
            rows *= (size + 2 * around - taps) // step + 1
        layer = module.linear
        self.found.append(
            Convolution(f"{name}.linear", rows, layer.in_features, layer.out_features, module.kernel, x.numel())
        )

    def _group_norm(self, name: str, module, x) -> None:
        self.found.append(GroupNorm(x.numel()))

    def _attention(self, name: str, module, query, key, value) -> None:
        rows, keys = query.shape[1], key.shape[1]
        heads = module.q.out_features // module.head_dim
        for part, tensor in (("q", query), ("k", key), ("v", value)):
            self._layer(f"{name}.{part}", getattr(module, part), tensor)
        self.found.append(Attention(rows, keys, heads, heads, module.head_dim))
        self.found.append(Product(f"{name}.out", rows, module.out.in_features, module.out.out_features))

    def _operator(self, function, arguments: Sequence, result) -> None:
        given = [tensor for tensor in _tensors(arguments) if id(tensor) in self._known]
        if not given:
            return
        results = list(_tensors([result]))
        self._known.update((id(tensor), tensor) for tensor in results)
        name = function.overloadpacket.__name__
        if self._inside or name in _VIEWS:
            return
        numbers = results[0].numel()
        if name in _CURVED:
            self.found.append(Pointwise(numbers, 0, 1, joins=True))
        else:
            moved = numbers + sum(tensor.numel() for tensor in _tensors(arguments))
            self.found.append(Pointwise(0, moved, 1, joins=True))


def _tensors(values) -> Iterator:
    import torch

    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
