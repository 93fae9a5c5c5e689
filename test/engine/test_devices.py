"""Descriptions of devices: what is taken, and what is wrong said by name."""

from __future__ import annotations

import pytest
import yaml

from vla_edge.engine.devices import DeviceError, device_names, load_device, parse_device
from vla_edge.resources import share_directory

SHIPPED = [name for name in device_names() if name != "local"]


@pytest.fixture
def plain():
    path = share_directory() / "config" / "devices" / "agx-orin-64gb.yaml"
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_devices_load_and_tell_their_sources(name):
    device = load_device(name)
    assert device.name == name and device.sources
    assert all(efficiency.compute for efficiency in device.runtimes.values())
    assert device.model().rate(device.floats) <= 1e12 * device.peak_tera[device.floats]


def test_the_devices_people_have_are_there():
    wanted = {"agx-orin-64gb", "agx-orin-32gb", "orin-nx-16gb", "agx-thor", "rtx-4090", "h200", "local"}
    assert wanted <= set(device_names())


def test_a_file_of_ones_own_is_taken_and_may_lean_on_a_shipped_device(plain, tmp_path):
    del plain["runtimes"]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**plain, "name": "mine", "bandwidth_gb_s": 100.0, "runtimes_of": "agx-orin-64gb"}))
    mine, orin = load_device(path), load_device("agx-orin-64gb")
    assert mine.name == "mine" and mine.runtimes == orin.runtimes
    assert mine.model("fused").bytes_per_s == 1e11


def test_unknown_devices_name_the_nearest(tmp_path):
    with pytest.raises(DeviceError, match="did you mean 'agx-orin-64gb'"):
        load_device("agx-orin-64")
    with pytest.raises(DeviceError, match="there is no device file"):
        load_device(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(DeviceError, match="must be YAML"):
        load_device(tmp_path / "broken.yaml")
    with pytest.raises(DeviceError, match="no runtime 'vllm'; choose one of fused"):
        load_device("agx-orin-64gb").model("vllm")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"bandwith_gb_s": 1}, "did you mean 'bandwidth_gb_s'"),
        ({"memory_gb": -1}, "memory_gb is -1, allowed is above 0"),
        ({"memory_gb": True}, "memory_gb is True"),
        ({"bandwidth_gb_s": float("nan")}, "bandwidth_gb_s is nan"),
        ({"peak_tera": {"int7": 3}}, "types are float32"),
        ({"floats": "fp8"}, "for which peak_tera has no value"),
        ({"runtime": "magic"}, "choose one of fused"),
        ({"runtimes": {"fused": {"compute": {"int8": 1.5}, "bandwidth": 1}}, "runtime": "fused"}, "allowed is above 0"),
        ({"runtimes": {"fused": {"compute": {}}}, "runtime": "fused"}, "lacks bandwidth"),
        ({"runtimes": {"fused": {"compute": {}, "bandwidth": 1, "kernel_us": -2}}, "runtime": "fused"}, "us is -2"),
        ({"runtimes": {"fused": {"compute": {}, "bandwidth": 1, "like": "x"}}, "runtime": "fused"}, "like is 'x'"),
        ({"runtimes": [1]}, "must map keys to values"),
    ],
)
def test_what_is_wrong_in_a_description_is_said(plain, changes, words):
    with pytest.raises(DeviceError, match=words):
        parse_device({**plain, **changes}, "here")


def test_a_description_without_what_it_needs_is_refused(plain):
    del plain["peak_tera"]
    with pytest.raises(DeviceError, match="here lacks peak_tera"):
        parse_device(plain, "here")
    with pytest.raises(DeviceError, match="must map keys"):
        parse_device("orin", "here")
