"""How hot this computer is and whether it holds its processors back, from what the kernel and Jetson's tegrastats tell."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

_TEGRA = re.compile(r"([A-Za-z_]\w*)@(-?\d+(?:\.\d+)?)C")
# Jetson's power sensors and sensors that are switched off report numbers like -256.
COLDEST, HOTTEST = -40.0, 150.0


@dataclass(frozen=True)
class Heat:
    """One reading.

    Attributes:
        celsius: of the hottest sensor; None where there is none.
        sensor: its name.
        throttled: processors are held back now, or were since the last reading.
    """

    celsius: float | None = None
    sensor: str = ""
    throttled: bool = False


class HeatSensors:
    """Reads hwmon, thermal zones, cooling devices and the processors' throttle counters, and tegrastats where it is.

    Args:
        root: of the file system, for tests.
        tegrastats: the program; looked for on the path when None, left out when "".
    """

    def __init__(self, root: str | Path = "/", tegrastats: str | None = None):
        classes = Path(root) / "sys" / "class"
        self._hwmon = sorted(classes.glob("hwmon/hwmon*/temp*_input"))
        self._zones = sorted(classes.glob("thermal/thermal_zone*/temp"))
        # On Jetson a cooling device that acts on a clock is how the kernel throttles; fans are none.
        self._coolers = [
            path / "cur_state" for path in sorted(classes.glob("thermal/cooling_device*"))
            if re.search("throttle|hot-surface|oc-event", _text(path / "type"))
        ]  # fmt: skip
        cpus = Path(root) / "sys" / "devices" / "system" / "cpu"
        self._counters = sorted(cpus.glob("cpu*/thermal_throttle/*_throttle_count"))
        self._count = self._throttle_count()
        self._tegra: dict[str, float] = {}
        self._process: subprocess.Popen | None = None
        program = shutil.which("tegrastats") if tegrastats is None else tegrastats
        if program:
            self._process = subprocess.Popen(
                [program, "--interval", "1000"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            threading.Thread(target=self._listen, name="tegrastats", daemon=True).start()

    def read(self) -> Heat:
        """Now."""
        found = {f"{_text(path.parent / 'name') or path.parent.name}.{path.name[:-6]}": path for path in self._hwmon}
        found |= {_text(path.parent / "type") or path.parent.name: path for path in self._zones}
        celsius = {name: value / 1000.0 for name, path in found.items() if (value := _number(path)) is not None}
        celsius = {name: value for name, value in (celsius | self._tegra).items() if COLDEST < value < HOTTEST}
        hottest = max(celsius, key=celsius.get, default="")
        before, self._count = self._count, self._throttle_count()
        throttled = self._count > before or any((_number(path) or 0) > 0 for path in self._coolers)
        return Heat(celsius.get(hottest), hottest, throttled)

    def close(self) -> None:
        """Ends tegrastats."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(5.0)
            self._process = None

    def _throttle_count(self) -> float:
        return sum(_number(path) or 0 for path in self._counters)

    def _listen(self) -> None:
        for line in self._process.stdout:
            self._tegra = tegrastats_temperatures(line)


def tegrastats_temperatures(line: str) -> dict[str, float]:
    """Sensor -> degrees Celsius, of one line of tegrastats ("... cpu@45.5C gpu@43C tj@46C ...")."""
    return {f"tegra.{name.lower()}": float(value) for name, value in _TEGRA.findall(line)}


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):  # a sensor that is asleep answers with an error
        return None
