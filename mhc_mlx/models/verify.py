"""Which sites `patch` keeps: those whose errors against float64 are small enough."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .exact import random_inputs, site_errors, site_token_errors, spread
from .family import Options, Site

TOKENS = (1, 8, 512)  # the number of tokens decides which kernels run
DRAWN = (16, 64)  # random tokens for each of these: draws of few, or copies (float64 is slow)
DEVIATION = 6.0  # of float32 logits: a wrong eps, order or orientation shows there
LEAST_FLOAT32, LEAST = 4.0, 2.0  # units in the last place that are never too many
# The largest error is a matter of luck, so its bound is loose. It finds what few tokens have wrong.
LOOSE = 16


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


def _in_float32(site: Site, options: Options, seed: int) -> Failure | None:
    """Compare the medians over draws and tokens, and loosely the largest errors."""
    large, found = spread(site, DEVIATION), None
    for tokens in TOKENS:
        for k, drawn in enumerate(DRAWN):  # a failure of few tokens may be luck: more decide
            found = _of_tokens(site, large, options, tokens, drawn, 1000 * seed + 100 * k)
            if found is None:
                break
        else:
            return found
    return None


def _of_tokens(
    site: Site, large: Site, options: Options, tokens: int, drawn: int, seed: int
) -> Failure | None:
    """Compare errors of calls with this number of tokens, of which so many are drawn."""
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
    for output in draws[0][0]:
        both = [np.concatenate([draw[k][output] for draw in draws]) for k in (0, 1)]
        for name, statistic, factor, least in (
            ("median of ", np.median, 2, LEAST_FLOAT32),
            ("", np.max, LOOSE, LOOSE * LEAST_FLOAT32),
        ):
            ours, theirs = (float(statistic(errors)) for errors in both)
            limit = max(factor * theirs, least)
            if too_large(ours, limit):
                what = f"{name}{output}, float32, {tokens} tokens"
                return Failure(site, what, ours, theirs, limit)
    return None


def _in_own_dtype(site: Site, options: Options, dtype: mx.Dtype, seed: int) -> Failure | None:
    name = str(dtype).split(".")[-1]
    for tokens in TOKENS:
        distinct = min(tokens, 4)
        inputs = random_inputs(site, dtype, distinct, seed)
        ours, theirs = site_errors(site, options, *inputs, tokens // distinct)
        for output, error in ours.items():
            limit = max(theirs[output], LEAST)
            if too_large(error, limit):
                what = f"{output}, {name}, {tokens} tokens"
                return Failure(site, what, error, theirs[output], limit)
    return None


def failure(site: Site, options: Options, dtype: mx.Dtype, seed: int) -> Failure | None:
    """Return the first error of a site that is too large, or None.

    In float32, with logits of deviation 6, the median error of an output over random tokens must
    be at most twice that of the package's code, or 4 units in the last place; its largest error at
    most 16 times these (the error of a token is that of its worst element). These are 16 tokens for
    each number of tokens in a call; if an error is too large, 64 others decide. Then, in
    the model's dtype and with the site's own scales, the largest error must be at most that of the
    package's code, or 2 units. (In float32 the first rule is the only one: the second would compare
    two roundings.)
    """
    found = _in_float32(site, options, seed)
    if found is None and dtype != mx.float32:
        found = _in_own_dtype(site, options, dtype, seed)
    return found
