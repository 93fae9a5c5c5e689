"""What fewer image tokens, and pictures that are not looked at again, cost on trained policies of three kinds.

    python benchmarks/vision_tokens.py --demonstrations out/demonstrations/hard

Small policies of OpenVLA's, OpenVLA-OFT's and pi0's architecture are trained on demonstrations for minutes, and judged on
episodes that nothing was trained on or chosen by, frame by frame in the order they were recorded: the error of the chunk
beside that of the same policy with all tokens and all pictures, relative to the motion. Nothing is timed.
`out/bench/vision_tokens.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_file import Row, add, table  # noqa: E402
from openvla_shapes import write_words  # noqa: E402
from speculation import STORED, copied, observations, random_policy, told  # noqa: E402

JUDGED, LEARNED_FROM = 100, 48  # frames
KEPT, BY, CHANGES = (0.75, 0.5, 0.25), ("action", "attention"), (0.15, 0.3)
AFTER = 2  # of four text layers
CHUNK = 8  # of OFT
FAMILIES = ("openvla", "oft", "pi0")


@dataclass
class Policy:
    """A policy that has begun, and how it is trained.

    Attributes:
        loss: of a part of the frames, with a generator.
    """

    policy: object
    checkpoint: object
    outer: tuple[str, ...]
    loss: Callable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demonstrations", type=Path, required=True, help="a recording; its last shard judges")
    parser.add_argument("--shards", type=int, default=6, help="of it, to train on")
    parser.add_argument("--steps", type=int, default=1500, help="of each policy's training")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--work", type=Path, help="directory where training goes on from, and what was trained stays")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(arguments.demonstrations, arguments.work or Path(scratch), arguments)
    print(table(rows))
    print(add("vision_tokens", rows))


def measure(demonstrations: Path, work: Path, arguments) -> list[Row]:
    """All rows."""
    from vla_edge.sim.demonstrations import shard_files

    shown, rows = copied(demonstrations, work / "shown", arguments.shards), []
    files = shard_files(demonstrations)
    for family in arguments.families:
        begun = BEGIN[family](shown, work / family)
        loss = trained(begun, shown, work / family / "run", arguments.steps)
        spec = begun.checkpoint.spec
        judges, seen = (list(observations(file, spec, count)) for file, count in ((files[-1], JUDGED), (files[0], LEARNED_FROM)))
        note = f"{arguments.steps} steps, {arguments.shards} shards, loss {loss:.3f}"
        rows += judged(family, begun, judges, seen, note)
    return rows


def judged(family: str, begun: Policy, judges, seen, note: str) -> list[Row]:
    """Errors of a trained policy."""
    from vla_edge.compress.prune.tokens import prune_tokens_
    from vla_edge.compress.steps import PruneTokens
    from vla_edge.engine.foreseen import Chunks
    from vla_edge.engine.runner import Runner
    from vla_edge.engine.verify import compare

    policy, checkpoint, rows = begun.policy, begun.checkpoint, []
    whole = Runner.from_policy(policy, checkpoint)
    reference = Chunks(checkpoint.spec, judges, [whole.infer(one).chunk for one in judges])

    def row(name: str, told: str, checkpoint=checkpoint) -> Row:
        runner = Runner.from_policy(policy, checkpoint)
        result = compare(runner, reference, judges)
        told = told or f"{runner.pictures_seen} of {len(judges)} pictures looked at"
        return Row(
            f"error.{family}.{name}", result.action_error_rel, "", n=len(judges), interval=result.frame_error_rel,
            note=f"{told}; interval: 5 to 95 % of frames; {note}",
        )  # fmt: skip

    for keep in KEPT:
        for by in BY:
            step = PruneTokens(keep, AFTER, by)
            prune_tokens_(step, policy, checkpoint, seen)
            tokens = policy.reader.choice.count
            rows.append(row(f"{100 * keep:.0f}_tokens.{by}", f"{tokens} of {len(policy.reader.image_places)} tokens, by {by}"))
            policy.reader.choice = None
    for change in CHANGES:
        changed = replace(checkpoint, spec=replace(checkpoint.spec, vision_cache=change))
        rows.append(row(f"frames_{100 * change:.0f}", "", changed))
    return rows


def trained(begun: Policy, shown: Path, run: Path, steps: int) -> float:
    """Trains the policy in place; its last loss."""
    from vla_edge.learn.fit import Fit, FitConfig
    from vla_edge.learn.frames import from_demonstrations

    frames = from_demonstrations([shown], begun.checkpoint.spec, begun.checkpoint.tokenizer_path)
    last = []

    class Cloning(Fit):
        def losses(self, rng, generator):
            part = frames.take(rng.integers(len(frames), size=self.config.batch))
            return {"loss": begun.loss(part, generator)}

    def progress(step, losses) -> None:
        last.append(float(losses["loss"]))
        told(step / steps, f"training ({last[-1]:.3f})")

    config = FitConfig(steps=steps, batch=32, rate=2e-3, warmup=50, average=0.99)
    fit = Cloning(config, begun.policy.requires_grad_(True), run, begun.outer)
    fit.train(50, progress)
    begun.policy.load_state_dict(fit.average.state_dict())
    begun.policy.requires_grad_(False).eval()
    return float(np.mean(last[-20:])) if last else float("nan")


def _openvla(shown: Path, work: Path) -> Policy:
    import torch

    from vla_edge.learn.outputs import output_of
    from vla_edge.policy.checkpoint import load_checkpoint, load_policy

    checkpoint = load_checkpoint(random_policy(shown, work / "random"))
    policy = load_policy(checkpoint)
    kind = output_of(policy)

    def loss(part, generator):
        tokens = kind.question(part.actions)
        said = policy.say(part.seen_by(policy), part.tokens, part.mask, part.state, tokens=tokens)
        return torch.nn.functional.cross_entropy(said.output.flatten(0, -2), tokens.flatten())

    return Policy(policy, checkpoint, kind.outer, loss)


def _oft(shown: Path, work: Path) -> Policy:
    import torch

    from vla_edge.learn.outputs import output_of
    from vla_edge.policy.checkpoint import load_checkpoint, load_policy
    from vla_edge.policy.openvla import OpenVLA

    checkpoint = load_checkpoint(random_policy(shown, work / "random"))
    config = load_policy(checkpoint).config
    torch.manual_seed(0)
    policy = OpenVLA(replace(config, chunk_size=CHUNK, head_hidden=2 * config.width, head_blocks=2))
    kind = output_of(policy)

    def loss(part, generator):
        said = policy.say(part.seen_by(policy), part.tokens, part.mask, part.state)
        return (said.output - part.actions).abs().mean()

    return Policy(policy, replace(checkpoint, spec=replace(checkpoint.spec, chunk_size=CHUNK)), kind.outer, loss)


def _pi0(shown: Path, work: Path) -> Policy:
    from pi0_shapes import Shapes, write_pi0

    from vla_edge.learn.losses import flow_matching_loss
    from vla_edge.learn.outputs import output_of
    from vla_edge.policy.checkpoint import load_checkpoint, load_policy
    from vla_edge.sim.demonstrations import read_mark, shards

    small = Shapes((128, 256, 4), (128, 384), (96, 288), layers=4, heads=4, head_dim=32, vocabulary=256, cameras=1)
    directory = write_pi0(work / "random", small)
    mark, parts = read_mark(shown), list(shards(shown, ("state", "action", "instruction")))
    words = (word for part in parts for text in set(map(str, part["instruction"])) for word in text.lower().split())
    write_words(directory, dict.fromkeys(("<pad>", "<eos>", "<bos>", "<unk>", "\n", *words)))
    states = np.concatenate([part["state"] for part in parts])
    actions = np.concatenate([part["action"] for part in parts])
    statistics = {
        name: {"mean": values.mean(0).tolist(), "std": np.maximum(values.std(0), 1e-3).tolist()}
        for name, values in (("state", states), ("actions", (actions - states[:, None]).reshape(-1, states.shape[1])))
    }
    camera = {"height": STORED, "width": STORED, "crop": [0, 0, STORED, STORED]}
    robot = {"joint_names": mark["joint_names"], "dt": mark["dt"], "relative_actions": True, "cameras": {"head": camera}}
    config = json.loads((directory / "config.json").read_text()) | {"action_horizon": actions.shape[1]}
    for path, content in (
        (directory / "assets" / "random" / "norm_stats.json", {"norm_stats": statistics}),
        (directory / "config.json", config),
        (directory / "vla_edge.json", robot),
    ):
        path.write_text(json.dumps(content))
    checkpoint = load_checkpoint(directory)
    policy = load_policy(checkpoint)

    def loss(part, generator):
        return flow_matching_loss(policy, part.shown_to(policy)[0], part.actions, 4, generator)

    return Policy(policy, checkpoint, output_of(policy).outer, loss)


BEGIN = {"openvla": _openvla, "oft": _oft, "pi0": _pi0}


if __name__ == "__main__":
    main()
