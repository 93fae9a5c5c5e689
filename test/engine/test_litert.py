"""LiteRT computes what a stage's file says, ahead of time and in XNNPACK."""

from __future__ import annotations

import pytest
from runtime_contract import RuntimeContract

pytestmark = pytest.mark.peers
pytest.importorskip("litert_torch", reason="litert-torch is not installed")


class TestLiteRT(RuntimeContract):
    NAME, SUFFIX, OTHER = "litert", "tflite", "other tensors"
