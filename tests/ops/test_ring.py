"""Which lane fetches and which lane reads what of mhc_pre's ring on CUDA, by g++."""

import ctypes

import pytest

from mhc_mlx import launch

ENTRY = """
extern "C" int {name}(int fetches, int i, int lane) {{
  return fetches == 1 ? {function}<1>(i, lane) : {function}<2>(i, lane);
}}
"""
FUNCTIONS = {"row": "fetch_row", "bytes": "fetch_bytes", "place": "slot_offset"}


@pytest.fixture
def ring(need) -> ctypes.CDLL:
    need("simulator")
    from proof import simulator

    text = launch.text("include/cuda/phi_product_ring.h")
    functions = text[text.index("template <int FETCHES>") : text.index("template <int NUM_LOGITS")]
    source = "typedef unsigned int uint;\n" + functions
    source += "".join(ENTRY.format(name=k, function=v) for k, v in FUNCTIONS.items())
    return ctypes.CDLL(str(simulator.build(source, ["-std=c++20", "-O1", "-fPIC"], source)))


@pytest.mark.parametrize("fetches", [1, 2])
def test_a_lane_reads_what_was_fetched_for_it(fetches, ring):
    """8 rows of 32 elements, 64 or 128 bytes each; lane l reads 8 elements of row l // 4."""
    held = {}  # place: row and byte of the row
    for i in range(fetches):
        for lane in range(32):
            held[32 * i + lane] = ring.row(fetches, i, lane), ring.bytes(fetches, i, lane)
    pieces = {(row, 16 * c) for row in range(8) for c in range(4 * fetches)}
    assert len(held) == len(pieces) and set(held.values()) == pieces
    for lane in range(32):
        read = [held[ring.place(fetches, i, lane)] for i in range(fetches)]
        first = lane % 4 * 16 * fetches
        assert read == [(lane // 4, first + 16 * i) for i in range(fetches)]


@pytest.mark.parametrize("fetches", [1, 2])
def test_fetches_take_whole_rows_and_lanes_all_banks(fetches, ring):
    for i in range(fetches):
        rows = [ring.row(fetches, i, lane) for lane in range(32)]
        assert all(rows.count(row) == 4 * fetches for row in rows)  # a row by neighbours, whole
        for eight in range(0, 32, 8):  # lanes that read at once, 16 bytes each: 32 banks
            places = [ring.place(fetches, i, lane) % 8 for lane in range(eight, eight + 8)]
            assert sorted(places) == list(range(8))
