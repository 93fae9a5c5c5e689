import numpy as np
import pytest
import torch

from vla_edge.learn.losses import flow_matching_loss, pointer_loss, splat
from vla_edge.policy.smolvla import PrefixCache

GRID, WORDS = 4, 3


@pytest.mark.parametrize("point", [(0.5, 0.5), (0.13, 0.77), (0.0, 1.0), (0.999, 0.02), (0.625, 0.375)])
def test_splat_weighs_the_cells_around_a_point_so_that_their_mean_is_the_point(point):
    weights = splat(torch.tensor([point], dtype=torch.float64), 6)[0].reshape(6, 6).numpy()
    centres = (np.arange(6) + 0.5) / 6
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all() and (weights > 0).sum() <= 4
    inside = np.clip(point, centres[0], centres[-1])
    np.testing.assert_allclose([weights.sum(0) @ centres, weights.sum(1) @ centres], inside, atol=1e-12)


def _attention(cell, words=WORDS, amount=1.0):
    """(1, 2, P, P) in which every word looks at one image cell."""
    tokens, length = GRID * GRID, GRID * GRID + words + 1
    attention = torch.full((1, 2, length, length), 1e-4)
    attention[0, 0, tokens : tokens + words, cell] = amount
    return attention


def test_pointer_loss_is_least_where_the_words_look_at_the_object():
    point = torch.tensor([[(2 + 0.5) / GRID, (1 + 0.5) / GRID]])
    mask = torch.ones(1, WORDS, dtype=torch.bool)
    losses = [pointer_loss([_attention(cell)], point, mask, (0,), GRID).item() for cell in range(GRID * GRID)]
    assert int(np.argmin(losses)) == 1 * GRID + 2
    faint = pointer_loss([_attention(6, amount=0.01)], point, mask, (0,), GRID).item()
    assert faint > losses[6] + 0.2


def test_pointer_loss_ignores_padding_and_objects_out_of_sight():
    mask = torch.tensor([[True, True, False]])
    point = torch.tensor([[0.6, 0.4]])
    attention = _attention(6)
    other = attention.clone()
    other[0, 0, GRID * GRID + 2] = 0.3
    same = [pointer_loss([a], point, mask, (0,), GRID).item() for a in (attention, other)]
    assert same[0] == same[1] > 0
    assert pointer_loss([attention], torch.tensor([[1.2, 0.4]]), mask, (0,), GRID).item() == 0


class _Oracle:
    """A policy whose velocity is right for one action only."""

    def __init__(self, action):
        self.action, self.seen = action, []

    def time(self, time):
        self.seen.append(time)
        return (time,)

    def denoise(self, mixed, time, *cache):
        assert all(len(tensor) == len(mixed) for tensor in cache[2:]) and cache[0].shape[1] == len(mixed)
        # x = t * noise + (1 - t) * action, velocity = noise - action
        return ((mixed - self.action) / time[:, None, None],)


def _cache(batch):
    return PrefixCache(*(torch.zeros(2, batch, 1, 5, 4) for _ in range(2)), *(torch.zeros(batch, 3) for _ in range(3)))


def test_flow_matching_loss_is_zero_for_the_velocity_that_leads_from_noise_to_the_action():
    action = torch.full((5, 8, 4), 0.7, dtype=torch.float64)
    oracle = _Oracle(action[:1])
    loss = flow_matching_loss(oracle, _cache(5), action, 3, torch.Generator().manual_seed(0))
    assert loss.item() < 1e-4
    assert flow_matching_loss(_Oracle(action[:1] + 1), _cache(5), action, 3).item() > 1


def test_times_follow_lerobots_beta_distribution():
    from scipy import stats

    action = torch.zeros(500, 8, 4)
    oracle = _Oracle(action[:1])
    flow_matching_loss(oracle, _cache(500), action, 8, torch.Generator().manual_seed(0))
    times = (torch.cat(oracle.seen).double().numpy() - 0.001) / 0.999
    assert len(times) == 4000
    assert stats.kstest(times, stats.beta(1.5, 1).cdf).pvalue > 0.01


class _Given(_Oracle):
    """Knows the velocity of rows with noise, and says nonsense of rows without."""

    def time(self, time):
        return (time[:, None],)

    def denoise(self, mixed, time, *cache):
        time = time if time.ndim == 3 else time[:, None]
        self.seen.append((mixed, time[..., 0]))
        velocity = (mixed - self.action) / time.clamp(min=1e-3)
        return (torch.where(time > 0, velocity, 1e3),)


def test_rows_given_as_a_prefix_are_without_noise_at_time_zero_and_not_learnt():
    action = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None].expand(400, 8, 4).clone()
    oracle = _Given(action[:1])
    loss = flow_matching_loss(oracle, _cache(400), action, 2, torch.Generator().manual_seed(0), prefix=3)
    assert loss.item() < 1e-4
    ((mixed, time),) = oracle.seen
    given = time == 0
    np.testing.assert_array_equal(mixed[given], action.repeat(2, 1, 1)[given])
    assert not given[:, 3:].any() and (given[:, :-1] | ~given[:, 1:]).all()  # first rows, without gaps
    counts = torch.bincount(given.sum(1), minlength=4)
    assert len(counts) == 4 and counts.min() > 150  # 0 to 3 rows, each as often
    # The mean is over the rows that are learnt, whatever their number.
    off = flow_matching_loss(_Given(action[:1] + 1), _cache(400), action, 2, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    with_prefix = flow_matching_loss(_Given(action[:1] + 1), _cache(400), action, 2, generator, prefix=3)
    assert with_prefix.item() == pytest.approx(off.item(), rel=0.2)
