from __future__ import annotations

import dataclasses
import json
import math
import tracemalloc

import numpy as np
import pytest
from conftest import CAMERA_HZ, JOINTS, START_NS, recording, truth

from vla_edge.evaluate.bag import BagError
from vla_edge.evaluate.limits import Limits
from vla_edge.evaluate.replay import evaluate_bag
from vla_edge.evaluate.report_engine import _decoding
from vla_edge.evaluate.verdict import judge
from vla_edge.types import JointCommand, VlaEdgeError


def test_a_policy_that_knows_the_future_has_only_the_error_of_interpolation(make_bag, oracle):
    found = evaluate_bag(make_bag(), oracle())
    assert found.frames == 30 and not found.skipped
    assert found.action_mae_rad < 1e-6
    assert set(found.action.per_joint) == set(JOINTS)
    assert found.jump_rad.max < 2e-3


def test_a_constant_offset_is_found_in_every_joint_at_every_step(make_bag, oracle):
    offset = np.array([0.01, -0.02, 0.03])
    found = evaluate_bag(make_bag(), oracle(offset=offset))
    assert [found.action.per_joint[name] for name in JOINTS] == pytest.approx(np.abs(offset), rel=1e-3)
    assert found.action.per_step == pytest.approx([0.02] * 16, rel=1e-3)
    assert (found.action.interval.low, found.action.interval.high) == pytest.approx((0.02, 0.02), rel=1e-3)


def test_standing_still_is_the_yardstick(make_bag, oracle):
    found = evaluate_bag(make_bag(), oracle(), rate_hz=None)
    frames = np.arange(0, 6, 1 / CAMERA_HZ)
    steps = (np.arange(16) + 1) * 0.05
    moved = [np.abs(truth(t + s) - truth(t)) for t in frames for s in steps if t + s <= 6 - 1 / 200 + 1e-9]
    assert found.hold.mean == pytest.approx(np.mean(moved), rel=1e-5)


def test_compression_error_is_relative_to_the_motion_of_full_precision(make_bag, oracle):
    offset = 0.01
    found = evaluate_bag(make_bag(), oracle(offset=offset), oracle())
    assert found.compression.error.mean == pytest.approx(offset)
    motion = [truth(k * 0.2 + s) - truth(k * 0.2) for k in range(30) for s in (np.arange(16) + 1) * 0.05]
    assert found.compression.motion_std == pytest.approx(np.std(motion), rel=1e-6)
    assert found.compression.relative == pytest.approx(offset / np.std(motion), rel=1e-6)
    assert found.reference_action.mean < 1e-6
    same = evaluate_bag(make_bag("again"), oracle(), oracle())
    assert (same.compression.relative, same.compression.cosine_min) == (0.0, pytest.approx(1.0))


def test_the_same_figures_to_the_last_digit_when_run_twice(make_bag, oracle):
    bag = make_bag(image_format="jpeg")
    first, second = (evaluate_bag(bag, oracle(sigma=0.05), oracle(sigma=0.04), seed=3) for _ in range(2))
    assert first == second
    assert json.dumps(first.to_dict()) == json.dumps(second.to_dict())
    assert evaluate_bag(bag, oracle(sigma=0.05), seed=4).action_mae_rad != first.action_mae_rad


def test_passes_over_tokens_are_told_where_there_are_any(make_bag, oracle, monkeypatch):
    bag, policy = make_bag(), oracle()
    assert evaluate_bag(bag, policy).decoding is None
    infer = policy.infer

    def decoding(observation, seed=0, noise=None):
        found = infer(observation, seed, noise)
        passes = 2 + len(policy.seen) % 2
        return dataclasses.replace(found, timing=dataclasses.replace(found.timing, passes=passes, decoded=6))

    monkeypatch.setattr(policy, "infer", decoding)
    found = evaluate_bag(bag, policy)
    assert found.to_dict()["decoding"] == {"passes": 2.5, "tokens_per_pass": pytest.approx(6 / 2.5)}
    assert "took 2.50 passes of the language model on average, 2.40 tokens in a pass" in _decoding(found)


def test_motion_after_another_instruction_is_not_held_against_the_chunk(make_bag, oracle):
    items = recording(6.0, instructions=((0.0, "touch the red cube"), (3.0, "touch the blue ball")))
    found = evaluate_bag(make_bag(items=items), oracle())
    assert {text: group.frames for text, group in found.instructions.items()} == {
        "touch the red cube": 15,
        "touch the blue ball": 15,
    }
    # of the frame 0.2 s before the change only the first three targets are before it, and so on
    whole = evaluate_bag(make_bag("whole"), oracle())
    lost = sum(max(0, 16 - math.ceil((3.0 - 0.2 * k) / 0.05 - 1e-6) + 1) for k in range(15))
    assert whole.action.values - found.action.values == 3 * lost


def test_commands_are_compared_where_the_bag_has_them(make_bag, oracle):
    items = recording(2.0)
    for k in range(400):
        stamp = START_NS + k * 5_000_000
        target = truth(k / 200) + 0.05
        items.append(("command", JointCommand(stamp, JOINTS, target, np.zeros(3), np.zeros(3))))
    items.sort(key=lambda item: item[1] if isinstance(item[1], int) else item[1].stamp_ns)
    assert evaluate_bag(make_bag(items=items), oracle()).command.mean == pytest.approx(0.05, rel=1e-3)
    assert evaluate_bag(make_bag("without"), oracle()).command is None


class Refusal(VlaEdgeError):
    pass


def test_frames_the_policy_refuses_are_counted_with_its_reason(make_bag, oracle):
    policy = oracle()
    infer = policy.infer

    def picky(observation, seed=0, noise=None):
        if (observation.stamp_ns - START_NS) % 1_000_000_000 == 0:
            raise Refusal("on the full second I rest")
        return infer(observation, seed, noise)

    policy.infer = picky
    found = evaluate_bag(make_bag(), policy)
    assert found.frames == 24
    assert found.skipped == {"frame the policy refuses: on the full second I rest": 6}
    verdict = judge(found)
    assert not verdict.passed and verdict.headline == "Fails 1 of 8 limits: skipped_fraction"


def test_a_bag_of_which_no_frame_can_be_used_says_why(make_bag, oracle):
    policy = oracle()

    def never(observation, seed=0, noise=None):
        raise Refusal("I never work")

    policy.infer = never
    with pytest.raises(BagError, match="no frame of bag .* 30 x frame the policy refuses: I never work"):
        evaluate_bag(make_bag(), policy)


def test_a_bag_too_short_to_see_what_followed_says_so(make_bag, oracle):
    items = [item for item in recording(1.0) if item[0] == "instruction"]
    items += [item for item in recording(1.0) if item[0] != "instruction"][:3]
    with pytest.raises(BagError, match="before any motion follows a frame"):
        evaluate_bag(make_bag(items=items), oracle())


def test_limits_name_what_is_broken(make_bag, oracle):
    found = evaluate_bag(make_bag(), oracle(offset=0.2), oracle())
    verdict = judge(found, Limits(latency_p99_ms=1.0))
    assert {check.name for check in verdict.checks if not check.passed} == {
        "action_error_rel",
        "error_over_hold",
        "latency_p99_ms",
    }
    assert judge(evaluate_bag(make_bag("good"), oracle(), oracle())).passed


def test_the_summary_is_plain_json_with_what_the_demo_quotes(make_bag, oracle):
    summary = evaluate_bag(make_bag(), oracle()).summary()
    assert summary["frames"] == 30 and summary["action_mae_rad"] < 1e-6
    assert set(summary["action_mae_rad_per_joint"]) == set(JOINTS)
    json.dumps(summary, allow_nan=False)


def test_progress_ends_near_one_and_max_frames_ends_early(make_bag, oracle):
    seen = []
    found = evaluate_bag(make_bag(), oracle(), progress=lambda fraction, frames: seen.append((fraction, frames)))
    assert seen == sorted(seen) and seen[-1][1] == 30 and seen[-1][0] > 0.95
    assert evaluate_bag(make_bag("short"), oracle(), max_frames=7).frames == 7
    assert dataclasses.is_dataclass(found)


def test_memory_does_not_grow_with_the_bag(make_bag, oracle):
    def peak(name, seconds):
        bag = make_bag(name, recording(seconds))
        policy = oracle()
        policy.seen = type("Forgetful", (), {"append": lambda self, _: None})()
        tracemalloc.start()
        evaluate_bag(bag, policy)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    short, long = peak("short", 10.0), peak("long", 50.0)
    assert long - short < 1_000_000, f"{short} -> {long} bytes"
