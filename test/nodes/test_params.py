"""Parameters come from one table: typed, in range, described, and mended while the node runs."""

from __future__ import annotations

import pytest
from rclpy.parameter import Parameter as RosParameter

from vla_edge.nodes.params import Parameter, ParameterError, Parameters

TABLE = (
    Parameter("rate", 5.0, "how often", 0.1, 100.0),
    Parameter("count", 3, "how many", 1, 10),
    Parameter("name", "a", "which", choices=("a", "b")),
    Parameter("free", "x", "anything"),
    Parameter("on", True, "whether"),
    Parameter("seeds", [1, 2], "which ones", 0, 100),
)


def test_defaults_and_overrides_have_the_types_of_the_table(make_node):
    values = Parameters(make_node(rate=7, count=4, seeds=[5]), TABLE).read()
    assert values.rate == 7.0 and isinstance(values.rate, float)
    assert (values.count, values.name, values.on, values.seeds) == (4, "a", True, [5])


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("rate", 0.0, "parameter rate is 0.0, allowed is a number from 0.1 to 100"),
        ("rate", float("nan"), "parameter rate is nan"),
        ("rate", "fast", "parameter rate is 'fast'"),
        ("rate", True, "parameter rate is True"),
        ("count", 11, "parameter count is 11, allowed is a whole number from 1 to 10"),
        ("count", 2.5, "parameter count is 2.5"),
        ("name", "c", "allowed is one of a, b"),
        ("on", 1, "allowed is true or false"),
        ("seeds", [1, 101], "allowed is a list from 0 to 100"),
    ],
)
def test_a_bad_value_is_told_with_name_value_and_range(make_node, name, value, says):
    parameters = Parameters(make_node(**{name: value}), TABLE)
    with pytest.raises(ParameterError) as caught:
        parameters.read()
    assert says in str(caught.value)


def test_all_bad_values_are_told_at_once(make_node):
    with pytest.raises(ParameterError, match="rate.*count"):
        Parameters(make_node(rate=-1.0, count=0), TABLE).read()


def test_a_bad_value_can_be_mended_while_the_node_runs(make_node):
    node = make_node(rate=0.0)
    parameters = Parameters(node, TABLE)
    assert node.set_parameters([RosParameter("rate", value=2)])[0].successful
    assert parameters.read().rate == 2.0


def test_a_bad_value_is_refused_while_the_node_runs(make_node):
    node = make_node()
    parameters = Parameters(node, TABLE)
    result = node.set_parameters([RosParameter("count", value=77)])[0]
    assert not result.successful and "77" in result.reason
    assert parameters.read().count == 3


def test_every_parameter_of_every_node_is_described_and_its_default_allowed():
    from vla_edge.nodes import (
        build_node,
        controller_node,
        demo_node,
        recorder_node,
        replay_node,
        sim_node,
        vla_node,
    )

    for module in (build_node, controller_node, demo_node, recorder_node, replay_node, sim_node, vla_node):
        names = [row.name for row in module.PARAMETERS]
        assert len(set(names)) == len(names)
        for row in module.PARAMETERS:
            assert row.description and row.check(row.default) == row.default, (module.__name__, row.name)
            descriptor = row.descriptor()
            if isinstance(row.default, (int, float)) and not isinstance(row.default, bool) and row.high is not None:
                assert descriptor.floating_point_range or descriptor.integer_range, row.name
