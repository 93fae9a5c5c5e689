"""Inference policies, one file each, and how they are named in parameters and on the command line."""

from __future__ import annotations

import difflib
from dataclasses import fields

from vla_edge.serve.inference_policy import InferencePolicy, InferencePolicyError
from vla_edge.serve.policies.asynchronous import Asynchronous
from vla_edge.serve.policies.offset_cancel import OffsetCancel
from vla_edge.serve.policies.real_time_chunking import RealTimeChunking
from vla_edge.serve.policies.state_roll_forward import StateRollForward
from vla_edge.serve.policies.synchronous import Synchronous
from vla_edge.serve.policies.temporal_ensembling import TemporalEnsembling
from vla_edge.serve.policies.trained_prefix import TrainedPrefix

POLICIES: dict[str, type] = {
    "synchronous": Synchronous,
    "asynchronous": Asynchronous,
    "temporal_ensembling": TemporalEnsembling,
    "real_time_chunking": RealTimeChunking,
    "trained_prefix": TrainedPrefix,
    "state_roll_forward": StateRollForward,
    "offset_cancel": OffsetCancel,
}
MOST = 60.0


def make_policy(text: str) -> InferencePolicy:
    """The policy that a text names: `real_time_chunking`, or with options `real_time_chunking: {overlap: 0.3}` (YAML).

    Raises:
        InferencePolicyError: an unknown name or option, or a value of the wrong kind.
    """
    import yaml

    try:
        said = yaml.safe_load(text)
    except yaml.YAMLError:
        said = None
    if isinstance(said, str):
        said = {said: {}}
    if not isinstance(said, dict) or len(said) != 1 or not isinstance(next(iter(said.values())) or {}, dict):
        raise InferencePolicyError(
            f"inference policy {text!r} is not understood; write one of {', '.join(POLICIES)}, or for example "
            "'real_time_chunking: {overlap: 0.3}'"
        )
    ((name, options),) = said.items()
    kind = POLICIES.get(name)
    if kind is None:
        nearest = difflib.get_close_matches(str(name), POLICIES, n=1, cutoff=0.0)[0]
        raise InferencePolicyError(f"there is no inference policy {name!r}; did you mean {nearest!r}?")
    known = {item.name: item for item in fields(kind)}
    values = {}
    for key, value in (options or {}).items():
        if key not in known:
            raise InferencePolicyError(f"{name} has no option {key!r}; it has {', '.join(known) or 'none'}")
        values[key] = _checked(name, key, value)
    return kind(**values)


def _checked(policy: str, key: str, value) -> float:
    """A number whose size makes sense."""
    low = -MOST if key == "decay" else 0.0
    if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= MOST:
        return float(value)
    raise InferencePolicyError(f"{policy}: {key} is {value!r}; it must be a number from {low:g} to {MOST:g}")
