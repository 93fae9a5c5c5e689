"""Chunk splines agree with scipy and join without corners."""

import numpy as np
import pytest

from vla_edge.control.spline import ChunkSpline, fade_coefficients, spline_matrices, stop_coefficients

scipy_interpolate = pytest.importorskip("scipy.interpolate")
DT = 0.05


@pytest.fixture
def points():
    return np.cumsum(np.random.default_rng(3).normal(0, 0.03, (32, 4)), axis=0)


def make(points, smoothing=0.0):
    return ChunkSpline(points, DT, smoothing, np.full(points.shape[1], 20.0), np.full(points.shape[1], 2000.0))


def test_it_is_scipys_natural_cubic_spline(points):
    ours = make(points)
    reference = scipy_interpolate.CubicSpline(DT * np.arange(1, 33), points, bc_type="natural")
    for t in np.linspace(DT, 32 * DT, 201)[:-1]:
        state = ours.state(t)
        for order in range(3):
            np.testing.assert_allclose(state[order], reference(t, order), atol=1e-9)
        np.testing.assert_allclose(ours.position(t, np.zeros(4)), reference(t), atol=1e-12)


def test_smoothing_is_scipys_smoothing_spline(points):
    weight = 0.5
    ours = make(points, weight)
    # Reinsch for unit knots and penalty lam: the same functional scipy minimizes.
    reference = scipy_interpolate.make_smoothing_spline(np.arange(1.0, 33.0), points[:, 0], lam=weight)
    at = np.linspace(1, 31.99, 100)
    np.testing.assert_allclose([ours.state(t * DT)[0, 0] for t in at], reference(at), atol=1e-8)


def test_smoothing_leaves_a_straight_line_alone():
    values, curvatures = spline_matrices(20, 3.0)
    line = np.arange(20.0)
    np.testing.assert_allclose(values @ line, line, atol=1e-12)
    np.testing.assert_allclose(curvatures @ line, 0.0, atol=1e-12)


def test_position_velocity_and_acceleration_have_no_jump_anywhere(points):
    spline = make(points)
    step = 1e-7
    for t in [*(DT * np.arange(1, 33)), spline.end + spline.tail]:
        before, after = spline.state(t - step), spline.state(t + step)
        np.testing.assert_allclose(before[0], after[0], atol=1e-5)
        np.testing.assert_allclose(before[1], after[1], atol=1e-4)
        np.testing.assert_allclose(before[2], after[2], atol=5e-2)


def test_after_the_last_point_it_comes_to_rest_within_the_deceleration(points):
    spline = make(points)
    times = np.arange(spline.end, spline.end + spline.tail, 1e-3)
    states = np.array([spline.state(t) for t in times])
    # The shortest tail lasts one dt, the limit otherwise
    assert np.abs(states[:, 2]).max() <= 20.0 * 1.001
    rest = spline.state(spline.end + spline.tail + 5.0)
    np.testing.assert_allclose(rest[1:], 0.0, atol=1e-9)


def test_two_points_are_a_line():
    spline = make(np.array([[0.0], [0.1]]))
    assert spline.state(1.5 * DT)[0, 0] == pytest.approx(0.05)
    assert spline.state(0.5 * DT)[0, 0] == pytest.approx(-0.05)


def test_a_fade_begins_at_the_offset_and_ends_flat_at_zero():
    offset = np.array([[0.2, -0.1], [1.0, 0.5], [-3.0, 10.0]])
    duration = 0.3
    pieces = fade_coefficients(offset, duration, np.zeros((6, 2)))
    polynomials = [np.polynomial.Polynomial(column, domain=[0, duration], window=[0, 1]) for column in pieces.T]
    for joint, polynomial in enumerate(polynomials):
        for order in range(3):
            derivative = polynomial.deriv(order) if order else polynomial
            assert derivative(0.0) == pytest.approx(offset[order, joint], abs=1e-9)
            assert derivative(duration) == pytest.approx(0.0, abs=1e-9)


def test_a_stop_keeps_position_velocity_and_acceleration_and_ends_at_rest():
    start = [np.array([value]) for value in (0.4, 1.5, -4.0)]
    polynomial = np.polynomial.Polynomial(
        stop_coefficients(*start, 0.25, np.zeros((5, 1)))[:, 0], domain=[0, 0.25], window=[0, 1]
    )
    for order, value in enumerate(start):
        assert (polynomial.deriv(order) if order else polynomial)(0.0) == pytest.approx(value[0])
    assert polynomial.deriv()(0.25) == pytest.approx(0.0, abs=1e-12)
    assert polynomial.deriv(2)(0.25) == pytest.approx(0.0, abs=1e-9)
