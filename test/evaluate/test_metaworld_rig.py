"""Meta-World in the closed loop: the rig on a world of pure kinematics, and (marked `peers`) on the library."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_closed_loop import SliderRig, obedient

from vla_edge.evaluate.closed_loop import ClosedLoopError, LoopOptions, run_closed_loop
from vla_edge.evaluate.closed_loop_report import judge_closed_loop, write_closed_loop_report
from vla_edge.evaluate.expert_policy import MetaWorldExpertPolicy
from vla_edge.evaluate.kernel_rig import EPISODE_START_NS
from vla_edge.evaluate.metaworld_rig import MetaWorldRig
from vla_edge.sim.metaworld import JOINTS, PICTURE, STEP_NS, STRIDE_M, MetaWorldEpisode
from vla_edge.types import ActionChunk, JointState

CHECKPOINT = Path(__file__).parents[2] / "engines" / "metaworld" / "checkpoint"
LOW, HIGH = np.array([-0.5, 0.4, 0.05, 0.0]), np.array([0.5, 1.0, 0.5, 0.1])


class Hand:
    """A hand that is where its target is, which moves as Meta-World lets it; done at x = 0.2 m."""

    def reset(self, seed, tier):
        self.at, self.targets = np.array([0.0, 0.6, 0.2, 0.1]), []
        self.episode = MetaWorldEpisode("reach", "reach for the red marker")
        return self.episode

    def step(self, target):
        self.targets.append(np.array(target))
        self.at = self.at + np.clip(target - self.at, -STRIDE_M, STRIDE_M)

    steps = property(lambda self: len(self.targets))
    time_ns = property(lambda self: self.steps * STEP_NS)
    success = property(lambda self: bool(self.at[0] >= 0.2))
    finished = property(lambda self: self.success or self.steps >= 500)

    def joint_state(self, stamp_ns):
        return JointState(stamp_ns, JOINTS, self.at)

    def bounds(self):
        return LOW, HIGH

    def render(self, height, width):
        return np.zeros((height, width, 3), np.uint8)


def straight(observation, seed, speed=0.2, noise=0.0):
    """To greater x at `speed` m/s."""
    rows = np.tile(observation.joints.position, (16, 1))
    rows[:, 0] += speed * 0.05 * np.arange(1, 17)
    rows += noise * np.random.default_rng([seed, observation.stamp_ns]).standard_normal(rows.shape)
    return ActionChunk(observation.stamp_ns, JOINTS, rows, 0.05)


def _rig():
    return MetaWorldRig(Hand())


def test_the_hand_follows_a_chunk_at_the_times_of_its_points():
    rigs = []

    def make():
        rigs.append(_rig())
        return rigs[-1]

    found = run_closed_loop(straight, [0], world="metaworld", rig=make, delay_s=0.0)
    targets = np.array(rigs[0].world.targets)
    assert found.successes == 1 and found.rows[0].seconds == pytest.approx(1.0, abs=0.05)
    # step k ends at (k + 1) * 12.5 ms, and has the target of that moment
    np.testing.assert_allclose(targets[40:70, 0], 0.2 * 0.0125 * np.arange(41, 71), atol=2e-3)
    np.testing.assert_allclose(targets[:, 1:], [[0.6, 0.2, 0.1]] * len(targets), atol=1e-9)


def test_what_the_environment_would_cut_is_cut_and_not_refused():
    wild = run_closed_loop(lambda *asked: straight(*asked, noise=0.2), [0], world="metaworld", rig=_rig)
    assert wild.rows[0].chunks > 0 and not wild.rows[0].rejected
    beyond = run_closed_loop(lambda *asked: straight(*asked, speed=1.5), [0], world="metaworld", rig=_rig)
    assert beyond.successes == 1 and beyond.rows[0].seconds < 0.6 and beyond.rows[0].limit_hits > 0
    broken = run_closed_loop(lambda *asked: straight(*asked, noise=np.nan), [0], world="metaworld", rig=_rig)
    assert set(broken.rows[0].rejections) == {"finite"} and not broken.successes


def test_observations_begin_at_the_same_time_and_show_the_hand_in_metres():
    rig = _rig()
    for seed in range(2):
        observation = rig.observe(rig.begin(seed, LoopOptions(world="metaworld")))
        assert observation.stamp_ns == EPISODE_START_NS and observation.joints.names == JOINTS
        assert observation.images["corner"].shape == (PICTURE, PICTURE, 3)


def test_there_are_no_instructions_to_shuffle_in_a_scene_of_one_goal():
    with pytest.raises(ClosedLoopError, match="one goal"):
        run_closed_loop(straight, [0], world="metaworld", rig=_rig, instruction_override="shuffled")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"world": "libero"}, "no world 'libero'"), ({"world": "metaworld", "tier": "hard"}, "no tier 'hard'")],
)
def test_worlds_and_tiers_are_checked_before_anything_runs(options, message):
    with pytest.raises(ClosedLoopError, match=message):
        run_closed_loop(straight, [0], rig=_rig, **options)


def test_the_report_speaks_of_metres_and_leaves_out_what_cannot_be_wrong(tmp_path):
    result = run_closed_loop(straight, range(3), world="metaworld", rig=_rig)
    assert "wrong" not in result.one_line()
    assert {check.name for check in judge_closed_loop(result).checks} == {"success_rate"}
    html, path = write_closed_loop_report(result, tmp_path / "loop.html", "hand")
    text, told = html.read_text(encoding="utf-8"), json.loads(path.read_text())
    assert "m/s³" in text and "rad/s³" not in text and "Wrong first" not in text and "metaworld" in text
    assert told["unit"] == "m" and told["options"]["tier"] == "three" and told["goals"] == {
        "reach": {"successes": 3, "episodes": 3}
    }
    assert run_closed_loop(obedient, range(2), rig=SliderRig).unit == "rad"


@pytest.fixture
def metaworld():
    return pytest.importorskip("metaworld", reason="metaworld is not installed")


@pytest.mark.peers
def test_the_experts_succeed_through_camera_clock_and_controller(metaworld):
    found = run_closed_loop(MetaWorldExpertPolicy(), range(700_000, 700_012), world="metaworld")
    assert found.successes >= 11 and not found.summary()["rejections"]
    alone = run_closed_loop(MetaWorldExpertPolicy(), [700_007], world="metaworld")
    assert alone.rows[0] == found.rows[7], "an episode does not depend on those before it"


@pytest.mark.peers
def test_the_shipped_policy_does_the_tasks_it_was_trained_for(metaworld):
    found = run_closed_loop(CHECKPOINT, range(700_100, 700_112), world="metaworld")
    assert found.successes >= 9
    # what it was not trained for it cannot do: the judge is not to blame for the figure above
    other = run_closed_loop(CHECKPOINT, range(700_100, 700_103), world="metaworld", tier="peg-insert-side")
    assert other.successes == 0
