"""What reading a prompt in blocks saves of memory: one layer of a 7B model in ONNX Runtime, at once and in blocks.

    python benchmarks/prefill_blocks.py

Layers follow each other in the same memory, so that one tells what all take beside their weights and caches. Each way runs in
a process of its own, whose peak is taken between loading and the end of the first prompt; keys and values of the prompt,
which both keep, are in it. `out/bench/prefill_blocks.json`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_file import Row, table, write  # noqa: E402

CAMERAS, BLOCKS = (1, 4), (0, 64)  # 0: at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=3, metavar=("CAMERAS", "BLOCK", "WIDTH"), type=int, help="measure in this process")
    parser.add_argument("--width", type=int, default=4096, help="of the model")
    arguments = parser.parse_args()
    if arguments.one:
        print(*peak(*arguments.one))
        return
    rows = []
    for cameras in CAMERAS:
        for block in BLOCKS:
            told = subprocess.run(
                [sys.executable, __file__, "--one", str(cameras), str(block), str(arguments.width)],
                capture_output=True, text=True, check=True,
            ).stdout.split()  # fmt: skip
            name = f"prefill_peak_bytes.cameras_{cameras}.{f'blocks_of_{block}' if block else 'at_once'}"
            rows.append(Row(name, int(told[0]), "B", note=f"prompt of {told[1]} places, one layer {arguments.width} wide"))
            print(rows[-1].name, rows[-1].value, flush=True)
    print(table(rows))
    print(write("prefill_blocks", rows))


def peak(cameras: int, block: int, width: int) -> tuple[int, int]:
    """Bytes beside what is loaded, and places of the prompt."""
    import gc

    import numpy as np
    import torch

    from vla_edge.engine.backends import StageInterface, onnxruntime
    from vla_edge.engine.export import export_stage
    from vla_edge.policy.openvla import IMAGENET, OpenVLA, OpenVLAConfig, TowerConfig

    torch.set_num_threads(1)
    tower = TowerConfig(14, 16, 16, 1, 1, 0, *IMAGENET)
    hidden = width * 43 // 16
    config = OpenVLAConfig(cameras, 224, (tower,), (16,), 512, width, hidden, 1, width // 128, width // 128, 1e-5, 1e4, 64, 7, 1)
    policy = OpenVLA(config).eval().requires_grad_(False)
    if block:
        policy.read_blocks_(block)
    stage = next(stage for stage in policy.stages() if stage.name == "prefill")
    with tempfile.TemporaryDirectory() as directory:
        file = export_stage(stage, {}, Path(directory) / "prefill.onnx")
        interface, length = StageInterface(stage.name, stage.inputs, stage.outputs), config.prompt_length
        stage = policy = None
        gc.collect()
        loaded = onnxruntime.load(file, interface, {"threads": 1})
        tensors = {spec.name: spec.zeros() for spec in (*interface.inputs, *interface.outputs)}
        for array in tensors.values():
            array.fill(0)  # so that its pages are there
        tensors["lang_mask"][:] = True
        call = loaded.bind(tensors, tensors)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        for begin in range(0, length, block or length):
            if block:
                tensors["begin"][...] = min(begin, length - block)
            call()
            if block:
                at = slice(int(tensors["begin"][0]), int(tensors["begin"][0]) + block)
                for kind in ("keys", "values"):
                    tensors[f"cache_{kind}"][..., at, :] = tensors[f"block_{kind}"]
        if not np.isfinite(tensors["scores"]).all():
            raise SystemExit("scores are not finite")
        return _status("VmHWM") - before, length


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[field].split()[0])


if __name__ == "__main__":
    main()
