"""Parameters of a node from one table: each with a description, a default and a range that `ros2 param` shows.

A value outside its range does not kill the node: it starts, says so, and fails configure with the parameter's name,
its value and what is allowed, until the value is mended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.parameter import Parameter as RosParameter

from vla_edge.types import VlaEdgeError


class ParameterError(VlaEdgeError):
    """A parameter that a node cannot work with."""


@dataclass(frozen=True)
class Parameter:
    """One row of a node's table.

    Attributes:
        name: as in `ros2 param get`.
        default: its type is the parameter's; a float takes whole numbers too.
        description: one line.
        low, high: inclusive range of numbers, and of the entries of a list.
        choices: the only values allowed.
        validate: raises VlaEdgeError on a value that is of the right type and still means nothing.
    """

    name: str
    default: bool | int | float | str | list
    description: str
    low: float | None = None
    high: float | None = None
    choices: Sequence[str] = ()
    validate: Callable[[object], object] | None = None

    @property
    def allowed(self) -> str:
        """What values may be, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
        words = kind[type(self.default)]
        if self.low is not None and self.high is not None:
            return f"{words} from {self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"{words} of at least {self.low:g}"
        return words

    def check(self, value):
        """`value` in the parameter's own type.

        Raises:
            ParameterError: it is of another type or out of range.
        """
        kind = type(self.default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if kind is list and value is not None and not isinstance(value, (str, bytes)):
            value = list(value)
        good = type(value) is kind
        if good and self.choices:
            good = value in self.choices
        if good and kind in (int, float, list):
            for number in value if kind is list else (value,):
                if isinstance(number, (int, float)):
                    # Written so that NaN fails.
                    good &= (self.low is None or number >= self.low) and (self.high is None or number <= self.high)
        if not good:
            raise ParameterError(f"parameter {self.name} is {value!r}, allowed is {self.allowed}")
        if self.validate is not None:
            try:
                self.validate(value)
            except VlaEdgeError as error:
                raise ParameterError(f"parameter {self.name}: {error}") from None
        return value

    def descriptor(self) -> ParameterDescriptor:
        """For `ros2 param describe`."""
        out = ParameterDescriptor(
            description=self.description, additional_constraints=self.allowed, dynamic_typing=True
        )
        if self.low is not None and self.high is not None:
            if isinstance(self.default, float):
                out.floating_point_range = [FloatingPointRange(from_value=float(self.low), to_value=float(self.high))]
            elif isinstance(self.default, int):
                out.integer_range = [IntegerRange(from_value=int(self.low), to_value=int(self.high), step=1)]
        return out


class Parameters:
    """The declared parameters of one node.

    Args:
        node: declares them.
        table: rows; names are unique.
    """

    def __init__(self, node, table: Sequence[Parameter]):
        self._node = node
        self._table = {row.name: row for row in table}
        self._problems: dict[str, str] = {}
        overrides = node._parameter_overrides
        for row in table:
            given = overrides.get(row.name)
            try:
                if given is not None:
                    row.check(given.value)
                node.declare_parameter(row.name, row.default, row.descriptor())
            except ParameterError as error:
                self._problems[row.name] = str(error)
                node.declare_parameter(row.name, row.default, row.descriptor(), ignore_override=True)
        node.add_on_set_parameters_callback(self._on_set)

    def read(self) -> SimpleNamespace:
        """All values by name, in their own types.

        Raises:
            ParameterError: a value given at start was refused and has not been mended.
        """
        if self._problems:
            raise ParameterError("; ".join(self._problems.values()))
        return SimpleNamespace(
            **{row.name: row.check(self._node.get_parameter(row.name).value) for row in self._table.values()}
        )

    def _on_set(self, changes: list[RosParameter]) -> SetParametersResult:
        for change in changes:
            row = self._table.get(change.name)
            if row is not None:
                try:
                    row.check(change.value)
                except ParameterError as error:
                    return SetParametersResult(successful=False, reason=str(error))
        for change in changes:
            self._problems.pop(change.name, None)
        return SetParametersResult(successful=True)
