"""A torch stage -> its ONNX graph, with every `nn.Linear` left as a marker that names the layer, and every
convolution, which is one over patches (`policy.convolution`), as a marker that also says which patches.

No weight of a layer passes through the exporter, so none has to be recognized afterwards among transposed and renamed
constants: what each marker becomes is decided later, by name (see `lower`), and one traced graph serves every recipe.
Parameters beside them keep their names and get their values then, too: recipes rescale the channels of norms, and a table
of words may be larger than everything else.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable

from vla_edge.policy.stages import Stage
from vla_edge.types import VlaEdgeError

OPSET = 21
MARKER_DOMAIN, MARKER, CONVOLUTION = "vla_edge", "Linear", "Convolution"


class ExportError(VlaEdgeError):
    """A stage that cannot be written as standard ONNX, or a layer that would be lost on the way."""


def linear_layers(stage: Stage) -> dict:
    """Name within the stage -> `nn.Linear`, in the order of definition."""
    from torch import nn

    return {name: module for name, module in stage.module.named_modules() if isinstance(module, nn.Linear)}


def policy_layers(stages: Iterable[Stage]) -> dict:
    """ "stage.path" -> `nn.Linear`, of all stages; of those that share their layers, where they are planned."""
    own = [stage for stage in stages if stage.shares is None]
    return {f"{stage.name}.{name}": layer for stage in own for name, layer in linear_layers(stage).items()}


def convolutions_in(stage: Stage) -> dict:
    """Name of its layer within the stage -> `Convolution`, in the order of definition."""
    from vla_edge.policy.convolution import Convolution

    found = stage.module.named_modules()
    return {f"{name}.linear": module for name, module in found if isinstance(module, Convolution)}


def rescalable_norms(module) -> dict:
    """Name -> norm whose output channels can be rescaled, see `policy.blocks.Fold`."""
    from torch import nn

    from vla_edge.policy.blocks import folds_in

    norms = {id(fold.producer) for fold in folds_in(module) if not isinstance(fold.producer, nn.Linear)}
    return {name: child for name, child in module.named_modules() if id(child) in norms}


def trace(stage: Stage):
    """The stage as an `onnx.ModelProto` with static shapes and marker nodes; its parameters hold no values.

    Raises:
        ExportError: torch cannot export it.
    """
    import torch
    from torch import nn

    class Marker(nn.Module):
        def __init__(self, name: str, width: int):
            super().__init__()
            self.name, self.width = name, width

        def forward(self, x):
            return torch.onnx.ops.symbolic(
                f"{MARKER_DOMAIN}::{MARKER}",
                (x,),
                attrs={"layer": self.name},
                dtype=x.dtype,
                shape=(*x.shape[:-1], self.width),
                version=1,
            )

    class ConvolutionMarker(Marker):
        def __init__(self, name: str, convolution):
            super().__init__(name, convolution.linear.out_features)
            self.kernel, self.stride, self.padding = convolution.kernel, convolution.stride, convolution.padding

        def forward(self, x):
            places = [
                (size + 2 * around - taps) // step + 1
                for size, taps, step, around in zip(x.shape[1:-1], self.kernel, self.stride, self.padding, strict=True)
            ]
            return torch.onnx.ops.symbolic(
                f"{MARKER_DOMAIN}::{CONVOLUTION}",
                (x,),
                attrs={
                    "layer": self.name, "kernel": list(self.kernel), "stride": list(self.stride),
                    "padding": list(self.padding),
                },
                dtype=x.dtype,
                shape=(x.shape[0], *places, self.width),
                version=1,
            )  # fmt: skip

    layers = linear_layers(stage)
    convolutions = convolutions_in(stage)
    norms = rescalable_norms(stage.module)
    rescaled = {f"{name}.{key}" for name, norm in norms.items() for key, _ in norm.named_parameters(recurse=False)}
    # deepcopy copies no weight of a layer, which is replaced through the memo, and none but those that are changed below
    memo = {id(value): value for name, value in stage.module.named_parameters() if name not in rescaled}
    memo |= {id(layer): Marker(name, layer.out_features) for name, layer in layers.items()}
    memo |= {id(whole): ConvolutionMarker(name, whole) for name, whole in convolutions.items()}
    module = copy.deepcopy(stage.module, memo).eval()
    # Equal constants become one in the exporter; these have to stay apart until they get their values.
    chance = torch.Generator().manual_seed(0)
    for norm in rescalable_norms(module).values():
        for parameter in norm.parameters(recurse=False):
            parameter.data = torch.rand(parameter.shape, generator=chance)
    arguments = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in stage.inputs)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                arguments,
                input_names=[spec.name for spec in stage.inputs],
                output_names=[spec.name for spec in stage.outputs],
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"stage {stage.name!r} cannot be exported to ONNX: {reason}; write its forward with static shapes and "
            "plain tensor operations"
        ) from error
    finally:
        logger.setLevel(level)
    lost = rescaled - program.model.graph.initializers.keys()
    if lost:
        raise ExportError(f"the norm {min(lost)!r} of stage {stage.name!r} did not survive the export")
    _leave_out(program.model, (name for name, _ in module.named_parameters()))
    return program.model_proto


def _leave_out(model, names: Iterable[str]) -> None:
    """The values of those constants, so that what is handed on is small."""
    from onnxscript import ir

    for name in names:
        if (value := model.graph.initializers.get(name)) is not None:
            there = value.const_value
            value.const_value = ir.ExternalTensor("", 0, 0, there.dtype, shape=there.shape, name=name)
