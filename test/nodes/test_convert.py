"""Messages say what the nouns say, and come back the same."""

from __future__ import annotations

import struct
import time

import numpy as np
import pytest
from rclpy.serialization import deserialize_message, serialize_message
from rosbags.typesys import Stores, get_typestore
from sensor_msgs.msg import CompressedImage, Image, JointState
from trajectory_msgs.msg import JointTrajectory

from vla_edge.control.modes import Mode
from vla_edge.nodes import convert
from vla_edge.nodes.sinks import SINKS, SinkSetup
from vla_edge.nodes.wire import JointStates, WireError, read_image
from vla_edge.observe.image import decode_image
from vla_edge.robots.robot import Joint, Robot
from vla_edge.types import ActionChunk, JointCommand
from vla_edge.types import JointState as State

NAMES = ("a", "b", "c")
STAMP = 1_234_567_890_123_456_789


def over_the_wire(message):
    return deserialize_message(serialize_message(message), type(message))


def chunk(seed: int = 0) -> ActionChunk:
    return ActionChunk(STAMP + seed, NAMES, np.random.default_rng(seed).normal(size=(5, 3)), 0.05)


def test_a_chunk_goes_over_the_wire_unchanged():
    message = over_the_wire(convert.to_trajectory(chunk()))
    assert [p.time_from_start.nanosec for p in message.points] == [50_000_000 * i for i in range(1, 6)]
    back = convert.to_chunk(message)
    assert (back.stamp_ns, back.joint_names, back.dt) == (STAMP, NAMES, 0.05)
    np.testing.assert_array_equal(back.positions, chunk().positions)


@pytest.mark.parametrize("names", (("a",), NAMES, ("a_joint_with_a_long_name", "b")))
def test_a_chunk_written_into_place_is_the_same_and_has_no_byte_too_many(names):
    write = convert.ChunkWriter(names, 5, 0.05)
    for seed in range(3):
        positions = np.random.default_rng(seed).normal(size=(5, len(names)))
        fresh = ActionChunk(STAMP + seed, names, positions, 0.05)
        data = write(fresh)
        assert deserialize_message(data, JointTrajectory) == convert.to_trajectory(fresh)
        # rosbags takes no byte too many, rclpy's serialize_message leaves some behind.
        strict = get_typestore(Stores.ROS2_JAZZY).deserialize_cdr(data, "trajectory_msgs/msg/JointTrajectory")
        np.testing.assert_array_equal([point.positions for point in strict.points], positions)


@pytest.mark.parametrize("damage", ("points", "length", "time", "names"))
def test_a_trajectory_that_is_no_chunk_is_refused(damage):
    message = convert.to_trajectory(chunk())
    if damage == "points":
        message.points = []
    elif damage == "length":
        message.points[2].positions = message.points[2].positions[:2]
    elif damage == "time":
        message.points[3].time_from_start.nanosec += 10_000_000
    else:
        message.joint_names = [*NAMES, "d"]
    with pytest.raises(convert.ChunkMessageError):
        convert.to_chunk(message)


def test_pixels_go_over_the_wire_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    message = over_the_wire(convert.to_image(STAMP, "head", pixels))
    assert isinstance(message, Image) and convert.stamp_of(message) == STAMP and message.step == 1920
    np.testing.assert_array_equal(convert.image_decoder(message)(), pixels)


def test_a_compressed_picture_looks_the_same():
    gradient = np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8)
    pixels = np.repeat(gradient[:, :, None], 3, axis=2)
    message = over_the_wire(convert.to_jpeg(STAMP, "head", pixels, 95))
    assert isinstance(message, CompressedImage)
    data = serialize_message(message)
    decoded = convert.decoder(read_image(data, compressed=True), data, (48, 64))()
    assert np.abs(decoded.astype(int) - pixels).mean() < 3


@pytest.mark.parametrize("frame_id", ("", "a", "head", "a_long_frame_id"))
@pytest.mark.parametrize("encoding", ("rgb8", "mono8", "yuv422_yuy2"))
def test_an_image_read_in_place_is_the_message(frame_id, encoding):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    message = convert.to_image(STAMP, frame_id, pixels)
    message.encoding, message.step = encoding, 30
    image = read_image(serialize_message(message))
    assert (image.stamp_ns, image.encoding) == (STAMP, encoding)
    assert (image.height, image.width, image.step) == (6, 10, 30)
    assert bytes(image.data) == pixels.tobytes()


def test_bytes_that_are_no_image_are_refused_wherever_they_end():
    whole = serialize_message(convert.to_image(STAMP, "head", np.zeros((4, 4, 3), np.uint8)))
    for end in range(len(whole)):
        with pytest.raises(WireError):
            read_image(whole[:end])
    with pytest.raises(WireError):
        read_image(b"\x07" + whole[1:])


@pytest.mark.parametrize("frame_id", ("", "a", "pelvis"))
@pytest.mark.parametrize(
    ("velocity", "effort"), [([0.1, 0.2], [3.0, 4.0]), ([], []), ([], [3.0, 4.0]), ([0.1, 0.2], [])]
)
def test_a_joint_state_read_in_place_is_the_message(frame_id, velocity, effort):
    read = JointStates()
    for names, positions in ((["a", "left_elbow"], [1.5, -2.5]), (["a", "left_elbow"], [7.0, 8.0]), (["b", "c"], [0.0, 1.0])):
        message = JointState(name=names, position=positions, velocity=velocity, effort=effort)
        message.header.stamp, message.header.frame_id = convert.to_time(STAMP), frame_id
        stamp_ns, *found = read(serialize_message(message))
        assert stamp_ns == STAMP
        assert [list(values) for values in found] == [names, positions, velocity, effort]
    again = read(serialize_message(message))
    assert again[1] is read(serialize_message(message))[1]  # so that nobody has to compare them


def test_bytes_that_are_no_joint_state_are_refused_wherever_they_end():
    message = JointState(name=["a", "bb"], position=[1.0, 2.0], velocity=[3.0, 4.0], effort=[5.0, 6.0])
    whole, read = serialize_message(message), JointStates()
    read(whole)
    for reader in (read, JointStates()):
        for end in range(len(whole) - 8):
            with pytest.raises(WireError):
                reader(whole[:end])
    announced = whole[:4] + struct.pack("<iI", 0, 0) + struct.pack("<I", 1) + b"\0" * 4 + struct.pack("<I", 2**31)
    with pytest.raises(WireError):
        JointStates()(announced)


def test_joint_states_and_commands_keep_every_value():
    state = State(STAMP, NAMES, [1.0, 2.0, 3.0], [0.1, 0.2, 0.3], [4.0, 5.0, 6.0])
    message = over_the_wire(convert.to_joint_state(state))
    command = convert.to_command(message)
    assert command.stamp_ns == STAMP and command.names == NAMES
    for name in ("position", "velocity", "effort"):
        np.testing.assert_array_equal(getattr(command, name), getattr(state, name))


def test_a_command_of_unequal_lengths_is_refused():
    with pytest.raises(ValueError, match="3 names"):
        convert.to_command(JointState(name=list(NAMES), position=[1.0]))


def test_arrival_is_on_the_steady_clock_whatever_the_wall_clock_does():
    now_ns = time.monotonic_ns()
    assert abs(convert.arrival_of({"received_timestamp": time.time_ns() - 5_000_000}) - (now_ns - 5_000_000)) < 5e6
    for odd in (0, time.time_ns() + 10**12, time.time_ns() - 10**12):
        assert abs(convert.arrival_of({"received_timestamp": odd}) - time.monotonic_ns()) < 5e6


@pytest.mark.parametrize("sink", [name for name in SINKS if not name.startswith("unitree")])
def test_every_sink_tells_the_newest_command(sink):
    robot = Robot("r", tuple(Joint(name, -9.0, 9.0, 1.0, 1.0) for name in NAMES))
    fill = SINKS[sink](SinkSetup(robot, 0.002))
    for seed in range(3):
        values = np.random.default_rng(seed).normal(size=(3, 3))
        message = over_the_wire(fill(JointCommand(STAMP + seed, NAMES, *values), Mode.FOLLOW))
        assert isinstance(message, SINKS[sink].message_type())
        if sink == "joint_state":
            assert convert.stamp_of(message) == STAMP + seed and tuple(message.name) == NAMES
            np.testing.assert_array_equal([message.position, message.velocity, message.effort], values)
        elif sink == "float64_multi_array":
            np.testing.assert_array_equal(message.data, values[0])
        else:
            assert isinstance(message, JointTrajectory) and tuple(message.joint_names) == NAMES
            np.testing.assert_array_equal(message.points[0].positions, values[0])
            np.testing.assert_array_equal(message.points[0].velocities, values[1])
            assert message.points[0].time_from_start.nanosec == 2_000_000


@pytest.mark.skipif(convert._cv_bridge() is None, reason="this distribution has no cv_bridge")
def test_cv_bridge_gives_the_pixels_that_are_read_without_it():
    for encoding, channels in (("rgb8", 3), ("bgr8", 3), ("rgba8", 4), ("bgra8", 4), ("mono8", 1), ("yuv422", 2)):
        pixels = np.random.default_rng(0).integers(0, 256, 6 * 10 * channels, dtype=np.uint8).tobytes()
        message = Image(height=6, width=10, encoding=encoding, step=10 * channels, data=pixels)
        expected = decode_image(encoding, 6, 10, 10 * channels, pixels)
        np.testing.assert_array_equal(convert.image_decoder(message)(), expected, err_msg=encoding)
