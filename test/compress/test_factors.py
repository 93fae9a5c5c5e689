"""Factors of convolutions' kernels: as good as they can be, for the data, and only where they save."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from vla_edge.compress.factor.cp import canonical, khatri_rao
from vla_edge.compress.factor.kernels import CPFactors, Kernel, TuckerFactors, factors_of, shrink_
from vla_edge.compress.factor.replace import module_of
from vla_edge.compress.factor.tucker import cheapest_ranks, kept_energy, tucker2
from vla_edge.compress.factor.vbmf import signal_rank
from vla_edge.compress.low_rank import factorize
from vla_edge.compress.statistics import output_error
from vla_edge.policy.convolution import Convolution


def planted(seed: int = 0, noise: float = 0.0) -> np.ndarray:
    """A kernel (O, taps, C) of ranks 4 and 5."""
    rng = np.random.default_rng(seed)
    core = np.einsum("oq,qsp,cp->osc", *(rng.normal(size=size) for size in ((24, 5), (5, 9, 4), (16, 4))))
    return core / core.std() + noise * rng.normal(size=core.shape)


def smooth_inputs(count: int = 4000, taps: int = 9, channels: int = 16) -> np.ndarray:
    """Patches (count, taps * channels) whose neighbours are alike and whose channels are mixed and of different size."""
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(channels, channels)) * 2.0 ** -np.arange(channels)[:, None]
    places = np.linalg.cholesky(0.8 ** np.abs(np.subtract.outer(np.arange(taps), np.arange(taps))))
    return np.einsum("nsc,cd,ts->ntd", rng.normal(size=(count, taps, channels)), mix, places).reshape(count, -1)


def kernel_of(weight: np.ndarray, covariance=None, stride=(1, 1), taps=(3, 3)) -> Kernel:
    flat = weight.reshape(len(weight), -1)
    return Kernel(flat, taps, stride, np.eye(flat.shape[1]) if covariance is None else covariance)


def test_planted_ranks_are_found_and_lose_nothing():
    kernel = planted()
    inputs, outputs = tucker2(kernel, 4, 5)
    again = np.einsum("osc,oq,pq,cx,dx->psd", kernel, outputs, outputs, inputs, inputs)
    np.testing.assert_allclose(again, kernel, atol=1e-9)
    kept = kept_energy(kernel)
    assert cheapest_ranks(kept, 1 - 1e-9, lambda p, q: p * q) == (4, 5)
    assert kept[3, 4] == pytest.approx(1) and kept[2, 4] < 1 - 1e-3 and kept[3, 3] < 1 - 1e-3


def test_orthogonal_iteration_errs_less_than_the_truncated_svd_and_no_less_than_each_side_alone():
    kernel = planted(noise=1.0)
    inputs, outputs = tucker2(kernel, 4, 5)
    kept = np.square(np.tensordot(outputs, kernel @ inputs, (0, 0))).sum() / np.square(kernel).sum()
    assert kept_energy(kernel)[3, 4] < kept
    for axis, rank in ((0, 5), (2, 4)):
        values = np.linalg.svd(np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1), compute_uv=False) ** 2
        assert kept < values[:rank].sum() / values.sum()


def test_a_sum_of_products_is_found_again_and_always_the_same():
    rng = np.random.default_rng(2)
    factors = [rng.normal(size=(n, 6)) for n in (20, 3, 3, 12)]
    kernel = np.einsum("or,yr,xr,cr->oyxc", *factors)
    found, missed = canonical(kernel, 6, gain=1e-9, sweeps=2000)
    assert missed < 1e-5
    again = (found[0] @ khatri_rao(found[1:]).T).reshape(kernel.shape)
    assert np.square(again - kernel).sum() / np.square(kernel).sum() == pytest.approx(missed, abs=1e-8)
    for one, other in zip(found, canonical(kernel, 6, gain=1e-9, sweeps=2000)[0]):
        np.testing.assert_array_equal(one, other)
    assert canonical(kernel, 3)[1] > canonical(kernel, 5)[1] > 1e-3


def test_more_components_than_a_dimension_has_numbers_are_no_obstacle():
    kernel = np.random.default_rng(3).normal(size=(8, 3, 6))
    errors = [canonical(kernel, rank)[1] for rank in (4, 10, 18)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


def test_noise_is_told_from_signal():
    rng = np.random.default_rng(4)
    signal = rng.normal(size=(60, 7)) @ rng.normal(size=(7, 200))
    assert signal_rank(signal + 0.5 * rng.normal(size=signal.shape)) == 7
    assert signal_rank((signal + 0.5 * rng.normal(size=signal.shape)).T) == 7
    assert signal_rank(rng.normal(size=(60, 200))) == 0
    assert signal_rank(np.zeros((4, 5))) == 0


@pytest.mark.parametrize("method", ["tucker", "cp"])
def test_with_data_factors_of_that_rank_err_less_at_the_output(method):
    inputs, weight = smooth_inputs(), np.random.default_rng(5).normal(size=(24, 9, 16))
    known = kernel_of(weight, inputs.T @ inputs / len(inputs))
    blind = factors_of(kernel_of(weight), method, 6, None)
    seen = factors_of(known, method, 6, None)
    assert known.energy_kept(seen) > 1 - 0.5 * (1 - known.energy_kept(blind))
    # straight from the data
    error = np.square(inputs @ (seen.weight() - known.weight).T).sum() / np.square(inputs @ known.weight.T).sum()
    assert 1 - known.energy_kept(seen) == pytest.approx(error, rel=1e-6)


def test_a_matrix_of_factors_is_the_least_error_at_the_output():
    inputs = smooth_inputs()
    kernel = kernel_of(planted(noise=0.5), inputs.T @ inputs / len(inputs))
    factors = factors_of(kernel, "svd", None, 0.9)
    rank = factors.ranks[1]
    ours = factorize(kernel.weight, rank, second_moment=kernel.covariance, dtype="float64")
    error = output_error(ours.dequantize() - kernel.weight, kernel.covariance) / output_error(kernel.weight, kernel.covariance)
    assert factors.inputs is None and factors.ranks[0] == 16
    assert 0.9 <= kernel.energy_kept(factors) == pytest.approx(1 - error, abs=1e-3)
    assert kernel.energy_kept(factors_of(kernel, "svd", rank - 1, None)) < 0.9


@pytest.mark.parametrize("method", ["tucker", "cp"])
@pytest.mark.parametrize("energy", [0.8, 0.95])
def test_energy_is_kept_at_the_output_and_hardly_more(method, energy):
    inputs = smooth_inputs()
    kernel = kernel_of(planted(noise=0.2), inputs.T @ inputs / len(inputs))
    factors = factors_of(kernel, method, None, energy)
    assert energy <= kernel.energy_kept(factors) < 1 - 0.2 * (1 - energy)
    assert kernel.multiplications(method, factors.ranks) < kernel.multiplications()


def test_what_few_samples_tell_is_believed_less():
    rng = np.random.default_rng(7)
    moved = []
    for count in (10, 100, 10_000):
        seen = rng.normal(size=(count, 40)) * np.linspace(1, 2, 40)
        sample = seen.T @ seen / count
        found = sample.copy()
        shrink_(found, count)
        assert np.trace(found) == pytest.approx(np.trace(sample)) and np.linalg.eigvalsh(found).min() > 0
        truth = np.diag(np.linspace(1, 2, 40) ** 2)
        assert np.linalg.norm(found - truth) < np.linalg.norm(sample - truth)
        moved.append(np.linalg.norm(found - sample) / np.linalg.norm(sample))
    assert moved[0] > moved[1] > 10 * moved[2]
    nothing = np.zeros((3, 3))
    shrink_(nothing, 5)
    assert not nothing.any()


def test_channels_in_between_vary_alike():
    inputs = smooth_inputs()
    kernel = kernel_of(planted(noise=0.2), inputs.T @ inputs / len(inputs))
    tucker, cp = factors_of(kernel, "tucker", 4, None), factors_of(kernel, "cp", 4, None)
    places = inputs.reshape(-1, 16)
    np.testing.assert_allclose(np.square(places @ tucker.inputs.T).mean(0), 1, rtol=0.05)
    thin = (places @ tucker.inputs.T).reshape(len(inputs), -1)
    np.testing.assert_allclose(np.square(thin @ tucker.core.T).mean(0), 1, rtol=0.05)
    np.testing.assert_allclose(np.square(inputs @ cp.features().T).mean(0), 1, rtol=0.05)


def test_ranks_by_variational_bayes_are_those_of_the_planted_kernel():
    assert factors_of(kernel_of(planted(noise=0.3)), "tucker", "vbmf", None).ranks == (4, 5)


def test_a_side_of_full_rank_is_no_convolution():
    kernel = kernel_of(planted(noise=0.5))
    factors = factors_of(kernel, "tucker", 16, None)
    assert isinstance(factors, TuckerFactors) and factors.ranks == (16, 16) and factors.inputs is None
    assert kernel.multiplications("tucker", (16, 16)) == 9 * 16 * 16 + 16 * 24
    # through fewer outputs alone it is the truncated SVD
    values = np.linalg.svd(kernel.weight, compute_uv=False) ** 2
    assert kernel.energy_kept(factors) == pytest.approx(values[:16].sum() / values.sum(), abs=1e-5)


def test_what_does_not_save_is_left_alone():
    kernel = kernel_of(np.random.default_rng(6).normal(size=(24, 9, 16)))
    for method in ("tucker", "cp"):
        assert factors_of(kernel, method, 200, None) is None
        assert factors_of(kernel, method, None, 0.9999) is None
    silent = kernel_of(np.zeros((24, 9, 16)))
    assert isinstance(factors_of(silent, "cp", 2, None), CPFactors)
    never = kernel_of(planted(), np.zeros((144, 144)))
    for method in ("tucker", "cp"):
        assert np.isfinite(factors_of(never, method, 3, None).weight().astype(np.float32)).all()


def test_multiplications_follow_the_places_there_are():
    kernel = kernel_of(planted(), stride=(2, 2))
    assert kernel.multiplications() == kernel.numbers() == 9 * 16 * 24
    assert kernel.multiplications("tucker", (4, 5)) == 4 * 16 * 4 + 9 * 4 * 5 + 5 * 24
    assert kernel.numbers("tucker", (4, 5)) == 16 * 4 + 9 * 4 * 5 + 5 * 24
    assert kernel.multiplications("cp", (7,)) == 4 * 16 * 7 + 2 * 3 * 7 + 3 * 7 + 7 * 24


@pytest.mark.parametrize("method", ["tucker", "cp"])
@pytest.mark.parametrize("inputs, rank", [(16, 5), (4, 6)], ids=["both sides", "one side"])
@pytest.mark.parametrize("taps, stride", [((3, 5), (2, 1)), ((5,), (2,))], ids=["pictures", "time"])
def test_modules_compute_what_the_weights_say_and_the_mean_output_stays(method, inputs, rank, taps, stride):
    torch.manual_seed(0)
    convolution = Convolution(inputs, 24, taps, stride, tuple(size // 2 for size in taps))
    flat = convolution.linear.weight.detach().double().numpy()
    factors = factors_of(kernel_of(flat, taps=taps, stride=stride), method, rank, None)
    mean = np.random.default_rng(8).normal(size=flat.shape[1])
    module, x = module_of(factors, convolution, mean), torch.randn(2, *(9, 11)[: len(taps)], inputs)
    whole = copy.deepcopy(convolution)
    whole.linear.weight.data.copy_(torch.from_numpy(factors.weight()))
    whole.linear.bias.data += torch.from_numpy((flat - factors.weight()) @ mean)
    torch.testing.assert_close(module(x), whole(x), atol=1e-4, rtol=1e-4)
    seen = torch.from_numpy(mean).float()
    torch.testing.assert_close(whole.linear(seen), convolution.linear(seen), atol=1e-4, rtol=1e-4)
    parts = 3 if method == "tucker" else 2 + len(taps)
    assert len(module.linear) == parts - (method == "tucker" and inputs == 4)
