"""Other libraries' algorithms behind the same recipe step (`quantize: {provider: ...}`), one file each.

They are imported when asked for, and their result is read back into our representation, so that export, gate and engine
are the same whoever rounded.

A provider module offers

    METHODS                                     (weights, activations, method) of the steps it can carry out
    quantize(root, modules, step, run) -> {name: CompressedLinear}
"""

from __future__ import annotations

import importlib
from types import ModuleType

from vla_edge.compress.recipe import RecipeError
from vla_edge.compress.steps import Quantize

# name -> (module, what to install)
PROVIDERS = {"modelopt": ("vla_edge.compress.providers.modelopt", "nvidia-modelopt")}


def get_provider(step: Quantize) -> ModuleType:
    """The module that carries out `step`.

    Raises:
        RecipeError: it is not installed, or cannot do that.
    """
    module, package = PROVIDERS[step.provider]
    try:
        provider = importlib.import_module(module)
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
    return provider
