"""Which topic of a bag plays which part: a short YAML file when a robot's names differ from ours."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from vla_edge.evaluate.storage import BagError


# Of topics that carry a camera's pictures, compressed, or its video.
ENDINGS = ("/compressed", "/ffmpeg", "/video")


class ContractError(BagError):
    """A topic contract that cannot be understood."""


@dataclass(frozen=True)
class TopicContract:
    """Names in the bag. A leading slash or a robot's namespace may be left out where that is unambiguous.

    Attributes:
        cameras: camera of the policy -> topic; cameras left out are looked for at `<camera>/image` and
            `<camera>/image/compressed`, `ffmpeg` or `video`.
        joint_states: measured joints, sensor_msgs/JointState.
        instruction: std_msgs/String.
        joint_command: what the joints were told, sensor_msgs/JointState; need not be there.
        joints: joint name in the bag -> joint name in the policy, for those that differ.
    """

    cameras: Mapping[str, str] = field(default_factory=dict)
    joint_states: str = "joint_states"
    instruction: str = "instruction"
    joint_command: str = "joint_command"
    joints: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> TopicContract:
        """Reads the YAML form: the attributes above as keys, all optional.

        Raises:
            ContractError: the file cannot be read, or holds a key or a value that means nothing here.
        """
        import yaml

        try:
            plain = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ContractError(f"topic contract {path} cannot be read: {error}; it must be a YAML file") from None
        if not isinstance(plain, dict):
            raise ContractError(f"topic contract {path} is a {type(plain).__name__}; it must map parts to topics")
        known = {entry.name: entry for entry in fields(cls)}
        for key, value in plain.items():
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
                raise ContractError(f"topic contract {path} has the unknown key {key!r}; did you mean {nearest!r}?")
            mapping = key in ("cameras", "joints")
            if not isinstance(value, dict if mapping else str):
                kind = "a mapping of names" if mapping else "a topic name"
                raise ContractError(f"topic contract {path}: {key} is {value!r}; it must be {kind}")
        return cls(**plain)

    def camera_candidates(self, camera: str) -> tuple[str, ...]:
        """Topics on which the frames of `camera` may be, best first."""
        if camera in self.cameras:
            return (self.cameras[camera],)
        return (f"{camera}/image", *(f"{camera}/image{ending}" for ending in ENDINGS))


def find_topic(name: str, topics: Collection[str]) -> str | None:
    """The topic of a bag that `name` means: itself, with a leading slash, or the only one inside a namespace.

    Raises:
        BagError: more than one namespace has it.
    """
    for candidate in (name, "/" + name.lstrip("/")):
        if candidate in topics:
            return candidate
    if name.startswith("/"):
        return None
    inside = sorted(topic for topic in topics if topic.endswith("/" + name))
    if len(inside) > 1:
        raise BagError(f"the bag has {name!r} more than once ({', '.join(inside)}); name one in the topic contract")
    return inside[0] if inside else None
