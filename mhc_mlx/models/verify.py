"""Which sites `patch` keeps: those whose errors against float64 are small enough."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .exact import random_inputs, site_errors, site_token_errors, spread
from .family import Options, Site

TOKENS = (1, 8, 512)  # the number of tokens decides which kernels run
DRAWN = (16, 64)  # random tokens for each of these: draws of few, or copies (float64 is slow)
LEAST = 2.0  # units in the last place that are never too many in the model's dtype


class Bound(NamedTuple):
    """Our errors must be at most factor times the package's by this statistic, or least units."""

    name: str  # what stands before the output's name in a message
    statistic: Callable[[np.ndarray], Any]
    factor: float
    least: float


# Bounds by the deviation of logits. The largest error is a matter of luck, so its bound is loose:
# it finds what few tokens have wrong. The ninth decile is steady: two bad tokens of 16 or seven of
# 64 raise it, and fewer do not.
BOUNDS = {
    6.0: (Bound("median of ", np.median, 2, 4.0), Bound("", np.max, 16, 64.0)),
    24.0: (Bound("ninth decile of ", partial(np.quantile, q=0.9, method="higher"), 2, 128.0),),
}


class Failure(NamedTuple):
    """A site whose error is too large."""

    site: Site
    what: str  # the output, the dtype and the number of tokens
    ours: float
    theirs: float
    limit: float

    def __str__(self) -> str:
        package = self.site.family.package
        return (
            f"{self.site.name} ({self.what}: {self.ours:.3g} units, {package} {self.theirs:.3g}, "
            f"limit {self.limit:.3g})"
        )


def too_large(ours: float, limit: float) -> bool:
    """Tell whether an error is above its limit; not a number is."""
    return not ours <= limit


def own_limit(site: Site, theirs: float) -> float:
    """Return the largest error that a site may have in the model's dtype, in units."""
    return max(site.own_factor * theirs, LEAST)


def _in_float32(site: Site, options: Options, seed: int) -> Failure | None:
    """Compare errors for each deviation of logits; the larger one is for h_res alone."""
    for j, deviation in enumerate(BOUNDS if site.mixes else list(BOUNDS)[:1]):
        large, found = spread(site, deviation), None
        for tokens in TOKENS:
            where = f"float32, logits of deviation {deviation:g}, {tokens} tokens"
            for k, drawn in enumerate(DRAWN):  # few tokens may fail by luck: more others decide
                first = 1000 * seed + 500 * j + 100 * k
                errors = _errors(large, options, tokens, drawn, first)
                found = _beyond(site, BOUNDS[deviation], errors, where)
                if found is None:
                    break
            else:
                return found
    return None


def _errors(
    large: Site, options: Options, tokens: int, drawn: int, seed: int
) -> dict[str, list[np.ndarray]]:
    """Return our errors and the package's by output, in calls with this number of tokens.

    So many different tokens are drawn in all.
    """
    distinct = min(tokens, drawn)
    draws = [
        site_token_errors(
            large,
            options,
            *random_inputs(large, mx.float32, distinct, seed + k),
            tokens // distinct,
        )
        for k in range(drawn // distinct)
    ]
    return {
        output: [np.concatenate([draw[k][output] for draw in draws]) for k in (0, 1)]
        for output in draws[0][0]
    }


def _beyond(
    site: Site, bounds: tuple[Bound, ...], errors: dict[str, list[np.ndarray]], where: str
) -> Failure | None:
    """Return the first output with an error beyond a bound."""
    for output, both in errors.items():
        for bound in bounds:
            ours, theirs = (float(bound.statistic(e)) for e in both)
            limit = max(bound.factor * theirs, bound.least)
            if too_large(ours, limit):
                return Failure(site, f"{bound.name}{output}, {where}", ours, theirs, limit)
    return None


def _in_own_dtype(site: Site, options: Options, dtype: mx.Dtype, seed: int) -> Failure | None:
    name = str(dtype).split(".")[-1]
    for tokens in TOKENS:
        distinct = min(tokens, 4)
        inputs = random_inputs(site, dtype, distinct, seed)
        ours, theirs = site_errors(site, options, *inputs, tokens // distinct)
        for output, error in ours.items():
            limit = own_limit(site, theirs[output])
            if too_large(error, limit):
                what = f"{output}, {name}, {tokens} tokens"
                return Failure(site, what, error, theirs[output], limit)
    return None


def failure(site: Site, options: Options, dtype: mx.Dtype, seed: int) -> Failure | None:
    """Return the first error of a site that is too large, or None.

    In float32, with logits of deviation 6, the median error of an output over random tokens must
    be at most twice that of the package's code, or 4 units in the last place; its largest error at
    most 16 times these (the error of a token is that of its worst element). With logits of
    deviation 24, where eps and a clamp decide many matrices, the ninth decile of an output must be
    at most twice the package's, or 128 units. These are 16 tokens for each number of tokens in a
    call; if an error is too large, 64 others decide.

    Measured at deviation 24 on tiny models of all families, in 200 draws each: of 64 tokens the
    ninth decile of every output was at most 44 units; of 16 it was at least 1000 where the
    sites had another eps, start, order, transpose, clamp or number of iterations.

    Then, in the model's dtype and with the site's own scales, the largest error must be at most
    that of the package's code, of a gated residual twice that (`GatedSite.own_factor`), or 2 units.
    (In float32 it would compare two roundings.)
    """
    found = _in_float32(site, options, seed)
    if found is None and dtype != mx.float32:
        found = _in_own_dtype(site, options, dtype, seed)
    return found
