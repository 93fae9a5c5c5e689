"""The engine that a parameter names: a bundle, the checkpoint itself in full precision, or a policy server."""

from __future__ import annotations

from pathlib import Path

from vla_edge.engine.remote import is_address
from vla_edge.nodes.params import ParameterError


def open_runner(directory: str, num_steps: int | None, threads: int | None):
    """A Runner, not yet warmed up.

    Args:
        directory: bundle, checkpoint (which needs torch), or the address of a policy server (ws://host:port).
        num_steps: flow steps; its own when None.
        threads: of a bundle's stages; as measured at build time when None.

    Raises:
        ParameterError, BundleError, CheckpointError, RunnerError, RemoteError: there is none, or it cannot be run here.
    """
    from vla_edge.engine.runner import Runner

    if not directory:
        raise ParameterError("parameter bundle is '', allowed is the directory of an engine bundle; build one first")
    if is_address(directory):
        from vla_edge.engine.remote.client import RemoteRunner

        return RemoteRunner(directory)
    if (Path(directory) / "config.json").is_file():
        return Runner.from_checkpoint(directory, num_steps)
    return Runner.from_bundle(directory, num_steps, threads)
