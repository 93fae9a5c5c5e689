"""Where an engine leaves its policy: the first layer of a stage whose output differs from the policy's own.

The stage's file is built once more, by the same runtime and in the same way, with the output of every layer among its
outputs, and run on the inputs that full precision gave the stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vla_edge.engine.backends import StageInterface, get_backend
from vla_edge.engine.trace import MARKER_DOMAIN
from vla_edge.policy.stages import TensorSpec

# relative L2 of a layer's output beyond which it counts as diverged; 8-bit layers stay within a few hundredths
LIMIT = 0.1


def layer_errors(
    module, file: str | Path, traced, stage: StageInterface, backend: str, options: Mapping, inputs, scratch: Path
) -> dict[str, float]:
    """Layer -> relative L2 of its output to the policy's, in the order of computation.

    Args:
        module: torch module of the stage, with the weights that were compressed. file: the stage's ONNX.
        traced: the graph that `file` was made of. backend, options: how the engine runs it.
        inputs: of the stage. scratch: a directory to build in.

    Raises:
        BackendError: the runtime cannot build the stage with its layers in sight.
    """
    import onnx

    expected = _outputs_of_layers(module, stage, inputs)
    tensors = {
        next(item.s.decode() for item in node.attribute if item.name == "layer"): node.output[0]
        for node in traced.graph.node
        if node.domain == MARKER_DOMAIN
    }
    seen = {layer: tensors[layer] for layer in expected if layer in tensors}
    model = onnx.load(str(file))
    present = {value.name for value in model.graph.output}
    specs = {}
    for layer, tensor in seen.items():
        specs[tensor] = TensorSpec(tensor, expected[layer].shape)
        if tensor not in present:
            model.graph.output.append(
                onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, expected[layer].shape)
            )
    open_stage = StageInterface(stage.name, stage.inputs, tuple(specs.values()))
    given = scratch / f"{stage.name}.open.onnx"
    onnx.save(model, given)
    runtime = get_backend(backend)
    built = runtime.build(given, scratch, open_stage, options)
    found = runtime.load(scratch / built.file, open_stage, built.options).run(inputs)
    return {layer: _distance(found[tensor], expected[layer]) for layer, tensor in seen.items()}


def first_divergence(errors: Mapping[str, float], limit: float = LIMIT) -> tuple[str, float] | None:
    """The first layer beyond `limit` with its error; where none is, the one that errs most. None without layers."""
    beyond = [layer for layer, error in errors.items() if not error <= limit]
    if not errors:
        return None
    layer = beyond[0] if beyond else max(errors, key=errors.__getitem__)
    return layer, errors[layer]


def _outputs_of_layers(module, stage: StageInterface, inputs) -> dict[str, np.ndarray]:
    """Of the first call of every linear layer, in the order of the calls."""
    import torch
    from torch import nn

    found: dict[str, np.ndarray] = {}

    def hook(name: str):
        def keep(_layer, _inputs, output) -> None:
            found.setdefault(name, output.detach().cpu().numpy().copy())

        return keep

    hooks = [
        layer.register_forward_hook(hook(name))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        with torch.no_grad():
            module.eval()(*(torch.from_numpy(np.ascontiguousarray(inputs[spec.name])) for spec in stage.inputs))
    finally:
        for one in hooks:
            one.remove()
    return found


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / (np.linalg.norm(expected) or 1.0))
