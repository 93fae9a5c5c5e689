"""Other libraries' algorithms behind the same recipe step (`quantize: {provider: ...}`), one file each.

They are imported when asked for, and their result is read back into our representation, so that export, gate and engine
are the same whoever rounded.

A provider module offers

    METHODS                                     (weights, activations, method) of the steps it can carry out
    SETTINGS                                    names of what else it obeys of a step
    load()                                      the library; raises ImportError
    quantize(root, modules, step, run) -> {name: CompressedLinear}
                                                of all `modules`; `run` is an error where the data do not reach one

and, where it trains through roundings of its own,

    trainable(step) -> what makes a `ConstrainedLinear` of a layer, or None
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import fields
from types import ModuleType

from vla_edge.compress.recipe import RecipeError
from vla_edge.compress.steps import CHANNEL, Quantize, Storage

# name -> (module, what to install)
PROVIDERS = {
    "modelopt": ("vla_edge.compress.providers.modelopt", "nvidia-modelopt"),
    "llmcompressor": ("vla_edge.compress.providers.llmcompressor", "llmcompressor"),
    "torchao": ("vla_edge.compress.providers.torchao", "torchao"),
    "nncf": ("vla_edge.compress.providers.nncf", "nncf"),
    "neural-compressor": ("vla_edge.compress.providers.neural_compressor", "neural-compressor-pt"),
}
# of a step, what `METHODS` and the plan are about
_KNOWN = {"targets", "weights", "activations", "method", "provider"}


def get_provider(step: Quantize) -> ModuleType:
    """The module that carries out `step`.

    Raises:
        RecipeError: it is not installed, or cannot do that.
    """
    module, package = PROVIDERS[step.provider]
    try:
        provider = importlib.import_module(module)
        with redirect_stdout(sys.stderr):  # some decide at import where they report to, and ours is for results
            provider.load()
    except ImportError as error:
        raise RecipeError(
            f"provider {step.provider!r} needs the package {package}, which cannot be imported here ({error}); "
            f"install it with pip install {package}"
        ) from error
    asked = (step.weights, step.activations, step.method)
    if asked not in provider.METHODS:
        able = "; ".join(f"weights {w}, activations {a or 'null'}, method {m}" for w, a, m in provider.METHODS)
        raise RecipeError(
            f"provider {step.provider!r} does not offer weights {asked[0]}, activations {asked[1] or 'null'}, method "
            f"{asked[2]}; it offers {able}"
        )
    for name in _ignored(step, provider.SETTINGS):
        raise RecipeError(
            f"provider {step.provider!r} does not heed {name} {getattr(step, name)} with weights {step.weights}; "
            "leave it out or change it"
        )
    return provider


def trained_by_providers(plan: Mapping[str, Storage]) -> dict[str, Callable]:
    """ "stage.path" -> what makes its `ConstrainedLinear`, for layers that a provider trains through its rounding."""
    found = {}
    for name, step in plan.items():
        if isinstance(step, Quantize) and step.provider:
            make = getattr(get_provider(step), "trainable", lambda _: None)(step)
            if make is not None:
                found[name] = make
    return found


def _ignored(step: Quantize, obeyed: frozenset[str]) -> list[str]:
    """What the step asks for and a provider that obeys `obeyed` would not do."""
    names = []
    for field in fields(step):
        value = getattr(step, field.name)
        # inputs per scale are what 4 bits are about; elsewhere they are a setting as any other
        grouped = field.name == "group_size" and step.weights == "int4" and value != CHANNEL
        if field.name not in _KNOWN | obeyed and value != field.default and not grouped:
            names.append(field.name)
    return names
