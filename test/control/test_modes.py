"""The mode table says what the ladder of degradation says."""

import pytest

from vla_edge.control.modes import TRANSITIONS, Event, Mode, after


@pytest.mark.parametrize("mode", [Mode.FAULT, Mode.DAMP, Mode.INIT])
def test_only_rearming_brings_motion_back(mode):
    for event in Event:
        if event is not Event.REARM:
            assert after(mode, event) in (mode, Mode.DAMP)
    assert after(mode, Event.REARM) is Mode.HOLD


def test_damping_is_not_lost_to_a_fault():
    assert after(Mode.DAMP, Event.FAULT) is Mode.DAMP


def test_a_fresh_chunk_ends_hold_and_slowdown():
    assert {after(mode, Event.CHUNK) for mode in (Mode.HOLD, Mode.FOLLOW, Mode.SLOWDOWN)} == {Mode.FOLLOW}


def test_every_moving_mode_can_fault_hold_and_damp():
    for mode in (Mode.HOLD, Mode.FOLLOW, Mode.SLOWDOWN):
        assert after(mode, Event.FAULT) is Mode.FAULT
        assert after(mode, Event.HOLD) is Mode.HOLD
        assert after(mode, Event.DAMP) is Mode.DAMP


def test_no_entry_is_without_meaning():
    for (mode, event), following in TRANSITIONS.items():
        assert isinstance(mode, Mode) and isinstance(event, Event) and isinstance(following, Mode)
