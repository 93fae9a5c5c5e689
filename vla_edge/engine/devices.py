"""Computers that engines are planned for: config/devices by name, a file of the same form, or `local`, this computer.

A description says what the hardware can do (operations per second by type, memory and its bandwidth), and for each
runtime what share of that kernels reach. The shares are solved from published latencies (`plan_score`); `local` is
measured.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vla_edge.engine.cost import CostModel, Roofline
from vla_edge.engine.described import entries, mapping
from vla_edge.resources import share_directory
from vla_edge.types import VlaEdgeError

LOCAL = "local"
TYPES = ("float32", "float16", "bfloat16", "int8", "fp8", "nvfp4")


class DeviceError(VlaEdgeError):
    """A device that is unknown, or a description of one with something missing, misspelled or impossible."""


@dataclass(frozen=True)
class Efficiency:
    """What a runtime makes of the hardware.

    Attributes:
        compute: type -> share of the peak. bandwidth: share of the memory's.
        kernel_us: between kernels. dispatch_us: to launch one from the host; 0 where a graph is replayed.
        weight_only: share of the products' speed left where 4-bit weights are unpacked for float inputs.
        like: runtime whose numbers it has where no published row tells otherwise.
    """

    compute: Mapping[str, float]
    bandwidth: float
    kernel_us: float = 0.0
    dispatch_us: float = 0.0
    weight_only: float = 1.0
    like: str = ""

    def check(self, where: str) -> None:
        """Raises DeviceError when a number is impossible."""
        shares = {"bandwidth": self.bandwidth, "weight_only": self.weight_only}
        shares |= {f"compute.{name}": share for name, share in self.compute.items()}
        for name, share in shares.items():
            if not _is_number(share) or not 0 < share <= 1:
                raise DeviceError(f"{where}: {name} is {share!r}, allowed is above 0, to 1")
        for name in ("kernel_us", "dispatch_us"):
            if not _is_number(getattr(self, name)) or getattr(self, name) < 0:
                raise DeviceError(f"{where}: {name} is {getattr(self, name)!r}, allowed is 0 or above")


@dataclass(frozen=True)
class Device:
    """One computer.

    Attributes:
        name, title: short and long.
        peak_tera: type -> 10^12 dense operations per s. bandwidth_gb_s, memory_gb: of its memory.
        floats: type that floats are multiplied in.
        runtime: that is planned for unless another is asked for. runtimes: name -> efficiency.
        capability: CUDA compute capability times ten, 0 without a GPU. tensorrt: version its system brings.
        reserved_gb: memory that is not for an engine: the system, contexts, the rest of the robot's software.
        host_ms_per_camera: of the host for one picture: decode, resize, copy.
        sources: of the numbers. source: file or place of the description.
        measured: cost model of a calibrated computer, in the place of `runtimes`.
    """

    name: str
    title: str
    peak_tera: Mapping[str, float]
    bandwidth_gb_s: float
    memory_gb: float
    floats: str
    runtime: str
    runtimes: Mapping[str, Efficiency]
    capability: int = 0
    tensorrt: str = ""
    reserved_gb: float = 2.0
    host_ms_per_camera: float = 0.0
    sources: tuple[str, ...] = ()
    measured: CostModel | None = None

    @property
    def bytes_for_engines(self) -> float:
        return 1e9 * (self.memory_gb - self.reserved_gb)

    def model(self, runtime: str | None = None) -> CostModel:
        """The cost model of `runtime`, or of the device's own.

        Raises:
            DeviceError: the device has none of that name.
        """
        name = runtime or self.runtime
        if name not in self.runtimes:
            raise DeviceError(f"{self.name} has no runtime {name!r}; choose one of {', '.join(self.runtimes)}")
        return self.measured or self._roofline(self.runtimes[name])

    def _roofline(self, runtime: Efficiency) -> Roofline:
        return Roofline(
            peak={name: 1e12 * tera for name, tera in self.peak_tera.items()},
            compute=runtime.compute,
            bytes_per_s=1e9 * self.bandwidth_gb_s,
            bandwidth=runtime.bandwidth,
            floats=self.floats,
            kernel_s=1e-6 * runtime.kernel_us,
            dispatch_s=1e-6 * runtime.dispatch_us,
            weight_only=runtime.weight_only,
        )


def device_names() -> list[str]:
    """Those that can be asked for by name."""
    return [*sorted(path.stem for path in _directory().glob("*.yaml")), LOCAL]


def load_device(name: str | Path, recalibrate: bool = False, progress=None) -> Device:
    """The device of that name, described by a file, or this computer, which is measured once.

    Args:
        recalibrate: measure this computer again. progress: called with the fraction done and the step.

    Raises:
        DeviceError: there is none, or its description is not valid.
    """
    import yaml

    if str(name) == LOCAL:
        from vla_edge.engine.calibrate_device import local_device

        return local_device(recalibrate, progress)
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = _directory() / f"{name}.yaml"
        if not path.is_file():
            nearest = difflib.get_close_matches(str(name), device_names(), n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(device_names())}"
            raise DeviceError(f"there is no device {str(name)!r}; {hint}")
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = ", ".join(device_names())
        raise DeviceError(f"there is no device file {path}; give a file or one of {names}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DeviceError(f"device {path} cannot be read: {' '.join(str(error).split())}; it must be YAML") from error
    return parse_device(plain, str(path))


def parse_device(plain, where: str) -> Device:
    """A device from plain types. `runtimes_of` names a shipped device whose efficiencies are taken.

    Raises:
        DeviceError: an unknown key, with the nearest valid one, a missing one, or an impossible value.
    """
    if isinstance(plain, Mapping) and "runtimes_of" in plain:
        rest = {key: value for key, value in plain.items() if key != "runtimes_of"}
        like = load_device(plain["runtimes_of"])
        return _checked(replace(_parsed({**rest, "runtimes": {}}, where), runtimes=like.runtimes), where)
    return _checked(_parsed(plain, where), where)


def _parsed(plain, where: str) -> Device:
    values = entries(Device, plain, where, DeviceError, internal=("measured",))
    values["runtimes"] = {
        name: Efficiency(**entries(Efficiency, entry, f"{where}, runtime {name}", DeviceError))
        for name, entry in mapping(values["runtimes"], f"{where}, runtimes", DeviceError).items()
    }
    values["sources"] = tuple(values.get("sources", ()))
    return Device(**values)


def _checked(device: Device, where: str) -> Device:
    for name in ("bandwidth_gb_s", "memory_gb"):
        if not _is_number(getattr(device, name)) or getattr(device, name) <= 0:
            raise DeviceError(f"{where}: {name} is {getattr(device, name)!r}, allowed is above 0")
    for kind, tera in mapping(device.peak_tera, f"{where}, peak_tera", DeviceError).items():
        if kind not in TYPES or not _is_number(tera) or tera <= 0:
            raise DeviceError(f"{where}: peak_tera {kind} is {tera!r}; types are {', '.join(TYPES)}, values above 0")
    if device.floats not in device.peak_tera:
        raise DeviceError(f"{where}: floats is {device.floats!r}, for which peak_tera has no value")
    if device.runtime not in device.runtimes:
        raise DeviceError(f"{where}: runtime is {device.runtime!r}; choose one of {', '.join(device.runtimes)}")
    for name, runtime in device.runtimes.items():
        runtime.check(f"{where}, runtime {name}")
        if runtime.like and runtime.like not in device.runtimes:
            raise DeviceError(f"{where}, runtime {name}: like is {runtime.like!r}, which it does not have")
    return device


def _directory() -> Path:
    return share_directory() / "config" / "devices"


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
