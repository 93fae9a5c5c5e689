"""LeRobot's pre- and post-processors, as far as they are arithmetic: what becomes of text, state and actions.

The steps that only move data (batch dimension, device, names of a data set) have no counterpart here. A step that is
not known could be arithmetic too, so it is refused rather than skipped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vla_edge.policy.checkpoint_files import CheckpointError, Document, read_json, read_tensors
from vla_edge.policy.spec import ACTION, STATE, Normalization, NormalizationMode, TextSpec

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"
NORMALIZER, UNNORMALIZER, NEW_LINE = "normalizer_processor", "unnormalizer_processor", "smolvla_new_line_processor"
NEW_LINES, STATE_PROMPT = {NEW_LINE, "pi0_new_line_processor"}, "pi05_prepare_state_tokenizer_processor_step"
PI05_PROMPT = "Task: {instruction}, State: {state};\nAction: "
PI05_STATE_DIMS = 32  # LeRobot does not save what it was made with, and loads this
MOVING = {"rename_observations_processor", "to_batch_processor", "device_processor"}
_KNOWN = {
    PREPROCESSOR: MOVING | NEW_LINES | {NORMALIZER, STATE_PROMPT, "tokenizer_processor"},
    POSTPROCESSOR: MOVING | {UNNORMALIZER},
}


@dataclass(frozen=True)
class Processing:
    """What the two pipelines do to a policy's inputs and outputs.

    Attributes:
        prompt: template of the text given to the tokenizer. text: what else becomes of it.
        state, action: of the (J,) state and the (T, J) actions.
        images: feature -> of its three channels, pixels being in [0, 1].
    """

    prompt: str
    text: TextSpec
    state: Normalization
    action: Normalization
    images: Mapping[str, Normalization]


def read_processing(directory: Path, images: Sequence[str] = ()) -> Processing:
    """Both pipelines of a checkpoint directory.

    Args:
        images: features whose pixels may be scaled by statistics; no other's may.

    Raises:
        CheckpointError: a file, an entry or a statistic is missing, or a step is not known.
    """
    before, after = (read_steps(directory, pipeline, _KNOWN[pipeline]) for pipeline in (PREPROCESSOR, POSTPROCESSOR))
    prompt, text = ("{instruction}\n" if NEW_LINES & before.keys() else "{instruction}"), TextSpec()
    if STATE_PROMPT in before:
        dims = before[STATE_PROMPT].get("config", {}).get("max_state_dim", PI05_STATE_DIMS)
        prompt, text = PI05_PROMPT, TextSpec(plain=True, state_dims=dims)
    if not images:
        _check_plain(directory, before)
    return Processing(
        prompt,
        text,
        state=_normalization(directory, PREPROCESSOR, before, NORMALIZER, STATE),
        action=_normalization(directory, POSTPROCESSOR, after, UNNORMALIZER, ACTION),
        images={key: _normalization(directory, PREPROCESSOR, before, NORMALIZER, key, "VISUAL") for key in images},
    )


def read_steps(directory: Path, pipeline: str, known: Collection[str]) -> dict[str, Document]:
    """The steps of a pipeline by name.

    Raises:
        CheckpointError: the file is missing, or a step is not among those `known`.
    """
    path = directory / f"{pipeline}.json"
    steps = {step.get("registry_name") or step.get("class"): step for step in read_json(path)["steps"]}
    for name in steps:
        if name not in known:
            raise CheckpointError(
                f"{path} has a step {name!r}, which this version does not know and so cannot reproduce; "
                "take it out if it does not change the policy's inputs or outputs"
            )
    return steps


def _check_plain(directory: Path, before: dict[str, Document]) -> None:
    """Raises CheckpointError: pixels are scaled by statistics."""
    mode = before[NORMALIZER]["config"]["norm_map"].get("VISUAL") if NORMALIZER in before else None
    if mode not in (None, NormalizationMode.IDENTITY.value):
        raise CheckpointError(
            f"{directory / PREPROCESSOR}.json scales images by {mode}; this version takes them as they are (IDENTITY)"
        )


def _normalization(
    directory: Path, pipeline: str, steps: dict[str, Document], name: str, feature: str, kind: str | None = None
) -> Normalization:
    path = directory / f"{pipeline}.json"
    if name not in steps:
        raise CheckpointError(f"{path} has no {name}, so {feature} cannot be scaled; copy it from the training run")
    step = steps[name]
    kind = kind or ("STATE" if feature == STATE else "ACTION")
    modes, prefix = step["config"]["norm_map"], f"{feature}."
    statistics = read_tensors(directory / step["state_file"], "numpy") if "state_file" in step else {}
    dimensions = 3 if kind == "VISUAL" else 1
    try:
        return Normalization(
            NormalizationMode(modes[kind]),
            {
                key.removeprefix(prefix): tuple(map(float, values.reshape(-1)))
                for key, values in statistics.items()
                if key.startswith(prefix) and values.ndim == dimensions and key != f"{prefix}count"
            },
            float(step["config"].get("eps", 1e-8)),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not say how to scale {feature}: {error}; give the statistics of the data it was trained on"
        ) from error
