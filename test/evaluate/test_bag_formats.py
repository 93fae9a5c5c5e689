"""The same recording in every container and compression gives the same observations; odd ones are named or repaired."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import yaml
from conftest import CAMERA_HZ, JOINTS, START_NS, picture, recording, truth

from benchmarks.cut_bags import KINDS, cut_at, try_cut, write_whole
from vla_edge.evaluate.bag import JOINT_STATE, Bag, BagError
from vla_edge.evaluate.bag_writer import BagWriter, write_bag
from vla_edge.evaluate.replay import evaluate_bag
from vla_edge.types import JointState

SECONDS = 3.0
INFORMATION = "rosbag2_bagfile_information"


def frames(path, contract=None):
    with Bag(path, contract) as bag:
        found = list(bag.frames(("head",), JOINTS, horizon_s=0.5))
        return found, dict(bag.skipped), bag.warnings


def assert_as_recorded(found, count=round(SECONDS * CAMERA_HZ)):
    assert len(found) == count
    for i, frame in enumerate(found):
        seen = frame.observation
        assert seen.stamp_ns == START_NS + i * 50_000_000 and seen.instruction == "touch the red cube"
        np.testing.assert_array_equal(seen.images["head"], picture(10 * i))
        np.testing.assert_array_equal(seen.joints.position, truth(i / CAMERA_HZ))
        np.testing.assert_array_equal(frame.measured.positions[0], truth(i / CAMERA_HZ))


@pytest.mark.parametrize(
    ("storage", "compression"),
    [("mcap", None), ("mcap", "chunk"), ("mcap", "message"), ("mcap", "file"),
     ("sqlite3", None), ("sqlite3", "message"), ("sqlite3", "file")],
)  # fmt: skip
def test_every_container_and_compression(make_bag, oracle, storage, compression):
    bag = make_bag(items=recording(SECONDS), storage=storage, compression=compression)
    found, skipped, warnings = frames(bag)
    assert_as_recorded(found)
    assert not skipped and not warnings
    whole = evaluate_bag(bag, oracle())
    assert whole.frames == 15 and whole.action_mae_rad < 1e-6 and not whole.warnings


@pytest.mark.parametrize("version", [4, 5, 6, 7, 8])
def test_metadata_of_every_distribution_since_humble(make_bag, version):
    """rosbag2's own version history: 5 is Humble's, 8 Iron's and Jazzy's; what each did not know yet is taken out."""
    path = make_bag(items=recording(SECONDS), storage="sqlite3")
    content = yaml.safe_load((path / "metadata.yaml").read_text())
    about = content[INFORMATION]
    about["version"] = version
    if version < 8:
        about.pop("ros_distro")
        for topic in about["topics_with_message_count"]:
            topic["topic_metadata"]["offered_qos_profiles"] = ""
    if version < 7:
        for topic in about["topics_with_message_count"]:
            topic["topic_metadata"].pop("type_description_hash")
    if version < 6:
        about.pop("custom_data")
    if version < 5:
        about.pop("files")
    (path / "metadata.yaml").write_text(yaml.safe_dump(content))
    assert_as_recorded(frames(path)[0])


def test_kilted_writes_version_9(make_bag, monkeypatch):
    monkeypatch.setattr("vla_edge.evaluate.bag_writer.METADATA_VERSION", 9)
    path = make_bag(items=recording(SECONDS))
    assert yaml.safe_load((path / "metadata.yaml").read_text())[INFORMATION]["version"] == 9
    assert_as_recorded(frames(path)[0])


@pytest.fixture
def split(make_bag, tmp_path):
    """split(storage) -> a bag in two files, as --max-bag-duration leaves them."""

    def make(storage):
        items = recording(SECONDS)
        half = len(items) // 2
        one, two = (make_bag(f"part{i}", part, storage=storage) for i, part in enumerate((items[:half], items[half:])))
        about, more = (yaml.safe_load((path / "metadata.yaml").read_text())[INFORMATION] for path in (one, two))
        about["relative_file_paths"] += more["relative_file_paths"]
        about["files"] += more["files"]
        about["message_count"] += more["message_count"]
        end = more["starting_time"]["nanoseconds_since_epoch"] + more["duration"]["nanoseconds"]
        about["duration"]["nanoseconds"] = end - about["starting_time"]["nanoseconds_since_epoch"]
        counts = {t["topic_metadata"]["name"]: t["message_count"] for t in more["topics_with_message_count"]}
        for topic in about["topics_with_message_count"]:
            topic["message_count"] += counts.get(topic["topic_metadata"]["name"], 0)
        (one / "metadata.yaml").write_text(yaml.safe_dump({INFORMATION: about}))
        for file in more["relative_file_paths"]:
            shutil.move(two / file, one / file)
        return one

    return make


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_split_bag_reads_as_a_whole_one(split, storage):
    found, _, warnings = frames(split(storage))
    assert_as_recorded(found)
    assert not warnings


def test_of_a_split_bag_with_a_lost_part_the_rest_is_used(split):
    path = split("mcap")
    (path / "part1.mcap").unlink()
    found, _, warnings = frames(path)
    assert_as_recorded(found, 30)
    assert "Some database files are missing" in warnings[0]


def test_without_index_or_metadata_a_bag_is_scanned(make_bag):
    path = make_bag(items=recording(SECONDS), compression="chunk")
    (path / "metadata.yaml").unlink()
    found, _, warnings = frames(path)
    assert_as_recorded(found)
    assert "no usable index" in warnings[0]


def write_ros1(path, items):
    """The same recording as a ROS 1 bag."""
    from rosbags.rosbag1 import Writer
    from rosbags.typesys import Stores, get_typestore

    types = get_typestore(Stores.ROS1_NOETIC)
    time, header = types.types["builtin_interfaces/msg/Time"], types.types["std_msgs/msg/Header"]
    with Writer(path) as writer:
        connections = {}

        def write(topic, msgtype, log_ns, **values):
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, msgtype, typestore=types)
            # 0x100 and above: a sequence number may look like the head of a CDR message
            if msgtype != "std_msgs/msg/String":
                values["header"] = header(0x100 + log_ns % 7, time(log_ns // 10**9, log_ns % 10**9), "robot")
            data = types.serialize_ros1(types.types[msgtype](**values), msgtype)
            writer.write(connections[topic], log_ns, data)

        for kind, *rest in items:
            if kind == "instruction":
                write("/instruction", "std_msgs/msg/String", rest[0], data=rest[1])
            elif kind == "joints":
                (state,) = rest
                values = {name: getattr(state, name).copy() for name in ("position", "velocity", "effort")}
                write("/joint_states", JOINT_STATE, state.stamp_ns, name=list(state.names), **values)
            else:
                stamp, camera, pixels = rest
                write(
                    f"/{camera}/image", "sensor_msgs/msg/Image", stamp, height=48, width=64, encoding="rgb8",
                    is_bigendian=0, step=192, data=pixels.reshape(-1),
                )  # fmt: skip
    return path


def test_a_ros_1_bag_reads_through_the_same_reader(tmp_path, oracle, make_bag):
    path = write_ros1(tmp_path / "old.bag", recording(SECONDS))
    found, skipped, _ = frames(path)
    assert_as_recorded(found)
    assert not skipped
    new = evaluate_bag(make_bag(items=recording(SECONDS)), oracle())
    assert evaluate_bag(path, oracle()).action == new.action


@pytest.mark.parametrize(
    ("change", "says"),
    [(("string[] name", "string[] names"), "defines sensor_msgs/msg/JointState as header, names"),
     (("std_msgs/Header header\n", ""), "lacks or moves one of header")],
)  # fmt: skip
def test_a_changed_message_definition_is_named(tmp_path, change, says):
    path = redefined(tmp_path / "bag", lambda text: text.replace(*change, 1))
    with pytest.raises(BagError, match=says):
        frames(path)


def test_a_definition_with_further_fields_is_read_by_its_own_definition(tmp_path):
    path = redefined(
        tmp_path / "bag", lambda text: text.replace("string[] name", "float64[] temperature\nstring[] name", 1)
    )
    assert_as_recorded(frames(path)[0], 20)


def redefined(path, change):
    """A second of recording whose JointState is defined by another text; the values fit that."""
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    base = get_typestore(Stores.ROS2_JAZZY)
    text, _ = base.generate_msgdef(JOINT_STATE, ros_version=2)
    own = get_typestore(Stores.EMPTY)
    own.register(get_types_from_msg(change(text), JOINT_STATE))
    with BagWriter(path) as writer:
        joints = None
        for kind, *rest in recording(1.0):
            if kind != "joints":
                {"instruction": writer.instruction, "image": writer.image}[kind](*rest)
                continue
            (state,) = rest
            joints = joints or writer._writer.add_connection("/joint_states", JOINT_STATE, typestore=own)
            known = {
                "header": writer._header(state.stamp_ns, ""), "name": list(state.names), "names": list(state.names),
                "temperature": np.linspace(20, 30, 4), "position": state.position, "velocity": state.velocity,
                "effort": state.effort,
            }  # fmt: skip
            cls = own.types[JOINT_STATE]
            message = cls(**{name: known[name] for name, _ in own.fielddefs[JOINT_STATE][1]})
            writer._writer.write(joints, state.stamp_ns, own.serialize_cdr(message, JOINT_STATE))
    return path


def test_joints_that_change_their_order_or_go_missing_are_matched_by_name_and_counted(make_bag):
    items = []
    for item in recording(SECONDS):
        if item[0] == "joints":
            state, at = item[1], item[1].stamp_ns - START_NS
            if at >= 2_000_000_000:
                item = ("joints", JointState(state.stamp_ns, state.names[:2], state.position[:2]))
            elif at >= 1_000_000_000:
                order = [2, 0, 3, 1]
                item = ("joints", JointState(state.stamp_ns, [state.names[i] for i in order], state.position[order]))
        items.append(item)
    found, skipped, _ = frames(make_bag(items=items))
    assert_as_recorded(found[:40], 40)
    # the last whole state is 5 ms before 2 s, and counts for 0.1 s
    assert len(found) == 42
    assert skipped == {"joint state without all joints": 200, "frame without a joint state of the 0.1 s before it": 18}


def test_images_that_change_their_size_are_refused_one_by_one(make_bag, oracle):
    from vla_edge.policy.preprocess import Preprocessor

    items = [
        (*item[:3], picture(0)[:24]) if item[0] == "image" and item[1] >= START_NS + 2_000_000_000 else item
        for item in recording(SECONDS)
    ]
    policy = oracle()
    infer, look = policy.infer, Preprocessor(policy.spec, None).image

    def strict(observation, seed=0, noise=None):
        look(observation, policy.spec.cameras[0])
        return infer(observation, seed, noise)

    policy.infer = strict
    found = evaluate_bag(make_bag(items=items), policy)
    assert found.frames == 10
    ((reason, count),) = found.skipped.items()
    assert count == 5 and "gave uint8 of shape (24, 64, 3)" in reason


def test_an_empty_bag_is_one_sentence(tmp_path, spec):
    path = write_bag(tmp_path / "empty", [])
    with pytest.raises(BagError, match="lacks head/image .* it has no messages at all"):
        frames(path)
    (path / "metadata.yaml").write_text("nothing: here")
    with pytest.raises(BagError, match="cannot be read"):
        frames(path)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_bag_cut_anywhere_is_evaluated_up_to_there_or_refused(tmp_path, kind):
    """Few of the thousand cuts of `make bench-replay`."""
    whole = write_whole(tmp_path, *kind, seconds=1.0)
    size = max(path.stat().st_size for path in whole.iterdir())
    found = [try_cut(cut_at(whole, round(size * share), tmp_path)) for share in (0.001, 0.4, 0.7, 0.99)]
    assert "wrong" not in {cut.outcome for cut in found}, found
    assert found[0].outcome == "refused"
    # what is compressed as a whole needs a whole block to begin with
    if kind in (("mcap", None), ("mcap", "message")):
        assert found[2].outcome == "used"
