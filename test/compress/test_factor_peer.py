"""Decompositions of trained kernels err no more than those of TensorLy."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from vla_edge.compress.factor.cp import canonical
from vla_edge.compress.factor.tucker import tucker2

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def tensorly():
    return pytest.importorskip("tensorly")


@pytest.fixture(scope="module")
def kernels(tensorly) -> dict[str, np.ndarray]:
    """(O, ky, kx, C) of face detectors (MTCNN, Zhang et al., 2016), as facenet-pytorch carries them; of norm 1."""
    import torch

    package = find_spec("facenet_pytorch")
    if package is None:
        pytest.skip("facenet-pytorch is not installed, whose trained convolutions are decomposed")
    found = {}
    for net in ("rnet", "onet"):
        weights = torch.load(Path(package.submodule_search_locations[0]) / "data" / f"{net}.pt", weights_only=True)
        for name in ("conv2", "conv3"):
            kernel = np.moveaxis(weights[f"{name}.weight"].double().numpy(), 1, -1)
            found[f"{net}.{name}"] = kernel / np.linalg.norm(kernel)
    return found


@pytest.mark.parametrize("name", ["rnet.conv2", "onet.conv2", "onet.conv3"])
def test_tucker_errs_no_more_than_theirs(tensorly, kernels, name):
    from tensorly.decomposition import partial_tucker

    kernel = kernels[name].reshape(len(kernels[name]), -1, kernels[name].shape[-1])
    outputs, inputs = (size // 3 for size in kernel.shape[::2])
    into, out = tucker2(kernel, inputs, outputs)
    ours = 1 - np.square(np.tensordot(out, kernel @ into, (0, 0))).sum()
    (core, factors), _ = partial_tucker(kernel, rank=[outputs, inputs], modes=[0, 2], n_iter_max=50, tol=1e-7)
    theirs = np.square(kernel - tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 2])).sum()
    assert 0.05 < ours <= 1.0001 * theirs


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("name", ["rnet.conv2", "onet.conv2", "onet.conv3"])
def test_cp_errs_hardly_more_than_the_better_of_theirs(tensorly, kernels, name, share):
    from tensorly.decomposition import parafac

    kernel = kernels[name]
    rank = int(share * kernel.shape[-1])
    theirs = [
        np.square(kernel - tensorly.cp_to_tensor(parafac(kernel, rank, 200, init=init, random_state=0, tol=1e-8))).sum()
        for init in ("svd", "random")
    ]
    assert 0.05 < canonical(kernel, rank)[1] <= 1.02 * min(theirs)
