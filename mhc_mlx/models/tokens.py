"""Token parity: what the patched model says of the tokens that the package's model chose."""

import time
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .family import Family
from .patching import as_stock

CHUNK = 512  # tokens of a prompt in one call


class Run(NamedTuple):
    """One model's answers to a prompt."""

    chosen: list[int]  # the most likely token after the prompt and after each token that it got
    rows: list[mx.array]  # log-probabilities [positions, vocabulary], of the prompt then of tokens
    prefill: float  # seconds
    decode: float


def _log_probabilities(logits: mx.array) -> mx.array:
    logits = logits[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _run(
    family: Family, model: nn.Module, prompt: mx.array, count: int, forced: list[int] | None, bar
) -> Run:
    """Continue a prompt by the most likely tokens, or by those that are forced."""
    cache, rows, chosen = family.cache(model), [], []
    start = time.perf_counter()
    for k in range(0, prompt.size, CHUNK):
        rows.append(_log_probabilities(family.logits(model, prompt[None, k : k + CHUNK], cache)))
        mx.eval(rows[-1])
        bar.update(rows[-1].shape[0])
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for k in range(count):
        chosen.append(int(rows[-1][-1].argmax().item()))
        if k < count - 1:
            token = chosen[-1] if forced is None else forced[k]
            rows.append(_log_probabilities(family.logits(model, mx.array([[token]]), cache)))
        bar.update(1)
    return Run(chosen, rows, prefill, time.perf_counter() - start)


def _compared(prompt: mx.array, theirs: Run, ours: Run) -> dict[str, Any]:
    a, b = mx.concatenate(theirs.rows), mx.concatenate(ours.rows)
    difference = mx.abs(a - b)
    first = next(
        (
            k
            for k, pair in enumerate(zip(theirs.chosen, ours.chosen, strict=True))
            if len({*pair}) > 1
        ),
        None,
    )
    found: dict[str, Any] = {
        "length": prompt.size,
        "tokens": len(theirs.chosen),
        "top-1 agreement": (a.argmax(-1) == b.argmax(-1)).astype(mx.float32).mean().item(),
        "largest difference": difference.max().item(),
        "mean difference": difference.mean().item(),
        "first difference": None,
    }
    if first is not None:
        best = mx.sort(a[prompt.size - 1 + first])[-2:]
        found["first difference"] = {
            "token": first,
            "stock": theirs.chosen[first],
            "patched": ours.chosen[first],
            "gap of stock's two best": (best[1] - best[0]).item(),
        }
    return found


def token_parity(
    family: Family, model: nn.Module, prompts: list[mx.array], count: int, verbose: bool
) -> dict[str, Any]:
    """Compare a patched model with its package's own on prompts ``[length]``."""
    from tqdm import tqdm  # both packages need it

    report: dict[str, Any] = {"prompts": []}
    times = {name: [0.0, 0.0] for name in (family.package, "patched")}
    peaks = dict.fromkeys(times, 0)
    total = 2 * sum(prompt.size + count for prompt in prompts)
    with tqdm(total=total, desc="tokens", disable=not verbose, leave=False) as bar:

        def measured(name: str, prompt: mx.array, forced: list[int] | None) -> Run:
            mx.clear_cache()
            mx.reset_peak_memory()
            found = _run(family, model, prompt, count, forced, bar)
            peaks[name] = max(peaks[name], mx.get_peak_memory())
            for k, seconds in enumerate((found.prefill, found.decode)):
                times[name][k] += seconds
            return found

        for prompt in prompts:
            with as_stock(model):
                theirs = measured(family.package, prompt, None)
            ours = measured("patched", prompt, theirs.chosen)
            report["prompts"].append(_compared(prompt, theirs, ours))
    sizes = sum(prompt.size for prompt in prompts), count * len(prompts)
    report["tokens/s"] = {
        name: {"prefill": sizes[0] / prefill, "decode": sizes[1] / decode}
        for name, (prefill, decode) in times.items()
    }
    return report | {"peak bytes": peaks}


def parity_lines(report: dict[str, Any] | None, package: str) -> list[str]:
    """Return the result of `token_parity` in words."""
    if report is None:
        return []
    lines = []
    for row in report["prompts"]:
        line = (
            f"prompt of {row['length']}, then {row['tokens']}: most likely token the same at "
            f"{100 * row['top-1 agreement']:.2f} %, log-probabilities differ by at most "
            f"{row['largest difference']:.2e}, {row['mean difference']:.1e} on average; "
        )
        first = row["first difference"]
        if first is None:
            lines.append(line + "all tokens are the same")
        else:
            gap = first["gap of stock's two best"]
            lines.append(
                f"{line}token {first['token']} differs, where {package}'s two best are "
                f"{gap:.1e} apart"
            )
    for name in ("prefill", "decode"):
        ours, theirs = (report["tokens/s"][k][name] for k in ("patched", package))
        lines.append(f"{name}: {ours:.1f} tokens/s, {package} {theirs:.1f} ({ours / theirs:.2f} x)")
    memory = ", ".join(f"{k} {v / 2**20:.0f} MiB" for k, v in report["peak bytes"].items())
    return [*lines, f"most memory: {memory}"]
