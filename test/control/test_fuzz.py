"""Thousands of random and adversarial chunks, and everything else that can be done to a kernel: no command gets out."""

import numpy as np
import pytest
from adversary import KINDS, chunk_of, play
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import Rig

from vla_edge.control.config import ControlConfig
from vla_edge.control.screening import RejectedChunk


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    velocity_scale=st.sampled_from([0.05, 0.5, 1.0]),
    acceleration_scale=st.sampled_from([0.05, 0.5, 1.0]),
    jerk_scale=st.sampled_from([0.05, 1.0]),
    blend_time=st.sampled_from([0.02, 0.15, 0.6]),
    smoothing=st.sampled_from([0.0, 1.0]),
    start_ramp=st.sampled_from([0.0, 0.5]),
    rate=st.sampled_from([500, 1000, 2000]),
    reflex_time=st.sampled_from([0.0, 0.1]),
    limit_repulsion=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_no_command_leaves_the_limits_whatever_arrives(
    seed, velocity_scale, acceleration_scale, jerk_scale, blend_time, smoothing, start_ramp, rate,
    reflex_time, limit_repulsion,
):
    config = ControlConfig(
        tick_rate=rate, velocity_scale=velocity_scale, acceleration_scale=acceleration_scale, jerk_scale=jerk_scale,
        blend_time=blend_time, smoothing=smoothing, start_ramp=start_ramp, emergency_stop_damps=bool(seed % 2),
        reflex_time=reflex_time, reflex_yields=bool(seed // 2 % 2), limit_repulsion=limit_repulsion,
    )
    outcome = play(seed, config, chunks=60, ticks=20)
    assert outcome.violations == 0, outcome.worst


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_chunk_alone_is_survived(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    rig = Rig(ControlConfig(start_ramp=0.0, max_first_step=7.0))
    accepted = 0
    for _ in range(60):
        try:
            rig.kernel.accept_chunk(chunk_of(kind, rig, rng), rig.now)
            accepted += 1
        except RejectedChunk:
            pass
        rig.run(0.02)
    rig.judge()
    never = {"nan", "inf", "huge", "wrong_names"}
    assert (accepted > 0) != (kind in never)
