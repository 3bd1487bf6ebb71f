"""Every body's Metal text, compiled by an optimising LLVM and no GPU: a sample of all variants."""

import os

import pytest
from cases import Case

from proof import optimiser
from proof.optimiser import variants

MAIN, OTHERS = variants.sample()


@pytest.fixture(scope="module")
def sampled() -> tuple[dict, dict]:
    """Variants by case, and the figures of all, compiled together."""
    each = variants.variants(MAIN, OTHERS)
    found = dict.fromkeys(v for launched in each.values() for v in launched)
    return each, optimiser.all_figures(found, os.cpu_count() or 1)


@pytest.mark.parametrize("case", MAIN + OTHERS, ids=str)
def test_nothing_is_left_in_memory_or_narrow(case: Case, need, request):
    need("optimiser")
    each, figures = request.getfixturevalue("sampled")
    assert each[str(case)]
    wrong = {str(v): optimiser.faults(v, figures[v]) for v in each[str(case)]}
    assert not {k: found for k, found in wrong.items() if found}
