import numpy as np
import pytest

from vla_edge.sim import demonstrations
from vla_edge.sim.demonstrations import FIELDS, DemonstrationError, record, shards
from vla_edge.sim.tasks import goals, parse_instruction


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Four episodes, by one worker and by two."""
    root = tmp_path_factory.mktemp("demonstrations")
    patch = pytest.MonkeyPatch()
    patch.setattr(demonstrations, "EPISODES_PER_SHARD", 2)
    try:
        for name, workers in (("one", 1), ("two", 2)):
            totals = record(4, 1_000_000, workers, root / name, progress=False)
    finally:
        patch.undo()
    return root, totals


def test_the_same_seed_gives_the_same_demonstrations_whatever_the_workers(recorded):
    root, totals = recorded
    one, two = list(shards(root / "one")), list(shards(root / "two"))
    assert len(one) == len(two) == 2
    assert totals["episodes"] == 4 and totals["frames"] == sum(len(shard["step"]) for shard in one)
    for a, b in zip(one, two):
        for name in FIELDS:
            assert np.array_equal(a[name], b[name]), name


def test_shards_hold_what_they_promise(recorded):
    root, _ = recorded
    for shard in shards(root / "one"):
        count = len(shard["step"])
        assert shard["images"].shape == (count, 96, 96, 3) and shard["images"].dtype == np.uint8
        assert shard["state"].shape == (count, 15) and shard["state"].dtype == np.float32
        assert shard["action"].shape == (count, 32, 15) and shard["action"].dtype == np.float32
        assert shard["pointer"].shape == (count, 2)
        for text, goal in zip(shard["instruction"], shard["goal"]):
            assert parse_instruction(str(text)) == goals()[goal]


def test_labels_are_clean_plans_from_the_state_shown(recorded, world, expert):
    root, _ = recorded
    shard = next(shards(root / "one"))
    for frame in range(0, len(shard["step"]), 17):
        world.reset(int(shard["episode"][frame]), "touch")
        plan = expert.plan(32, goals()[shard["goal"][frame]], shard["state"][frame].astype(float))
        assert np.allclose(plan, shard["action"][frame], atol=3e-3)


def test_most_demonstrations_reach_their_object(recorded):
    _, totals = recorded
    assert totals["successes"] >= 3


def test_another_recording_is_not_written_into_the_same_place(recorded):
    root, _ = recorded
    with pytest.raises(DemonstrationError, match="another recording"):
        record(7, 1_000_000, 1, root / "one", progress=False)


def test_missing_and_damaged_recordings_are_named_errors(tmp_path):
    with pytest.raises(DemonstrationError, match="no demonstrations"):
        next(shards(tmp_path))
    (tmp_path / "shard-0000.npz").write_bytes(b"not a zip")
    with pytest.raises(DemonstrationError, match="cannot be read"):
        next(shards(tmp_path))
