import numpy as np
import pytest

from vla_edge.learn.dataset import Demonstrations
from vla_edge.sim.demonstrations import DemonstrationError

TOKENS = np.arange(16)[None]


def _tokenize(text):
    assert text == "touch the red cube with your left hand"
    return TOKENS, TOKENS < 8


def test_frames_come_with_their_own_state_action_and_words(recording):
    data = Demonstrations([recording], _tokenize)
    batch = data.draw(np.random.default_rng(0), 30)
    assert len(data) == 80 and data.chunk_size == 32 and data.image_size == 96
    assert batch.images.shape == (30, 96, 96, 3) and batch.images.dtype == np.uint8
    # the invented offset is where the square is, so a frame mixed up with another's state would show here
    expected = (batch.pointer.mean(1) - 0.5)[:, None, None] * np.linspace(0, 1, 32)[None, :, None]
    np.testing.assert_allclose(batch.action, np.broadcast_to(expected, batch.action.shape), atol=1e-6)
    for image, (x, y) in zip(batch.images, batch.pointer):
        assert image[int(y * 96), int(x * 96), 0] == 220
    assert (batch.tokens == TOKENS).all() and batch.mask.sum() == 30 * 8


def test_the_same_generator_draws_the_same_frames(recording):
    data = Demonstrations([recording], _tokenize)
    one, two = (data.draw(np.random.default_rng(3), 16) for _ in range(2))
    assert np.array_equal(one.images, two.images) and np.array_equal(one.action, two.action)


def test_normalization_makes_state_and_relative_action_standard(recording):
    data = Demonstrations([recording], _tokenize)
    state, action = data.normalization()
    with np.load(recording / "shard-0000.npz") as a, np.load(recording / "shard-0001.npz") as b:
        states = np.concatenate([a["state"], b["state"]]).astype(np.float64)
        offsets = np.concatenate([a["action"] - a["state"][:, None], b["action"] - b["state"][:, None]])
    np.testing.assert_allclose(state.normalize(states).std(0), 1, atol=1e-4)
    np.testing.assert_allclose(state.normalize(states).mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(action.normalize(offsets).reshape(-1, 15).std(0), 1, atol=1e-4)


def test_each_recording_has_its_share_of_a_batch(recording, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    with np.load(recording / "shard-0000.npz") as shard:
        np.savez_compressed(other / "shard-0000.npz", **{**shard, "state": shard["state"] + 100})
    rng = np.random.default_rng(0)
    for shares, expected in (((0.3, 0.7), 14), ((), 7)):
        batch = Demonstrations([recording, other], _tokenize, shares=shares).draw(rng, 20)
        assert (batch.state > 50).all(1).sum() == expected
    with pytest.raises(DemonstrationError, match="as many shares"):
        Demonstrations([recording], _tokenize, shares=(1, 2))
