from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import CAMERA_HZ, JOINTS, START_NS, picture, recording, truth

from vla_edge.compress.calibrate import collect, load_calibration
from vla_edge.evaluate.bag import Bag, BagError
from vla_edge.evaluate.bag_writer import BagWriter
from vla_edge.evaluate.contract import ContractError, TopicContract
from vla_edge.types import JointState


def observations(path, spec=None, rate_hz=None, contract=None):
    """Those of a bag as the policy of `spec` would have been shown them; all cameras and joints without one."""
    cameras = None if spec is None else tuple(camera.name for camera in spec.cameras)
    with Bag(path, contract) as bag:
        for frame in bag.frames(cameras, spec and spec.joint_names, rate_hz):
            yield frame.observation


def test_calibration_is_sampled_from_the_frames_of_a_bag(make_bag, spec):
    bag = make_bag()
    data = load_calibration(bag, spec)
    assert data.source == "bag" and data.identity == collect(observations(bag, spec)).identity


def test_a_policy_that_reads_other_joints_than_it_moves_is_shown_both(make_bag, spec):
    data = load_calibration(make_bag(), replace(spec, state_names=(JOINTS[1], "neck_joint")))
    assert {seen.joints.names for seen in data.observations} == {(*JOINTS, "neck_joint")}


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
@pytest.mark.parametrize("image_format", ["raw", "png"])
def test_a_written_bag_reads_back_as_the_same_observations(make_bag, spec, storage, image_format):
    bag = make_bag(storage=storage, image_format=image_format, compression="chunk" if storage == "mcap" else None)
    seen = list(observations(bag, spec))
    assert len(seen) == 6 * CAMERA_HZ
    for i, observation in enumerate(seen):
        assert observation.stamp_ns == START_NS + i * 50_000_000
        np.testing.assert_array_equal(observation.images["head"], picture(10 * i))
        assert observation.joints.names == JOINTS
        assert observation.joints.stamp_ns == observation.stamp_ns
        np.testing.assert_array_equal(observation.joints.position, truth(i / CAMERA_HZ))
        assert observation.instruction == "touch the red cube"


def test_a_single_file_reads_as_its_directory_does(make_bag, spec):
    bag = make_bag()
    stamps = [observation.stamp_ns for observation in observations(bag, spec)]
    assert stamps == [observation.stamp_ns for observation in observations(bag / "bag.mcap", spec)]


def test_the_rate_thins_frames_evenly_and_jitter_loses_none(make_bag, spec):
    assert [round((o.stamp_ns - START_NS) / 1e9, 3) for o in observations(make_bag(), spec, rate_hz=5)] == [
        round(0.2 * k, 3) for k in range(30)
    ]
    rng = np.random.default_rng(0)
    jitter = {k: int(rng.uniform(-8e6, 8e6)) for k in range(30)}
    items = [("instruction", START_NS, "go")]
    for k in range(30):
        at = START_NS + 20_000_000 + k * 200_000_000 + jitter[k]
        items += [("joints", JointState(at - 1_000_000, JOINTS, truth(0.2 * k))), ("image", at, "head", picture(k))]
    assert len(list(observations(make_bag("jitter", items), spec, rate_hz=5))) == 30


def test_the_instruction_is_latched_and_nothing_is_observed_before_the_first(make_bag, spec):
    items = recording(4.0, instructions=((1.0, "touch the red cube"), (2.5, "touch the blue ball")))
    with Bag(make_bag(items=items)) as bag:
        frames = list(bag.frames(("head",), JOINTS))
        assert bag.skipped == {"frame before the first instruction": CAMERA_HZ}
    asked = [(frame.observation.stamp_ns - START_NS, frame.observation.instruction) for frame in frames]
    assert all((text == "touch the blue ball") == (at >= 2_500_000_000) for at, text in asked)


@pytest.mark.parametrize("rate_hz", (None, 5.0))
def test_a_policy_of_several_observations_sees_those_that_were_made_that_long_before(make_bag, spec, rate_hz):
    several = replace(spec, observation_steps=3, dt=0.1)
    single = {each.stamp_ns: each for each in observations(make_bag(), spec)}
    with Bag(make_bag("again")) as bag:
        frames = list(bag.frames(("head",), spec.joint_names, rate_hz, lags=several.lags))
    assert len(frames) > 20
    for frame in frames[1:]:
        seen = frame.observation
        ages = [seen.stamp_ns - each.stamp_ns for each in seen.before]
        assert ages == [200_000_000, 100_000_000] or seen.stamp_ns < min(single) + 200_000_000
        for each in seen.before:
            alone = single[each.stamp_ns]
            np.testing.assert_array_equal(each.images["head"], alone.images["head"])
            np.testing.assert_array_equal(each.joints.position, alone.joints.position)
    first = frames[0].observation
    assert {each.stamp_ns for each in first.last(3)} == {first.stamp_ns}


def test_a_policy_without_language_needs_no_instruction_in_a_bag(make_bag, spec):
    path = make_bag(items=[item for item in recording() if item[0] != "instruction"])
    with pytest.raises(BagError, match="instruction"):
        list(observations(path, spec))
    with Bag(path) as bag:
        seen = [moment.read() for moment in bag.moments(replace(spec, tokenizer_max_length=0))]
    assert len(seen) == 120 and {each.instruction for each in seen} == {""}


def test_truth_is_interpolated_by_name_and_ends_with_the_instruction(make_bag):
    items = recording(4.0, instructions=((0.0, "touch the red cube"), (2.0, "touch the blue ball")))
    with Bag(make_bag(items=items)) as bag:
        frames = bag.frames(("head",), JOINTS, horizon_s=0.8)
        frame = next(frame for frame in frames if frame.observation.stamp_ns >= START_NS + 1.5e9)
    at = frame.observation.stamp_ns + np.array([2_500_000, 101_000_000, 499_000_000, 501_000_000])
    found = frame.measured.at(at, ("waist_yaw_joint", "left_elbow_joint", "nose_joint"))
    expected = truth((at - START_NS) / 1e9)
    np.testing.assert_allclose(found[:3, :2], expected[:3][:, [2, 0]], atol=5e-6)
    assert np.isnan(found[3]).all() and np.isnan(found[:, 2]).all()


def test_truth_ends_where_the_world_was_reset(make_bag):
    def jumping(t):
        return truth(t) + (1.0 if t >= 1.0 else 0.0)

    with Bag(make_bag(items=recording(2.0, positions=jumping))) as bag:
        frames = bag.frames(("head",), JOINTS, horizon_s=0.8)
        frame = next(frame for frame in frames if frame.observation.stamp_ns >= START_NS + 0.5e9)
    found = frame.measured.at(START_NS + np.array([900_000_000, 1_100_000_000]), JOINTS)
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


def test_missing_topics_are_named_beside_what_is_there(make_bag, spec):
    items = [item for item in recording(1.0) if item[0] == "joints"]
    with pytest.raises(BagError, match=r"lacks head/image or .*head/image/video, instruction; it has /joint_states"):
        list(observations(make_bag(items=items), spec))


def test_missing_joints_are_named(make_bag, spec):
    items = recording(1.0, joints=("left_elbow_joint", "right_elbow_joint", "torso_joint"))
    bag = make_bag(items=items)
    with pytest.raises(BagError, match="never reports waist_yaw_joint"):
        list(observations(bag, spec))
    contract = TopicContract(joints={"torso_joint": "waist_yaw_joint"})
    assert len(list(observations(bag, spec, contract=contract))) == CAMERA_HZ


def test_a_topic_of_another_type_is_refused(make_bag, spec):
    contract = TopicContract(joint_states="instruction", instruction="joint_states")
    with pytest.raises(BagError, match="std_msgs/msg/String on /instruction, expected sensor_msgs/msg/JointState"):
        list(observations(make_bag(), spec, contract=contract))


def test_a_namespace_is_found_and_an_ambiguous_one_is_not_guessed(tmp_path, spec):
    for robots in (("/g1",), ("/g1", "/h1")):
        path = tmp_path / f"bag{len(robots)}"
        contract = TopicContract(cameras={"head": "/g1/head/image"}, instruction="/g1/instruction")
        with BagWriter(path, contract) as writer:
            writer.instruction(START_NS, "go")
            for robot in robots:
                writer._contract = replace(contract, joint_states=f"{robot}/joint_states")
                writer.joints(JointState(START_NS, JOINTS, truth(0)))
            writer.image(START_NS, "head", picture(0))
        if len(robots) == 1:
            assert len(list(observations(path, spec))) == 1
        else:
            with pytest.raises(BagError, match="'joint_states' more than once"):
                list(observations(path, spec))


def test_frames_without_recent_joints_and_states_without_finite_positions_are_counted(make_bag):
    items = [
        item
        if item[0] != "joints"
        else ("joints", JointState(item[1].stamp_ns, item[1].names, np.full(4, np.nan)))
        if 1.0e9 <= item[1].stamp_ns - START_NS < 1.5e9
        else item
        for item in recording(2.0)
    ]
    with Bag(make_bag(items=items)) as bag:
        frames = list(bag.frames(("head",), JOINTS))
        assert bag.skipped["joint state without finite positions"] == 100
        # the last good state is 5 ms before 1.0 s, and counts for 0.1 s
        assert bag.skipped["frame without a joint state of the 0.1 s before it"] == 8
    assert len(frames) == 40 - 8
    assert all(np.isfinite(frame.observation.joints.position).all() for frame in frames)


def test_stamps_that_repeat_or_fall_back_are_left_out_and_counted(make_bag):
    items = recording(1.0)
    again = [item for item in items if item[0] == "image"][3]
    with Bag(make_bag(items=items + [again])) as bag:
        assert len(list(bag.frames(("head",), JOINTS))) == CAMERA_HZ
        assert bag.skipped == {"frame with a stamp not newer than the last": 1}


def test_a_second_camera_gives_its_newest_frame_not_newer_than_the_first(tmp_path):
    path = tmp_path / "two"
    with BagWriter(path) as writer:
        writer.instruction(START_NS, "go")
        for k in range(20):
            at = START_NS + k * 50_000_000
            writer.joints(JointState(at, JOINTS, truth(0)))
            writer.image(at, "head", picture(k))
            # the same moment, but logged after it; from frame 10 on 20 ms late, then silent for the last five
            if k < 15:
                writer.image(at + (20_000_000 if k >= 10 else 0), "wrist", picture(100 + k))
    with Bag(path) as bag:
        frames = list(bag.frames(("head", "wrist"), JOINTS))
        shown = [(f.observation.images["head"][0, 0, 0], f.observation.images["wrist"][0, 0, 0]) for f in frames]
        assert bag.skipped == {"frame without one of camera wrist near it": 3}
    assert shown == [(k, 100 + k) for k in range(10)] + [(k, 99 + k) for k in range(10, 16)] + [(16, 114)]


def test_a_clock_set_back_starts_over(make_bag):
    late = recording(2.0)
    shifted = []
    for item in recording(2.0):
        if item[0] == "joints":
            shifted.append(("joints", JointState(item[1].stamp_ns - 10**12, item[1].names, item[1].position)))
        else:
            shifted.append((item[0], item[1] - 10**12, *item[2:]))
    path = make_bag(items=[])
    with pytest.raises(BagError, match="lacks"):
        list(observations(path))
    path = path.parent / "late_then_early"
    with BagWriter(path) as writer:
        log_ns = START_NS
        write = writer._writer.write
        # a recorder's log time goes on while the stamps of the robot's clock fall back
        writer._writer.write = lambda connection, _, data: write(connection, log_ns, data)
        for item in late + shifted:
            log_ns += 1_000_000
            {"image": writer.image, "joints": writer.joints, "instruction": writer.instruction}[item[0]](*item[1:])
    with Bag(path) as bag:
        assert len(list(bag.frames(("head",), JOINTS))) == 2 * 2 * CAMERA_HZ
        assert bag.skipped == {"joint state after the clock was set back": 1}


@pytest.mark.parametrize("compression", [None, "chunk", "message", "file"])
def test_a_cut_recording_is_used_up_to_the_cut_or_refused_with_one_error(make_bag, spec, compression):
    whole = make_bag(items=recording(12.0), compression=compression)
    (file,) = whole.glob("bag.mcap*")
    data = file.read_bytes()
    expected = {o.stamp_ns: o for o in observations(whole, spec)}
    rng = np.random.default_rng(0)
    warned = refused = 0
    for size in (1, 60, 300, len(data) - 1, *rng.integers(1, len(data), 12)):
        cut = whole.parent / f"cut{file.name.removeprefix('bag')}"
        cut.write_bytes(data[:size])
        try:
            with Bag(cut) as bag:
                frames = list(bag.frames(("head",), spec.joint_names))
                assert bag.storage.warnings
                # what follows the last message is the index
                assert len(frames) < len(expected) or size > 0.85 * len(data)
                warned += 1
        except BagError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        for frame in frames:
            same = expected[frame.observation.stamp_ns]
            np.testing.assert_array_equal(frame.observation.images["head"], same.images["head"])
            np.testing.assert_array_equal(frame.observation.joints.position, same.joints.position)
    assert warned >= 10 and refused >= 2


def test_damage_inside_an_indexed_bag_ends_it_with_a_warning(make_bag, spec):
    path = make_bag(items=recording(20.0), compression="chunk") / "bag.mcap"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    path.write_bytes(data)
    with Bag(path) as bag:
        frames = list(bag.frames(("head",), spec.joint_names))
        assert 0 < len(frames) < 20 * CAMERA_HZ
        assert "damaged" in bag.storage.warnings[0]


def test_a_recorder_that_died_leaves_a_readable_directory(make_bag, spec):
    path = make_bag(items=recording(20.0))
    (path / "metadata.yaml").unlink()
    assert len(list(observations(path, spec))) == 20 * CAMERA_HZ


@pytest.mark.parametrize("content", [b"", b"not a bag", bytes(5000)])
@pytest.mark.parametrize("suffix", [".mcap", ".db3", ".bag"])
def test_files_that_are_no_bags_give_one_clear_error(tmp_path, content, suffix):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with pytest.raises(BagError, match="cannot be read"):
        Bag(path)


def test_no_bag_and_a_directory_without_one_are_named(tmp_path):
    with pytest.raises(BagError, match="there is no bag"):
        Bag(tmp_path / "nothing")
    with pytest.raises(BagError, match="cannot be read: it holds no metadata.yaml"):
        Bag(tmp_path)


def test_images_in_other_layouts_are_the_same_pixels_and_unknown_ones_are_counted(tmp_path):
    path = tmp_path / "layouts"
    rgb = picture(7)
    padded = np.zeros((48, 64 * 4 + 12), np.uint8)
    padded[:, : 64 * 4] = np.concatenate([rgb[..., ::-1], np.full((48, 64, 1), 255, np.uint8)], axis=2).reshape(48, -1)
    with BagWriter(path) as writer:
        writer.instruction(START_NS, "go")
        kind = "sensor_msgs/msg/Image"
        good = [("rgb8", 192, rgb), ("bgr8", 192, rgb[..., ::-1]), ("bgra8", 268, padded)]
        bad = [("32FC1", 256, padded), ("rgb8", 192, rgb[:9])]
        for k, (encoding, step, data) in enumerate(good + bad):
            at = START_NS + k * 1_000_000
            writer.joints(JointState(at, JOINTS, truth(0)))
            flat = np.ascontiguousarray(data).reshape(-1)
            image = writer._types.types[kind](writer._header(at, ""), 48, 64, encoding, 0, step, flat)
            writer.message("/head/image", kind, at, image)
    with Bag(path) as bag:
        frames = list(bag.frames(("head",)))
        assert len(frames) == 3
        assert all((frame.observation.images["head"] == rgb).all() for frame in frames)
        assert sorted(bag.skipped.values()) == [1, 1]
        assert any("32FC1" in reason for reason in bag.skipped)


def test_an_existing_bag_is_never_overwritten(make_bag):
    make_bag()
    with pytest.raises(BagError, match="is there already"):
        make_bag()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("camera: {head: /cam}", "unknown key 'camera'; did you mean 'cameras'"),
        ("cameras: /cam", "must be a mapping"),
        ("joint_states: 3", "must be a topic name"),
        ("- a", "must map parts to topics"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_contract_is_named(tmp_path, text, message):
    (tmp_path / "contract.yaml").write_text(text)
    with pytest.raises(ContractError, match=message):
        TopicContract.load(tmp_path / "contract.yaml")


def test_a_contract_maps_topics(tmp_path, make_bag, spec):
    (tmp_path / "contract.yaml").write_text("cameras: {head: /zed/left/rgb}\njoint_states: /body/state\n")
    contract = TopicContract.load(tmp_path / "contract.yaml")
    bag = make_bag("mapped", contract=contract)
    assert len(list(observations(bag, spec, contract=contract))) == 6 * CAMERA_HZ
