"""Which texts are judged: those of all cases, and of the shapes that models have."""

import itertools
from collections.abc import Iterable

import mlx.core as mx
from cases import CASES, DTYPES, RINGED, UNUSUAL, Case

from mhc_mlx import DEEPSEEK_V4, PAPER, launch, ops
from mhc_mlx.launch import Launch
from proof import executor
from proof.compare import case_arrays, several
from proof.optimiser import Variant, variant

STREAMS = (4, 2, 8, 16)
CHANNELS = (2048, 4096, 5120, 7168)
TOKENS = (1, 8, 512, 2048)
# What CI judges: of shapes those that models run most, of cases every so many.
SAMPLE = [(4, 4096, T, "bfloat16") for T in (1, 2048)] + [(4, 7168, 512, "bfloat16")]
SAMPLE += [(4, 5120, 2048, "float32"), (4, 2048, 2048, "float16")]
FULL = Case("mhc_static", (2048,), 4, 2048, "bfloat16")  # its gradient needs stay_packed most
STRIDE = 16


def main_shapes() -> list[tuple[int, int, int, str]]:
    return list(itertools.product(STREAMS, CHANNELS, TOKENS, DTYPES))


def main_cases(n: int, C: int, T: int, dtype: str) -> list[Case]:
    """What models call at a shape."""
    shape, each = ((T,), n, C, dtype), {"per_token": (True, True)}
    return [
        Case("mhc_pre", *shape, PAPER),
        Case("mhc_pre", *shape, PAPER, norm=False),
        Case("mhc_seam", *shape, **each),
        Case("mhc_single_pass", *shape, DEEPSEEK_V4, rounded=True),
        Case("stream_mix_add", *shape, **each),
        Case("stream_aggregate", *shape, per_token=(True, False)),
        Case("gate_mix", *shape),
        Case("mhc_layer", *shape, PAPER),
        Case("mhc_static", *shape),
        Case("mhc_head", *shape, DEEPSEEK_V4),
        Case("stream_norm", *shape, **each),
    ]


def zeros(case: Case) -> list[mx.array]:
    """The arrays of a case that are not None, not evaluated."""
    arrays = []
    for k, array in enumerate(case.row.arrays.values()):
        if k not in case.absent:
            shape = array.shape(case.lead if array.per_token(case) else (), case.size)
            name = getattr(case, array.dtype, case.weights)
            arrays.append(mx.zeros(shape, DTYPES.get(name, mx.float32)))
    return arrays


def call(case: Case, given: list[mx.array]) -> None:
    """Call an op, forward and backward, and evaluate nothing."""
    op = getattr(ops, case.op)

    def f(*arrays):
        return several(op(*case_arrays(case, arrays), *case.statics))

    mx.vjp(f, given, [mx.zeros(a.shape, a.dtype) for a in f(*given)])
    if case.op == "mhc_single_pass":  # it launches other kernels where no gradient is asked for
        op(*case_arrays(case, given), *case.statics, differentiable=False)


def main_launches(case: Case) -> list[Launch]:
    """What a case launches on a Mac."""
    with launch.record() as launches:
        call(case, zeros(case))
    return launches


def case_launches(case: Case) -> list[Launch]:
    """What a case launches in the tests, whose thresholds of tokens are low."""
    launches = []

    def run(name, inputs, outputs, groups, threads, template, verbose=False):
        launches.append(Launch(name, inputs, outputs, groups, threads, template))
        return [mx.zeros(*spec) for spec in outputs.values() if spec is not None]

    with executor("dialect"):
        launch.run = run
        call(case, [a for a in case.arrays() if a is not None])
    return launches


def unlike(launch: Launch) -> tuple:
    """What the text depends on: of each array, also its dtype and its address space."""
    arrays = []
    for k, a in (*launch.inputs.items(), *launch.outputs.items()):
        if a is not None:
            shape, dtype = a if isinstance(a, tuple) else (a.shape, a.dtype)
            arrays.append((k, dtype, mx.zeros(shape).size < 8))
    return (launch.name, launch.threads, tuple(launch.template.items()), tuple(arrays))


def variants(main: Iterable[Case], others: Iterable[Case]) -> dict[str, list[Variant]]:
    """Return what each case launches, by its name; cases share the variants that are alike."""
    texts: dict[tuple[str, int], Variant] = {}
    known: dict[tuple, Variant] = {}
    found: dict[str, list[Variant]] = {}
    for is_main, cases in ((True, main), (False, others)):
        for case in cases:
            launches = main_launches(case) if is_main else case_launches(case)
            for one in launches:
                if (key := unlike(one)) not in known:
                    made = variant(one, str(case), is_main)
                    known[key] = texts.setdefault((made.source, made.threads), made)
            found[str(case)] = list(dict.fromkeys(known[unlike(one)] for one in launches))
    return found


def all_cases() -> tuple[list[Case], list[Case]]:
    """Cases of every main shape, and of tests/cases.py."""
    main = [case for shape in main_shapes() for case in main_cases(*shape)]
    return main, list(dict.fromkeys(CASES + RINGED + UNUSUAL))


def sample() -> tuple[list[Case], list[Case]]:
    """Those that CI judges."""
    generic = next(case for case in CASES if case.op == "mhc_pre" and case.n == 8)
    others = [case for case in CASES[::STRIDE] if case.tokens > 0]
    main = [case for shape in SAMPLE for case in main_cases(*shape)]
    return [*main, FULL], [*others, generic]
