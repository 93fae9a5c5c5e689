"""Calibration data: sampled evenly, held apart from what judges, recognizable, and watched without being held."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vla_edge.compress.calibrate import CalibrationError, Sample, collect, load_calibration, watch_inputs
from vla_edge.compress.quantize.ranges import RangeObserver
from vla_edge.types import JointState, Observation


def episodes(count: int, frames: int = 6) -> list[Observation]:
    rng = np.random.default_rng(0)
    return [
        Observation(
            200_000_000 * frame + 60_000_000_000 * episode,
            {"head": rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)},
            JointState(0, ("a",), rng.normal(size=1)),
            "touch the red cube",
        )
        for episode in range(count)
        for frame in range(frames)
    ]


def test_whole_episodes_are_held_out():
    stream = episodes(8)
    data = collect(iter(stream))
    used = {o.stamp_ns // 60_000_000_000 for o in data.observations}
    judged = {o.stamp_ns // 60_000_000_000 for o in data.held_out}
    assert judged == {3, 7} and used == {0, 1, 2, 4, 5, 6}


def test_a_single_episode_is_cut_in_two():
    data = collect(episodes(1, 20))
    assert max(o.stamp_ns for o in data.observations) < min(o.stamp_ns for o in data.held_out)
    assert len(data.held_out) == 5


def test_a_change_of_instruction_ends_an_episode():
    stream = [replace(o, instruction=f"word {i // 3}", stamp_ns=i) for i, o in enumerate(episodes(2))]
    assert {o.instruction for o in collect(stream).held_out} == {"word 3"}


def test_too_little_is_an_error():
    with pytest.raises(CalibrationError, match="holds 0 usable"):
        collect([])
    with pytest.raises(CalibrationError, match="record at least a whole episode"):
        collect(episodes(1, 1))


@pytest.mark.parametrize("length", [1, 5, 8, 9, 100, 1000])
def test_a_sample_is_spread_evenly_whatever_the_length(length):
    sample = Sample(8)
    for item in range(length):
        sample.add(item)
    items = sample.items()
    assert len(items) == min(8, length) and items == sorted(set(items)) and items[0] == 0
    if length >= 100:
        assert np.diff(items).max() <= 2.1 * length / 8 and items[-1] > 0.8 * length


def test_the_identity_is_of_the_content():
    stream = episodes(4)
    assert collect(stream).identity == collect(iter(episodes(4))).identity
    pixels = stream[0].images["head"].copy()
    pixels[0, 0, 0] ^= 1
    changed = [replace(stream[0], images={"head": pixels}), *stream[1:]]
    assert collect(changed).identity != collect(stream).identity


def test_data_pass_through_and_iterables_are_collected():
    data = collect(episodes(4))
    assert load_calibration(data, None) is data
    assert load_calibration(iter(episodes(4)), None).identity == data.identity


class Stub:
    """Stands in for a runner: drives one layer with what it is shown."""

    num_steps = 1

    def __init__(self, layer):
        self._layer = layer

    def set_num_steps(self, count: int) -> None:
        pass

    def infer(self, value) -> None:
        import torch

        self._layer(torch.tensor([[value, -value]], dtype=torch.float32))


def test_ranges_are_those_of_the_layers_input():
    from torch import nn

    layer = nn.Linear(2, 3)
    observers = watch_inputs(Stub(layer), {"denoise.in": layer}, lambda _: RangeObserver(), [1.0, 4.0, 2.5])
    assert (observers["denoise.in"].low, observers["denoise.in"].high) == (-4.0, 4.0)
    assert observers["denoise.in"].counts.sum() == 6
    assert not layer._forward_pre_hooks, "the policy is left as it was"


def test_an_input_that_is_not_finite_names_the_layer():
    from torch import nn

    layer = nn.Linear(2, 3)
    with pytest.raises(CalibrationError, match="layer denoise.in has values that are not finite"):
        watch_inputs(Stub(layer), {"denoise.in": layer}, lambda _: RangeObserver(), [float("nan")])
    assert not layer._forward_pre_hooks
