"""Pickled weights (.bin, .pt, .pth, .ckpt) -> safetensors, without running what else a pickle may hold.

    python tools/convert_weights.py pytorch_model.bin                       # writes pytorch_model.safetensors
    python tools/convert_weights.py pytorch_model.bin model.safetensors

PyTorch's restricted reader builds tensors and plain containers and refuses everything else. Tensors that share memory
are written once each.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pickle", type=Path)
    parser.add_argument("output", type=Path, nargs="?", help="beside the pickle when not given")
    arguments = parser.parse_args()
    target = arguments.output or arguments.pickle.with_suffix(".safetensors")
    if target.exists():
        raise SystemExit(f"{target} exists and is not replaced; choose another output")
    print(f"{convert(arguments.pickle, target)} tensors in {target}")


def convert(source: Path, target: Path) -> int:
    """The number of tensors written."""
    from zipfile import is_zipfile

    import torch
    from safetensors.torch import save_file

    content = torch.load(source, map_location="cpu", weights_only=True, mmap=is_zipfile(source))
    content = content.get("state_dict", content)
    tensors = {name: value.contiguous().clone() for name, value in content.items() if isinstance(value, torch.Tensor)}
    partial = target.with_name(f".{target.name}.partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.rename(target)
    return len(tensors)


if __name__ == "__main__":
    main()
