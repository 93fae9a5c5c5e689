"""Speculative decoding on a trained policy: how many passes a chunk takes with each draft, and whether it is the same chunk.

    python benchmarks/speculation.py --demonstrations out/demonstrations/hard

A small OpenVLA (15 tokens a chunk) is trained on demonstrations for minutes, a block draft and Medusa's heads on what it
writes, and all of them are run on episodes that nothing was trained on, frame by frame in the order they were recorded,
since a draft out of earlier chunks depends on it. Nothing is timed. `out/bench/speculation.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_file import Row, table, write  # noqa: E402
from openvla_shapes import Shapes, write_openvla, write_words  # noqa: E402

SHAPES = Shapes(layers=4, width=128, hidden=352, heads=4, image_size=84, towers=((64, 128, 4), (64, 128, 4)))
STORED = 96  # pixels along a side of what demonstrations hold
JUDGED = 100  # frames
TOKENS = (4, 13)  # proposed at a time


@dataclass(frozen=True)
class Sizes:
    """Shards to train on, and steps of the policy and of a draft."""

    shards: int
    steps: int
    draft_steps: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demonstrations", type=Path, required=True, help="a recording; its last shard judges")
    parser.add_argument("--shards", type=int, default=6, help="of it, to train on")
    parser.add_argument("--steps", type=int, default=1500, help="of the policy's training")
    parser.add_argument("--draft-steps", type=int, default=1500)
    parser.add_argument("--work", type=Path, help="directory where the trained policy stays, and is found again")
    arguments = parser.parse_args()
    sizes = Sizes(arguments.shards, arguments.steps, arguments.draft_steps)
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(arguments.demonstrations, arguments.work or Path(scratch), sizes)
    print(table(rows))
    print(write("speculation", rows))


def measure(demonstrations: Path, work: Path, sizes: Sizes) -> list[Row]:
    """All rows."""
    from vla_edge.learn.draft import train_draft
    from vla_edge.policy.checkpoint import load_checkpoint
    from vla_edge.sim.demonstrations import shard_files

    work.mkdir(parents=True, exist_ok=True)
    files, shown = shard_files(demonstrations), copied(demonstrations, work / "shown", sizes.shards)
    plain = trained_policy(shown, work, sizes.steps)
    judges = list(observations(files[-1], load_checkpoint(plain).spec))
    rows = judged(plain, judges, sizes)
    for kind in ("block", "medusa"):
        directory = work / kind
        if not directory.is_dir():
            partial = shutil.copytree(plain, work / f"{kind}.partial", dirs_exist_ok=True)
            train_draft(partial, [shown], kind, width=128, steps=sizes.draft_steps, frames=600, force=True, progress=told)
            partial.rename(directory)
        rows += judged(directory, judges, sizes, kind)
    return rows


def copied(demonstrations: Path, shown: Path, count: int) -> Path:
    """The first shards of a recording, to train on."""
    from vla_edge.sim.demonstrations import shard_files

    if not shown.is_dir():
        shown.mkdir(parents=True)
        for file in (demonstrations / "recording.json", *shard_files(demonstrations)[:count]):
            shutil.copyfile(file, shown / file.name)
    return shown


def judged(directory: Path, judges, sizes: Sizes, kind: str = "") -> list[Row]:
    """Rows of a trained draft, or of those that cost nothing."""
    from vla_edge.policy.checkpoint import load_checkpoint, load_policy

    loaded, rows = load_checkpoint(directory), []
    greedy = run(loaded, judges, lambda policy: policy.one_by_one_())[0]
    ways = {f"history.{chunks}": {"draft_chunks": chunks} for chunks in (1, 8)} if not kind else {kind: {}}
    if not kind:
        found, passes = run(loaded, judges, lambda policy: policy.revise_())
        rows.append(_row("fixed_point", found, greedy, passes, sizes, ""))
    most = load_policy(loaded).most_drafted
    for name, spec in ways.items():
        for tokens in sorted({min(tokens, most) for tokens in TOKENS}):
            changed = replace(loaded, spec=replace(loaded.spec, **spec))
            found, passes = run(changed, judges, lambda policy, tokens=tokens: policy.speculate_(tokens, bool(kind)))
            rows.append(_row(f"{name}.tokens_{tokens}", found, greedy, passes, sizes, f"{tokens} tokens proposed at a time"))
    return rows


def run(loaded, judges, decode) -> tuple[np.ndarray, np.ndarray]:
    """Chunks and passes."""
    from vla_edge.engine.runner import Runner
    from vla_edge.policy.checkpoint import load_policy

    policy = load_policy(loaded)
    decode(policy)
    runner = Runner.from_policy(policy, loaded)
    found = [runner.infer(observation) for observation in judges]
    return np.stack([one.chunk.positions for one in found]), np.array([one.timing.passes for one in found])


def _row(name: str, found: np.ndarray, greedy: np.ndarray, passes: np.ndarray, sizes: Sizes, note: str) -> Row:
    same = (found == greedy).all(axis=(1, 2))
    if not same.all():
        raise SystemExit(f"{name}: {int((~same).sum())} of {len(same)} chunks are not those of greedy decoding")
    decoded = greedy.shape[1] * greedy.shape[2] - 1
    draws = np.random.default_rng(0).choice(passes, (1000, len(passes))).mean(1)
    interval = tuple(float(value) for value in np.percentile(decoded / draws, (2.5, 97.5)))
    told = f"{passes.mean():.2f} passes in the place of {decoded}, every chunk greedy decoding's; policy of {sizes.steps} steps"
    return Row(
        f"tokens_per_pass.{name}", float(decoded / passes.mean()), "", n=len(passes), interval=interval,
        note="; ".join(filter(None, (note, told))),
    )  # fmt: skip


def trained_policy(shown: Path, work: Path, steps: int) -> Path:
    """The checkpoint of a policy that was trained on demonstrations, made once."""
    import torch

    from vla_edge.learn.fit import Fit, FitConfig
    from vla_edge.learn.frames import from_demonstrations
    from vla_edge.learn.outputs import output_of
    from vla_edge.policy.checkpoint import load_checkpoint, load_policy
    from vla_edge.policy.openvla_student import write as write_policy

    done = work / "policy"
    if done.is_dir():
        return done
    begun = load_checkpoint(random_policy(shown, work / "random"))
    policy = load_policy(begun)
    frames = from_demonstrations([shown], begun.spec, begun.tokenizer_path)
    kind = output_of(policy)

    class Cloning(Fit):
        def losses(self, rng, generator):
            part = frames.take(rng.integers(len(frames), size=self.config.batch))
            tokens = kind.question(part.actions)
            said = policy.say(part.seen_by(policy), part.tokens, part.mask, part.state, tokens=tokens)
            return {"tokens": torch.nn.functional.cross_entropy(said.output.flatten(0, -2), tokens.flatten())}

    fit = Cloning(FitConfig(steps=steps, batch=32, rate=2e-3, warmup=50, average=0.99), policy, work / "run", kind.outer)
    fit.train(50, lambda step, losses: told(step / steps, f"training the policy ({losses['tokens']:.3f})"))
    return write_policy(done, fit.average, begun.spec, begun)


def random_policy(shown: Path, directory: Path) -> Path:
    """Of `SHAPES`, for what the demonstrations show."""
    from vla_edge.sim.demonstrations import read_mark, shards

    write_openvla(directory, SHAPES)
    mark, motion, words = read_mark(shown), [], {}
    for shard in shards(shown, ("state", "action", "instruction")):
        motion.append(shard["action"][:, 0] - shard["state"])
        words.update(dict.fromkeys(word for text in set(map(str, shard["instruction"])) for word in text.lower().split()))
    write_words(directory, dict.fromkeys(("<unk>", "<s>", "</s>", *"in what action should robot take to out : ?".split(), *words)))
    low, high = np.quantile(np.concatenate(motion), (0.01, 0.99), axis=0)
    low, high = np.minimum(low, -1e-3), np.maximum(high, 1e-3)
    bounds = {"q01": low.tolist(), "q99": high.tolist(), "mask": [True] * len(low)}
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "norm_stats": {"demonstrations": {"action": bounds}}}))
    camera = {"height": STORED, "width": STORED, "crop": [0, 0, STORED, STORED]}
    robot = {"joint_names": mark["joint_names"], "dt": mark["dt"], "relative_actions": True, "cameras": {"head": camera}}
    (directory / "vla_edge.json").write_text(json.dumps(robot))
    return directory


def observations(shard: Path, spec, count: int = JUDGED) -> Iterator:
    """The first frames of a shard, in order, as a robot would show them."""
    from vla_edge.sim.demonstrations import read_shard
    from vla_edge.types import JointState, Observation

    found = read_shard(shard, ("images", "state", "instruction"))
    period = round(1e9 * spec.dt)
    for index in range(min(count, len(found["state"]))):
        joints = JointState(index * period, spec.joint_names, found["state"][index])
        yield Observation(index * period, {"head": found["images"][index]}, joints, str(found["instruction"][index]))


def told(fraction: float, what: str) -> None:
    """Progress, now and then."""
    if int(1000 * fraction) % 20 == 0:
        print(f"{100 * fraction:5.1f} %  {what}", flush=True)


if __name__ == "__main__":
    main()
