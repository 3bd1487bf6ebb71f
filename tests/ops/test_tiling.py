"""How launches are cut, of shapes with a reason each: each number follows from the rules beside it.

A change of a rule changes its rows here, and only where it was meant to.
"""

from dataclasses import replace

import mlx.core as mx
import pytest

from mhc_mlx.devices import APPLE, H100, find
from mhc_mlx.ops import tiling

F32, BF16 = mx.float32, mx.bfloat16
# GPUs with less memory for a ring than an H100.
A100, SMALL = (
    find("cuda", {"compute_capability_major": 8, "compute_capability_minor": k}) for k in (0, 6)
)
ALMOST = replace(H100, ring_memory=140 << 10)

# n, C, bytes of an element, copies of a token, threads asked for, device:
# neighbours per load, threads, passes, whether the token stays in registers
TOKENS = {
    # a load of 16 bytes, a thread for each, 256 at most
    (4, 1024, 2, 1, None, APPLE): (8, 128, 1, True),
    (4, 1024, 4, 1, None, APPLE): (4, 256, 1, True),
    (4, 4096, 2, 1, None, APPLE): (8, 256, 2, True),
    (4, 7168, 2, 1, None, H100): (8, 224, 4, True),  # 896 loads in four equal passes
    (4, 1280, 2, 1, 96, APPLE): (8, 96, 2, True),
    # what divides C; at least one simdgroup
    (1, 1, 4, 1, None, APPLE): (1, 32, 1, True),
    (4, 129, 4, 1, None, APPLE): (1, 160, 1, True),
    (4, 130, 2, 1, None, APPLE): (2, 96, 1, True),
    # 256 bytes of registers: 4 streams of 16 bytes in 4 passes, not in 5; at least 4 bytes a load
    (4, 10240, 2, 1, None, APPLE): (8, 320, 4, True),
    (4, 10248, 2, 1, None, APPLE): (8, 288, 5, False),
    (4, 4095, 2, 1, None, H100): (1, 256, 16, True),
    (4, 4097, 2, 1, None, H100): (1, 256, 17, False),
    (4, 4097, 2, 1, None, APPLE): (1, 320, 13, True),
    # the sums of n streams: n * vec up to 64; more than 8 streams are never kept
    (8, 1024, 2, 1, None, H100): (8, 128, 1, True),
    (8, 1024, 4, 1, None, H100): (4, 256, 1, True),
    (9, 1024, 2, 1, None, H100): (4, 256, 1, False),
    (16, 1024, 2, 1, None, APPLE): (4, 256, 1, False),
    (64, 64, 4, 1, None, APPLE): (1, 64, 1, False),
    # backward, x and dout: as floats in 512 bytes on CUDA, packed in 128 on Metal
    (4, 1024, 2, 2, None, APPLE): (4, 256, 1, True),
    (4, 4096, 2, 2, None, APPLE): (4, 128, 8, False),  # on a Mac 128 threads if it is not kept
    (4, 4096, 2, 2, 256, APPLE): (4, 256, 4, False),
    (4, 4096, 2, 2, None, H100): (8, 256, 2, True),
    (4, 2048, 4, 2, None, APPLE): (4, 128, 4, False),
    # from 5 to 8 streams half as wide, where the token then fits or nothing does
    (8, 1024, 2, 2, None, H100): (8, 128, 1, True),
    (8, 1024, 2, 2, None, APPLE): (4, 256, 1, True),
    (5, 1280, 2, 2, None, APPLE): (4, 128, 3, False),
    (8, 4096, 2, 2, None, H100): (4, 256, 4, False),
    # and of float32 128 threads at most
    (4, 1024, 4, 2, None, H100): (4, 256, 1, True),
    (5, 1024, 4, 2, None, H100): (4, 128, 2, True),
    (8, 1024, 4, 2, None, APPLE): (4, 128, 2, False),
    (8, 516, 4, 2, None, H100): (4, 96, 2, True),  # 129 loads
    (9, 1024, 4, 2, None, H100): (4, 256, 1, False),
    (8, 31, 4, 2, None, H100): (1, 32, 1, True),
}


def test_a_token():
    for shape, want in TOKENS.items():
        assert tuple(tiling.token_tiling(*shape)) == want, shape


def test_gates_of_channels():
    """A thread for each pack of 16 bytes, 64 at most; as many threadgroups share a token, and each
    of 65,536 at most takes tokens in turn."""
    few = replace(H100, many_groups=12)
    for shape, want in {
        (1, 2560, 2, None, H100): (8, 64, 5),
        (8192, 2560, 2, None, APPLE): (8, 64, 5 * 8192),
        (1 << 20, 2560, 2, None, H100): (8, 64, 65535),  # 13107 tokens at once
        (1, 2560, 2, 320, H100): (8, 320, 1),
        (1, 4096, 4, None, H100): (4, 64, 16),
        (3, 129, 2, None, H100): (1, 64, 9),  # one channel a load: 3 threadgroups of 64 threads
        (3, 70, 4, None, H100): (2, 64, 3),  # 35 packs
        (3, 1, 2, None, APPLE): (1, 32, 3),
        (7, 2560, 2, None, few): (8, 64, 10),
        (7, 8192, 2, None, few): (8, 64, 16),  # a token has 16, though the device would have 12
    }.items():
        assert tuple(tiling.gate_tiling(*shape)) == want, shape


def test_a_seam():
    """Forward up to 320 threads if none are asked for; backward 128 channels a thread in
    all streams, kept only in one pass."""
    for shape, want in {
        (4, 5120, 2, None, H100): (8, 320, 2, True),
        (4, 7168, 2, None, H100): (8, 320, 3, True),
        (4, 5120, 2, None, APPLE): (8, 320, 2, True),
        (4, 7168, 2, 64, H100): (8, 64, 14, False),
        (4, 1024, 2, None, H100): (8, 128, 1, True),
        (1, 2568, 2, None, H100): (8, 192, 2, True),  # 321 loads
    }.items():
        assert tuple(tiling.seam_tiling(*shape)) == want, shape
    for shape, want in {
        (4, 1024, 2, None): (4, 256, 1, True),
        (4, 1028, 2, None): (4, 160, 2, False),  # 257 loads
        (4, 512, 4, None): (4, 128, 1, True),
        (2, 8224, 2, None): (8, 224, 5, False),
        (1, 1024, 2, None): (8, 128, 1, True),
    }.items():
        assert tuple(tiling.seam_backward_tiling(*shape, H100)) == want, shape
    for shape, want in {  # on a Mac 128 threads where no token is kept
        (4, 1024, 2, None): (4, 256, 1, True),
        (4, 1028, 2, None): (4, 96, 3, False),
        (4, 512, 4, None): (2, 256, 1, True),
        (2, 8224, 2, None): (4, 128, 17, False),
        (4, 5120, 2, None): (4, 128, 10, False),
        (4, 5120, 2, 256): (4, 256, 5, False),
    }.items():
        assert tuple(tiling.seam_backward_tiling(*shape, APPLE)) == want, shape


def test_turns_and_sums():
    """As many turns for each threadgroup; many threads a column of few columns and many rows, on a
    Mac one for few rows."""
    shares = [tiling.even_groups(count, 4096) for count in (0, 5, 4096, 4097, 8193, 65536)]
    assert shares == [0, 5, 4096, 2049, 2731, 4096]
    shapes = [(63, 100), (64, 100), (64, (1 << 14) - 1), (64, 1 << 14)]
    shapes += [(1, 100), (16, 1 << 20), (17, 100)]
    assert [tiling.threads_per_column(*k, H100) for k in shapes] == [8, 64, 64, 8, 8, 8, 8]
    assert [tiling.threads_per_column(*k, APPLE) for k in shapes] == [8, 64, 64, 8, 1, 1, 8]
    assert [tiling._power(k) for k in (1, 2, 3, 4, 7, 8, 31)] == [1, 2, 2, 4, 4, 8, 16]


# n, C, dtype, outputs, tokens, threads asked for, device:
# neighbours per load, threads, slices of k, tiles of 8 tokens, of 8 outputs, sharing threadgroups
PROJECTIONS = {
    # many tokens: two tiles for each simdgroup, a slice each; 24 outputs are three blocks
    (4, 1024, BF16, 24, 1025, None, H100): (8, 256, 8, 2, 3, 1),
    (4, 1024, BF16, 24, 1024, None, H100): (8, 256, 8, 1, 3, 1),
    # long rows: 16 slices of 512 threads, if a ring for two tiles fits
    (4, 4096, BF16, 24, 2048, None, H100): (8, 512, 16, 2, 3, 1),
    (4, 4096, BF16, 24, 2048, None, A100): (8, 512, 16, 2, 3, 1),
    (4, 4096, BF16, 24, 2048, None, SMALL): (8, 256, 8, 2, 3, 1),
    (4, 4096, BF16, 24, 2048, 256, H100): (8, 256, 8, 2, 3, 1),
    (4, 4088, BF16, 24, 2048, None, H100): (8, 256, 8, 2, 3, 1),
    (4, 4096, F32, 24, 4, None, H100): (4, 512, 16, 1, 3, 1),  # as for many tokens
    (4, 4096, BF16, 24, 4, None, ALMOST): (8, 256, 8, 1, 3, 1),  # for one tile it does
    # n * C no multiple of 32: single elements, two blocks
    (4, 4095, BF16, 24, 2048, None, H100): (1, 256, 8, 2, 2, 1),
    (4, 129, F32, 24, 2048, None, APPLE): (1, 256, 8, 2, 2, 1),
    # threads asked for: their simdgroups, in slices that divide them; above 512 one tile
    (4, 1024, BF16, 24, 2048, 32, H100): (8, 32, 1, 2, 3, 1),
    (4, 1024, BF16, 24, 2048, 160, H100): (8, 160, 5, 2, 3, 1),
    (4, 1024, BF16, 24, 2048, 288, H100): (8, 288, 9, 2, 3, 1),
    (4, 1024, BF16, 24, 2048, 512, H100): (8, 512, 8, 2, 3, 1),
    (4, 1024, BF16, 24, 2048, 544, H100): (8, 544, 17, 1, 3, 1),
    (4, 1024, BF16, 24, 2048, 1024, H100): (8, 1024, 8, 1, 3, 1),
    # 30 KiB hold 8 slices and 40 floats of a token: n + 1, up to 8 streams also n * n
    (5, 64, F32, 35, 2048, 512, APPLE): (4, 512, 8, 2, 3, 1),
    (8, 64, F32, 80, 2048, 512, APPLE): (4, 512, 16, 2, 3, 1),
    (9, 64, F32, 99, 2048, 512, APPLE): (4, 512, 8, 2, 3, 2),
    (39, 64, F32, 39 * 41, 9, 512, APPLE): (4, 512, 8, 2, 3, 32),
    (40, 64, F32, 40 * 42, 9, 512, APPLE): (4, 512, 16, 2, 3, 32),
    # few outputs; four blocks of 8 in two turns
    (4, 1024, BF16, 25, 2048, None, H100): (8, 256, 8, 2, 2, 1),
    (4, 1024, BF16, 4, 2048, None, H100): (8, 256, 8, 2, 1, 1),
    (4, 1024, BF16, 32, 2048, None, H100): (8, 256, 8, 2, 2, 1),
    (8, 1024, F32, 80, 2048, None, H100): (4, 256, 8, 2, 3, 1),
    (8, 1024, F32, 80, 1024, None, H100): (4, 256, 8, 1, 3, 1),
    # more than 8 streams: many tokens from 9 on; seven blocks of 24 by four threadgroups
    (12, 1024, BF16, 168, 8, None, APPLE): (8, 256, 8, 1, 3, 4),
    (12, 1024, BF16, 168, 9, None, APPLE): (8, 256, 8, 2, 3, 4),
    (9, 64, BF16, 99, 2, None, APPLE): (8, 256, 8, 1, 3, 4),  # five blocks
    # a power of two, fewer the more tokens fill a GPU
    (16, 4096, BF16, 288, 64, None, APPLE): (8, 256, 8, 2, 3, 8),
    (16, 4096, BF16, 288, 352, None, APPLE): (8, 256, 8, 2, 3, 8),  # 22 * 12 threadgroups
    (16, 4096, BF16, 288, 353, None, APPLE): (8, 256, 8, 2, 3, 4),
    (16, 4096, BF16, 288, 2048, None, APPLE): (8, 256, 8, 2, 3, 2),
    (16, 4096, BF16, 288, 65536, None, APPLE): (8, 256, 8, 2, 3, 1),
    # the first of them makes all h_pre: 64 outputs are three of its blocks, 25 are two
    (25, 32, BF16, 25 * 27, 2, None, APPLE): (8, 256, 8, 1, 3, 8),
    (64, 512, BF16, 4224, 2, None, APPLE): (8, 256, 8, 1, 3, 32),
    (32, 64, F32, 1088, 2, None, APPLE): (4, 256, 8, 1, 3, 16),
}
# of these: bytes of its ring with phi of float32 and bfloat16, and per backend the simdgroups that
# share u and the packs that a lane keeps
RINGS = {
    (4, 1024, BF16, 24, 1025, None, H100): (64, 40, (1, 4), (1, 4)),
    (4, 1024, BF16, 24, 1024, None, H100): (56, 32, (1, 4), (1, 4)),
    (4, 4096, BF16, 24, 2048, None, H100): (128, 80, (4, 4), (2, 8)),
    (4, 4096, BF16, 24, 2048, None, SMALL): (64, 40, (4, 4), (2, 8)),
    (4, 4096, BF16, 24, 2048, None, APPLE): (0, 0, (4, 4), (2, 8)),
    (4, 4096, BF16, 24, 2048, 160, APPLE): (0, 0, (1, 0), (1, 0)),  # five simdgroups
    (4, 72, BF16, 24, 2048, None, H100): (64, 40, (1, 2), (1, 2)),  # n * C is whole, C is not
    (4, 129, BF16, 12, 2048, None, H100): (0, 0, (1, 6), (1, 6)),
    (4, 4096, F32, 24, 4, None, H100): (128, 80, (1, 0), (1, 0)),  # 12.5 KiB of squares, 16 wanted
    (4, 4095, BF16, 24, 2048, None, H100): (0, 0, (1, 0), (1, 0)),  # not whole, 128 packs a lane
    (4, 1024, BF16, 24, 2048, 160, H100): (40, 25, (1, 4), (1, 4)),
    (4, 1024, BF16, 24, 2048, 1024, H100): (0, 128, (1, 4), (1, 4)),
    (4, 1024, BF16, 4, 2048, None, H100): (0, 0, (1, 4), (1, 4)),  # one block: read once anyway
    (4, 1024, BF16, 32, 2048, None, H100): (0, 0, (1, 4), (1, 4)),  # two turns
    (8, 1024, F32, 80, 2048, None, H100): (0, 0, (1, 8), (1, 8)),
    (16, 4096, BF16, 288, 64, None, APPLE): (0, 0, (4, 4), (2, 8)),
}


def test_a_projection():
    for shape, want in PROJECTIONS.items():
        got = tiling.logits_tiling(*shape)
        assert tuple(got) == want, shape
        _, threads, slices, tiles, *_ = want
        assert got.tokens == 8 * tiles * threads // 32 // slices
    for shape, (wide, narrow, metal, cuda) in RINGS.items():
        (n, C, dtype, outs, _, _, device), g = shape, tiling.logits_tiling(*shape)
        got = [tiling.ring_bytes(g, n, C, dtype, phi, outs, device) for phi in (F32, BF16)]
        assert got == [wide << 10, narrow << 10], shape
        assert tiling.u_tiling(g, n, C, APPLE) == metal, shape
        assert tiling.u_tiling(g, n, C, H100) == cuda, shape


def test_a_ring_beside_its_sums():
    """65,536 bytes and 4 floats for each of 16 tokens: 8 slices of 25, and 4 + 16 coefficients."""
    g = tiling.logits_tiling(4, 1024, BF16, 24, 2048, None, H100)
    least = (64 << 10) + 4 * 16 * (8 * 25 + 20)
    found = [replace(H100, ring_memory=bytes_) for bytes_ in (least - 1, least)]
    rings = [tiling.ring_bytes(g, 4, 1024, BF16, F32, 24, device) for device in found]
    assert rings == [0, 64 << 10]
    assert tiling.ring_bytes(g, 4, 1024, BF16, F32, 9, H100) == 64 << 10
    assert tiling.ring_bytes(g, 4, 1024, BF16, F32, 8, H100) == 0
    assert tiling.ring_bytes(g, 5, 1024, BF16, F32, 24, H100) == 0


@pytest.mark.parametrize("n, packs", [(1, 4), (2, 4), (3, 2), (4, 2), (5, 1), (8, 1)])
def test_a_lane_keeps_whole_chunks(n, packs):
    """Of packs that a lane makes at once: one more channel pack is one more chunk."""
    g = tiling.logits_tiling(n, 2056, BF16, 2 * n + n * n, 2048, None, APPLE)
    assert tiling.u_tiling(g, n, 256 * packs, H100) == (1, packs)
    assert tiling.u_tiling(g, n, 256 * packs + 8, H100) == (1, 2 * packs)


def test_what_is_swept():
    """Up to 16 tokens, 64 on a Mac, of up to 8 streams, whose squares and sums fit 28 KiB."""
    for shape, want in {
        (4, 4096, BF16, 24, 16, None, H100): True,
        (4, 4096, BF16, 24, 17, None, H100): False,
        (4, 4096, BF16, 24, 64, None, APPLE): True,
        (4, 4096, BF16, 24, 65, None, APPLE): False,
        (8, 64, BF16, 80, 2, None, APPLE): True,
        (9, 64, BF16, 99, 2, None, APPLE): False,
        # 7136 squares, and 32 of the one slice of a simdgroup: 28 KiB; then 32 squares more
        (4, 28544, F32, 28, 2, 32, APPLE): True,
        (4, 28548, F32, 28, 2, 32, APPLE): False,
        # 21 squares of 320 threads, and 56 of each of eight slices
        (2, 26880, F32, 52, 2, None, APPLE): True,
        (2, 26880, F32, 53, 2, None, APPLE): False,
    }.items():
        assert tiling.use_partial_logits(*shape) == want, shape


def test_the_backward_of_a_projection():
    """Threads, tokens of a tile, neighbours per load, threadgroups that share a tile,
    and rows of sums, in mhc_pre_backward_generic."""
    for shape, want in {
        (4, 1024, 24, 1025, None): (128, 4, 8, 1, 257),
        (4, 1024, 24, 1024, None): (128, 2, 8, 1, 512),
        (4, 1024, 24, 5, 256): (256, 2, 8, 1, 3),
        (4, 64, 24, 2048, None): (32, 4, 8, 1, 512),
        (4, 264, 24, 2048, None): (64, 4, 8, 1, 512),
        (4, 63, 24, 5, None): (64, 2, 1, 1, 3),
        # outputs of a tile in 30 KiB of threadgroup memory: 4 of 1917 floats, 2 of 3837
        (32, 512, 1885, 2048, None): (64, 4, 8, 1, 512),
        (32, 512, 1886, 2048, None): (64, 2, 8, 1, 1024),
        (64, 512, 4224, 2048, None): (64, 1, 8, 1, 1056),
        # more than 8 streams and few tokens: 264 threadgroups, a power of two for each tile, no
        # more than there are simdgroups' worth of channels
        (8, 4096, 80, 5, None): (128, 2, 8, 1, 3),
        (9, 4096, 99, 5, None): (32, 2, 8, 16, 3),
        (16, 4096, 288, 100, None): (128, 2, 8, 4, 50),
        (16, 4096, 288, 527, None): (128, 2, 8, 1, 264),
        (12, 1024, 168, 2048, None): (128, 4, 8, 1, 512),
        (12, 1800, 168, 5, None): (32, 2, 8, 8, 3),  # eight simdgroups' worth, the last one's small
        (64, 512, 4224, 2, None): (32, 1, 8, 2, 2),
        (64, 520, 4224, 2, None): (64, 1, 8, 2, 2),
    }.items():
        assert tiling.generic_gradient_tiling(*shape, H100) == want, shape


def test_tokens_backward():
    """Threads, neighbours, passes, cached, batch, groups and rows of sums, in
    mhc_pre_backward_coefficients."""
    for shape, want in {
        # with a norm a threadgroup a token; x of four streams in 128 bytes a thread
        (4, 1024, 2, 65536, True, None, H100): (64, 8, 2, True, 8, 1056, 1056),
        (4, 1024, 2, 65536, True, None, APPLE): (128, 8, 1, True, 8, 528, 528),
        (4, 4096, 2, 2048, True, None, H100): (256, 8, 2, True, 2, 128, 128),
        (4, 4096, 2, 2048, True, None, APPLE): (256, 8, 2, False, 2, 128, 128),
        (4, 5120, 2, 2048, True, None, APPLE): (256, 8, 3, False, 2, 128, 128),  # at most 256
        (3, 20480, 2, 64, True, None, H100): (512, 8, 5, False, 2, 2, 2),  # at most 512
        (2, 1024, 2, 5, True, None, H100): (32, 8, 4, True, 2, 3, 3),
        (1, 4096, 2, 5, True, None, H100): (64, 8, 8, True, 2, 2, 2),
        (1, 16, 2, 5, True, None, H100): (32, 8, 1, True, 2, 3, 3),
        (1, 257, 2, 5, True, None, H100): (64, 1, 5, True, 2, 2, 2),  # at most 8 passes
        (4, 1280, 2, 2048, True, 64, H100): (64, 8, 3, False, 2, 512, 512),
        (5, 1024, 2, 5, True, None, H100): (128, 8, 1, False, 1, 2, 2),  # n > 4: never kept
        # without, a simdgroup a token: a row of sums for each of four
        (4, 1280, 2, 2048, False, 96, H100): (96, 8, 0, False, 2, 342, 1026),
        (1, 7, 2, 3, False, None, APPLE): (128, 1, 0, False, 2, 1, 4),
        # eight tokens at once, a lane for each line, from 16,896 on: then no simdgroup is idle
        (4, 1024, 2, 16895, False, None, H100): (128, 8, 0, False, 2, 528, 2112),
        (4, 1024, 2, 16896, False, None, H100): (128, 8, 0, False, 8, 528, 2112),
        (5, 1024, 2, 1 << 20, False, None, H100): (128, 8, 0, False, 4, 528, 2112),
        (1, 1024, 2, 1 << 20, False, None, H100): (128, 8, 0, False, 8, 528, 2112),
        (12, 1024, 2, 1 << 20, False, None, H100): (128, 2, 0, False, 2, 528, 2112),
        (12, 1024, 2, 2048, False, None, H100): (128, 2, 0, False, 1, 512, 2048),
        (16, 1024, 2, 2048, True, None, H100): (512, 2, 1, False, 1, 128, 128),
        (9, 1024, 2, 5, False, None, H100): (128, 2, 0, False, 1, 2, 8),
        (8, 1024, 2, 5, False, None, H100): (128, 8, 0, False, 1, 2, 8),
        (32, 1024, 2, 5, False, None, H100): (128, 1, 0, False, 1, 2, 8),
        # four-byte elements
        (4, 1024, 4, 65536, True, None, APPLE): (256, 4, 1, True, 8, 264, 264),
        (4, 1024, 4, 65536, False, None, APPLE): (128, 4, 0, False, 8, 528, 2112),
    }.items():
        assert tuple(tiling.coefficient_gradient_tiling(*shape)) == want, shape
    # half-steps, threads, device: what a simdgroup keeps, of 20 KiB
    for shape, want in {
        (20, 128, APPLE): 20,
        (20, 512, APPLE): 10,
        (20, 128, H100): 40,
        (20, 160, H100): 32,
        (3, 128, H100): 6,
        (20, 512, H100): 10,
        (20, 1024, H100): 5,
    }.items():
        assert tiling.stored_half_steps(*shape) == want, shape


def test_products_backward():
    """Threads, channels, chunks of tokens and threadgroups of a chunk, in
    mhc_pre_backward_projection."""
    for shape, want in {
        (4, 1024, 24, 65536, None): (128, 32, 33, 32),  # 128 units: 16.5 chunks, in two turns 33
        (4, 1024, 25, 65536, None): (128, 16, 33, 64),
        (4, 4096, 24, 65536, None): (128, 32, 4, 128),
        (4, 1024, 24, 2048, None): (128, 32, 32, 32),  # at least 64 tokens each
        (4, 7168, 24, 4096, None): (128, 32, 7, 224),
        (3, 32, 15, 5, None): (96, 32, 1, 1),  # three units
        (3, 40, 24, 64, None): (128, 32, 1, 2),  # six
        (4, 7680, 24, 65536, None): (128, 32, 2, 240),  # in four turns at most
        (4, 1024, 24, 65536, 256): (256, 32, 33, 16),
    }.items():
        assert tiling.projection_gradient_tiling(*shape, H100) == want, shape
    kinds = [(32, BF16, True), (33, BF16, False), (32, F32, False), (32, F32, True)]
    kinds += [(32, mx.float16, True), (32, mx.float16, False), (33, F32, False)]
    for device, want in {
        H100: [True] + 6 * [False],
        APPLE: [True, False, True, False, False, True, False],
    }.items():
        assert [tiling.use_matrix_gradient(*kind, device) for kind in kinds] == want
    # a ring of 32 channels, 6 bytes of each, beside 24 KiB
    least = (24 << 10) + 2 * 4 * 16 * 32 * 6
    found = [replace(H100, ring_memory=bytes_) for bytes_ in (least - 1, least)]
    rings = [tiling.projection_gradient_ring_bytes(32, 128, 6, device) for device in found]
    assert rings == [0, least - (24 << 10)]
    assert tiling.projection_gradient_ring_bytes(16, 128, 6, H100) == 0


def test_the_gradient_of_phi():
    """Of mhc_pre_backward_phi: threads, neighbours, outputs of a thread, chunks of tokens,
    threadgroups of a chunk."""
    for shape, want in {
        (4096, 1024, 24, 65536, None): (128, 2, 24, 33, 16),  # 16 spans: 528 threadgroups
        (4096, 1024, 24, 64, None): (128, 2, 24, 1, 16),
        (4096, 1024, 24, 65, None): (128, 2, 24, 2, 16),  # 64 tokens a chunk
        (33, 33, 25, 1000, None): (128, 1, 13, 16, 2),  # two parts of the outputs
        (33, 33, 25, 1 << 17, None): (128, 1, 13, 264, 2),
        (4096, 1024, 80, 2048, None): (128, 2, 20, 9, 64),
        (16384, 4096, 24, 2048, None): (128, 2, 24, 9, 64),
        (4096, 1024, 24, 2048, 256): (256, 2, 24, 32, 8),
        (1 << 18, 4096, 24, 65536, None): (128, 2, 24, 1, 1024),
    }.items():
        assert tiling.phi_gradient_tiling(*shape, H100) == want, shape


def test_stream_norm_takes_what_registers_hold():
    """Streams at once, tokens at once, and the tokens that the gradient keeps."""
    at_once = {1: 1, 4: 4, 7: 7, 8: 4, 12: 4, 17: 1, 33: 3, 64: 4}
    assert {n: tiling.streams_at_once(n) for n in at_once} == at_once
    for device in (APPLE, H100):
        for size, inject, tokens, tile in (
            (2, True, 1055, 1),
            (2, True, 1056, 2),
            (2, False, 1056, 1),
            (4, True, 1056, 1),  # two tokens would spill
        ):
            t = tiling.seam_tiling(4, 2560, size, None, device)
            assert tiling.norm_tile(t, 4, size, tokens, inject, device) == tile
        back = [tiling.norm_backward_tiling(n, 2560, 2, None, device) for n in (4, 8)]
        assert back[0] == (8, 320, 1, True)
        assert back[1] == ((8, 128, 3, False) if device is APPLE else (8, 160, 2, False))
