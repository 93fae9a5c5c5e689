"""A robot as the controller sees it: one table of joints with limits, read from YAML or a URDF.

Two kinds of numbers live in the table. `hardware_velocity` and `effort` are what the maker says the motor can do;
`velocity`, `acceleration` and `jerk` are the working limits the controller enforces, which should be far lower.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from vla_edge.types import VlaEdgeError

FULL_ACCELERATION_TIME = 0.01
"""s from rest to the full acceleration, where a table gives no jerk."""


class RobotError(VlaEdgeError):
    """A robot description is missing, contradicts itself or does not have the joints asked for."""


@dataclass(frozen=True)
class Joint:
    """One actuated joint.

    Attributes:
        name: as in joint_states and the URDF.
        lower, upper: position limits, rad.
        velocity: working limit, rad/s.
        acceleration: working limit, rad/s^2.
        jerk: working limit, rad/s^3; where left out, the full acceleration is reached in 10 ms.
        effort: maker's limit, N.m; 0 where it is not known.
        kp, kd: position stiffness N.m/rad and damping N.m.s/rad, for sinks that carry gains.
        home: resting position, rad.
        hardware_velocity: maker's limit, rad/s; `velocity` may not exceed it.
        index: motor index on the robot's own bus, None where the bus goes by name.
        grasp_torque: N.m of measured torque at which a finger stops closing; its sign is the direction that closes it;
            0 for a joint that is no finger.
    """

    name: str
    lower: float
    upper: float
    velocity: float
    acceleration: float
    effort: float = 0.0
    kp: float = 0.0
    kd: float = 0.0
    home: float = 0.0
    hardware_velocity: float | None = None
    index: int | None = None
    jerk: float | None = None
    grasp_torque: float = 0.0

    def __post_init__(self):
        if self.jerk is None and isinstance(self.acceleration, (int, float)):
            object.__setattr__(self, "jerk", self.acceleration / FULL_ACCELERATION_TIME)
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("name", "index") or (item.name == "hardware_velocity" and value is None):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise RobotError(f"joint {self.name!r}: {item.name} is {value!r}, give a finite number")
            object.__setattr__(self, item.name, float(value))
        if not self.name or not isinstance(self.name, str):
            raise RobotError(f"a joint is named {self.name!r}; every joint needs the name its joint_states carry")
        if self.lower >= self.upper:
            raise RobotError(f"joint {self.name!r}: lower {self.lower} is not below upper {self.upper}")
        if self.velocity <= 0 or self.acceleration <= 0 or self.jerk <= 0:
            raise RobotError(f"joint {self.name!r}: velocity, acceleration and jerk limits have to be above zero")
        if self.effort < 0 or self.kp < 0 or self.kd < 0:
            raise RobotError(f"joint {self.name!r}: effort, kp and kd cannot be negative")
        if not self.lower <= self.home <= self.upper:
            raise RobotError(f"joint {self.name!r}: home {self.home} is outside [{self.lower}, {self.upper}]")
        if self.hardware_velocity is not None and self.velocity > self.hardware_velocity:
            raise RobotError(
                f"joint {self.name!r}: working velocity {self.velocity} exceeds the hardware's "
                f"{self.hardware_velocity} rad/s"
            )


@dataclass(frozen=True)
class Robot:
    """A named table of joints, in the robot's own order.

    Attributes:
        name: e.g. "g1".
        joints: J joints.
        driven: names the controller moves by default; the others are only known.
        notes: where the numbers come from.
        revision: of the hardware the limits are for, as the robot itself reports it; None where it reports none.
    """

    name: str
    joints: tuple[Joint, ...]
    driven: tuple[str, ...] = ()
    notes: str = ""
    revision: int | None = None
    _by_name: Mapping[str, Joint] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "joints", tuple(self.joints))
        by_name = {joint.name: joint for joint in self.joints}
        if not by_name:
            raise RobotError(f"robot {self.name!r} has no joints; give at least one")
        if len(by_name) != len(self.joints):
            twice = sorted({j.name for j in self.joints if [k.name for k in self.joints].count(j.name) > 1})
            raise RobotError(f"robot {self.name!r} names {', '.join(twice)} twice; joint names have to be unique")
        object.__setattr__(self, "_by_name", by_name)
        object.__setattr__(self, "driven", tuple(self.driven) or self.joint_names)
        self.check(self.driven)

    @property
    def joint_names(self) -> tuple[str, ...]:
        return tuple(joint.name for joint in self.joints)

    @property
    def home(self) -> np.ndarray:
        """(J,) rad, over all joints."""
        return self.column("home")

    def joint(self, name: str) -> Joint:
        """The joint called `name`. Raises RobotError naming the nearest one."""
        self.check((name,))
        return self._by_name[name]

    def check(self, names: Iterable[str]) -> None:
        """Raise RobotError when a name is unknown or given twice."""
        names = tuple(names)
        unknown = [name for name in names if name not in self._by_name]
        if unknown:
            import difflib

            near = difflib.get_close_matches(str(unknown[0]), self._by_name, n=1, cutoff=0.0)[0]
            raise RobotError(
                f"robot {self.name!r} has no joint {unknown[0]!r}; the nearest is {near!r}. "
                "Use the robot's own joint names or choose the right robot"
            )
        if len(set(names)) != len(names):
            raise RobotError(f"joint list for robot {self.name!r} names a joint twice: {', '.join(names)}")

    def select(self, names: Iterable[str]) -> Robot:
        """The same robot with exactly these joints, in this order, all driven."""
        names = tuple(names)
        self.check(names)
        return replace(self, joints=tuple(self._by_name[name] for name in names), driven=names)

    def check_within(self, other: Robot, where: str) -> None:
        """Raise RobotError when a joint of this robot may do more than the same joint of another description.

        Args:
            other: holds the limits that count. where: what it is, for the sentence.
        """
        for joint in self.joints:
            if joint.name not in other._by_name:
                raise RobotError(f"joint {joint.name!r} does not exist in {where}; do not drive it, or mend one of them")
            own = other._by_name[joint.name]
            fastest = own.velocity if own.hardware_velocity is None else own.hardware_velocity
            for what, unit, ours, theirs in (
                ("lower limit", "rad", -joint.lower, -own.lower),
                ("upper limit", "rad", joint.upper, own.upper),
                ("velocity", "rad/s", joint.velocity, fastest),
                ("torque", "N.m", joint.effort, own.effort or math.inf),
            ):
                if ours > theirs + 1e-6:
                    sign = -1.0 if what == "lower limit" else 1.0
                    raise RobotError(
                        f"joint {joint.name!r}: {what} {sign * ours:g} {unit} contradicts {where}, which allows "
                        f"{sign * theirs:g}; mend the one that is wrong"
                    )

    def column(self, attribute: str) -> np.ndarray:
        """(J,) float64 of one numeric attribute over all joints, read-only."""
        values = np.array([getattr(joint, attribute) for joint in self.joints], dtype=np.float64)
        values.setflags(write=False)
        return values

    def to_dict(self) -> dict:
        """Plain types, the inverse of `from_dict`."""
        joints = [{key: value for key, value in asdict(joint).items() if value is not None} for joint in self.joints]
        data = {"name": self.name, "notes": self.notes, "driven": list(self.driven), "joints": joints}
        return data if self.revision is None else {**data, "revision": self.revision}

    @staticmethod
    def from_dict(data: Mapping, source: str = "robot") -> Robot:
        """A robot from plain types. Raises RobotError with `source` in the sentence."""
        if not isinstance(data, Mapping) or "joints" not in data:
            raise RobotError(f"{source} is not a robot description: it needs 'name' and a list 'joints'")
        known = {item.name for item in fields(Joint)}
        joints = []
        for row in data["joints"] or ():
            if not isinstance(row, Mapping):
                raise RobotError(f"{source}: joint entry {row!r} is not a mapping of names to numbers")
            wrong, missing = set(row) - known, {"name", "lower", "upper", "velocity", "acceleration"} - set(row)
            if wrong or missing:
                problem = f"has unknown keys {', '.join(sorted(map(str, wrong)))}" if wrong else ""
                problem = problem or f"lacks {', '.join(sorted(missing))}"
                raise RobotError(
                    f"{source}: joint {row.get('name', '?')!r} {problem}; known keys are {', '.join(sorted(known))}"
                )
            joints.append(Joint(**row))
        name, notes = str(data.get("name", "robot")), str(data.get("notes", ""))
        revision = data.get("revision")
        if revision is not None and (not isinstance(revision, int) or isinstance(revision, bool)):
            raise RobotError(f"{source}: revision is {revision!r}; give the whole number the robot reports, or none")
        return Robot(name, tuple(joints), tuple(data.get("driven") or ()), notes, revision)

    @staticmethod
    def from_yaml(path: str | Path) -> Robot:
        """A robot from a YAML file in the layout of config/robots/. Raises RobotError."""
        import yaml

        path = Path(path)
        try:
            data = yaml.safe_load(path.read_text())
        except FileNotFoundError as error:
            raise RobotError(f"robot file {path} does not exist; give the path of a robot YAML") from error
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise RobotError(f"robot file {path} cannot be read: {error}") from error
        return Robot.from_dict(data, str(path))

    @staticmethod
    def from_urdf(
        urdf: str | Path, velocity: float = 3.0, acceleration: float = 30.0, driven: Iterable[str] = ()
    ) -> Robot:
        """A robot from a URDF: position limits and effort as written, working velocity never above the URDF's.

        Args:
            urdf: path of a file, or the XML itself as in the `robot_description` parameter.
            velocity, acceleration: working limits, rad/s and rad/s^2: a URDF carries only hardware extremes.
            driven: names the controller moves; all actuated ones when empty.

        Raises:
            RobotError: not a URDF, no actuated joint, or a joint without limits.
        """
        import xml.etree.ElementTree as ElementTree

        text = str(urdf)
        source = "robot_description"
        if not text.lstrip().startswith("<"):
            source = text
            try:
                text = Path(urdf).read_text()
            except OSError as error:
                raise RobotError(f"URDF {source} cannot be read: {error}") from error
        try:
            root = ElementTree.fromstring(text)
        except ElementTree.ParseError as error:
            raise RobotError(f"URDF {source} is not XML: {error}; process xacro files first") from error
        joints = []
        for element in root.iter("joint"):
            kind = element.get("type")
            if kind not in ("revolute", "continuous", "prismatic") or element.find("mimic") is not None:
                continue
            name, limit = element.get("name"), element.find("limit")
            if limit is None:
                if kind == "continuous":
                    limit = ElementTree.Element("limit")
                else:
                    raise RobotError(f"URDF {source}: joint {name!r} has no <limit>; add lower, upper and velocity")
            # A continuous joint winds without end; a wide bound keeps the arithmetic of limits uniform.
            wide = 1e3 if kind == "continuous" else None
            try:
                lower = -wide if wide else float(limit.get("lower", 0.0))
                upper = wide if wide else float(limit.get("upper", 0.0))
                extreme = float(limit.get("velocity", velocity)) or velocity
                effort = float(limit.get("effort", 0.0))
            except ValueError as error:
                raise RobotError(f"URDF {source}: joint {name!r} has a limit that is not a number: {error}") from error
            home = min(max(0.0, lower), upper)
            joints.append(
                Joint(name, lower, upper, min(velocity, extreme), acceleration, effort, 0.0, 0.0, home, extreme)
            )
        if not joints:
            raise RobotError(f"URDF {source} has no revolute, continuous or prismatic joint to drive")
        return Robot(root.get("name", "robot"), tuple(joints), tuple(driven), f"URDF {root.get('name', '')}".strip())

    def with_limits(self, velocity: float | None = None, acceleration: float | None = None) -> Robot:
        """The same robot with other working limits (rad/s, rad/s^2) on every joint, never above the hardware's.

        Jerk limits follow the accelerations.
        """

        def limited(joint: Joint) -> Joint:
            ceiling = math.inf if joint.hardware_velocity is None else joint.hardware_velocity
            scale = (acceleration or joint.acceleration) / joint.acceleration
            return replace(
                joint,
                velocity=min(velocity or joint.velocity, ceiling),
                acceleration=scale * joint.acceleration,
                jerk=scale * joint.jerk,
            )

        return replace(self, joints=tuple(limited(joint) for joint in self.joints))


def load_robot(name: str) -> Robot:
    """A robot by name, by YAML or URDF path, or from URDF text.

    Names: "g1", "g1:13" for a hardware mode, "g1+dex3" or "g1:13+dex3" with hands.

    Raises:
        RobotError
    """
    text = str(name).strip()
    if text.partition("+")[0].partition(":")[0] == "g1":
        from vla_edge.robots.g1 import DEFAULT_MODE, g1

        body, plus, hands = text.partition("+")
        return g1(body[3:] or DEFAULT_MODE, hands if plus else "")
    if text.startswith("<") or text.lower().endswith(".urdf"):
        return Robot.from_urdf(text)
    if text.lower().endswith((".yaml", ".yml")):
        return Robot.from_yaml(text)
    raise RobotError(f"robot {text[:60]!r} is not known; use 'g1', 'g1:<mode>', or the path of a .yaml or .urdf file")
