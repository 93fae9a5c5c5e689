"""Whole heads and feed-forward channels taken out of a policy, so that every runtime is faster and nothing is sparse.

What goes is what the layers behind it would miss least: the energy that a unit's inputs bring to their outputs over the
calibration data. What stays is then refitted to the outputs there were, by least squares (as SliceGPT's and ZipLM's
compensation; Kurtic et al., 2023, arXiv:2302.04089).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from vla_edge.compress.statistics import InputStatistics

_DAMPING = 1e-3


def shrink(units: Iterable, shares: Mapping[str, float], statistics: Mapping[int, InputStatistics]) -> dict[str, int]:
    """Take units out of a policy, in place.

    Args:
        units: `policy.blocks.Units`, with every layer in one of each side at most.
        shares: kind -> share of each block's units to take out; at least one unit always stays.
        statistics: id of each reading layer -> what reaches it.

    Returns:
        kind -> units taken out in all.
    """
    gone = dict.fromkeys(shares, 0)
    for block in units:
        count = min(round(shares.get(block.kind, 0.0) * block.count), block.count - 1)
        if count <= 0:
            continue
        score = np.zeros(block.count)
        for layer, width in block.readers:
            score += _energy(layer, width, statistics[id(layer)].second_moment)
        keep = np.sort(np.argsort(score, kind="stable")[count:])
        for layer, width in block.readers:
            _keep_inputs(layer, _places(keep, width), statistics[id(layer)].second_moment)
        for layer, width in block.makers:
            _keep_outputs(layer, _places(keep, width))
        gone[block.kind] += count
    return gone


def _energy(layer, width: int, moment: np.ndarray) -> np.ndarray:
    """(units,) mean square of what each unit alone brings to the layer's outputs."""
    weight = _numpy(layer)
    return np.array(
        [
            np.einsum(
                "oi,ij,oj->", weight[:, i : i + width], moment[i : i + width, i : i + width], weight[:, i : i + width]
            )
            for i in range(0, weight.shape[1], width)
        ]
    )


def _places(keep: np.ndarray, width: int) -> np.ndarray:
    return (keep[:, None] * width + np.arange(width)).ravel()


def _keep_inputs(layer, places: np.ndarray, moment: np.ndarray) -> None:
    moment = np.asarray(moment, np.float64)
    inside = moment[np.ix_(places, places)]
    inside[np.diag_indices_from(inside)] += _DAMPING * max(float(np.diag(inside).mean()), 1e-30)
    # the part that stays plus what it can say about the part that goes; damping pulls towards the weights there were
    weight = _numpy(layer).astype(np.float64)
    rest = np.setdiff1d(np.arange(weight.shape[1]), places)
    correction = np.linalg.solve(inside, moment[np.ix_(places, rest)] @ weight[:, rest].T).T
    _replace(layer, weight[:, places] + correction, None if layer.bias is None else layer.bias)
    layer.in_features = len(places)


def _keep_outputs(layer, places: np.ndarray) -> None:
    _replace(layer, _numpy(layer)[places], None if layer.bias is None else layer.bias[places.tolist()])
    layer.out_features = len(places)


def _replace(layer, weight: np.ndarray, bias) -> None:
    import torch

    trained = layer.weight.requires_grad
    layer.weight = torch.nn.Parameter(torch.from_numpy(np.array(weight, np.float32)), trained)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias.detach().clone(), trained)


def _numpy(layer) -> np.ndarray:
    return layer.weight.detach().cpu().float().numpy()
