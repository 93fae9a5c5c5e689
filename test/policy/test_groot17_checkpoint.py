"""What is wrong with a GR00T N1.7 directory is one sentence; what it says becomes the spec and one embodiment's networks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from edited import edit, refused
from safetensors.torch import load_file

from vla_edge.engine.continuation import Continuation
from vla_edge.engine.runner import Runner
from vla_edge.policy.checkpoint import load_checkpoint, load_policy
from vla_edge.policy.checkpoint_files import Document
from vla_edge.policy.groot17 import Groot17, Groot17Config, token_places
from vla_edge.policy.groot17_checkpoint import placed
from vla_edge.policy.groot17_layout import EMBODIMENTS
from vla_edge.policy.groot17_pictures import fit_of, in_patches
from vla_edge.policy.preprocess import Postprocessor
from vla_edge.policy.spec import PolicySpec
from vla_edge.types import JointState, Observation

SAVED = Path(__file__).parents[1] / "parity" / "groot17"
TAG = "unitree_g1_sonic"


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))


@pytest.fixture(params=["isaac", "lerobot", "keys"])
def any_layout(request, tmp_path) -> Path:
    return copied(request.param, tmp_path)


@pytest.fixture
def isaac(tmp_path) -> Path:
    return copied("isaac", tmp_path)


@pytest.fixture
def lerobot(tmp_path) -> Path:
    return copied("lerobot", tmp_path)


@pytest.fixture
def keys(tmp_path) -> Path:
    return copied("keys", tmp_path)


def copied(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAVED / name / "checkpoint", tmp_path / name))


def step(path: Path, name: str) -> str:
    """Where a step's config is, as `edit` takes it."""
    steps = json.loads(path.read_text())["steps"]
    return f"steps__{[each['registry_name'] for each in steps].index(name)}__config__"


def test_every_layout_becomes_a_spec():
    lerobot, keys, isaac = (load_checkpoint(SAVED / name / "checkpoint").spec for name in ("lerobot", "keys", "isaac"))
    for spec in (lerobot, keys, isaac):
        assert PolicySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
        assert (spec.family, spec.chunk_size, spec.max_state_dim) == ("groot17", 6, 12)
        assert spec.state.clip and not spec.state.held and spec.action.held and not spec.action.clip
    assert (lerobot.num_steps, keys.num_steps) == (4, 5)
    # its own data: the alphabet's order, nothing relative, words as they are
    assert [camera.name for camera in lerobot.cameras] == ["head", "wrist"]
    assert not lerobot.relative_actions and not lerobot.text.bare
    # a base model's keys: their order, the arm relative, words brought to small letters
    assert [camera.name for camera in keys.cameras] == ["wrist", "head"]
    assert keys.absolute_names == ("joint_3", "joint_4") and keys.offset_joints.tolist() == [True] * 3 + [False] * 2
    assert keys.text.bare and keys.text.lower
    assert np.shape(keys.action.statistics["min"]) == (6, 5) and np.shape(lerobot.action.statistics["min"]) == (5,)
    assert isaac.joint_names == ("joint_5", "joint_6", "joint_2", "joint_3", "joint_4")
    assert isaac.absolute_names == ("joint_5", "joint_6") and len(isaac.read_names) == 7
    assert [(c.height, c.width, c.fit) for c in isaac.cameras] == [(64, 80, "zoom_area")]


def test_bounds_are_by_key_quantiles_for_what_is_absolute_and_by_point_for_what_is_not(isaac):
    raw = json.loads((isaac / "statistics.json").read_text())[TAG]
    spec = load_checkpoint(isaac).spec
    low = np.array(spec.action.statistics["min"])
    np.testing.assert_array_equal(low[:, :2], np.tile(raw["action"]["hand"]["q01"], (6, 1)))
    np.testing.assert_array_equal(low[:, 2:], raw["relative_action"]["arm"]["min"])
    assert spec.state.statistics["max"] == tuple(x for key in ("waist", "arm", "hand") for x in raw["state"][key]["q99"])
    edit(isaac / "processor_config.json", processor_kwargs__use_percentiles=False)
    assert load_checkpoint(isaac).spec.state.statistics["max"][:2] == tuple(raw["state"]["waist"]["max"])


def test_offsets_are_added_to_the_measured_positions_of_their_own_joints():
    spec = load_checkpoint(SAVED / "isaac" / "checkpoint").spec
    joints = JointState(0, [f"joint_{i}" for i in range(7)], np.arange(7.0))
    actions = np.full((1, 6, 8), 3.0)  # beyond what the network was shown: held at its bounds
    high = np.array(spec.action.statistics["max"])
    targets = Postprocessor(spec)(actions, joints)
    np.testing.assert_allclose(targets, high + [0, 0, 2, 3, 4])
    np.testing.assert_allclose(Postprocessor(spec).inverse(targets, joints), np.ones((6, 5)), atol=1e-6)
    fewer = spec.of_joints(["joint_3", "joint_6"])
    assert fewer.absolute_names == ("joint_6",)
    np.testing.assert_array_equal(fewer.action.statistics["max"], high[:, [3, 1]])


def test_a_plan_is_continued_in_the_rows_that_become_the_chunk():
    checkpoint = load_checkpoint(SAVED / "isaac" / "checkpoint")
    runner, spec = Runner.from_policy(load_policy(checkpoint), checkpoint), checkpoint.spec
    camera, rng = spec.cameras[0], np.random.default_rng(0)
    pixels = rng.integers(0, 256, (camera.source_height, camera.source_width, 3), dtype=np.uint8)
    joints = JointState(0, spec.measured_names, rng.normal(0, 0.3, 7))
    observation = Observation(0, {camera.name: pixels}, joints, "touch the red cube")
    free = runner.infer(observation).chunk.positions
    assert free.shape == (6, 5) and runner.noise_shape == (1, 8, 8)
    wanted = Postprocessor(spec)(np.full((1, 6, 8), 0.1), joints)
    weights = np.array([1.0, 1.0, 0.5, 0.0, 0.0, 0.0])
    led = runner.infer(observation, continuation=Continuation(wanted, weights)).chunk.positions
    np.testing.assert_allclose(led[:2], wanted[:2], atol=1e-5)
    assert np.abs(led[3:] - wanted[3:]).max() > 0.1


def test_the_embodiment_chooses_the_networks_for_state_and_actions(isaac):
    tensors = {}
    for shard in isaac.glob("*.safetensors"):
        tensors |= load_file(shard)
    states = tensors["action_head.state_encoder.layer1.W"]
    assert load_policy(load_checkpoint(isaac)).prefix.state_in.weight.T.equal(states[7])  # embodiment_id.json
    (isaac / "embodiment_id.json").unlink()
    assert load_policy(load_checkpoint(isaac)).prefix.state_in.weight.T.equal(states[EMBODIMENTS[TAG]])
    edit(isaac / "processor_config.json", processor_kwargs__embodiment_id_mapping={TAG: 3})
    assert load_policy(load_checkpoint(isaac)).prefix.state_in.weight.T.equal(states[3])
    (isaac / "embodiment_id.json").write_text(json.dumps({TAG: 32}))
    assert "embodiment 32 was asked for, and" in refused(isaac)


def test_an_embodiment_that_is_not_said_or_not_known_is_asked_for(isaac):
    edit(isaac / "vla_edge.json", embodiment_tag=None)
    assert f"statistics of libero_sim, {TAG}, and vla_edge.json says embodiment_tag = None" in refused(isaac)
    edit(isaac / "statistics.json", made_up={})
    edit(isaac / "vla_edge.json", embodiment_tag="made_up")
    assert "has no entry 'made_up'" in refused(isaac)


def test_absent_statistics_are_asked_for_and_never_assumed(isaac, lerobot):
    edit(isaac / "statistics.json", unitree_g1_sonic__relative_action__arm__max=None)
    assert "has no entry 'max'" in refused(isaac)
    (isaac / "statistics.json").unlink()
    assert "has no statistics.json" in refused(isaac)
    (lerobot / "policy_preprocessor_step_2_groot_n1_7_pack_inputs_v1.safetensors").unlink()
    assert "policy_preprocessor_step_2_groot_n1_7_pack_inputs_v1.safetensors" in refused(lerobot)


def test_points_without_bounds_are_refused(isaac):
    place = f"processor_kwargs__modality_configs__{TAG}__action__delta_indices"
    edit(isaac / "processor_config.json", **{place: list(range(8))})
    assert "statistics are of 6 points and a chunk has 8" in refused(isaac)


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("action__action_configs__1__type", "EEF", "action.arm is eef, relative; this version takes joint positions"),
        ("action__action_configs__1__rep", "DELTA", "action.arm is non_eef, delta; this version takes joint positions"),
        ("action__action_configs__1__state_key", "leg", "tells action.arm from state.leg on, which is not read"),
        ("action__action_configs__1__state_key", "waist", "actions of joint_2 are offsets to joint_0"),
        ("state__delta_indices", [-1, 0], "reads more than one moment of unitree_g1_sonic"),
        ("video__delta_indices", [-10, 0], "reads more than one moment of unitree_g1_sonic"),
        ("video__modality_keys", ["wrist"], "vla_edge.json has no camera 'wrist', at which the policy looks"),
        ("state__sin_cos_embedding_keys", ["arm"], "sets sin_cos_embedding_keys to ['arm']"),
    ],
)
def test_keys_that_mean_something_else_are_refused(isaac, entry, value, said):
    edit(isaac / "processor_config.json", **{f"processor_kwargs__modality_configs__{TAG}__{entry}": value})
    assert said in refused(isaac)


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("use_mean_std", True, "sets use_mean_std to True"),
        ("use_tactile", True, "sets use_tactile to True"),
        ("shortest_image_edge", 72, "sets shortest_image_edge to 72"),
        ("letter_box_transform", True, "pads pictures to squares; crop them to squares in vla_edge.json"),
    ],
)
def test_what_is_not_done_to_states_and_pictures_is_refused(isaac, entry, value, said):
    edit(isaac / "processor_config.json", **{f"processor_kwargs__{entry}": value})
    assert said in refused(isaac)


def test_pictures_that_the_backbone_would_resize_are_refused(keys, isaac):
    place = step(keys / "policy_preprocessor.json", "groot_n1_7_vlm_encode_v1")
    edit(keys / "policy_preprocessor.json", **{f"{place}image_target_size": [60, 60], f"{place}shortest_image_edge": 60})
    assert "makes pictures of 60x60 px, which the backbone resizes; train with a multiple of 16 px" in refused(keys)
    edit(isaac / "backbone" / "preprocessor_config.json", size={"shortest_edge": 65536, "longest_edge": 100_000})
    assert "makes pictures 64 px high, which the backbone resizes" in refused(isaac)


def test_pictures_come_to_whole_tokens_between_the_least_and_the_most_pixels():
    told = Document(Path("preprocessor_config.json"), {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2})
    told["size"] = Document(told.path, {"shortest_edge": 65536, "longest_edge": 262144})
    told |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    # as transformers' smart_resize, by hand: 341 / 32 = 10.66; 64 * 64 is a sixteenth of the least
    assert in_patches(told, 256, 341) == (256, 352) and in_patches(told, 64, 64) == (256, 256)
    assert in_patches(told, 1024, 1024) == (512, 512)
    pictures = Document(Path("processor_config.json"), {})
    assert fit_of(pictures, told, (480, 640)) == ((256, 256), {"fit": "zoom_torch", "zoom": 230 / 256})  # LeRobot's defaults
    pictures |= {"image_target_size": [256, 256], "crop_fraction": 0.95, "use_albumentations": True}
    # 256 x 341, of which 243 x 323, again 256 x 340
    assert fit_of(pictures, told, (480, 640)) == ((256, 352), {"fit": "zoom_area", "zoom": 0.95})


def test_lerobots_processors_have_to_be_those_that_are_known(lerobot, keys):
    before, after = (lerobot / f"policy_{side}processor.json" for side in ("pre", "post"))
    edit(before, **{f"{step(before, 'groot_n1_7_pack_inputs_v1')}video_horizon": 2})
    assert "reads 2 frames; this version takes the newest alone" in refused(lerobot)
    edit(before, **{f"{step(before, 'groot_n1_7_pack_inputs_v1')}video_horizon": 1})
    edit(after, **{f"{step(after, 'groot_action_unpack_unnormalize_v2')}libero_gripper_action": True})
    assert "sets libero_gripper_action to True" in refused(lerobot)
    edit(after, steps=[])
    assert "neither groot_n1_7_action_decode_v1 nor groot_action_unpack_unnormalize_v2" in refused(lerobot)
    edit(keys / "config.json", action_decode_transform="libero")
    assert "sets action_decode_transform to 'libero'" in refused(keys)
    edit(keys / "config.json", action_decode_transform=None)
    before = keys / "policy_preprocessor.json"
    edit(before, **{f"{step(before, 'groot_n1_7_pack_inputs_v1')}video_modality_keys": ["front"]})
    assert "has the cameras head, wrist, and the policy looks at front; name them so" in refused(keys)


def test_a_robot_that_adds_what_the_policy_has_added_is_refused(keys):
    edit(keys / "vla_edge.json", relative_actions=True)
    assert "vla_edge.json says relative_actions, of a policy whose own processing adds what is measured" in refused(keys)


def test_joints_that_do_not_fit_are_refused(any_layout):
    facts = json.loads((any_layout / "vla_edge.json").read_text())
    edit(any_layout / "vla_edge.json", joint_names=facts["joint_names"][:-1], state_names=facts["joint_names"])
    assert "the statistics of action are not of 4 joints" in refused(any_layout)
    edit(any_layout / "vla_edge.json", joint_names=facts["joint_names"], state_names=facts["joint_names"][1:])
    assert "the statistics of observation.state are not of the 4 joints that are read" in refused(any_layout)


def test_the_backbone_is_asked_for(any_layout):
    for name in ("tokenizer.json", "chat_template.json", "preprocessor_config.json", "config.json"):
        (any_layout / "backbone" / name).unlink()
        assert name in refused(any_layout)


def test_a_backbone_of_another_kind_is_refused(isaac):
    edit(isaac / "backbone" / "config.json", model_type="qwen2_5_vl")
    assert "is of type 'qwen2_5_vl'; this version loads N1.7 on a qwen3_vl" in refused(isaac)
    edit(isaac / "backbone" / "config.json", model_type="qwen3_vl", text_config__rope_scaling={"rope_type": "yarn"})
    assert "turns queries and keys in another way than Qwen3-VL" in refused(isaac)


def test_layers_have_to_be_those_that_are_read(isaac):
    edit(isaac / "config.json", select_layer=2)
    assert "reads what layer 2 of the language model gives, and" in refused(isaac)


def test_a_table_of_positions_is_stretched_corner_on_corner():
    table = torch.arange(9.0)[:, None] * torch.ones(2)
    stretched = placed(table, 5, 3)
    assert stretched.shape == (5, 3, 2)
    assert stretched[:, 0, 0].tolist() == [0, 1.5, 3, 4.5, 6] and stretched[0, :, 0].tolist() == [0, 1, 2]


def config(**sizes) -> Groot17Config:
    """Of huggingface.co/nvidia/GR00T-N1.7-3B and nvidia/Cosmos-Reason2-2B."""
    shapes = dict(
        cameras=1, image_size=256, image_columns=256, patch_size=16, shuffle=1, vision_width=1024, vision_hidden=4096,
        vision_layers=24, vision_heads=16, vision_eps=1e-6, connector=((4096, 4096), (4096, 2048)), deep=(5, 11, 17),
        vocabulary=151936, text_width=2048, text_hidden=6144, text_layers=16, heads=16, kv_heads=8, head_dim=128, text_eps=1e-6,
        wavelength=5e6, sections=(24, 20, 20), image_places=(4,), language_length=70, adapter_layers=4, adapter_hidden=8192,
        adapter_heads=32, width=1536, layers=32, layers_hidden=6144, layers_heads=32, output_width=1024, state_hidden=1024,
        decoder_hidden=1024, future_tokens=0, positions=True, time_buckets=1000, chunk_size=40, max_state_dim=132,
        max_action_dim=132, text_every=2,
    )  # fmt: skip
    return Groot17Config(**shapes | sizes)


def test_at_the_published_shapes_it_has_the_published_parameters():
    with torch.device("meta"):
        policy = Groot17(config())
    count = sum(parameter.numel() for parameter in policy.parameters())
    # of the 3B of its name: 31 more embodiments' networks, 151,936 words
    assert 3.0e9 < count + 31 * (count_of(policy.prefix.state_in, policy.prefix.state_out) + 1.2e7) < 3.7e9
    assert policy.stages()[0].outputs[0].shape == (1, 64, 4 * 2048)


def count_of(*modules) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_what_follows_a_picture_goes_on_behind_its_greatest_place():
    places = token_places(config(image_columns=384, image_places=(4,), language_length=8))
    rows, columns = 8, 12
    assert places[:4] == [(i, i, i) for i in range(4)]
    assert places[4] == (4, 4, 4) and places[4 + columns + 1] == (4, 5, 5) and places[4 + rows * columns - 1] == (4, 11, 15)
    assert places[4 + rows * columns :] == [(16, 16, 16), (17, 17, 17), (18, 18, 18)]


def test_frequencies_know_time_row_and_column_in_turns():
    with torch.no_grad():
        encoder = Groot17(config(text_layers=1, adapter_layers=1, layers=2, text_width=64, adapter_heads=1, vision_layers=1,
                                 deep=(0,), vocabulary=8, connector=((4096, 8), (8, 64)))).prefix  # fmt: skip
    places = torch.tensor(token_places(encoder.config))[10].tolist()  # within the picture: three different ones
    radians = torch.atan2(encoder.sin[0, 10], encoder.cos[0, 10])
    rates = 5e6 ** -(torch.arange(64) / 64)
    knows = [1 if i % 3 == 1 and i < 60 else 2 if i % 3 == 2 and i < 60 else 0 for i in range(64)]
    expected = torch.tensor([places[axis] for axis in knows]) * rates
    assert torch.allclose(torch.cos(expected), torch.cos(radians), atol=1e-5)
