"""Tokens of a picture are used again while hardly anything in it changes, and not a picture longer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny import make_observations

from vla_edge.compress.recipe import RecipeError, parse_recipe
from vla_edge.engine.build import build
from vla_edge.engine.bundle import Bundle
from vla_edge.engine.runner import Runner
from vla_edge.engine.vision_cache import MOST_AGE_NS, VisionCache, change
from vla_edge.types import NANOSECONDS

STEP_NS = NANOSECONDS // 5


def picture(value: float = 0.0, size=(48, 40)) -> np.ndarray:
    return np.full((1, 3, *size), value, np.float32)


def test_change_is_that_of_the_block_that_differs_most():
    still, moved = picture(), picture()
    assert change(still, moved) == 0
    moved[0, :, :3, :3] = 1.0  # a corner, of a block of 3 x 2 and half of its neighbour
    assert change(still, moved) == pytest.approx(0.5)
    assert change(picture(-1), picture(1)) == pytest.approx(1.0)
    assert change(picture(0, (5, 7)), picture(0.2, (5, 7))) == pytest.approx(0.1), "fewer pixels than blocks"


def test_tokens_hold_until_what_they_are_of_has_changed():
    cache = VisionCache(0.05)
    looked = [1 - len(cache.again([picture(0.04 * k)], k * STEP_NS)) for k in range(1, 5)]
    # 0.02 of the range a picture: the first is looked at, two are near enough, then drift has added up
    assert looked == [1, 0, 0, 1]


def test_tokens_do_not_hold_for_long_nor_for_what_is_no_later():
    cache = VisionCache(0.05)
    assert not cache.again([picture()], NANOSECONDS)
    assert not cache.again([picture()], NANOSECONDS), "the same observation again is no new frame"
    assert not cache.again([picture()], NANOSECONDS - 1), "time went back"
    assert cache.again([picture()], NANOSECONDS - 1 + MOST_AGE_NS) == {0}
    assert not cache.again([picture()], NANOSECONDS + MOST_AGE_NS)
    cache.forget()
    assert not cache.again([picture()], NANOSECONDS + MOST_AGE_NS + 1)


def test_cameras_are_judged_one_by_one():
    cache = VisionCache(0.05)
    cache.again([picture(), picture()], STEP_NS)
    assert cache.again([picture(0.5), picture()], 2 * STEP_NS) == {1}


@pytest.fixture(scope="module")
def cached(checkpoint, data, traced, tmp_path_factory):
    recipe = {"name": "cached", "steps": [{"vision_cache": {"change": 0.1}}]}
    output = tmp_path_factory.mktemp("cached") / "engine"
    path = build(checkpoint, parse_recipe(recipe), "onnxruntime", output, data, traced=traced)
    assert Bundle.load(path).spec.vision_cache == 0.1
    return Runner.from_bundle(path)


def later(observation, count: int, pixels: int = 0):
    images = {
        name: np.clip(image.astype(int) + pixels, 0, 255).astype(np.uint8) for name, image in observation.images.items()
    }
    return replace(observation, stamp_ns=observation.stamp_ns + count * STEP_NS, images=images)


def test_an_engine_looks_at_what_has_changed_alone(cached, bundle):
    first = make_observations(1)[0]
    cached.warm_up()
    before = cached.pictures_seen
    for number, pixels in enumerate((0, 4, 0)):
        cached.infer(later(first, number, pixels))
    assert cached.pictures_seen - before == 1
    alone = replace(cached.spec, vision_cache=0.0)
    plain = Runner(alone, Bundle.load(bundle).tokenizer_path, cached.stages)
    seen = later(first, 3, 60)
    np.testing.assert_array_equal(cached.infer(seen).chunk.positions, plain.infer(seen).chunk.positions)
    assert cached.pictures_seen - before == 2
    same = [runner.infer(later(seen, 1, 0)).chunk.positions for runner in (cached, plain)]
    np.testing.assert_array_equal(*same, "the tokens of the same picture are the same")
    assert cached.pictures_seen - before == 2


def test_an_inference_that_failed_leaves_no_tokens_behind(cached, monkeypatch):
    first = make_observations(2)[1]
    monkeypatch.setattr(cached._loop, "acting", lambda: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        cached.infer(first)
    monkeypatch.undo()
    before = cached.pictures_seen
    cached.infer(later(first, 1))
    assert cached.pictures_seen == before + 1


def test_the_step_is_checked():
    with pytest.raises(RecipeError, match="change is 0, allowed is above 0, to 1"):
        parse_recipe({"steps": [{"vision_cache": {"change": 0}}]})
