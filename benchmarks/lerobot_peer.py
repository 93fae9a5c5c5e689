"""LeRobot's own SmolVLA and pi0 as contenders in benchmarks, in a process of its own: it wants other versions than ours.

    python benchmarks/lerobot_peer.py CHECKPOINT --family smolvla --threads 2     in an environment of `INTERPRETERS`

Answers every line on standard input with the milliseconds one `sample_actions` took, in float32; its own preparation of
pictures and words is not counted. Says "ready" once it is loaded. A pi0 has random weights and LeRobot's own sizes, as
LeRobot reads no checkpoint of openpi's layout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
# family -> environments of tools/peer_environment.sh; LeRobot's pi0 wanted another transformers than the published until 0.5
ENVIRONMENTS = {"smolvla": "smolvla", "pi0": "groot_n17"}
INTERPRETERS = {family: ROOT / f".venv-peers/{name}/bin/python" for family, name in ENVIRONMENTS.items()}
HOW = {family: f"tools/peer_environment.sh {name} installs it" for family, name in ENVIRONMENTS.items()}
INSTRUCTION = "touch the red cube with your left hand"


class LeRobotPeer:
    """Looks like a runner to `engine.race`: what it sees is noise of its own, as its speed does not depend on it."""

    def __init__(self, checkpoint: Path, threads: int, family: str = "smolvla"):
        # its threads must not spin while another's turn is timed
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}
        command = [str(INTERPRETERS[family]), __file__, str(checkpoint), "--family", family, "--threads", str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        if self._line() != "ready":
            raise RuntimeError("LeRobot did not start")

    def warm_up(self) -> None:
        self.infer()

    def infer(self, observation=None) -> SimpleNamespace:
        """`timing.total` is in seconds."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return SimpleNamespace(timing=SimpleNamespace(total=float(self._line()) / 1e3, stages={}))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _line(self) -> str:
        return self._process.stdout.readline().strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--family", choices=ENVIRONMENTS, default="smolvla")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries greet
    sys.path.insert(0, str(ROOT / "tools/parity"))
    import torch

    torch.set_num_threads(options.threads)
    sample = {"smolvla": smolvla, "pi0": pi0}[options.family](options.checkpoint)
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        with torch.no_grad():
            sample()
        print(1e3 * (time.perf_counter() - start), file=answers, flush=True)


def smolvla(checkpoint: Path) -> Callable[[], object]:
    """One `sample_actions` of the policy in a directory."""
    import numpy as np
    import torch
    from lerobot_offline import LeRobotSmolVLA

    peer, rng = LeRobotSmolVLA(checkpoint), np.random.default_rng(0)
    config, policy = peer.config, peer.policy
    pictures = {
        key: rng.integers(0, 256, (*feature.shape[1:], 3), dtype=np.uint8)
        for key, feature in config.image_features.items()
    }
    state = rng.normal(size=config.robot_state_feature.shape)
    batch = peer.batch(pictures, state, INSTRUCTION)
    images, present = policy.prepare_images(batch)
    words, mask = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
    noise = torch.randn(1, config.chunk_size, config.max_action_dim)
    state = policy.prepare_state(batch)
    return lambda: policy.model.sample_actions(images, present, words, mask, state, noise=noise.clone())


def pi0(checkpoint: Path) -> Callable[[], object]:
    """One `sample_actions` of a pi0 that sees as many cameras and joints as the one in a directory of `pi0_shapes`."""
    from generate_groot17 import read_newer_python  # which tells transformers first that there is no network

    read_newer_python()
    import torch
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.pi0.configuration_pi0 import PI0Config
    from lerobot.policies.pi0.modeling_pi0 import PI0Policy
    from transformers.initialization import no_init_weights

    facts = json.loads((checkpoint / "vla_edge.json").read_text(encoding="utf-8"))
    joints = PolicyFeature(FeatureType.STATE, (len(facts["joint_names"]),))
    features = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)) for name in facts["cameras"]}
    config = PI0Config(
        input_features={"observation.state": joints, **features},
        output_features={"action": PolicyFeature(FeatureType.ACTION, joints.shape)}, device="cpu",
    )  # fmt: skip
    with no_init_weights():  # as their distributions ask, which would take minutes
        policy = PI0Policy(config).eval()
    for parameter in policy.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    batch = {key: torch.rand(1, *feature.shape) for key, feature in config.input_features.items()}
    words = torch.randint(0, 1000, (1, config.tokenizer_max_length))
    mask = torch.arange(config.tokenizer_max_length)[None] <= len(INSTRUCTION.split())
    images, present = policy._preprocess_images(batch)
    state = policy.prepare_state(batch)
    return lambda: policy.model.sample_actions(images, present, words, mask, state)


if __name__ == "__main__":
    main()
