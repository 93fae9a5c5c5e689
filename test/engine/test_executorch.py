"""ExecuTorch computes what a stage's file says, ahead of time and in XNNPACK."""

from __future__ import annotations

import pytest
from runtime_contract import RuntimeContract

pytestmark = pytest.mark.peers
pytest.importorskip("executorch", reason="executorch is not installed")


class TestExecuTorch(RuntimeContract):
    NAME, SUFFIX, OTHER = "executorch", "pte", "other shapes"

    def test_products_are_xnnpacks(self, build):
        _, file, _ = build("int8")
        assert b"XnnpackBackend" in file.read_bytes()
