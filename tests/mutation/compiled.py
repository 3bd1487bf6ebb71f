"""Compiles some variants of bodies with NVRTC: an error, a spill or too much memory is exit code 1.

python tests/mutation/compiled.py mhc_pre mhc_seam
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import cases  # noqa: E402
import mlx.core as mx  # noqa: E402
import nvrtc  # noqa: E402
from conftest import executor, missing  # noqa: E402
from test_parity import results  # noqa: E402

from mhc_mlx import kernel, ops  # noqa: E402

EACH = 3  # variants of a body
MOST = 8  # in all


def variants(bodies: set[str]) -> list[tuple[str, str]]:
    """(body, CUDA source) of the first launches in which a body's template is new."""
    found: dict[str, dict] = {b: {} for b in bodies}

    def launch(name, inputs, outputs, groups, threads, template, verbose=False):
        kinds = str([v for k, v in template.items() if k not in ("THREADS", "SLICES", "VEC")])
        if name in found and len(found[name]) < EACH and kinds not in found[name]:
            source = nvrtc.cuda_source(name, inputs, outputs, threads, template)
            found[name][kinds] = source
        return [mx.zeros(*spec) for spec in outputs.values() if spec is not None]

    with executor("nvrtc"):
        kernel.launch = launch
        for case in cases.RINGED + cases.SINGLE + cases.DYNAMIC + cases.COVERING:
            if case.tokens and any(len(v) < EACH for v in found.values()):
                results(getattr(ops, case.op), case, [a for a in case.arrays() if a is not None])
    each = [(name, source) for name, sources in found.items() for source in sources.values()]
    return each[:MOST]


def main() -> None:
    if missing("nvrtc"):
        return
    for name, source in variants(set(sys.argv[1:])):
        error, figures = nvrtc.compile_cuda(name, source)
        if error:
            line = re.search(r"error.*", error)
            sys.exit(f"{name}: {line.group() if line else error[:200]}")
        if figures["spills"] or figures["shared"] > 32 << 10:
            sys.exit(f"{name}: {figures}")


if __name__ == "__main__":
    main()
