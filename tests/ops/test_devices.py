"""Records of devices: the numbers by which launches are cut, and what MLX tells of a GPU."""

import re
from dataclasses import FrozenInstanceError, fields, replace
from itertools import pairwise
from pathlib import Path

import pytest

from mhc_mlx import devices
from mhc_mlx.devices import APPLE, APPLE_CHIPS, H100, H200, Device, apple, find
from mhc_mlx.ops import tiling
from ops.test_tiling import A100, SMALL


def test_numbers_of_devices():
    """What was measured, or follows from a GPU's size: another value needs another measurement."""
    multiprocessors, threads = 132, 512  # of an H100; that one holds at 128 registers
    simdgroups = multiprocessors * threads // 32
    same = {
        "backward_threads": multiprocessors * threads,
        "coefficient_gradient_simdgroups": simdgroups,
        "projection_gradient_simdgroups": simdgroups,
        "filling_groups": 2 * multiprocessors,
        "phi_gradient_groups": 4 * multiprocessors,
        "forward_groups": 4096,
        "many_groups": 65536,
        "one_launch_tokens": 1024,
        "few_tokens": 1024,
        "few_backward_tokens": 1024,
        "long_row": 16384,
        "norm_tile_tokens": 1056,
        "forward_register_bytes": 256,
        "threadgroup_memory": 32 << 10,
    }
    pairs = {  # an H100's, and an Apple GPU's, whose threads have 128 registers
        "backward_register_bytes": (512, 128),
        "backward_packed": (False, True),
        "backward_vec": (8, 4),
        "seam_backward_bytes": (16, 8),
        "forward_threads": (256, 320),
        "uncached_backward_threads": (256, 128),
        "coefficient_gradient_threads": (512, 256),
        "coefficient_gradient_x_bytes": (128, 64),
        "stored_half_steps": (40, 20),
        "one_thread_rows": (0, 16),
        "partial_logits_tokens": (16, 64),
        "u_floats_per_lane": (64, 32),
        "float_products": (False, True),
        "ring_memory": (227 << 10, 0),
    }
    pairs |= {k: (v, v) for k, v in same.items()}
    assert {k: (getattr(H100, k), getattr(APPLE, k)) for k in pairs} == pairs
    assert tiling.PROJECTION_GRADIENT_STAGE == 64
    described = {"name", "backend", "cores", "bandwidth", "registers_per_thread"}
    described |= {"registers_per_core", "threads_per_core", "threadgroup_memory_per_core"}
    assert {f.name for f in fields(Device)} == described | set(pairs)
    for gpu in (H200, A100, SMALL):  # cut as for an H100, but for their rings
        for k in set(pairs) - {"ring_memory"}:
            assert getattr(gpu, k) == getattr(H100, k), (gpu.name, k)


def uncited(text: str) -> list[str]:
    """Fields of the record APPLE in a text of devices.py whose comment names no evidence.

    A comment stands for all fields that follow it without another.
    """
    call = text[text.index("APPLE = Device(") :]
    lines, comment, missing = call[: call.index("\n)\n")].splitlines()[1:], "", []
    for before, line in pairwise(["", *lines]):
        if line.lstrip().startswith("#"):
            comment = comment + line if before.lstrip().startswith("#") else line
        else:
            name = line.split("=")[0].strip()
            cited = re.search(r"model:|clang-19:|https://", comment)
            missing += [name] if name not in ("name", "backend") and not cited else []
    return missing


def test_every_number_of_a_mac_names_its_evidence():
    text = Path(devices.__file__).read_text()
    assert uncited(text) == []
    told = {f.name for f in fields(Device) if getattr(APPLE, f.name) != f.default}
    told -= {"name", "backend"}
    blind = re.sub(r"model:|clang-19:|https://", "", text)
    assert set(uncited(blind)) == told


def test_the_record_of_a_gpu():
    nine = {"compute_capability_major": 9, "compute_capability_minor": 0}
    assert find("cuda", {"device_name": "AMD EPYC"}) is H100 and find("metal", {}) is APPLE
    assert find("cuda", nine | {"device_name": "NVIDIA H200"}) is H200
    other = find("cuda", nine | {"device_name": "NVIDIA H100 PCIe"})
    assert (other.name, other.cores, other.bandwidth) == ("NVIDIA H100 PCIe", None, None)
    assert other.ring_memory == H100.ring_memory and H200.ring_memory == H100.ring_memory
    rings = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (10, 0): 227, (12, 0): 99}
    for (major, minor), ring in rings.items():
        info = {"compute_capability_major": major, "compute_capability_minor": minor}
        assert find("cuda", info).ring_memory == ring << 10


def test_the_record_of_a_mac():
    """MLX tells a chip's name but not its cores, and so no bandwidth that depends on them."""
    found = find("metal", {"device_name": "Apple M2 Max", "architecture": "applegpu_g14s"})
    assert (found.name, found.cores, found.bandwidth) == ("Apple M2 Max", None, 400e9)
    assert apple("Apple M4 Max").bandwidth is None
    assert apple("Apple M4 Max", 40).bandwidth == 546e9
    assert (apple("Apple M9").bandwidth, apple("Apple M9", 7).cores) == (None, 7)
    assert find("metal", {"device_name": "AMD EPYC"}) is APPLE
    for chip, rates in APPLE_CHIPS.items():
        for cores in rates:
            mac, names = apple(chip, cores), [f.name for f in fields(Device)]
            differ = {k for k in names if getattr(mac, k) != getattr(APPLE, k)}
            assert differ == {"name", "cores", "bandwidth"}


def test_caches_know_a_record_by_its_identity():
    """A record of many fields that were hashed at every call would take the host 1 us each time."""
    copy = replace(H100)
    assert copy != H100 and hash(H100) == object.__hash__(H100)
    with pytest.raises(FrozenInstanceError):
        copy.name = "another"
