"""Say how long a launch takes on a GPU, of what it counts and of published rates, and what binds.

A threadgroup of the launch is run on the CPU (benchmarks/threadgroup.py), from the PTX that the
launch compiles to (benchmarks/listings.py). It gives instructions by kind, sectors by buffer and
cache, and the clocks of a threadgroup that is alone. With the rates of benchmarks/rates.py

    time = launch + max(DRAM, last cache, L2, issue, each pipe, latency)

DRAM, caches: bytes over bandwidth. Issue and pipes: clocks of the busiest core, which has
ceil(threadgroups / cores). Latency: ceil(threadgroups / (cores x resident threadgroups)) waves,
each as long as a threadgroup that is alone: by Little's law, what too few bytes in flight cost.

    python -m benchmarks.model --json benchmarks/results/model.json   # counts and predicts
    python -m benchmarks.model --markdown > docs/model.md             # from that JSON
"""

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from benchmarks import listings, ptx, threadgroup
from benchmarks.rates import Rates, Unit
from mhc_mlx import launch, ops
from mhc_mlx.device_report.measure import count_inputs
from mhc_mlx.device_report.suite import DTYPES, add_cotangents, function, make_inputs
from mhc_mlx.device_report.timing import directed
from mhc_mlx.launch import Launch

STEPS = 60_000  # instructions that a threadgroup may take; what takes more is scaled from less
KINDS = {  # the first part of a word of PTX, with its kind
    **dict.fromkeys(("fma", "add", "sub", "mul", "mad", "neg", "abs", "max", "min"), "number"),
    **dict.fromkeys(("and", "or", "xor", "not", "shl", "shr", "bfi", "bfe", "lop3", "shf"), "bits"),
    **dict.fromkeys(("prmt", "selp", "setp", "popc", "clz", "brev"), "bits"),
    **dict.fromkeys(("ex2", "lg2", "rsqrt", "sin", "cos", "tanh"), "special"),
    **dict.fromkeys(("mma", "simd_multiply", "wgmma"), "matrix"),
    **dict.fromkeys(("shfl", "movmatrix"), "shuffle"),
    **dict.fromkeys(("bra", "ret", "exit"), "branch"),
    **dict.fromkeys(("mov", "cvta"), "free"),
}


def kind_of(op: str) -> tuple[str, int]:
    """The kind of a PTX instruction, and for memory the bytes of a lane."""
    parts = op.split(".")
    word, last = parts[0], parts[-1]
    if word in ("ld", "st", "cp", "ldmatrix"):
        if "param" in parts:
            return "free", 0
        if word == "cp" and "shared" not in parts:
            return "branch", 0
        lanes = next((int(p[1:]) for p in parts if p[0] in "vx" and p[1:].isdigit()), 1)
        size = 16 if word == "cp" else 4 if word == "ldmatrix" else ptx.TYPES[last].itemsize
        return "shared" if "shared" in parts and word != "cp" else "global", size * lanes
    if word == "bar":
        return ("barrier", 0) if "warp" not in parts else ("branch", 0)
    if word in ("simd_sum", "simd_max"):
        return "sum", 0
    if word in ("div", "rcp", "sqrt"):
        if last[0] != "f":
            return "integer_divide", 0
        return ("special", 0) if "approx" in parts else ("divide", 0)
    if word == "rem":
        return "integer_divide", 0
    if word == "cvt":
        return ("free", 0) if last[1:] == "32" and parts[-2][1:] == "64" else ("convert", 0)
    kind = KINDS.get(word)
    if kind is None:
        raise NotImplementedError(f"[model] {op} has no kind")
    if kind in ("number", "bits"):
        if last in ("pred",):
            return "free", 0
        wide = last.endswith("64") and "wide" not in parts
        if word in ("mul", "mad") and last[0] in "sub" and not last.startswith("bf"):
            return ("wide" if wide else "multiply"), 0
        if wide:
            return "wide", 0
        return ("float" if last[0] in "fb" and kind == "number" else "integer"), 0
    return kind, 0


class Counts(NamedTuple):
    """What one threadgroup does, and how it occupies a core."""

    instructions: dict[str, float]  # of 32 threads, by kind, in the machine's instructions
    clocks: dict[str, float]  # of pipes
    chain: float  # clocks of a threadgroup that is alone
    loads: dict[str, float]  # bytes that L2 gives, by buffer
    stores: dict[str, float]
    touched: dict[str, float]  # bytes, each once
    again: dict[str, dict[int, float]]  # bytes loaded again, by log2 of the bytes since
    registers: int
    spilled: int
    threadgroup_memory: int

    @property
    def barriers(self) -> float:
        return self.instructions.get("barrier", 0.0)

    @property
    def products(self) -> float:
        return self.instructions.get("matrix", 0.0)


def costs(rates: Rates):
    """The cost of a PTX instruction on a GPU."""

    @functools.cache
    def cost(op: str) -> ptx.Cost:
        kind, size = kind_of(op)
        unit = rates.units[kind if kind in rates.units else "shuffle"]
        clocks = unit.clocks * (max(1, size / 4) if size else 1)
        return ptx.Cost(kind, unit.pipe, unit.count, clocks, unit.latency)

    return cost


def tokens_of(call: Launch) -> int:
    """Tokens (or rows) of a launch: the first axis of the array that its body takes them from."""
    for name in ("x", "s", "partial", "logits"):
        if spec := call.inputs.get(name):
            return spec[0][0]
    raise ValueError(f"[model] {call.name} has no tokens")


def with_tokens(call: Launch, tokens: int) -> Launch:
    """The launch with fewer tokens, and as many threadgroups."""
    before = tokens_of(call)

    def cut(specs):
        of = {}
        for k, spec in specs.items():
            fits = spec is not None and spec[0] and spec[0][0] == before
            of[k] = ((tokens, *spec[0][1:]), spec[1]) if fits else spec
        return of

    return call._replace(inputs=cut(call.inputs), outputs=cut(call.outputs))


def size_of(spec) -> int:
    return math.prod(spec[0]) * spec[1].size


def resident(rates: Rates, threads: int, registers: int, memory: int) -> int:
    """Threadgroups that a core holds at once."""
    granule = 8 if rates.backend == "cuda" else 1
    per_thread = -(-max(registers, 16) // granule) * granule
    limits = [rates.groups, rates.threads // threads, rates.registers // (per_thread * threads)]
    if memory:
        limits.append(rates.threadgroup_memory // (memory + (1024 if granule == 8 else 0)))
    return max(1, min(limits))


def run_group(
    call: Launch, listing: listings.Listing, rates: Rates, steps: int
) -> threadgroup.Work:
    """Run the first threadgroup.

    Raises:
        threadgroup.Stopped: It takes more steps than that.
    """
    program = _program(listing.ptx)
    given = {**call.inputs, **call.outputs}
    arguments: list = []
    held = resident(rates, call.threads, listing.registers, listing.threadgroup_memory)
    waves = math.ceil(call.groups / (rates.cores * held))
    tokens = tokens_of(call)
    shared = {k for k, v in given.items() if v and v[0][0] != tokens} if waves > 1 else set()
    buffers = 0
    for name in listing.names:
        if name == "groups":
            arguments.append(np.array([call.groups], np.uint32))
        elif name.startswith("of_"):  # an array in threadgroup memory, of which only bytes matter
            arguments.append(np.array([len(arguments) << 16], np.uint64))
        elif name.endswith("_shape"):
            dims = np.array([*given[name[:-6]][0], *[0] * 10], np.int32)
            if listing.names[0] == "groups":  # on Metal it is a buffer
                arguments.append(threadgroup.buffer_of(name, buffers, dims.nbytes, 0, dims))
                buffers += 1
            else:
                arguments.append(dims.view(np.uint32))
        else:
            fill = 0x3F800000 if given[name][1].size == 4 else 0x3F803F80
            arguments.append(threadgroup.buffer_of(name, buffers, size_of(given[name]), fill))
            buffers += 1
    l1 = rates.l1_bytes
    if rates.backend == "cuda":  # threadgroup memory is a part of it
        l1 -= held * listing.threadgroup_memory
    reach = max(0, l1) // held

    def latency(name: str, first: bool, distance: int) -> tuple[bool, float]:
        if first:
            return False, rates.l2_latency if name in shared else rates.dram_latency
        hit = distance < reach
        return hit, rates.l1_latency if hit else rates.l2_latency

    # Threadgroups of a core run the same text at the same time, and share its schedulers.
    together = min(held, math.ceil(call.groups / rates.cores))
    issue = max(1.0, together * call.threads / ptx.WARP / rates.schedulers)
    group = threadgroup.Threadgroup(
        program, arguments, call.threads, 0, call.groups, costs(rates), latency, issue, steps
    )
    return group.run()


@functools.lru_cache(maxsize=64)
def _program(text: str) -> ptx.Program:
    return ptx.parse(text)


def counts(call: Launch, rates: Rates, listing: listings.Listing | None = None) -> Counts:
    """Count what a threadgroup of a launch does. A threadgroup that takes too many turns is run on
    two smaller numbers of tokens, and what it does grows along a line."""
    listing = listing or listings.of_launch(call, rates.backend)
    found = _whole(call, listing, rates, STEPS)

    def of(part: str) -> dict[str, float]:
        return {k[1]: v for k, v in found.items() if k[0] == part}

    again: dict[str, dict[int, float]] = {}
    for key, v in found.items():
        if key[0] == "again":
            again.setdefault(key[1], {})[key[2]] = v
    return Counts(
        of("instructions"),
        of("clocks"),
        found[("chain",)],
        of("loads"),
        of("stores"),
        of("touched"),
        again,
        listing.registers,
        listing.spilled,
        listing.threadgroup_memory,
    )


def _whole(call: Launch, listing: listings.Listing, rates: Rates, steps: int) -> Counter:
    """Numbers of a threadgroup, scaled from fewer tokens where it takes more steps than allowed.

    Half of those tokens must make a good part of the work less: otherwise a threadgroup has no
    whole turns of them, so that more steps are allowed.
    """
    tokens, cut = tokens_of(call), 1
    while True:
        some = math.ceil(tokens / cut)
        try:
            found = _numbers(run_group(with_tokens(call, some), listing, rates, steps))
            break
        except threadgroup.Stopped:
            cut *= 2
            if cut > tokens:
                return _whole(call, listing, rates, 2 * steps)
    if cut == 1:
        return found
    fewer = math.ceil(some / 2)
    below = _numbers(run_group(with_tokens(call, fewer), listing, rates, steps))
    if below["steps",] > 0.65 * found["steps",]:
        return _whole(call, listing, rates, 2 * steps)
    scale = (tokens - some) / (some - fewer)
    keys = found.keys() | below.keys()
    return Counter({k: found[k] + scale * max(0.0, found[k] - below[k]) for k in keys})


def _numbers(work: threadgroup.Work) -> Counter:
    """All numbers of what a threadgroup does, by name, so that they can be scaled."""
    found: Counter = Counter({("chain",): work.chain, ("steps",): work.steps})
    for part in ("instructions", "clocks"):
        found.update({(part, k): v for k, v in getattr(work, part).items()})
    for part in ("loads", "stores", "touched"):
        found.update({(part, k): v * ptx.SECTOR for k, v in getattr(work, part).items()})
    found.update({("again", *k): v * ptx.SECTOR for k, v in work.again.items()})
    return found


class Prediction(NamedTuple):
    """Microseconds of a launch, by term, and what they come from."""

    kernel: str
    device: str
    us: float
    binds: str
    terms: dict[str, float]  # us
    dram_read: float  # bytes of the whole launch
    dram_written: float
    l2_bytes: float
    instructions: float
    products: float
    barriers: float
    groups: int
    resident: int  # threadgroups of a core at once
    waves: int
    registers: int
    spilled: int


def predict(call: Launch, rates: Rates, found: Counts | None = None) -> Prediction:
    """Say how long a launch takes on a GPU."""
    found = found or counts(call, rates)
    groups = call.groups
    held = resident(rates, call.threads, found.registers, found.threadgroup_memory)
    in_flight = min(groups, held * rates.cores)
    sizes = {k: size_of(v) for k, v in {**call.inputs, **call.outputs}.items() if v}
    written = {k: min(sizes.get(k, math.inf), groups * v) for k, v in found.stores.items()}
    once = {k: min(sizes.get(k, math.inf), groups * v) for k, v in found.touched.items()}
    read = {k: v for k, v in once.items() if found.loads.get(k)}
    loads = sum(found.loads.values()) * groups

    def missed(capacity: int) -> float:
        """Bytes that are loaded again from beyond a cache of that many bytes."""
        far = 0.0
        for name, by in found.again.items():
            alone = sizes.get(name, 0) >= 0.5 * groups * found.touched.get(name, 0)
            for log, bytes_ in by.items():
                distance = 2.0**log * 0.75 * (in_flight if alone else 1)
                far += groups * bytes_ * max(0.0, 1 - capacity / distance)
        return far

    dram_read = sum(read.values()) + missed(rates.last_bytes)
    dram_written = sum(written.values())
    last = sum(read.values()) + missed(rates.l2_bytes) + dram_written
    l2_bytes = loads + sum(found.stores.values()) * groups
    busiest = math.ceil(groups / rates.cores)
    waves = math.ceil(groups / (rates.cores * held))
    seconds = {
        "DRAM": dram_read / rates.read + dram_written / rates.write,
        "L2": l2_bytes / (rates.l2 * rates.clock * min(rates.cores, groups)),
        "latency": waves * found.chain / rates.clock,
    }
    if rates.last_bytes != rates.l2_bytes:
        seconds["last cache"] = last / rates.last
    each = busiest / rates.schedulers / rates.clock
    for pipe, clocks in pipes(found, rates.units).items():
        seconds[{"matrix": "matrix", "alu": "ALU"}.get(pipe, pipe)] = each * clocks
    if rates.backend == "cuda":
        seconds["issue"] = each * sum(found.instructions.values())
    terms = {k: v * 1e6 for k, v in seconds.items()} | {"launch": rates.launch * 1e6}
    binds = max(terms, key=lambda k: terms[k])
    us = terms["launch"] + max(v for k, v in terms.items() if k != "launch")
    return Prediction(
        call.name,
        rates.name,
        us,
        binds,
        terms,
        dram_read,
        dram_written,
        l2_bytes,
        groups * sum(found.instructions.values()),
        groups * found.products,
        groups * found.barriers,
        groups,
        held,
        waves,
        found.registers,
        found.spilled,
    )


def pipes(found: Counts, units: Mapping[str, Unit]) -> dict[str, float]:
    """Clocks of a threadgroup by pipe of its core's schedulers."""
    total: Counter = Counter()
    for kind, clocks in found.clocks.items():
        pipe = units[kind if kind in units else "shuffle"].pipe
        if pipe != "issue":
            total[pipe] += clocks
    return dict(total)


@contextlib.contextmanager
def recording(backend: str) -> Iterator[list[Launch]]:
    """Collect the launches of this thread as for that backend; none runs."""
    launches: list[Launch] = []
    usual, usual_backend = launch.run, launch.backend

    def record(name, inputs, outputs, groups, threads, template, verbose=False):
        specs = {k: None if a is None else (a.shape, a.dtype) for k, a in inputs.items()}
        launches.append(Launch(name, specs, outputs, groups, threads, template))
        return [mx.zeros(*spec) for spec in outputs.values() if spec is not None]

    launch.run, launch.backend = record, lambda: backend
    try:
        yield launches
    finally:
        launch.run, launch.backend = usual, usual_backend


def launches_of(
    op: str, direction: str, shape, dtype: str, backend: str, threads: int | None = None
) -> list[Launch]:
    """What an op launches on that backend; a forward alone as in inference."""
    options: dict = {"differentiable": False} if direction == "forward" else {}
    options |= {"threads_per_group": threads} if threads else {}
    arrays = add_cotangents(op, direction, make_inputs(op, shape, DTYPES[dtype]))
    number = count_inputs(op, shape, DTYPES[dtype])
    with recording(backend) as launches:
        directed(function(ops, op, **options), direction, number, False)(*arrays)
    return launches


def from_row(row: Mapping) -> Launch:
    """The launch that a row of kernel_times.json describes."""

    def dtype(value):
        return getattr(mx, value) if isinstance(value, str) else value

    def specs(arrays):
        return {k: v and (tuple(v[0]), dtype(v[1])) for k, v in arrays.items()}

    template = {k: dtype(v) for k, v in row["template"].items()}
    inputs, outputs = specs(row["inputs"]), specs(row["outputs"])
    return Launch(row["kernel"], inputs, outputs, row["groups"], row["threads"], template)
