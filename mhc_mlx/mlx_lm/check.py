"""`check` measures errors and times of every site of a model, with its weights."""

import statistics
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..ops.checks import check_bools
from .exact import random_inputs, site_errors, streams_dtype
from .layers import SinglePassLayer
from .patch import patch, unpatch
from .sites import (
    SinglePassConnection,
    Site,
    activations,
    find_sites,
    stage_layers,
    text_model,
)
from .times import check_counts, machine, site_times, time_line


def _summary(sites: list[Site], errors: list[float]) -> dict[str, Any]:
    worst = max(range(len(errors)), key=errors.__getitem__)
    return {"max": errors[worst], "median": statistics.median(errors), "worst": sites[worst].name}


def check(
    model: nn.Module,
    tokens: mx.array | None = None,
    times: tuple[int, ...] = (1, 512),
    verbose: bool = True,
) -> dict[str, Any]:
    """Measure errors and times of every site of a model, patched and by mlx-lm's own code.

    Each site runs with its weights, on this machine. Its errors are against float64 NumPy, on
    random streams and on the streams that the model has at that site.

    Args:
        model: A ``deepseek_v41`` model, patched or not; it does not change.
        tokens: Integers ``[batch, length]`` or ``[length]``; the streams of the model's sites are
            those of these tokens. By default there are 64 random tokens.
        times: The numbers of tokens in one call for which sites are timed.
        verbose: Whether to print the report.

    Returns:
        Numbers and strings by name. Errors are in units in the last place of the model's dtype:
        those of each site, their maximum and median, and the name of the worst site. Times are in
        seconds per site.

    Raises:
        TypeError: The model is no ``deepseek_v41``, tokens are no array of integers, or times no
            tuple of integers.
        ValueError: Tokens have another shape, or are not in the model's vocabulary; or a number in
            times is not positive.
    """
    text = text_model("check", model)
    configuration: Any = model.args
    check_bools("check", verbose=verbose)
    check_counts("check", times=times)
    if tokens is not None:
        _check_tokens(tokens, configuration.vocab_size)
    patched = any(isinstance(layer, SinglePassLayer) for layer in stage_layers(text))
    if not patched:
        patch(model, verify=False)
    try:
        report = _check(model, text, tokens, times)
    finally:
        if not patched:
            unpatch(model)
    if verbose:
        _print_check(report)
    return report


def _check_tokens(tokens: mx.array, vocabulary: int) -> None:
    if not isinstance(tokens, mx.array) or not mx.issubdtype(tokens.dtype, mx.integer):
        got = tokens.dtype if isinstance(tokens, mx.array) else type(tokens).__name__
        raise TypeError(f"[check] tokens must be an mx.array of integers but got {got}.")
    if tokens.ndim not in (1, 2) or tokens.size == 0:
        must = "have shape [length] or [batch, length], not empty,"
        raise ValueError(f"[check] tokens must {must} but got {list(tokens.shape)}.")
    lowest: Any = tokens.min().item()
    highest: Any = tokens.max().item()
    if lowest < 0 or highest >= vocabulary:  # MLX would read beyond the embedding
        got = f"{lowest} to {highest}"
        raise ValueError(f"[check] tokens must be from 0 to {vocabulary - 1} but got {got}.")


def _check(model, text, tokens, times):
    dtype, sites = streams_dtype(text), find_sites(text)
    if tokens is None:
        tokens = mx.random.randint(0, model.args.vocab_size, (64,), key=mx.random.key(0))
    real = activations(model, sites, tokens.reshape(-1, tokens.shape[-1]))
    rows = []
    for k, (site, real_inputs) in enumerate(zip(sites, real, strict=True)):
        row = {"site": site.name, "patched": isinstance(site.hc, SinglePassConnection)}
        for kind, (x, y) in (("random", random_inputs(site, dtype, 4, k)), ("real", real_inputs)):
            row[kind], row[f"{kind}, mlx-lm"] = site_errors(site, x, y)
        rows.append(row)
    kinds = ("random", "random, mlx-lm", "real", "real, mlx-lm")
    return {
        **machine(),
        "dtype": str(dtype).split(".")[-1],
        "patched": sum(row["patched"] for row in rows),
        "sites": rows,
        "errors": {kind: _summary(sites, [row[kind] for row in rows]) for kind in kinds},
        "times": [site_times(sites, dtype, count) for count in times],
    }


def _print_check(report: dict[str, Any]) -> None:
    print(f"{report['device']}, kernels: {report['backend']}, MLX {report['mlx']}, ", end="")
    print(f"mlx-lm {report['mlx-lm']}, {report['date']}")
    count = len(report["sites"])
    print(f"{report['patched']} of {count} hyper-connections patched, {report['dtype']}")
    print("error against float64, units in the last place")
    for kind, e in report["errors"].items():
        who = kind if "mlx-lm" in kind else f"{kind}, patched"
        print(f"  {who:16} max {e['max']:.2f} at {e['worst']}, median {e['median']:.2f}")
    for t in report["times"]:
        print(time_line(t))
