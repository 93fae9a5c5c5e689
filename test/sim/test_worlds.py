import sys
from dataclasses import asdict

import pytest

from vla_edge.sim.demonstrations import record
from vla_edge.sim.metaworld import GROUPS, TASKS, MetaWorld, MetaWorldError
from vla_edge.sim.worlds import WORLDS, WorldError, world


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_is_known_before_it_is_set_up(name):
    shown = world(name)
    assert shown.name == name and shown.tier(None) == shown.tiers[0]
    assert all(shown.tier(tier) == tier for tier in shown.tiers)
    assert shown.chunk * shown.dt > 0.5, "the horizon has to outlast an observation period and its delay"
    top, left, height, width = shown.camera.crop
    assert top + height <= shown.camera.source_height and left + width <= shown.camera.source_width
    assert (height % shown.camera.height, width % shown.camera.width) == (0, 0)
    assert set(asdict(shown)) >= {"unit", "joint_names", "vocabulary"}


def test_worlds_and_tiers_that_do_not_exist_are_named():
    with pytest.raises(WorldError, match="no world 'libero'; it is one of tabletop, metaworld"):
        world("libero")
    with pytest.raises(WorldError, match="metaworld has no tier 'touch'.*button-press-topdown"):
        world("metaworld").tier("touch")


def test_no_two_tasks_of_meta_world_share_a_wording_and_the_tokenizer_knows_every_word():
    wordings = [text for each in TASKS.values() for text in each]
    assert len(set(wordings)) == len(wordings)
    assert {word for text in wordings for word in text.split()} == set(world("metaworld").vocabulary)
    assert all(set(tasks) <= set(TASKS) for tasks in GROUPS.values())


def test_without_meta_world_the_error_says_what_to_install_and_nothing_is_begun(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    with pytest.raises(MetaWorldError, match="pip install metaworld==3.1.1"):
        MetaWorld()
    with pytest.raises(MetaWorldError):
        record(1, out_dir=tmp_path / "out", world_name="metaworld", progress=False)
    assert not (tmp_path / "out").exists()
