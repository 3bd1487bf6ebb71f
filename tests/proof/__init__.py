"""How a kernel is judged without a GPU; README.md says what each module proves.

with executor("simulator"):
    outputs_and_gradients = results(ops.mhc_pre, case, case.arrays())
check(case, outputs_and_gradients)
"""

from proof.compare import check, errors, results
from proof.executors import executor, missing, set_tiling, variants

__all__ = ["check", "errors", "executor", "missing", "results", "set_tiling", "variants"]
