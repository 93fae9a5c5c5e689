"""NF4: what a QLoRA adapter saw in the place of its base's weights (Dettmers et al., arXiv:2305.14314)."""

from __future__ import annotations

BLOCK = 64
# appendix E: quantiles of the normal distribution, zero among them, scaled to [-1, 1]
CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def nf4_rounded(weight):
    """A weight, any shape, rounded to NF4 and back: blocks of 64 in storage order, each scaled by its largest value.

    The paper's second quantization, of the scales, is left out: it moves what comes back by about a fiftieth of what
    the first does.

    Args:
        weight: float32 tensor.
    """
    import torch

    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).reshape(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    codes = torch.tensor(CODES, dtype=weight.dtype)
    nearest = torch.bucketize(blocks / scales.clamp_min(torch.finfo(weight.dtype).tiny), (codes[1:] + codes[:-1]) / 2)
    return (codes[nearest] * scales).flatten()[: flat.numel()].reshape(weight.shape)
