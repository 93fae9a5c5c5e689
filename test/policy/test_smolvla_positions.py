"""Patches read the rows of a position table that transformers gives them, and ours read alike everywhere."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from vla_edge.policy.smolvla_positions import read_table, spare_table


def table(side: int) -> torch.Tensor:
    """(side * side, 2): each row says its own row and column."""
    return torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()


@pytest.mark.parametrize("grid", [2, 3, 12, 16, 24, 32])
def test_in_float32_a_table_of_the_images_size_is_read_one_row_and_column_off(grid):
    rows = [max(i - 1, 0) for i in range(grid)]
    expected = torch.tensor([(r, c) for r in rows for c in rows], dtype=torch.float32)
    assert torch.equal(read_table(table(grid), grid, torch.float32), expected)


@pytest.mark.parametrize("grid", [2, 4, 8, 16, 32, 64])
def test_in_bfloat16_powers_of_two_are_read_in_order(grid):
    assert torch.equal(read_table(table(grid), grid, torch.bfloat16), table(grid))


@pytest.mark.parametrize("dtype, largest", [(torch.float32, 100), (torch.bfloat16, 26)])
def test_a_table_with_a_spare_row_and_column_is_read_in_order(dtype, largest):
    for grid in range(1, largest + 1):
        positions = torch.randn(grid**2, 3)
        stored = spare_table(positions, grid)
        assert len(stored) == (grid + 1) ** 2
        assert torch.equal(read_table(stored, grid, dtype), positions), grid


@pytest.mark.parametrize("grid, side", [(6, 10), (7, 9), (5, 12), (3, 4), (10, 6)])
def test_a_table_of_another_size_is_read_by_proportion(grid, side):
    exact = [int(Fraction(i * side, grid)) for i in range(grid)]
    # where i * side / grid is whole, float32 falls just below it; nothing else differs
    rows = [row - (i > 0 and i * side % grid == 0) for i, row in enumerate(exact)]
    expected = torch.tensor([(r, c) for r in rows for c in rows], dtype=torch.float32)
    assert torch.equal(read_table(table(side), grid, torch.float32), expected)


def test_a_table_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match="12 positions is not square"):
        read_table(torch.zeros(12, 4), 3, torch.float32)
