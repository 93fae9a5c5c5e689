"""The parameters of the VLA node."""

from __future__ import annotations

from vla_edge.nodes.params import Parameter
from vla_edge.serve.policies import make_policy

PARAMETERS = (
    Parameter("bundle", "", "engine bundle, or a checkpoint to serve in full precision (needs torch); set it while "
              "serving to exchange it between two chunks"),
    Parameter("lighter_bundles", [], "bundles to step down to when the engine is too slow or the computer too hot, "
              "lightest last"),
    Parameter("inference", "asynchronous", "inference policy, with its options where wanted; see doc/serving.md",
              validate=make_policy),
    Parameter("rate", 6.0, "chunks per second", 0.1, 100.0),
    Parameter("num_steps", 0, "flow steps per chunk; 0 takes the bundle's", 0, 100),
    Parameter("threads", 1, "threads of the engine; 0 lets it choose", 0, 256),
    Parameter("seed", 0, "of the policy's noise, together with each observation's stamp", 0, 2**62),
    Parameter("image_transport", "raw", "form in which images are subscribed to", choices=("raw", "compressed")),
    Parameter("max_skew", 0.1, "s between a frame and the joint state or further frames used with it", 0.001, 10.0),
    Parameter("max_age", 0.5, "s of silence after which a source is stale", 0.01, 60.0),
    Parameter("frozen_after", 0.0, "s of one and the same picture after which a camera is stale; 0 never looks", 0.0, 60.0),
    Parameter("hot", 90.0, "degrees Celsius at which a lighter bundle takes over", 30.0, 120.0),
    Parameter("cool", 80.0, "degrees Celsius below which the heavier one may come back", 20.0, 119.0),
    Parameter("derate_after", 3.0, "s of heat or slowness before a lighter bundle takes over", 0.0, 600.0),
    Parameter("recover_after", 30.0, "s of neither before the heavier one comes back", 0.0, 3600.0),
    Parameter("heartbeat_period", 0.2, "s between beats of ~/heartbeat", 0.05, 10.0),
    Parameter("stuck_after", 5.0, "s of one inference after which the heartbeat stops", 0.1, 600.0),
    Parameter("start_on_activate", True, "serve at once; otherwise wait for ~/start"),
    Parameter("priority", 10, "SCHED_FIFO priority asked for, to be below the controller's; 0 for none", 0, 98),
    Parameter("lock_memory", False, "keep the engine's pages in memory; needs the right to lock them all"),
    Parameter("stay_awake", True, "keep idle processors out of sleep states that are slow to leave; costs power"),
    Parameter("status_period", 1.0, "s between diagnostics", 0.1, 60.0),
)
