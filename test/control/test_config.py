"""Controller parameters are refused by name, value and allowed range."""

import math

import pytest

from vla_edge.control.config import ControlConfig, ControlConfigError

ROWS = list(ControlConfig.parameters())


def test_every_parameter_has_a_description_and_a_default_inside_its_range():
    for row in ROWS:
        assert len(row.description) > 10
        assert row.low <= row.default <= row.high


@pytest.mark.parametrize("row", [row for row in ROWS if not isinstance(row.default, bool)], ids=lambda row: row.name)
def test_a_value_outside_the_range_is_refused_with_the_range(row):
    for value in (row.low - 1, row.high + 1, math.nan, math.inf, "fast", None, True):
        with pytest.raises(ControlConfigError) as refused:
            ControlConfig(**{row.name: value})
        assert row.name in str(refused.value) and f"{row.high:g}" in str(refused.value)


def test_whole_numbers_may_come_as_floats_but_not_as_fractions():
    assert ControlConfig(tick_rate=2000.0).tick_rate == 2000
    with pytest.raises(ControlConfigError, match="whole"):
        ControlConfig(late_ticks=2.5)


def test_a_switch_takes_only_true_or_false():
    with pytest.raises(ControlConfigError, match="true or false"):
        ControlConfig(emergency_stop_damps=1)


@pytest.mark.parametrize("rates", [(1000, 300), (500, 1000)])
def test_a_command_rate_the_tick_does_not_divide_is_refused(rates):
    with pytest.raises(ControlConfigError, match="does not divide"):
        ControlConfig(tick_rate=rates[0], command_rate=rates[1])


def test_a_tick_rate_without_a_whole_period_is_refused():
    with pytest.raises(ControlConfigError, match="nanoseconds"):
        ControlConfig(tick_rate=700, command_rate=350)


def test_a_shortest_blend_longer_than_the_longest_is_refused():
    with pytest.raises(ControlConfigError, match="blend_time_max"):
        ControlConfig(blend_time=0.5, blend_time_max=0.2)


def test_slowing_down_only_nearer_than_standing_is_refused():
    with pytest.raises(ControlConfigError, match="collision_slow"):
        ControlConfig(collision_stop=0.05, collision_slow=0.02)
