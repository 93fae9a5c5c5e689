"""Engines broken in the ways engines break: the default limits catch each, for the right reason."""

from __future__ import annotations

import pytest

from benchmarks.broken_engines import SWAPPED, Late, Remembered, stale_statistics, swap_joints, swap_outputs, two_bits
from vla_edge.engine.runner import Runner
from vla_edge.evaluate.calibration_bag import FIRST_SEED, record
from vla_edge.evaluate.limits import Limits
from vla_edge.evaluate.replay import evaluate_bag
from vla_edge.evaluate.verdict import judge
from vla_edge.resources import share_directory, shipped_checkpoint

CHECKPOINT = shipped_checkpoint()
FRAMES = 16


@pytest.fixture(scope="module")
def reference():
    return Remembered(Runner.from_checkpoint(CHECKPOINT))


@pytest.fixture(scope="module")
def verdict_on(reference, tmp_path_factory):
    """verdict_on(engine) -> (name of the first limit that breaks, names of those that hold, sentences by name).

    Timing is judged where an engine is made late and nowhere else: this machine may be busy.
    """

    bag = tmp_path_factory.mktemp("broken") / "recording"
    record(bag, range(FIRST_SEED, FIRST_SEED + 2))

    def evaluate(engine, frames=FRAMES, late=None):
        found = evaluate_bag(bag, engine, reference, max_frames=frames)
        limits = Limits() if late else Limits(latency_p99_ms=1e6, staleness_p99_ms=1e6, served_fraction=None)
        checks = judge(found, limits).checks
        broken = [check.name for check in checks if not check.passed]
        return broken, {check.name for check in checks if check.passed}, {c.name: c.sentence for c in checks}

    return evaluate


def test_the_engine_itself_passes(verdict_on, reference):
    broken, held, _ = verdict_on(reference)
    assert not broken and {"exchanged_joints", "normalization", "state_outside", "action_error_rel"} <= held


@pytest.mark.parametrize("stage", ["vision", "prefix", "denoise"])
def test_a_stage_at_2_bits_is_found_by_its_error_and_named(verdict_on, stage):
    broken, held, told = verdict_on(two_bits(CHECKPOINT, stage))
    assert broken[0] == "action_error_rel" and f"stage {stage} is furthest off" in told["action_error_rel"]
    assert {"exchanged_joints", "normalization", "state_outside"} <= held


@pytest.mark.parametrize("what", ["names", "outputs"])
def test_swapped_joints_are_found_and_named(verdict_on, tmp_path, what):
    if what == "names":
        engine = Runner.from_checkpoint(swap_joints(CHECKPOINT, tmp_path / "swapped"))
    else:
        engine = swap_outputs(CHECKPOINT)
    broken, held, told = verdict_on(engine)
    assert broken[0] == "exchanged_joints" and "normalization" in held
    for a, b in (SWAPPED, SWAPPED[::-1]):
        assert f"{a} is {b} of full precision" in told["exchanged_joints"]


def test_stale_statistics_are_found_and_named(verdict_on, tmp_path):
    broken, held, told = verdict_on(Runner.from_checkpoint(stale_statistics(CHECKPOINT, tmp_path / "stale")))
    assert broken[0] == "normalization" and "exchanged_joints" in held
    assert "action" in told["normalization"] and "off by 0.25 of its scale" in told["normalization"]


def test_half_a_second_of_latency_is_found_as_latency(verdict_on, reference):
    broken, held, told = verdict_on(Late(reference, 0.5), frames=6, late=True)
    assert broken == ["latency_p99_ms", "staleness_p99_ms", "served_fraction"]
    assert {"exchanged_joints", "normalization", "action_error_rel", "error_over_hold"} <= held


def test_the_shipped_file_of_limits_says_what_the_code_does():
    assert Limits.load(share_directory() / "config" / "accept.yaml") == Limits()
