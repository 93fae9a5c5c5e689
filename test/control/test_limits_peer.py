"""Our limiter beside Ruckig (MIT): stops as short as its time-optimal ones, and what is ours alone."""

import numpy as np
import pytest

from vla_edge.control.limits import Limiter
from vla_edge.control.stopping import plan_stop

pytestmark = pytest.mark.peers
PERIOD, LOWER, UPPER, TOP, MOST, JERK = 1e-3, -1.0, 1.0, 3.0, 30.0, 3000.0


@pytest.fixture(scope="module")
def ruckig():
    return pytest.importorskip("ruckig")


def own_path(reference):
    joints = reference.shape[1]
    limiter = Limiter(*(np.full(joints, value) for value in (LOWER, UPPER, TOP, MOST, JERK)), PERIOD, 0.02)
    limiter.restart(reference[0])
    path, before = [reference[0]], reference[0]
    for after in reference[1:]:
        limiter.step(before, after)
        path.append(limiter.position.copy())
        before = after
    return np.array(path)


def ruckig_path(ruckig, reference, with_velocity):
    """Each tick the newest reference as the target state, as one would follow a stream with it."""
    joints = reference.shape[1]
    otg, given, out = ruckig.Ruckig(joints, PERIOD), ruckig.InputParameter(joints), ruckig.OutputParameter(joints)
    given.synchronization = ruckig.Synchronization.No
    given.current_position = list(reference[0])
    given.max_velocity, given.max_acceleration, given.max_jerk = [TOP] * joints, [MOST] * joints, [JERK] * joints
    velocity = np.clip(np.gradient(reference, PERIOD, axis=0), -TOP, TOP) if with_velocity else np.zeros_like(reference)
    path = [reference[0]]
    for place, speed in zip(reference[1:], velocity[1:]):
        given.target_position, given.target_velocity = place.tolist(), speed.tolist()
        otg.update(given, out)
        out.pass_to_input(given)
        path.append(np.array(out.new_position))
    return np.array(path)


def test_stops_take_at_most_three_steps_longer_than_ruckigs_time_optimal_ones(ruckig):
    otg, given = ruckig.Ruckig(1), ruckig.InputParameter(1)
    given.control_interface = ruckig.ControlInterface.Velocity
    given.max_acceleration, given.max_jerk, given.target_velocity = [MOST], [JERK], [0.0]
    rng, longer = np.random.default_rng(0), []
    for _ in range(500):
        velocity, acceleration = rng.uniform(-TOP, TOP), rng.uniform(-MOST, MOST) * rng.choice([0.0, 0.3, 1.0])
        given.current_position, given.current_velocity, given.current_acceleration = [0.0], [velocity], [acceleration]
        trajectory = ruckig.Trajectory(1)
        otg.calculate(given, trajectory)
        # On the grid half of the last step's acceleration has yet to act in continuous time.
        step = (velocity + 0.5 * acceleration * PERIOD) * PERIOD
        ours = plan_stop(step, acceleration * PERIOD**2, MOST * PERIOD**2, JERK * PERIOD**3)
        longer.append(ours.ends[-1] - trajectory.duration / PERIOD)
    assert min(longer) > -1e-6  # time-optimal is the least there is
    assert max(longer) < 3.0


def test_a_smooth_reference_passes_ours_unchanged_and_lags_behind_in_ruckigs(ruckig):
    seconds = np.arange(2000)[:, None] * PERIOD
    reference = 0.5 * np.sin(2 * np.pi * seconds * np.linspace(0.3, 0.6, 5)) ** 3
    np.testing.assert_allclose(own_path(reference), reference, atol=1e-12)
    for with_velocity in (False, True):
        assert np.abs(ruckig_path(ruckig, reference, with_velocity) - reference).max() > 0.01


def test_a_reference_sent_to_the_limits_at_speed_stays_inside_ours_and_not_in_ruckigs(ruckig):
    seconds = np.arange(3000)[:, None] * PERIOD
    reference = np.clip(1.3 * np.sin(2 * np.pi * seconds * np.linspace(0.3, 0.6, 5)), LOWER, UPPER)
    ours, theirs = own_path(reference), ruckig_path(ruckig, reference, with_velocity=True)
    assert ours.min() >= LOWER and ours.max() <= UPPER
    assert theirs.max() > UPPER + 0.05 or theirs.min() < LOWER - 0.05
