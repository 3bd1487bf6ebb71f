"""Limits by size: threadgroup memory at long rows, and buffers of more than 2^32 elements."""

import ctypes
import itertools
import math
import mmap
import re

import mlx.core as mx
import numpy as np
import pytest
from proof import executor, set_tiling, simulator

from mhc_mlx import PAPER, devices, launch, ops
from mhc_mlx.conventions import KRONECKER, MHC_LITE
from mhc_mlx.ops import checks, tiling
from mhc_mlx.ops.autodiff import FUSED_OPS

# ---- threadgroup memory: what a body declares, by g++, of the launches of every op

WORDS = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16_t"}
VARIANT = """namespace variant{k} {{
{constants}
{declared}
constexpr size_t bytes = 0{sizes};
}}
"""


def declared_bytes(launches: list[tuple[str, dict]], backend: str) -> list[int]:
    """Bytes of threadgroup memory that the bodies declare with these template arguments."""
    files = dict.fromkeys(
        h for name, _ in launches for h in launch.included_files(f"{name}.metal", backend)
    )
    headers = "".join(map(launch.text, files)).replace(
        launch.text("include/cuda/ptx.h"), '\n#include "ptx.hpp"\n'
    )
    source = '#include "body.hpp"\n' + re.sub(
        r"\b(device|constant|thread|threadgroup)\b", "", headers
    )
    for k, (name, template) in enumerate(launches):
        body = launch.text(f"{name}.metal")
        constants = "".join(
            f"typedef {WORDS[v]} {word};\n"
            if isinstance(v, mx.Dtype)
            else f"constexpr {'bool' if isinstance(v, bool) else 'int'} {word} = {int(v)};\n"
            for word, v in template.items()
        )
        lines = re.findall(r"(?m)^(?:constexpr |typedef |static_assert)[^;]*;", body)
        arrays = re.findall(r"(?m)^threadgroup ([\w:]+(?:<[^;=]*?>)?) \w+((?:\[[^;]*\])+);", body)
        assert len(arrays) == len(re.findall(r"(?m)^threadgroup .*", body)), name
        source += VARIANT.format(
            k=k,
            constants=constants,
            declared="\n".join(lines),
            sizes="".join(f" + sizeof({kind}{extent})" for kind, extent in arrays),
        )
    count = len(launches)
    each = ", ".join(f"variant{k}::bytes" for k in range(count))
    source += f'extern "C" {{ size_t declared[{count}] = {{{each}}}; }}\n'
    flags = ["-std=c++20", "-O0", "-w", "-fPIC", f"-I{simulator.HERE}"]
    library = ctypes.CDLL(str(simulator.build(source, flags, source)), mode=ctypes.RTLD_LOCAL)
    return list((ctypes.c_size_t * count).in_dll(library, "declared"))


class Launches:
    """Calls of `launch.run`, which returns zeros that nobody evaluates."""

    def __init__(self, backend: str):
        self.calls, self.backend = [], backend

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(launch, "run", self.run)
        self.patch.setattr(launch, "backend", lambda: self.backend)
        return self

    def __exit__(self, *_):
        self.patch.undo()

    def run(self, name, inputs, outputs, groups, threads, template, verbose=False):
        self.calls.append((name, inputs, outputs, groups, threads, template))
        return [mx.zeros(*spec) for spec in outputs.values() if spec is not None]


def called(op, tokens, n, C, dtype, threads=None, norm=True, per_token=True, convention=PAPER):
    """The op and its gradient, of arrays that are never evaluated."""
    outs = n if op == "mhc_head" else 2 * n + convention.res_size(n)
    x, y, weight = mx.zeros((tokens, n, C), dtype), mx.zeros((tokens, C), dtype), mx.zeros(C)
    gate, mix = mx.zeros((tokens, n)), mx.zeros((tokens, n, n))
    made = [mx.zeros((outs, n * C)), mx.zeros(outs), mx.zeros(1 if op == "mhc_head" else 3)]
    shared = [mx.zeros(n), mx.zeros((n, n))]
    last = [weight] if norm else []
    arrays, statics = {
        "sinkhorn_knopp": ([mix], [convention]),
        "stream_aggregate": ([x, gate if per_token else shared[0]], []),
        "stream_aggregate_norm": ([x, shared[0], weight], []),
        "stream_mix_add": ([x, y, gate, mix] if per_token else [x, y, *shared], []),
        "mhc_static": ([x, shared[0], *shared, weight], []),
        "mhc_layer": ([x, shared[0], *shared, weight], [convention]),
        "mhc_coefficients": ([x, *made], [convention]),
        "mhc_pre": ([x, *made, *last], [convention] if norm else [None, convention]),
        "mhc_head": ([x, *made], [convention]),
        "mhc_seam": ([x, y, gate, gate, mix, *last], []),
        "gate_mix": ([x, x], []),
        "mhc_single_pass": ([x, y, *made, *last], [convention] if norm else [None, convention]),
        "stream_norm": ([x, mx.zeros((n, C)), y, gate, mx.zeros((n, n * C))], []),
    }[op]

    def several(*a):
        out = getattr(ops, op)(*a, *statics, threads_per_group=threads)
        return [b for b in out if b is not None] if isinstance(out, tuple) else [out]

    mx.vjp(several, arrays, [mx.zeros(a.shape, a.dtype) for a in several(*arrays)])


LONG = [(1024, 8), (1024, 48), (1024, 64), (9001, 4), (9001, 8), (9001, 12), (9001, 64)]
LONG += [(20000, 4), (20000, 64), (131072, 4)]
WIDEST = (1 << 31) - 1  # elements of phi, whose gradient is one axis until it is added up
MADE = ("mhc_coefficients", "mhc_pre", "mhc_single_pass")
OPTIONS = [(mx.float32, None, 3), (mx.bfloat16, None, 3), (mx.bfloat16, None, 2000)]
OPTIONS += [(mx.float32, 1024, 2), (mx.bfloat16, 32, 40)]


@pytest.mark.parametrize("backend", ["metal", "cuda"])
def test_threadgroup_memory_of_long_rows(backend, need):
    """At most 32 KiB in every launch of every op, forward and backward, at ragged and long C, for
    few and many streams, few and many tokens, any number of threads: 1024 too."""
    need("simulator")
    with Launches(backend) as launches:
        for op, (C, n), (dtype, threads, tokens) in itertools.product(FUSED_OPS, LONG, OPTIONS):
            if op in MADE and (2 * n + n * n) * n * C > WIDEST:
                C = 2049
            called(op, tokens, n, C, dtype, threads)
            if op in ("mhc_pre", "mhc_seam", "mhc_single_pass"):
                called(op, tokens, n, C, dtype, threads, norm=False)
    variants = {str((c[0], c[5])): (c[0], c[5]) for c in launches.calls}
    must = {"mhc_pre_partial_logits", "mhc_seam", "mhc_pre_backward_coefficients"}
    must |= {"mhc_pre_backward_coefficients_norm"}
    assert {name for name, _ in variants.values()} >= must
    found = declared_bytes(list(variants.values()), backend)
    for bytes_, variant in zip(found, variants, strict=True):
        assert 0 <= bytes_ <= 32 << 10, f"{bytes_} bytes: {variant}"
    assert max(found) > 20 << 10  # of a launch that fills it


def test_threadgroup_memory_that_grows_is_caught(need, monkeypatch):
    """As the simulator counts it, too."""
    need("simulator")
    text, old = launch.text, "threadgroup float scratch[2 * SIMDS];"
    new = old.replace("2 * SIMDS", "PASSES * THREADS * VEC")
    template = {"T": mx.float32, "N": 4, "VEC": 1, "THREADS": 256, "PASSES": 36, "CACHED": False}
    template |= {"MIX": True, "SINKHORN": False, "GATES": False, "ITERS": 20, "START": 0}
    template |= {"COLUMNS": False, "OUT_COLUMNS": False}
    before = declared_bytes([("mhc_fused", template)], "metal")
    assert before == [4 * (4 + 4 + 16 + 16)]
    monkeypatch.setattr(launch, "text", lambda f: text(f).replace(old, new))
    assert declared_bytes([("mhc_fused", template)], "metal") == [4 * (4 + 4 + 16 + 9216)]


# ---- 2^32 elements: the last threadgroups of launches whose buffers are virtual

TOKENS = 3 << 29  # of a call: four floats of each are 1.5 times 2^32
SEEN = 128  # the last tokens, which the threadgroups that run take
NO_RESERVE = 0x4000  # mmap's flag on Linux: pages exist once they are touched


def virtual(count: int, dtype) -> np.ndarray:
    """Zeros without memory."""
    size = count * np.dtype(dtype).itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype)


class Sparse(simulator.Watched):
    """A buffer whose counts are virtual, too."""

    def __post_init__(self):
        self.loads, self.stores, self.writer = (
            virtual(self.array.size, np.uint32) for _ in range(3)
        )
        self.where = virtual(self.array.size, np.uint64)


def shares(name: str, template: dict, C: int) -> tuple[int, int, int]:
    """Tokens of a threadgroup, threadgroups that share them, and rows of sums that they leave."""
    t, simds = template, template["THREADS"] // 32 if "THREADS" in template else 1
    n = t["N"]
    if name == "mhc_pre":
        return 8 * t["TILES"] * (simds // t["SLICES"]), t["SPLITS"], 0
    if name == "mhc_pre_backward_generic":
        return t["TILE"], t["SPLITS"], 1
    if name == "mhc_pre_backward_coefficients":
        return t["BATCH"] * simds, 1, simds
    if name == "mhc_pre_backward_coefficients_norm":
        return t["BATCH"] * simds, 1, 1
    if name == "mhc_pre_backward_projection":
        return SEEN, math.ceil(n * math.ceil(C / t["SPAN"]) / simds), 1
    if name == "mhc_pre_backward_phi":
        spans = math.ceil(n * C / (t["THREADS"] * t["VEC"]))
        return SEEN, spans * math.ceil(t["NUM_LOGITS"] / t["LOGITS_PER_THREAD"]), 1
    if name == "stream_norm":
        return t["TILE"], 1, 0
    if name == "stream_norm_backward_weights":
        spans = math.ceil(n * C / (t["THREADS"] * t["VEC"]))
        return SEEN, spans * (n // t["ROWS"]), 1
    if name == "mhc_pre_partial_logits":
        return 8, math.ceil(math.ceil(n * C / 32) / simds), 0
    if name.startswith("sinkhorn_knopp"):
        return t["THREADS"] // (1 << (n - 1).bit_length()), 1, 0
    if name.startswith("mixing_matrix"):
        return t["THREADS"], n if name == "mixing_matrix" else 1, 0
    return (256 // t["THREADS_PER_COLUMN"], 1, 0) if name == "sum_partials" else (1, 1, 1)


def last_groups(
    name: str,
    source: str,
    buffers: dict[str, np.ndarray],
    outputs: set[str],
    groups: int,
    skipped: int,
    threads: int,
    template: dict,
) -> None:
    """Run the threadgroups of a launch that follow the first ``skipped``."""
    text, names = simulator.cpp(name, source)
    library, entry = simulator.program(text)
    watched = {k: Sparse(k in outputs, buffers[k]) for k in names}
    table = (simulator._Buffer * len(names))(*(w.entry(k) for k, w in watched.items()))
    where, run = ctypes.c_uint64(), simulator.runtime()
    run.sim_skip(skipped)
    ring = ctypes.c_size_t(template.get("RING_BYTES", 0))
    error = run.simulate(entry, table, len(names), groups, threads, 0, ring, ctypes.byref(where))
    run.sim_skip(0)
    if error:
        line = simulator.source_line(library, where.value)
        raise simulator.SimulationError(f"{name}: {error.decode()} at {line}")


def far_apart(form: str, call: tuple) -> None:
    """The last threadgroups of a launch of TOKENS tokens leave the bits that they leave where these
    tokens are all; a token, or a column of `sum_partials`, is an index of the axis of SEEN."""
    name, inputs, outputs, _, threads, template = call
    rng, C = np.random.default_rng(0), inputs["x"].shape[2] if "x" in inputs else 1
    each, split, rows = shares(name, template, C)
    few, many = (math.ceil(count / each) * split for count in (SEEN, TOKENS))
    values = {}
    for k, a in inputs.items():
        if a is not None:
            shape = (5, SEEN) if name == "sum_partials" and k == "partial" else a.shape
            values[k] = mx.array(rng.uniform(0.1, 1, shape).astype(np.float32)).astype(a.dtype)
    made = {k: v for k, v in outputs.items() if v is not None}
    if "partial" in made:
        shape, dtype = made["partial"]
        made["partial"] = ((few // split * rows, shape[1]), dtype)
    if name == "sum_partials":
        made["out"] = ((SEEN,), mx.float32)
    given = inputs | values
    small = simulator.run(name, given, outputs | made, few, threads, template)

    def extended(shape: tuple, rows: int | None) -> tuple:
        """The shape of an array of TOKENS tokens, or of the rows of sums of their threadgroups."""
        ratio = TOKENS // SEEN
        if rows is not None:
            return (rows * ratio, *shape[1:])
        return tuple(size * (ratio if size == SEEN else 1) for size in shape)

    buffers, ends = {}, {}
    for k, a in values.items():
        shape = extended(a.shape, None)
        buffers[k] = virtual(math.prod(shape), simulator.NUMPY[a.dtype])
        end = tuple(slice(-size, None) for size in a.shape)
        buffers[k].reshape(shape)[end] = simulator.to_numpy(a)
        buffers[f"{k}_shape"] = np.array(shape, np.int32)
    for k, (shape, dtype) in made.items():
        total = extended(shape, shape[0] if k == "partial" else None)
        buffers[k] = virtual(math.prod(total), simulator.NUMPY[dtype])
        ends[k] = buffers[k][-math.prod(shape) :]
    source = simulator.generated(name, given, outputs | made, few, threads, template)
    last_groups(name, source, buffers, set(made), many, many - few, threads, template)
    for k, want in zip(made, small, strict=True):
        same = ends[k].view(np.uint8) == simulator.to_numpy(want).ravel().view(np.uint8)
        assert same.all(), f"{name}, {form}: {k} at its end is another, {(~same).mean():.0%}"


FAR = [
    *((op, 4, mx.float32, {}) for op in ("sinkhorn_knopp", "stream_aggregate", "gate_mix")),
    *((op, n, mx.float32, {}) for op in ("stream_mix_add", "mhc_static") for n in (4, 12)),
    ("mhc_coefficients", 4, mx.float32, {"convention": KRONECKER}),
    ("mhc_coefficients", 3, mx.float32, {"convention": MHC_LITE}),
    ("mhc_pre", 4, mx.float32, {}),
    ("mhc_pre", 12, mx.float32, {"norm": False}),
    ("mhc_pre", 4, mx.bfloat16, {}),
    ("mhc_pre", 4, mx.bfloat16, {"norm": False}),
    ("mhc_seam", 4, mx.float32, {}),
    ("stream_norm", 12, mx.float32, {}),
]


def far_calls(form: str) -> list[tuple]:
    """A launch of each body and template."""
    with Launches("cuda" if form.endswith("CUDA") else "metal") as launches:
        for op, n, dtype, options in FAR:
            if form == "simulator" or op == "mhc_pre" and n == 4:
                called(op, SEEN, n, 8, dtype, **options)
        with set_tiling(partial_logits_tokens=SEEN):
            called("mhc_pre", SEEN, 4, 8, mx.float32)
    return list({str((c[0], c[5])): c for c in launches.calls}.values())


@pytest.mark.parametrize("form", ["simulator", "simulator, CUDA"])
def test_buffers_of_more_than_two_to_the_32_elements(form, need):
    """Every array that has a token's is indexed beyond 2^32 by every body."""
    need(form)
    calls = far_calls(form)
    own = ("mhc_pre", "mhc_pre_backward_projection", "mhc_pre_partial_logits")
    with executor(form):
        for call in calls:
            if form == "simulator" or call[0] in own:
                far_apart(form, call)
    bodies = {p.stem for p in launch._FOLDERS[1].glob("*.metal")}
    assert form != "simulator" or {call[0] for call in calls} == bodies


NARROW = [
    ("stream_mix_add", "size_t(t) * size_t(N * C)", "t * uint(N * C)"),
    ("mhc_seam", "h_res + size_t(t) * (N * N)", "h_res + t * (N * N)"),
    ("mhc_pre_backward_coefficients", "size_t t = first + uint(i);", "uint t = first + uint(i);"),
    ("mhc_pre_backward_phi", "size_t(t0) * size_t(K)", "t0 * uint(K)"),
    (
        "mhc_pre_backward_phi",
        "(size_t(chunk) * NUM_LOGITS + size_t(o0 + o)) * size_t(K)",
        "uint(chunk * NUM_LOGITS + o0 + o) * uint(K)",
    ),
    ("sum_partials", "size_t(g) * columns", "g * columns"),
]


@pytest.mark.parametrize("body, old, new", NARROW)
def test_a_product_of_32_bits_is_caught(body, old, new, need, monkeypatch):
    need("simulator")
    calls, text = [c for c in far_calls("simulator") if c[0] == body], launch.text
    assert calls and old in text(f"{body}.metal")
    changed = {f"{body}.metal": text(f"{body}.metal").replace(old, new)}
    monkeypatch.setattr(launch, "text", lambda file: changed.get(file) or text(file))
    launch._build.cache_clear()
    with executor("simulator"), pytest.raises((AssertionError, simulator.SimulationError)):
        for call in calls:
            far_apart("simulator", call)
    launch._build.cache_clear()


# ---- offsets of 32 bits: within a token, and within the rows of phi by which `mhc_pre` multiplies

RECORDS = (devices.APPLE, devices.H100)
ADDRESS = """
extern "C" size_t offset_of(int i) { return mhc::address(mhc::at((const float*)nullptr, i)); }
"""


@pytest.mark.parametrize("backend", ["metal", "cuda"])
def test_the_longest_token_is_addressed(backend, need):
    need("simulator")
    words = re.sub(r"\b(device|constant|thread)\b", "", launch.text(f"include/{backend}/packs.h"))
    source = f'#include "body.hpp"\n{words}{ADDRESS}'
    flags = ["-std=c++20", "-O0", "-w", "-fPIC", f"-I{simulator.HERE}"]
    library = ctypes.CDLL(str(simulator.build(source, flags, source)), mode=ctypes.RTLD_LOCAL)
    library.offset_of.restype = ctypes.c_size_t
    for i in (0, 1, checks.MAX_TOKEN // 2, checks.MAX_TOKEN - 1):
        assert library.offset_of(i) == 4 * i, (backend, i)


def last_run(K: int) -> None:
    """The last run of 32 k of the longest rows gives its phi products, which are whole numbers."""
    template = {"T": mx.float32, "PHI_T": mx.float32, "N": 1, "NUM_LOGITS": 24, "BLOCK": 3}
    template |= {"THREADS": 128}
    runs, count, rng = math.ceil(K / 32), (K - 1) % 32 + 1, np.random.default_rng(0)
    shapes = {"x": (8, 1, K), "phi": (24, K), "partial_logits": (8, runs, 28)}
    buffers = {k: virtual(math.prod(shape), np.float32) for k, shape in shapes.items()}
    buffers["x_shape"] = np.array(shapes["x"], np.int32)
    ends = [buffers[k].reshape(-1, K)[:, -count:] for k in ("x", "phi")]
    for end in ends:
        end[:] = rng.integers(-4, 5, end.shape)
    given = {k: mx.zeros(shapes[k]) for k in ("x", "phi")}
    made = {"partial_logits": (shapes["partial_logits"], mx.float32)}
    call = ("mhc_pre_partial_logits", given, made, groups := math.ceil(runs / 4), 128, template)
    source = simulator.generated(*call)
    last_groups(call[0], source, buffers, set(made), groups, groups - 1, 128, template)
    found = buffers["partial_logits"].reshape(shapes["partial_logits"])[:, -1]
    assert (found[:, :24] == ends[0] @ ends[1].T).all()
    assert (found[:, 24:].sum(1) == (ends[0] ** 2).sum(1)).all()


@pytest.mark.parametrize("K", [checks.MAX_PHI_ROW // 32 * 32, checks.MAX_PHI_ROW])
def test_the_longest_rows_of_phi_are_multiplied(K, need):
    """By each tile of logits, aligned and ragged. So many tokens and logits go at once:"""
    need("simulator")
    for n, dtype, tokens, device in itertools.product((1, 4, 8), WORDS, (1, 1 << 16), RECORDS):
        t = tiling.logits_tiling(n, K // n, dtype, 2 * n + n * n, tokens, None, device)
        assert 8 * max(t.tiles, t.block) <= 24
    with executor("simulator"):
        last_run(K)


def test_longer_rows_of_phi_would_be_misread(need):
    need("simulator")
    with executor("simulator"), pytest.raises(AssertionError):
        last_run(checks.MAX_PHI_ROW * 24 // 23 + 32)


@pytest.mark.parametrize("backend", ["metal", "cuda"])
def test_launches_of_the_largest_arrays(backend):
    """Their grids and outputs are of sizes that MLX holds."""
    long, wide = checks.MAX_TOKEN, checks.MAX_PHI_ROW
    with Launches(backend) as launches:
        for tokens, norm in ((1, True), (4000, False)):
            called("mhc_coefficients", tokens, 4, wide // 4, mx.bfloat16)
            called("mhc_pre", tokens, 4, wide // 4, mx.float32, norm=norm)
            called("mhc_pre", tokens, 64, checks.MAX_PHI // 4224 // 64, mx.float32, norm=norm)
            called("mhc_head", tokens, 1, wide, mx.float32)
            called("mhc_single_pass", tokens, 2, wide // 2, mx.float16, norm=norm)
            for n in (1, 4, 16):
                for op in ("mhc_static", "stream_aggregate_norm", "stream_mix_add", "mhc_seam"):
                    called(op, tokens, n, long // n, mx.float32)
                called("gate_mix", tokens, n, long // n, mx.float32)
                called("stream_norm", tokens, n, checks.MAX_INJECT // n // n, mx.float32)
    for name, _, outputs, groups, threads, _ in launches.calls:
        assert groups * threads < 1 << 31, name
        assert all(size < 1 << 31 for spec in outputs.values() if spec for size in spec[0]), name


TOO_LARGE = [
    ("mhc_static", "x", "n * C", checks.MAX_TOKEN, (4, (1 << 28) + 1)),
    ("mhc_seam", "x", "n * C", checks.MAX_TOKEN, (2, (1 << 29) + 1)),
    ("stream_aggregate", "x", "n * C", checks.MAX_TOKEN, (1, (1 << 30) + 1)),
    ("gate_mix", "s", "n * C", checks.MAX_TOKEN, (4, (1 << 28) + 1)),
    ("mhc_head", "x", "n * C", checks.MAX_PHI_ROW, (1, checks.MAX_PHI_ROW + 1)),
    ("mhc_pre", "x", "n * C", checks.MAX_PHI_ROW, (4, checks.MAX_PHI_ROW // 4 + 1)),
    ("mhc_single_pass", "x", "n * C", checks.MAX_PHI_ROW, (2, checks.MAX_PHI_ROW // 2 + 1)),
    ("mhc_coefficients", "phi", "a size", checks.MAX_PHI, (64, checks.MAX_PHI // 4224 // 64 + 1)),
    ("stream_norm", "inject", "a size", checks.MAX_INJECT, (64, (1 << 18) + 1)),
]


@pytest.mark.parametrize("op, argument, what, most, shape", TOO_LARGE)
def test_larger_arrays_are_refused(op, argument, what, most, shape):
    n, C = shape
    size = n * C * {"phi": 2 * n + n * n, "inject": n}.get(argument, 1)
    must = f"[{op}] {argument} must have {what} of at most {most} but got {size}."
    with pytest.raises(ValueError, match=re.escape(must)):
        called(op, 1, n, C, mx.float32)


# ---- the same by the texts, also of what no case of FAR launches

CONVERTED = r"\buint\((?:[^()]|\([^()]*\))*\)\)* *\*|\* *uint\("  # a factor of 32 bits
# Not of a token: spans and chunks, lines of a matrix, places in threadgroup memory; and what lies
# within a token or a tile's rows of phi, of which the ops refuse more than 4 GiB.
FEW = ("uint(chunk) * tokens_per_chunk", "/ uint(groups_per_tile) * 8", "* uint(N)")
FEW += ("* uint(runs.K) * uint(sizeof(", "* 16u", "* 512u", "uint(i) * uint(sizeof(")


def narrow_products(text: str) -> list[str]:
    """Lines of a kernel text that multiply a token's number, or a row's of sums, in 32 bits."""
    for words in FEW:
        text = text.replace(words, " ")
    found = [line for line in text.split("\n") if re.search(CONVERTED, line)]
    for declared in re.finditer(r"\buint (t0?|g)\b", text):
        name, end, depth = declared[1], declared.end(), 0
        while end < len(text) and depth >= 0:
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        scope = re.split(rf"\bsize_t {name}\b", text[declared.end() : end])[0]
        found += re.findall(rf".*[ (\[]{name} \*.*", scope)
    return found


def test_no_text_multiplies_tokens_in_32_bits():
    texts = {file: launch.text(file) for file in simulator.kernel_files()}
    assert {name: narrow_products(text) for name, text in texts.items()} == dict.fromkeys(texts, [])
    for body, old, new in NARROW:
        assert narrow_products(texts[f"{body}.metal"].replace(old, new)), (body, new)
    count = 0
    for name, text in texts.items():  # nor would any line whose factors were narrowed pass
        for line in (line for line in text.split("\n") if "size_t(" in line):
            narrowed = text.replace(line, line.replace("size_t(", "uint("))
            assert narrow_products(narrowed), f"{name}: {line}"
            count += 1
    assert count > 100
