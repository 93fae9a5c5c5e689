"""The policy families that can be loaded, and which one a config.json describes.

Each has a module with three functions:

    describe(directory, config) -> Description      everything but the weights, checked
    build(checkpoint, weights) -> nn.Module         of the checkpoint's shapes, not yet of its values
    tensors(policy, checkpoint, weights) -> Mapping values for its state dict

and, where smaller policies can be made of one (`learn.distill`), another with two:

    keep_joints(policy, columns)                    in place; ValueError says why that cannot be
    write(directory, policy, spec, checkpoint)      the policy, made of that of `checkpoint`, as a checkpoint
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from vla_edge.policy.checkpoint_files import CheckpointError, Document
from vla_edge.policy.spec import PolicySpec


@dataclass(frozen=True)
class Description:
    """What a family's module reads of a checkpoint directory.

    Attributes:
        tokenizer_path: a Hugging Face tokenizer.json; None where the policy reads no instruction.
        backbone: the backbone's config.json, where the family has one.
    """

    spec: PolicySpec
    tokenizer_path: Path | None = None
    backbone: Document | None = None


@dataclass(frozen=True)
class Family:
    """A policy family: its name in `PolicySpec.family`, for people with an article, and where its modules are.

    Attributes:
        also: what else a config.json may call it.
    """

    name: str
    title: str
    path: str
    student_path: str | None = None
    also: tuple[str, ...] = ()

    @property
    def module(self) -> ModuleType:
        """With the functions above."""
        return import_module(self.path)

    @property
    def student(self) -> ModuleType | None:
        """With the functions that make smaller policies, where there are some."""
        return None if self.student_path is None else import_module(self.student_path)


FAMILIES = {
    family.name: family
    for family in (
        Family("smolvla", "a SmolVLA", "vla_edge.policy.smolvla_shapes", "vla_edge.policy.smolvla_student"),
        Family("pi0", "a pi0", "vla_edge.policy.pi_checkpoint"),
        Family("pi05", "a pi0.5", "vla_edge.policy.pi_checkpoint"),
        Family("openvla", "an OpenVLA", "vla_edge.policy.openvla_checkpoint", "vla_edge.policy.openvla_student"),
        Family("act", "an ACT", "vla_edge.policy.act_checkpoint"),
        Family("diffusion", "a diffusion policy", "vla_edge.policy.diffusion_checkpoint"),
        Family("groot", "a GR00T N1.5", "vla_edge.policy.groot_checkpoint", also=("gr00t_n1_5",)),
        Family("groot17", "a GR00T N1.7", "vla_edge.policy.groot17_checkpoint", also=("Gr00tN1d7",)),
    )
}
# known by what a config.json calls them, and not loaded: another backbone, action head or layout
_RELATIVES = {
    "gr00t_n1": "a GR00T N1", "Gr00tN1d6": "a GR00T N1.6", "gr00t_n1_6": "a GR00T N1.6",
}  # fmt: skip


def family_of(config: Document) -> Family:
    """LeRobot says it in `type`, Hugging Face in `model_type`, openpi by what it writes.

    Raises:
        CheckpointError: it is none that can be loaded.
    """
    name = config.get("type") or config.get("model_type")
    if name is None and {"paligemma_variant", "action_horizon"} <= config.keys():
        name = "pi0"  # or a pi0.5, which its tensors tell
    if name == "groot" and not config.get("tokenizer_assets_repo"):  # LeRobot names both so; N1.5 has these of its own
        name = "groot17"
    named = {alias: family for family in FAMILIES.values() for alias in (family.name, *family.also)}
    if name in _RELATIVES:
        raise CheckpointError(
            f"{config.path} is of type {name!r}, {_RELATIVES[name]}, which this version does not load; of the GR00T "
            f"family it loads {FAMILIES['groot'].title} and {FAMILIES['groot17'].title}"
        )
    if name not in named:
        known = ", ".join(repr(family) for family in FAMILIES)
        raise CheckpointError(f"{config.path} is of type {name!r}; this version loads {known}")
    return named[name]
