"""`check` measures errors and times of every site of a model, and compares tokens."""

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..layers import check_sizes
from ..ops.checks import check_bools
from . import run
from .exact import random_inputs, site_errors
from .families import family_of
from .family import Family, Options, Site
from .patching import enable, is_patched, patch, release, unpatch
from .times import check_counts, machine, site_times, time_line
from .tokens import parity_lines, token_parity

Prompts = Sequence[Any] | mx.array


def _summary(sites: list[Site], errors: list[float]) -> dict[str, Any]:
    worst = max(range(len(errors)), key=errors.__getitem__)
    return {"max": errors[worst], "median": statistics.median(errors), "worst": sites[worst].name}


def check(
    model: nn.Module,
    prompts: Prompts | None = None,
    tokens: int = 64,
    times: tuple[int, ...] = (1, 512),
    verbose: bool = True,
) -> dict[str, Any]:
    """Measure errors and times of every site of a model, patched and by its package's own code.

    Each site runs with its weights, on this machine. Its errors are against float64 NumPy, on
    random streams and on the streams that the model has at that site.

    With prompts, the whole model is compared too. The package's model continues each prompt by its
    most likely tokens, then the patched model gets the same tokens. Reported are how often the
    most likely token is the same, at the prompt's positions and after; the largest and the mean
    difference of log-probabilities of all tokens of the vocabulary; the first token after the
    prompt that differs, and how far apart the package's two best were there; tokens per second of
    both; and the peak memory of both.

    Args:
        model: A model of one of the families, patched or not; it does not change.
        prompts: Token ids: an array of integers ``[length]`` or ``[count, length]``, or a sequence
            of arrays or lists of different lengths. Without prompts tokens are not compared, and
            the streams of sites are those of 64 random tokens; otherwise of the first prompt.
        tokens: The number of tokens after each prompt.
        times: The numbers of tokens in one call for which sites are timed.
        verbose: Whether to print the report, and bars of progress.

    Returns:
        Numbers and strings by name. Errors are in units in the last place of the model's dtype:
        those of each site, their maximum and median, and the name of the worst site. Times are in
        seconds per site.

    Raises:
        TypeError: The model is no `nn.Module`, prompts are no integers, tokens is no int, or times
            no tuple of integers.
        ValueError: The model is of no family; prompts have another shape, or are not in the
            model's vocabulary; or tokens or a number in times is not positive.
    """
    family = family_of("check", model)
    check_bools("check", verbose=verbose)
    check_counts("check", times=times)
    check_sizes("check", tokens=(tokens, float("inf")))
    rows = None if prompts is None else _rows(prompts, family.vocabulary(model))
    patched = is_patched(model)
    if not patched:
        patch(model, verify=False)
    try:
        report = _check(family, model, rows, times)
        if rows is not None:
            report["tokens"] = token_parity(family, model, rows, tokens, verbose)
    finally:
        if not patched:
            unpatch(model)
    if verbose:
        _print_check(report, family.package)
    return report


def _rows(prompts: Any, vocabulary: int) -> list[mx.array]:
    """Return prompts as arrays ``[length]``, checked."""
    if isinstance(prompts, mx.array):
        _check_tokens(prompts, vocabulary)
        return list(prompts.reshape(-1, prompts.shape[-1]))
    if not isinstance(prompts, (list, tuple)):
        must = "be an mx.array of integers or a list of prompts"
        raise TypeError(f"[check] prompts must {must} but got {type(prompts).__name__}.")
    if not prompts:
        raise ValueError("[check] prompts must have at least one prompt but have none.")
    rows = []
    for given in prompts:
        prompt: Any = given
        if isinstance(given, (list, tuple)) and all(type(token) is int for token in given):
            prompt = mx.array(given, mx.int32)
        _check_tokens(prompt, vocabulary)
        if prompt.ndim != 1:
            got = list(prompt.shape)
            raise ValueError(f"[check] each prompt must have shape [length] but got {got}.")
        rows.append(prompt)
    return rows


def _check_tokens(tokens: Any, vocabulary: int) -> None:
    """Raise TypeError or ValueError unless these are tokens ``[length]`` or ``[count, length]``."""
    if not isinstance(tokens, mx.array) or not mx.issubdtype(tokens.dtype, mx.integer):
        got = tokens.dtype if isinstance(tokens, mx.array) else type(tokens).__name__
        raise TypeError(f"[check] prompts must be an mx.array of integers but got {got}.")
    if tokens.ndim not in (1, 2) or tokens.size == 0:
        must = "have shape [length] or [count, length], not empty,"
        raise ValueError(f"[check] prompts must {must} but got {list(tokens.shape)}.")
    lowest: Any = tokens.min().item()
    highest: Any = tokens.max().item()
    if lowest < 0 or highest >= vocabulary:  # MLX would read beyond the embedding
        got = f"{lowest} to {highest}"
        raise ValueError(f"[check] prompts must be from 0 to {vocabulary - 1} but got {got}.")


@contextlib.contextmanager
def _all_enabled(sites: list[Site]) -> Iterator[None]:
    """Let the sites of a patched model that keep the package's code run on these kernels."""
    options: Any = next((site.options for site in sites if site.options), Options(True, False))
    own = [site for site in sites if site.options is None]
    for site in own:
        enable(site, options)
    try:
        yield
    finally:
        for site in own:
            release(site, options.differentiable)


def activations(
    family: Family, model: nn.Module, sites: list[Site], tokens: mx.array, keep: int = 8
) -> list[tuple[mx.array, ...]]:
    """Return x and y of each site in a forward pass over tokens ``[batch, length]``.

    They are those of the last ``keep`` tokens of the first sequence.
    """
    seen: dict = {}
    token = run._seen.set(seen)
    try:
        with _all_enabled(sites):
            logits = family.logits(model, tokens, family.cache(model))
    finally:
        run._seen.reset(token)
    found = [tuple(a[:1, -keep:] for a in seen[id(site.hc), site.prefix]) for site in sites]
    mx.eval(logits, found)
    return found


def _check(family: Family, model: nn.Module, rows: list[mx.array] | None, times) -> dict[str, Any]:
    dtype, sites, package = family.dtype(model), family.sites(model), family.package
    if rows is None:
        rows = [mx.random.randint(0, family.vocabulary(model), (64,), key=mx.random.key(0))]
    real = activations(family, model, sites, rows[0][None])
    options: Any = next((site.options for site in sites if site.options), Options(True, False))
    table: list[dict[str, Any]] = []
    for k, (site, real_inputs) in enumerate(zip(sites, real, strict=True)):
        row: dict[str, Any] = {"site": site.name, "patched": site.options is not None}
        for kind, (x, y) in (("random", random_inputs(site, dtype, 4, k)), ("real", real_inputs)):
            ours, theirs = site_errors(site, site.options and options, x, y)
            row[kind], row[f"{kind}, {package}"] = ours.most, theirs.most
        table.append(row)
    kinds = ("random", f"random, {package}", "real", f"real, {package}")
    return {
        **machine(),
        "dtype": str(dtype).split(".")[-1],
        "patched": sum(row["patched"] for row in table),
        "sites": table,
        "errors": {kind: _summary(sites, [row[kind] for row in table]) for kind in kinds},
        "times": [site_times(sites, dtype, count) for count in times],
    }


def _print_check(report: dict[str, Any], package: str) -> None:
    print(f"{report['device']}, kernels: {report['backend']}, MLX {report['mlx']}, ", end="")
    print(f"{package} {report[package]}, {report['date']}")
    count = len(report["sites"])
    print(f"{report['patched']} of {count} hyper-connections patched, {report['dtype']}")
    print("error against float64, units in the last place")
    for kind, e in report["errors"].items():
        who = kind if package in kind else f"{kind}, patched"
        print(f"  {who:16} max {e['max']:.2f} at {e['worst']}, median {e['median']:.2f}")
    for t in report["times"]:
        print(time_line(t, package))
    for line in parity_lines(report.get("tokens"), package):
        print(line)
