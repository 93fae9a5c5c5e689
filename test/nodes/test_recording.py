"""What was recorded is a rosbag2 directory that others read."""

from __future__ import annotations

import numpy as np
import pytest
from rclpy.serialization import serialize_message
from rosbags.highlevel import AnyReader

from vla_edge.nodes import convert
from vla_edge.nodes.recording import Recording, RecordingError, is_bag
from vla_edge.types import JointState as State

TYPE = "sensor_msgs/msg/JointState"


def test_recorded_messages_are_read_back_by_an_independent_reader(tmp_path):
    recording = Recording(tmp_path / "bag")
    for i in range(100):
        state = State(1000 + i, ("a", "b"), [i, -i])
        recording.write("/joint_states", TYPE, 5000 + i, serialize_message(convert.to_joint_state(state)))
    recording.close()
    assert recording.written["/joint_states"] == 100
    with AnyReader([tmp_path / "bag"]) as reader:
        messages = [(at, reader.deserialize(raw, c.msgtype)) for c, at, raw in reader.messages()]
    assert [at for at, _ in messages] == list(range(5000, 5100))
    np.testing.assert_array_equal(messages[7][1].position, [7, -7])
    assert messages[7][1].header.stamp.nanosec == 1007


def test_pictures_are_made_small_in_the_writing_thread(tmp_path):
    recording = Recording(tmp_path / "bag")
    image = recording.compressed_image(42, "head", "jpeg", np.arange(9, dtype=np.uint8))
    kind = "sensor_msgs/msg/CompressedImage"
    recording.write("/head/image/compressed", kind, 1, lambda: recording.serialize(image, kind))
    recording.write("/head/image/compressed", kind, 2, lambda: None)
    recording.close()
    with AnyReader([tmp_path / "bag"]) as reader:
        ((connection, _, raw),) = list(reader.messages())
        message = reader.deserialize(raw, connection.msgtype)
    assert message.format == "jpeg" and bytes(message.data) == bytes(range(9))


def test_only_a_bag_is_ever_overwritten(tmp_path):
    Recording(tmp_path / "bag").close()
    with pytest.raises(RecordingError, match="exists"):
        Recording(tmp_path / "bag")
    Recording(tmp_path / "bag", overwrite=True).close()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(RecordingError):
        Recording(precious, overwrite=True)
    assert (precious / "thesis.txt").exists() and not is_bag(precious)


def test_a_type_without_a_definition_is_known_to_be_unknown(tmp_path):
    recording = Recording(tmp_path / "bag")
    assert recording.knows(TYPE) and not recording.knows("my_robot_msgs/msg/Mood")
    recording.close()
