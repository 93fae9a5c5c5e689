import numpy as np
import pytest
import torch

from vla_edge.learn.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 20), (4, 30, 5)])
def test_orthogonalizing_keeps_the_directions_and_evens_out_the_singular_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = orthogonalize(matrices).numpy()
    u, _, vt = np.linalg.svd(matrices.numpy(), full_matrices=False)
    inner = u.transpose(0, 2, 1) @ got @ vt.transpose(0, 2, 1)
    values = np.diagonal(inner, axis1=1, axis2=2)
    assert (values > 0.6).all() and (values < 1.3).all()
    np.testing.assert_allclose(inner - values[:, :, None] * np.eye(values.shape[1]), 0, atol=1e-9)


def test_a_matrix_finds_its_target():
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(12, 20, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(12, 20))
    optimizer = Muon([weight], lr=0.2)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 200)
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert (weight - target).norm() < 0.05 * target.norm()


def test_decay_shrinks_and_parameters_without_a_gradient_stay():
    weight, other = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    optimizer = Muon([weight, other], lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros(3, 3)
    optimizer.step()
    assert torch.allclose(weight, torch.full((3, 3), 0.95)) and torch.equal(other, torch.ones(3, 3))
