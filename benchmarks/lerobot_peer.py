"""LeRobot's own SmolVLA as a contender in `engine.py`, in a process of its own: it wants other versions than ours.

    python benchmarks/lerobot_peer.py CHECKPOINT --threads 2     in the environment `smolvla` of tools/peer_environment.sh

Answers every line on standard input with the milliseconds one `sample_actions` took; its own preparation of pictures
and words is not counted. Says "ready" once it is loaded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-peers/smolvla/bin/python"
HOW = "tools/peer_environment.sh smolvla installs it"


class LeRobotPeer:
    """Looks like a runner to `engine.race`: what it sees is noise of its own, as its speed does not depend on it."""

    def __init__(self, checkpoint: Path, threads: int):
        # its threads must not spin while another's turn is timed
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}
        command = [str(PYTHON), __file__, str(checkpoint), "--threads", str(threads)]
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
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries greet
    sys.path.insert(0, str(ROOT / "tools/parity"))
    import numpy as np
    import torch
    from lerobot_offline import LeRobotSmolVLA

    torch.set_num_threads(options.threads)
    peer, rng = LeRobotSmolVLA(options.checkpoint), np.random.default_rng(0)
    config, policy = peer.config, peer.policy
    pictures = {
        key: rng.integers(0, 256, (*feature.shape[1:], 3), dtype=np.uint8)
        for key, feature in config.image_features.items()
    }
    state = rng.normal(size=config.robot_state_feature.shape)
    batch = peer.batch(pictures, state, "touch the red cube with your left hand")
    images, present = policy.prepare_images(batch)
    words, mask = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
    noise = torch.randn(1, config.chunk_size, config.max_action_dim)
    state = policy.prepare_state(batch)
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        with torch.no_grad():
            policy.model.sample_actions(images, present, words, mask, state, noise=noise.clone())
        print(1e3 * (time.perf_counter() - start), file=answers, flush=True)


if __name__ == "__main__":
    main()
