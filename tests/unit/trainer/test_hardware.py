"""Laws of the table of accelerators."""

import pytest

from trainer.hardware import ACCELERATORS, by_device_name


def test_every_device_is_found_by_its_names_and_by_no_others():
    for accelerator in ACCELERATORS.values():
        for name in accelerator.device_names:
            assert by_device_name(name) is accelerator
            assert by_device_name(f" {name.upper()} ") is accelerator
            assert by_device_name(name.removeprefix("NVIDIA ")) is accelerator
    names = [name for each in ACCELERATORS.values() for name in each.device_names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100_80gb"),
        ("A100-SXM4-40GB", "a100_40gb"),
        ("NVIDIA A100 80GB PCIe", "a100_80gb_pcie"),
        ("NVIDIA H100 80GB HBM3", "h100_80gb"),
        ("NVIDIA H100 PCIe", "h100_80gb_pcie"),
        ("Tesla V100-SXM2-32GB", "v100_32gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090_24gb"),
        ("AMD Instinct MI300X", "mi300x_192gb"),
    ],
)
def test_names_that_drivers_give(name, key):
    assert by_device_name(name) is ACCELERATORS[key]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA A10G",
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GB200",
        "",
        "cpu",
    ],
)
def test_relatives_with_other_figures_are_not_taken_for_them(name):
    assert by_device_name(name) is None


def test_figures_are_in_their_order():
    for each in ACCELERATORS.values():
        assert each.half_tflops >= (each.tf32_tflops or 0.0)
        assert (each.tf32_tflops or each.half_tflops) >= each.fp32_tflops
        assert each.memory_gb_per_s > (each.link_gb_per_s or 0.0)
        assert (each.link_gb_per_s or each.memory_gb_per_s) > (each.network_gb_per_s or 0.0)
        assert each.half_tflops / each.tdp_w < 3.0
