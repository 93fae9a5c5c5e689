"""A spec survives JSON and YAML, and normalizes as LeRobot's formulas say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from small import small_spec

from vla_edge.policy.spec import Normalization, NormalizationMode, PolicySpec

RNG = np.random.default_rng(0)
DATA = RNG.normal([0.3, -2.0, 0.0, 1.0], [0.5, 0.01, 3.0, 0.0], (400, 4))  # the last never moves
STATISTICS = {
    "mean": DATA.mean(0), "std": DATA.std(0), "min": DATA.min(0), "max": DATA.max(0),
    "q01": np.quantile(DATA, 0.01, axis=0), "q99": np.quantile(DATA, 0.99, axis=0),
    "q10": np.quantile(DATA, 0.10, axis=0), "q90": np.quantile(DATA, 0.90, axis=0),
}  # fmt: skip
STATISTICS = {name: tuple(float(np.float32(value)) for value in values) for name, values in STATISTICS.items()}
MOVING = [0, 1, 2]


def between(low: str, high: str):
    """LeRobot's scaling to [-1, 1], in float64."""

    def scale(value: np.ndarray, eps: float) -> np.ndarray:
        bottom, top = np.array(STATISTICS[low]), np.array(STATISTICS[high])
        return 2 * (value - bottom) / np.where(top == bottom, eps, top - bottom) - 1

    return scale


def standard(value: np.ndarray, eps: float) -> np.ndarray:
    return (value - STATISTICS["mean"]) / (np.array(STATISTICS["std"]) + eps)


FORMULAS = {
    NormalizationMode.IDENTITY: lambda value, eps: value,
    NormalizationMode.MEAN_STD: standard,
    NormalizationMode.MIN_MAX: between("min", "max"),
    NormalizationMode.QUANTILES: between("q01", "q99"),
    NormalizationMode.QUANTILE10: between("q10", "q90"),
}


@pytest.mark.parametrize("mode", NormalizationMode)
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_normalizing_is_lerobots_formula_and_a_constant_joint_stays_finite(mode, eps):
    normalization = Normalization(mode, STATISTICS, eps)
    values = np.float32(DATA[:50])
    values[:, 3] = STATISTICS["mean"][3]
    got = normalization.normalize(values)
    assert got.dtype == np.float32 and np.isfinite(got).all()
    np.testing.assert_allclose(got, FORMULAS[mode](values.astype(np.float64), eps), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", NormalizationMode)
def test_unnormalizing_undoes_it(mode):
    normalization = Normalization(mode, STATISTICS)
    values = np.float32(DATA[:50])
    back = normalization.unnormalize(normalization.normalize(values))
    assert back.dtype == np.float64
    np.testing.assert_allclose(back[:, MOVING], values[:, MOVING], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(back[:, 3], 1.0, atol=1e-6)


@pytest.mark.parametrize(
    "mode, missing", [("MEAN_STD", "std"), ("MIN_MAX", "max"), ("QUANTILES", "q01"), ("QUANTILE10", "q90")]
)
def test_a_statistic_that_is_missing_is_named(mode, missing):
    statistics = {name: values for name, values in STATISTICS.items() if name != missing}
    with pytest.raises(ValueError, match=f"normalization {mode} lacks {missing}"):
        Normalization(NormalizationMode(mode), statistics)


@pytest.mark.parametrize(
    "through",
    [lambda plain: plain, lambda plain: json.loads(json.dumps(plain)), lambda p: yaml.safe_load(yaml.safe_dump(p))],
    ids=["plain", "json", "yaml"],
)
def test_a_spec_survives_plain_types(through):
    spec = small_spec(action=Normalization(NormalizationMode.QUANTILES, STATISTICS, 1e-3))
    again = PolicySpec.from_dict(through(spec.to_dict()))
    assert again == spec
    assert isinstance(again.joint_names, tuple) and isinstance(again.cameras[0].crop, tuple)
    assert again.action.mode is NormalizationMode.QUANTILES


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda p: p.pop("dt"), TypeError),
        (lambda p: p.pop("joint_names"), KeyError),
        (lambda p: p.update(colour="red"), TypeError),
        (lambda p: p["state"].update(mode="LOG"), ValueError),
        (lambda p: p["cameras"][0].pop("crop"), KeyError),
    ],
    ids=["missing", "joints", "unknown", "mode", "crop"],
)
def test_a_plain_spec_that_is_not_one_is_refused(change, error):
    plain = small_spec().to_dict()
    change(plain)
    with pytest.raises(error):
        PolicySpec.from_dict(plain)
