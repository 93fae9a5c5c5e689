from __future__ import annotations

import time

import pytest

from vla_edge.serve.heat import Heat, HeatSensors, tegrastats_temperatures


def put(root, path: str, text) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


@pytest.fixture
def robot(tmp_path):
    """A computer with one sensor of each kind, files as the kernel writes them."""
    put(tmp_path, "sys/class/hwmon/hwmon0/name", "coretemp")
    put(tmp_path, "sys/class/hwmon/hwmon0/temp1_input", 61000)
    put(tmp_path, "sys/class/thermal/thermal_zone0/type", "tj-thermal")
    put(tmp_path, "sys/class/thermal/thermal_zone0/temp", 72500)
    put(tmp_path, "sys/class/thermal/cooling_device0/type", "pwm-fan")
    put(tmp_path, "sys/class/thermal/cooling_device0/cur_state", 3)
    put(tmp_path, "sys/class/thermal/cooling_device1/type", "cpu-throttle-alert")
    put(tmp_path, "sys/class/thermal/cooling_device1/cur_state", 0)
    put(tmp_path, "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", 4)
    return tmp_path


def test_the_hottest_sensor_is_named_and_a_fan_is_no_throttling(robot):
    sensors = HeatSensors(robot, tegrastats="")
    assert sensors.read() == Heat(72.5, "tj-thermal", False)
    put(robot, "sys/class/hwmon/hwmon0/temp1_input", 88000)
    assert sensors.read() == Heat(88.0, "coretemp.temp1", False)


def test_throttling_is_told_by_a_cooling_device_and_by_a_counter_that_grew(robot):
    sensors = HeatSensors(robot, tegrastats="")
    put(robot, "sys/class/thermal/cooling_device1/cur_state", 1)
    assert sensors.read().throttled
    put(robot, "sys/class/thermal/cooling_device1/cur_state", 0)
    assert not sensors.read().throttled
    put(robot, "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", 5)
    assert sensors.read().throttled and not sensors.read().throttled


def test_sensors_that_are_off_asleep_or_absent_say_nothing(robot, tmp_path_factory):
    put(robot, "sys/class/thermal/thermal_zone0/temp", -256000)
    put(robot, "sys/class/hwmon/hwmon0/temp1_input", "")
    assert HeatSensors(robot, tegrastats="").read() == Heat()
    assert HeatSensors(tmp_path_factory.mktemp("bare"), tegrastats="").read() == Heat()


def test_tegrastats_is_read_while_it_runs_and_ended(tmp_path):
    line = "RAM 3181/7620MB (lfb 4x4MB) CPU [2%@729,off] cpu@45.5C soc2@43C gpu@91.25C tj@49C VDD_IN 4973mW/4973mW"
    assert tegrastats_temperatures(line) == {
        "tegra.cpu": 45.5, "tegra.soc2": 43.0, "tegra.gpu": 91.25, "tegra.tj": 49.0
    }  # fmt: skip
    program = tmp_path / "tegrastats"
    program.write_text(f"#!/bin/sh\nwhile true; do echo '{line}'; sleep 0.1; done\n")
    program.chmod(0o755)
    sensors = HeatSensors(tmp_path / "bare", tegrastats=str(program))
    end = time.monotonic() + 10.0
    while sensors.read().celsius is None and time.monotonic() < end:
        time.sleep(0.02)
    assert sensors.read() == Heat(91.25, "tegra.gpu", False)
    process = sensors._process
    sensors.close()
    assert process.poll() is not None
