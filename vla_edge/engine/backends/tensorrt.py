"""TensorRT: builds on the GPU that runs the engine. See `tensorrt_common`."""

from __future__ import annotations

import tensorrt as api

from vla_edge.engine.backends.tensorrt_common import TensorRt

_backend = TensorRt("tensorrt", api, ahead=False)
version, precisions, candidates = _backend.version, _backend.precisions, _backend.candidates
build, load = _backend.build, _backend.load
runs_here, portable = _backend.runs_here, _backend.portable
gains_by_reduced_range = _backend.gains_by_reduced_range
