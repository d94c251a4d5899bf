"""Accelerators and what their makers say of them, without torch.

Peaks are of dense matrix products: data sheets of Ampere and later print twice as much, for
sparse ones. Links and networks are in one direction: data sheets print the sum of both.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One device as a process sees it."""

    name: str
    """As its maker calls it."""
    device_names: tuple[str, ...]
    """What drivers call it."""
    half_tflops: float
    """Peak in bf16 and fp16 with sums in fp32."""
    has_bf16: bool = True
    """Else `half_tflops` is fp16's alone."""
    tf32_tflops: float | None
    """Peak of fp32 products that are rounded to tf32; None where there is no such thing."""
    fp32_tflops: float
    """Peak in fp32."""
    memory_gib: float
    """Memory; drivers show up to 1 % less."""
    memory_gb_per_s: float
    """Bandwidth of its memory."""
    link_gb_per_s: float | None
    """To all others of its node together, in one direction: NVLink, Infinity Fabric, or PCIe where
    there is no other; None where it depends on which other."""
    network_gb_per_s: float | None
    """Its share of the node's network in the reference system; None where there is none."""
    tdp_w: float
    """Most that it draws over time."""


def by_device_name(name: str) -> Accelerator | None:
    """Find a device by what `torch.cuda.get_device_name` or NVML calls it.

    Variants with other figures (A10G, H100 NVL, a part of a device under MIG) are not found.
    """
    return _BY_DEVICE_NAME.get(_plain(name))


def _plain(name: str) -> str:
    """Old drivers leave out the maker."""
    return " ".join(name.casefold().split()).removeprefix("nvidia ")


# NVIDIA V100 data sheet; DGX-1 data sheet: 4 x 100 Gb/s for 8 GPUs.
_V100 = Accelerator(
    name="NVIDIA V100 SXM2 32GB",
    device_names=("Tesla V100-SXM2-32GB",),
    half_tflops=125.0,
    has_bf16=False,
    tf32_tflops=None,
    fp32_tflops=15.7,
    memory_gib=32.0,
    memory_gb_per_s=900.0,
    link_gb_per_s=150.0,
    network_gb_per_s=6.25,
    tdp_w=300.0,
)
# NVIDIA A100 data sheet; DGX A100 data sheet: 8 x 200 Gb/s for 8 GPUs.
_A100 = Accelerator(
    name="NVIDIA A100 SXM4 80GB",
    device_names=("NVIDIA A100-SXM4-80GB",),
    half_tflops=312.0,
    tf32_tflops=156.0,
    fp32_tflops=19.5,
    memory_gib=80.0,
    memory_gb_per_s=2039.0,
    link_gb_per_s=300.0,
    network_gb_per_s=25.0,
    tdp_w=400.0,
)
# NVIDIA H100 data sheet; DGX H100 data sheet: 8 x 400 Gb/s for 8 GPUs.
_H100 = Accelerator(
    name="NVIDIA H100 SXM5 80GB",
    device_names=("NVIDIA H100 80GB HBM3",),
    half_tflops=989.0,
    tf32_tflops=494.0,
    fp32_tflops=67.0,
    memory_gib=80.0,
    memory_gb_per_s=3350.0,
    link_gb_per_s=450.0,
    network_gb_per_s=50.0,
    tdp_w=700.0,
)
# NVIDIA H100 data sheet, the PCIe card.
_H100_PCIE = Accelerator(
    name="NVIDIA H100 PCIe 80GB",
    device_names=("NVIDIA H100 PCIe",),
    half_tflops=756.0,
    tf32_tflops=378.0,
    fp32_tflops=51.0,
    memory_gib=80.0,
    memory_gb_per_s=2000.0,
    link_gb_per_s=64.0,
    network_gb_per_s=None,
    tdp_w=350.0,
)
# NVIDIA Blackwell architecture technical brief, HGX B200; DGX B200 user guide: 1,440 GB and
# 8 x 400 Gb/s for 8 GPUs.
_B200 = Accelerator(
    name="NVIDIA B200 SXM 180GB",
    device_names=("NVIDIA B200",),
    half_tflops=2250.0,
    tf32_tflops=1100.0,
    fp32_tflops=80.0,
    memory_gib=180.0,
    memory_gb_per_s=8000.0,
    link_gb_per_s=900.0,
    network_gb_per_s=50.0,
    tdp_w=1000.0,
)
# NVIDIA L40S data sheet.
_L40S = Accelerator(
    name="NVIDIA L40S 48GB",
    device_names=("NVIDIA L40S",),
    half_tflops=362.0,
    tf32_tflops=183.0,
    fp32_tflops=91.6,
    memory_gib=48.0,
    memory_gb_per_s=864.0,
    link_gb_per_s=32.0,
    network_gb_per_s=None,
    tdp_w=350.0,
)
# NVIDIA A10 data sheet.
_A10 = Accelerator(
    name="NVIDIA A10 24GB",
    device_names=("NVIDIA A10",),
    half_tflops=125.0,
    tf32_tflops=62.5,
    fp32_tflops=31.2,
    memory_gib=24.0,
    memory_gb_per_s=600.0,
    link_gb_per_s=32.0,
    network_gb_per_s=None,
    tdp_w=150.0,
)
# NVIDIA Ada GPU architecture white paper. Sums in fp16 would make it twice as fast.
_RTX4090 = Accelerator(
    name="NVIDIA GeForce RTX 4090 24GB",
    device_names=("NVIDIA GeForce RTX 4090",),
    half_tflops=165.2,
    tf32_tflops=82.6,
    fp32_tflops=82.6,
    memory_gib=24.0,
    memory_gb_per_s=1008.0,
    link_gb_per_s=32.0,
    network_gb_per_s=None,
    tdp_w=450.0,
)
# Half of AMD's data sheet: each of the two dies is a device. HPE Cray EX235a, the node of Frontier:
# 4 x 200 Gb/s for 8 dies.
_MI250X = Accelerator(
    name="AMD Instinct MI250X, one die, 64GB",
    device_names=("AMD Instinct MI250X",),
    half_tflops=191.5,
    tf32_tflops=None,
    fp32_tflops=47.9,
    memory_gib=64.0,
    memory_gb_per_s=1638.0,
    link_gb_per_s=None,
    network_gb_per_s=12.5,
    tdp_w=280.0,
)
# AMD Instinct MI300X data sheet: 7 links of 64 GB/s, one to each other of its platform.
_MI300X = Accelerator(
    name="AMD Instinct MI300X 192GB",
    device_names=("AMD Instinct MI300X",),
    half_tflops=1307.4,
    tf32_tflops=653.7,
    fp32_tflops=163.4,
    memory_gib=192.0,
    memory_gb_per_s=5300.0,
    link_gb_per_s=448.0,
    network_gb_per_s=None,
    tdp_w=750.0,
)

ACCELERATORS: Mapping[str, Accelerator] = MappingProxyType(
    {
        "v100_32gb": _V100,
        "a100_40gb": replace(
            _A100,
            name="NVIDIA A100 SXM4 40GB",
            device_names=("NVIDIA A100-SXM4-40GB",),
            memory_gib=40.0,
            memory_gb_per_s=1555.0,
        ),
        "a100_80gb": _A100,
        "a100_40gb_pcie": replace(
            _A100,
            name="NVIDIA A100 PCIe 40GB",
            device_names=("NVIDIA A100-PCIE-40GB",),
            memory_gib=40.0,
            memory_gb_per_s=1555.0,
            link_gb_per_s=32.0,
            network_gb_per_s=None,
            tdp_w=250.0,
        ),
        "a100_80gb_pcie": replace(
            _A100,
            name="NVIDIA A100 PCIe 80GB",
            device_names=("NVIDIA A100 80GB PCIe",),
            memory_gb_per_s=1935.0,
            link_gb_per_s=32.0,
            network_gb_per_s=None,
            tdp_w=300.0,
        ),
        "h100_80gb": _H100,
        "h100_80gb_pcie": _H100_PCIE,
        # NVIDIA H200 data sheet; DGX H200 has the network of DGX H100.
        "h200_141gb": replace(
            _H100,
            name="NVIDIA H200 SXM 141GB",
            device_names=("NVIDIA H200",),
            memory_gib=141.0,
            memory_gb_per_s=4800.0,
        ),
        "b200_180gb": _B200,
        "l40s_48gb": _L40S,
        "a10_24gb": _A10,
        "rtx4090_24gb": _RTX4090,
        "mi250x_64gb": _MI250X,
        "mi300x_192gb": _MI300X,
    }
)

_BY_DEVICE_NAME = {
    _plain(name): accelerator
    for accelerator in ACCELERATORS.values()
    for name in accelerator.device_names
}
