from __future__ import annotations

import numpy as np
import pytest
from fake_engine import FakeEngine, observation

from vla_edge.serve.inference_policy import InferencePolicyError
from vla_edge.serve.served import ServedEngine


class Engine(FakeEngine):
    spec = None

    def description(self):
        return {"name": "fake"}


def test_over_a_recording_a_policy_gives_the_chunks_it_would_have_published():
    engine = Engine()
    served = ServedEngine(engine, "real_time_chunking", delay_s=0.2)
    first = served.infer(observation(1.0)).chunk
    assert engine.asked[0][1] is None and first.stamp_ns == 10**9
    served.infer(observation(1.4, (0.1, 0.1)))
    assert np.count_nonzero(engine.asked[1][1].weights == 1.0) == 4
    served.infer(observation(0.2))  # another recording, or another stretch of it
    assert engine.asked[2][1] is None
    assert served.description() == {"name": "fake", "inference": "real_time_chunking"}


def test_another_seed_is_another_robot():
    engine = Engine()
    served = ServedEngine(engine, "real_time_chunking")
    served.infer(observation(1.0), seed=0)
    served.infer(observation(1.2, (0.05, 0.05)), seed=1)
    assert engine.asked[1][1] is None


def test_what_it_cannot_do_is_refused():
    with pytest.raises(InferencePolicyError, match="did you mean"):
        ServedEngine(Engine(), "sinchronous")
    with pytest.raises(ValueError, match="draws its own noise"):
        ServedEngine(Engine(), "asynchronous").infer(observation(0.0), noise=np.zeros(1))
