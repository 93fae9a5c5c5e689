"""A smaller policy made of an OpenVLA: of fewer joints, with fewer channels in its feed-forwards. See `families`.

It is written file by file, under the names its teacher's files have: memory holds one of them beside the policy. What a
policy never runs (the last block of each vision tower, scores of words that stand for no action) stays the teacher's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vla_edge.files import whole_directory
from vla_edge.policy.bins import BINS
from vla_edge.policy.checkpoint_files import CheckpointError, read_json
from vla_edge.policy.openvla_checkpoint import STATISTICS, WORDS, file_names, files_of, first_action_token, scale_of
from vla_edge.policy.robot_facts import ROBOT_FILE
from vla_edge.policy.spec import PolicySpec
from vla_edge.policy.weights import INDEX_FILE, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from vla_edge.policy.checkpoint import Checkpoint
    from vla_edge.policy.openvla import OpenVLA


def keep_joints(policy: OpenVLA, columns: Sequence[int]) -> None:
    """Let a policy write the tokens of some of its joints alone, in place: no weight depends on which they are.

    Raises:
        ValueError: its actions come at once, from a head that reads all joints together.
    """
    import torch

    if policy.config.head_hidden:
        raise ValueError("its action head reads what was found for all joints together; ask for all of them")
    policy.one_by_one_()  # a draft is of all joints
    config = replace(policy.config, action_dim=len(columns), draft=None)
    policy.config = policy.prefill.config = policy.decode.config = config
    policy.decode.places = torch.arange(config.tokens - 1)


def write(directory: str | Path, policy: OpenVLA, spec: PolicySpec, checkpoint: Checkpoint) -> Path:
    """Write `policy`, whose teacher is that of `checkpoint`, replacing `directory` as a whole.

    Tensors keep the type they have in the teacher's files. The vision towers may be narrower than timm makes them: their
    shapes are read from the tensors here, but the authors' code does not load such towers.
    """
    directory = Path(directory)
    with whole_directory(directory, CheckpointError) as temporary:
        total = _write_tensors(temporary, policy, checkpoint)
        for path in sorted(checkpoint.directory.iterdir()):
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, temporary / path.name)
        _change_facts(temporary, policy, spec, checkpoint.spec.joint_names)
        if (index := temporary / INDEX_FILE).is_file():
            entries = read_json(index)
            _write_json(index, {**entries, "metadata": {**entries.get("metadata", {}), "total_size": total}})
    return directory


def _write_tensors(directory: Path, policy: OpenVLA, checkpoint: Checkpoint) -> int:
    """All files of the teacher, with the policy's values; returns the bytes of its shards."""
    from safetensors.torch import save_file

    state, makers = policy.state_dict(), {}
    for name in state:
        for file in file_names(name):
            makers.setdefault(file, []).append(name)
    scales = {scale_of(file) for file in makers}
    action_end, total = first_action_token(checkpoint, policy.config.vocabulary) + BINS, 0
    for path, part in files_of(checkpoint).items():
        values, old = {}, Weights((path,))
        for stored in old:
            name, like = part + stored.removeprefix("module."), old[stored]
            if name in makers:
                values[stored] = _stored(name, [state[maker] for maker in makers[name]], like, action_end)
            else:  # layers were multiplied by their scale when they were read
                values[stored] = like.new_ones(like.shape) if name in scales else like
            values[stored] = values[stored].to(like.dtype).contiguous()
        save_file(values, directory / path.name, metadata={"format": "pt"})
        (directory / path.name).chmod(0o644)  # safetensors keeps them to their owner
        total += 0 if part else sum(value.numel() * value.element_size() for value in values.values())
    return total


def _stored(name: str, ours: Sequence[Tensor], like: Tensor, action_end: int) -> Tensor:
    """A file's tensor out of those of ours that were made of it; `like` is the teacher's."""
    import torch

    first, last = ours[0], ours[-1]
    if name.endswith(".cls_token"):
        return first[:, : like.shape[1]]
    if name.endswith(".reg_token"):
        return first[:, -like.shape[1] :]
    if ".attn.qkv." in name:
        return torch.cat(list(ours))
    if name in WORDS and len(last) == BINS:  # kept by themselves beside the table, if there is one
        table = (first if first.shape == like.shape else like).clone()
        table[action_end - BINS : action_end] = last
        return table
    return first.reshape(like.shape) if first.numel() == like.numel() else first


def _change_facts(directory: Path, policy: OpenVLA, spec: PolicySpec, joints: Sequence[str]) -> None:
    """What the files beside the tensors say of widths and joints; `joints` are the teacher's."""
    columns = [joints.index(name) for name in spec.joint_names]

    def picked(values):
        told = isinstance(values, list) and len(values) == len(joints)
        return [values[column] for column in columns] if told else values

    def of_joints(sets: dict) -> dict:
        return {
            name: entry | {"action": {key: picked(values) for key, values in entry["action"].items()}}
            for name, entry in sets.items()
        }

    reader = policy.act if policy.config.head_hidden else policy.prefill
    config = read_json(directory / "config.json")
    config["text_config"]["intermediate_size"] = reader.layers[0].mlp.up.out_features
    if "norm_stats" in config:
        config["norm_stats"] = of_joints(config["norm_stats"])
    _write_json(directory / "config.json", config)
    if (beside := directory / STATISTICS).is_file():
        _write_json(beside, of_joints(read_json(beside)))
    robot = read_json(directory / ROBOT_FILE)
    _write_json(directory / ROBOT_FILE, {**robot, "joint_names": list(spec.joint_names)})


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
