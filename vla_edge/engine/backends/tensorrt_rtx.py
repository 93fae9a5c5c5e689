"""TensorRT for RTX: builds ahead of time for GPUs that are not here. See `tensorrt_common`."""

from __future__ import annotations

import tensorrt_rtx as api

from vla_edge.engine.backends.tensorrt_common import TensorRt

_backend = TensorRt("tensorrt_rtx", api, ahead=True)
version, precisions, candidates = _backend.version, _backend.precisions, _backend.candidates
build, load, runs_here = _backend.build, _backend.load, _backend.runs_here
gains_by_reduced_range = _backend.gains_by_reduced_range
