"""The starting noise depends on seed and stamp alone, and stays what it is."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from vla_edge.policy.noise import noise_for

STAMP = 1_764_000_000_123_456_789


def test_the_same_seed_and_stamp_give_the_same_noise_in_any_order_and_process():
    first = noise_for(3, STAMP, (1, 32, 16))
    noise_for(4, STAMP + 1, (5,))
    np.testing.assert_array_equal(noise_for(3, STAMP, (1, 32, 16)), first)
    code = f"from vla_edge.policy.noise import noise_for; print(noise_for(3, {STAMP}, (1, 32, 16)).tobytes().hex())"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert elsewhere.strip() == first.tobytes().hex()


def test_another_seed_or_the_next_nanosecond_gives_independent_noise():
    draws = [noise_for(seed, STAMP + step, (4096,)) for seed in (0, 1) for step in (0, 1)]
    correlation = np.corrcoef(draws) - np.eye(4)
    assert np.abs(correlation).max() < 5 / 4096**0.5


def test_noise_is_standard_normal_float32():
    noise = noise_for(0, STAMP, (200_000,))
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs((noise**4).mean() - 3) < 0.1


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1])
def test_a_seed_beyond_signed_64_bits_loses_no_nanosecond(seed):
    assert not np.array_equal(noise_for(seed, STAMP, (8,)), noise_for(seed, STAMP + 1, (8,)))
    assert not np.array_equal(noise_for(seed, STAMP, (8,)), noise_for(seed - 1, STAMP, (8,)))


def test_recorded_evaluations_stay_comparable():
    # a numpy that draws other numbers would make recorded results incomparable without anyone noticing
    expected = [-1.604920744895935, -1.5845997333526611, -0.5574825406074524, 2.0847346782684326]
    np.testing.assert_array_equal(noise_for(7, 1_000_000_000, (4,)), np.float32(expected))
