"""Video in bags: every frame that is used comes with its own stamp and pixels, whatever the encoder held back."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from conftest import JOINTS, START_NS, truth

from vla_edge.evaluate.bag import Bag
from vla_edge.evaluate.bag_writer import BagWriter
from vla_edge.evaluate.contract import TopicContract
from vla_edge.evaluate.video_stream import COMPRESSED_VIDEO, FFMPEG_PACKET, VideoStream, decoder_name, pixels
from vla_edge.observe.image import ImageEncodingError
from vla_edge.types import JointState

av = pytest.importorskip("av")

DEFINITIONS = {
    COMPRESSED_VIDEO: "builtin_interfaces/Time timestamp\nstring frame_id\nuint8[] data\nstring format\n",
    FFMPEG_PACKET: "std_msgs/Header header\nint32 width\nint32 height\nstring encoding\nuint64 pts\nuint8 flags\n"
    "bool is_bigendian\nuint8[] data\n",
}
FRAMES, STEP_NS = 60, 50_000_000
ENDING = {COMPRESSED_VIDEO: "video", FFMPEG_PACKET: "ffmpeg"}


def shade(number: int) -> int:
    return 20 + 3 * number


def packets(codec: str = "libx264", **options) -> list[tuple[int, bytes]]:
    """(stamp, packet) of a video whose n-th frame has one shade, in the order an encoder gives them."""
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt = 64, 48, "yuv420p"
    encoder.time_base, encoder.framerate, encoder.gop_size = Fraction(1, 20), Fraction(20), 10
    encoder.options = {"preset": "ultrafast", "crf": "10", **options}
    found = []
    for number in (*range(FRAMES), None):
        frame = None
        if number is not None:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade(number), np.uint8), format="rgb24")
            frame.pts = number
        found += [(START_NS + packet.pts * STEP_NS, bytes(packet)) for packet in encoder.encode(frame)]
    return found


def write(path, msgtype: str, sent, told: str = "h264", topic: str | None = None, storage: str = "mcap"):
    from rosbags.typesys import get_types_from_msg

    with BagWriter(path, storage=storage) as writer:
        writer._types.register(get_types_from_msg(DEFINITIONS[msgtype], msgtype))
        kind, time = writer._types.types[msgtype], writer._types.types["builtin_interfaces/msg/Time"]
        writer.instruction(START_NS, "touch the red cube")
        video = topic or f"head/image/{ENDING[msgtype]}"
        begin = min(stamp for stamp, _ in sent)
        for number, (stamp, data) in enumerate(sent):
            now = begin + number * STEP_NS  # a packet is logged when it comes, whichever frame it is of
            writer.joints(JointState(now, JOINTS, np.array(truth(number * STEP_NS / 1e9))))
            content = np.frombuffer(data, np.uint8)
            if msgtype == COMPRESSED_VIDEO:
                message = kind(time(stamp // 10**9, stamp % 10**9), "head", content, told)
            else:
                message = kind(writer._header(stamp, "head"), 64, 48, told, number, 0, False, content)
            writer.message(video, msgtype, now, message)
    return path


def shown(path, rate_hz=None, contract=None):
    with Bag(path, contract) as bag:
        assert bag.cameras() == ("head",)
        found = [frame.observation for frame in bag.frames(rate_hz=rate_hz)]
        return found, bag.skipped


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
@pytest.mark.parametrize("msgtype", [COMPRESSED_VIDEO, FFMPEG_PACKET])
def test_every_packet_is_a_frame_with_its_stamp(tmp_path, msgtype, storage):
    sent = packets(tune="zerolatency")
    told = "h264" if msgtype == COMPRESSED_VIDEO else "libx264;yuv420p;rgb8"
    found, skipped = shown(write(tmp_path / "bag", msgtype, sent, told, storage=storage))
    assert [o.stamp_ns for o in found] == [START_NS + n * STEP_NS for n in range(FRAMES)] and not skipped
    for number, observation in enumerate(found):
        assert observation.images["head"].shape == (48, 64, 3)
        assert np.abs(observation.images["head"].astype(int) - shade(number)).max() <= 3


def test_frames_that_come_out_of_order_find_their_stamps(tmp_path):
    sent = packets(bf="3", preset="veryfast")
    assert [stamp for stamp, _ in sent] != sorted(stamp for stamp, _ in sent), "the encoder used no frames of both sides"
    found, skipped = shown(write(tmp_path / "bag", COMPRESSED_VIDEO, sent))
    assert [o.stamp_ns for o in found] == [START_NS + n * STEP_NS for n in range(FRAMES)] and not skipped
    assert all(abs(int(o.images["head"].mean()) - shade(n)) <= 2 for n, o in enumerate(found))


def test_frames_that_are_not_used_are_decoded_and_not_kept(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("vla_edge.evaluate.frame_stream.pixels", lambda frame: made.append(1) or pixels(frame))
    found, _ = shown(write(tmp_path / "bag", COMPRESSED_VIDEO, packets(tune="zerolatency")), rate_hz=5.0)
    assert len(found) == len(made) == FRAMES // 4
    assert all(abs(int(o.images["head"].mean()) - shade(4 * n)) <= 2 for n, o in enumerate(found))


def test_a_video_that_begins_or_breaks_in_the_middle_counts_what_is_lost(tmp_path):
    sent = packets(tune="zerolatency")
    late, skipped = shown(write(tmp_path / "late", COMPRESSED_VIDEO, sent[5:]))
    assert late[0].stamp_ns == START_NS + 10 * STEP_NS, "the next key frame"
    assert skipped == {"packet of camera head of which no frame came": 5}
    broken = [*sent[:20], (sent[20][0], b"\x00\x01\x02"), *sent[21:]]
    found, skipped = shown(write(tmp_path / "broken", COMPRESSED_VIDEO, broken))
    assert len(found) == FRAMES - sum(skipped.values()) and 1 <= sum(skipped.values()) <= 10


def test_topics_may_be_named_and_codecs_are_known_by_many_names(tmp_path):
    path = write(tmp_path / "bag", FFMPEG_PACKET, packets(tune="zerolatency"), "h264_nvenc", "/front/stream")
    contract = TopicContract(cameras={"head": "/front/stream"})
    assert len(shown(path, contract=contract)[0]) == FRAMES
    assert [decoder_name(told) for told in ("h265", "hevc_nvenc", "libx265", "h264;nv12", "libsvtav1", "VP9")] == [
        "hevc", "hevc", "hevc", "h264", "av1", "vp9",
    ]  # fmt: skip
    with pytest.raises(ImageEncodingError, match="video in 'theora' is not read"):
        VideoStream("head", Counter()).push(0, "theora", b"x")


def test_an_unknown_codec_in_a_bag_is_told(tmp_path):
    found, skipped = shown(write(tmp_path / "bag", COMPRESSED_VIDEO, packets(tune="zerolatency"), "theora"))
    ((reason, count),) = skipped.items()
    assert not found and count == FRAMES and reason.startswith("frame of camera head: video in 'theora' is not read")
