"""`stability_report` runs a model once and reports what each connection did, as plain data."""

import contextlib
import dataclasses
import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..gated import GatedResidual
from ..layers import HyperConnection, observer, starting_logits
from ..reference import gates


@dataclasses.dataclass(frozen=True)
class ConnectionReport:
    """This report says what one connection did in one run, in numbers and nested lists.

    Gains are computed for the matrix of each token (arXiv 2512.24880, section 3.1). A field with
    ``_max`` is the largest gain of a token, one without it is the mean over tokens. In a
    `GatedResidual` h_res is the identity, so that its gains are 1 and its errors 0.

    Attributes:
        name: The path of the connection in the model.
        convention, dynamic, streams: The name of the convention, or ``"gated"``; whether the
            connection is dynamic; n.
        h_pre, h_post: ``[n]``, means over tokens. In a `GatedResidual`, which has a gate for each
            channel, h_pre is the mean of a stream's gates over tokens and channels.
        h_res: ``[n][n]``, mean over tokens, row = output.
        composite: ``[n][n]``, mean over tokens of the product of h_res from the first connection to
            this one, row = output.
        forward_gain, forward_gain_max: ``max_i |sum_j h_res[i, j]|``.
        backward_gain, backward_gain_max: ``max_j |sum_i h_res[i, j]|``.
        composite_forward_gain, composite_forward_gain_max: The forward gain of the composite.
        composite_backward_gain, composite_backward_gain_max: The backward gain of the composite.
        row_error: ``max |sum_j h_res[i, j] - 1|`` over rows and tokens.
        column_error: ``max |sum_i h_res[i, j] - 1|`` over columns and tokens.
        similarity: `stream_similarity` of the streams after the connection: 1 where they have
            collapsed into copies. None for n = 1.
        h_pre_moved, h_post_moved: ``max_j |h[j] - start[j]|``, h the mean over tokens, and start
            the value before training.
        gradient_norms: ``[n]``, the norm of d loss / d x[i] over tokens and channels, x the streams
            after the connection. None without a loss.
        gate_min, gate_max: ``[n]``, the smallest and the largest of a stream's gates over tokens
            and channels, in a `GatedResidual`. None in other connections.
    """

    name: str
    convention: str
    dynamic: bool
    streams: int
    h_pre: list[float]
    h_post: list[float]
    h_res: list[list[float]]
    composite: list[list[float]]
    forward_gain: float
    forward_gain_max: float
    backward_gain: float
    backward_gain_max: float
    composite_forward_gain: float
    composite_forward_gain_max: float
    composite_backward_gain: float
    composite_backward_gain_max: float
    row_error: float
    column_error: float
    similarity: float | None
    h_pre_moved: float
    h_post_moved: float
    gradient_norms: list[float] | None = None
    gate_min: list[float] | None = None
    gate_max: list[float] | None = None


_COLUMNS = {
    "forward": "forward_gain",
    "backward": "backward_gain",
    "comp. fwd": "composite_forward_gain",
    "fwd max": "composite_forward_gain_max",
    "comp. bwd": "composite_backward_gain",
    "bwd max": "composite_backward_gain_max",
    "row err": "row_error",
    "col err": "column_error",
    "similarity": "similarity",
    "pre moved": "h_pre_moved",
    "post moved": "h_post_moved",
}


def _finite(v: Any) -> Any:
    """Return the same data with None for each number that is not finite."""
    if isinstance(v, dict):
        return {k: _finite(value) for k, value in v.items()}
    if isinstance(v, list):
        return [_finite(value) for value in v]
    return None if isinstance(v, float) and not math.isfinite(v) else v


def _numbers(v: Any) -> Any:
    """Return the same numbers with NaN for each None."""
    if isinstance(v, list):
        return [_numbers(value) for value in v]
    return math.nan if v is None else v


_OPTIONAL = ("gradient_norms", "gate_min", "gate_max")  # None where there are none


def _read_connection(similarity=None, **fields: Any) -> ConnectionReport:
    """Return the report with these fields, as `StabilityReport.to_dict` writes them."""
    absent = {k for k in _OPTIONAL if fields.get(k) is None}
    return ConnectionReport(
        similarity=None if fields["streams"] == 1 else _numbers(similarity),
        **{k: _numbers(v) for k, v in fields.items() if k not in absent},
    )


@dataclasses.dataclass(frozen=True)
class StabilityReport:
    """This report says what a model's connections did in one run; ``str`` makes a table of it.

    Attributes:
        connections: A report for each call of a connection, in the order of the calls.
        loss: The result of the loss function, or None without one.
    """

    connections: list[ConnectionReport]
    loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict of numbers, strings, lists and dicts, for JSON.

        JSON has no NaN and no infinity: a number that is not finite becomes None.
        """
        return _finite(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "StabilityReport":
        """Return the report of a dict of `to_dict`; numbers that were not finite become NaN."""
        connections = [_read_connection(**c) for c in d["connections"]]
        graded = any(c.gradient_norms is not None for c in connections)
        return cls(connections, _numbers(d["loss"]) if graded else d["loss"])

    def __str__(self) -> str:
        width = max(len(c.name) for c in self.connections)
        graded = self.connections[0].gradient_norms is not None
        head = [*_COLUMNS] + ["grad norm"] * graded
        lines = [f"{'':>4} {'connection':<{max(width, 10)}} " + " ".join(f"{h:>10}" for h in head)]
        for k, c in enumerate(self.connections, 1):
            values = [getattr(c, field) for field in _COLUMNS.values()]
            values += [math.hypot(*c.gradient_norms or ())] if graded else []
            cells = " ".join(f"{'' if v is None else format(v, '.4g'):>10}" for v in values)
            lines.append(f"{k:>4} {c.name:<{max(width, 10)}} {cells}")
        return "\n".join(lines)


def stream_similarity(x: mx.array) -> mx.array:
    """Return the mean cosine similarity between two different streams of a token.

    ``mean of x[i] . x[j] / (|x[i]| |x[j]|)`` over i != j and tokens. It is 1 where the streams are
    copies of each other, at any scale. The cosine with a stream of zeros is 0.

    Args:
        x: Streams ``[..., n, C]``.

    Returns:
        A float32 scalar; NaN for n = 1 and where x is not finite.
    """
    x, n = x.astype(mx.float32), x.shape[-2]
    if n == 1:
        return mx.array(math.nan)
    largest = mx.abs(x).max(-1, keepdims=True)
    x = x / mx.where(largest > 0, largest, 1)  # so that float32 holds the squares
    squares = (x * x).sum(-1, keepdims=True)
    x = x * mx.rsqrt(mx.where(squares > 0, squares, 1))
    diagonal = (squares > 0).sum((-2, -1))  # sum_i x[i] . x[i] of unit vectors and zeros
    return ((x.sum(-2) ** 2).sum(-1) - diagonal).mean() / (n * (n - 1))


def _product(a: mx.array, b: mx.array) -> mx.array:
    """``a @ b`` of ``[..., n, n]`` by elementwise products, because ``@`` is TF32 on some GPUs."""
    terms = [a[..., :, j, None] * b[..., None, j, :] for j in range(a.shape[-1])]
    return sum(terms[1:], terms[0])


def _composed(h_res: mx.array, composite: mx.array | None) -> mx.array:
    """``h_res @ composite``, or h_res if it is the first or its n or its leading axes differ."""
    if composite is None or h_res.shape[-1] != composite.shape[-1]:
        return h_res
    a, b = h_res.shape[:-2], composite.shape[:-2]
    return _product(h_res, composite) if a == b or () in (a, b) else h_res


def _gains(h: mx.array, prefix: str) -> dict[str, mx.array]:
    """Return the gains of h ``[..., n, n]`` by name, their mean and their maximum over tokens."""
    gains = {"forward": mx.abs(h.sum(-1)).max(-1), "backward": mx.abs(h.sum(-2)).max(-1)}
    means = {f"{prefix}{k}_gain": g.mean() for k, g in gains.items()}
    return means | {f"{prefix}{k}_gain_max": g.max() for k, g in gains.items()}


def _mean(h: mx.array, ndim: int) -> mx.array:
    """Return the mean over tokens: over all axes but the last ``ndim``."""
    return h.mean(axis=tuple(range(h.ndim - ndim)))


def _coefficients(connection: HyperConnection | GatedResidual, x: mx.array) -> dict[str, Any]:
    """Return h_pre, h_post and h_res of each token, and the fields that only a connection knows."""
    if isinstance(connection, GatedResidual):
        gate, h_post = connection.coefficients(x)
        h_pre, h_res = gate.mean(-1), None
        axes = [*range(gate.ndim - 2), gate.ndim - 1]  # all but the streams
        fields = {"convention": "gated", "dynamic": True}
        fields |= {"gate_min": gate.min(axes), "gate_max": gate.max(axes)}
    else:
        h_pre, h_post, h_res = connection.coefficients(x)
        fields = {"convention": connection.convention.name, "dynamic": connection.dynamic}
    h_res = mx.eye(connection.num_streams) if h_res is None else h_res
    return {"h_pre": h_pre, "h_post": h_post, "h_res": h_res, **fields}


def _starts(connection: HyperConnection | GatedResidual) -> list[tuple[mx.array, mx.array]]:
    """Return each h_pre and h_post with which a connection may have begun."""
    n = connection.num_streams
    if isinstance(connection, GatedResidual):
        return [(mx.full(n, 0.5), mx.ones(n))]
    c = connection.convention
    return [gates(*starting_logits(n, c, k)[:2], c) for k in range(n if c.sigmoid else 1)]


def _moved(connection, h_pre, h_post, before: ConnectionReport | None) -> list:
    """``max_j |h[j] - start[j]|`` of h_pre and of h_post.

    The start is that of the report before, or else the nearest that the connection may have had.
    """
    starts = _starts(connection)
    if before is not None:
        starts = [(mx.array(before.h_pre), mx.array(before.h_post))]
    return [
        mx.stack([mx.abs(h - start[k]).max() for start in starts]).min()
        for k, h in enumerate((h_pre, h_post))
    ]


@contextlib.contextmanager
def _observed(observe: Callable[..., mx.array]) -> Iterator[None]:
    """Let connections in this thread return ``observe(connection, x, out)`` instead of out."""
    token = observer.set(observe)
    try:
        yield
    finally:
        observer.reset(token)


def _recomputed(loss: mx.array, outs: list[mx.array]) -> int | None:
    """Return the index of the first of outs inside an mx.checkpoint, or None.

    The gradient of a checkpoint computes everything inside it again, so it would miss what this
    module adds to outs there. In the loss's graph a checkpoint is a CustomTransforms node whose
    inputs are its arguments and, behind StopGradient, the arrays that it computed from them.
    """
    text, labels, before, after = io.StringIO(), {}, defaultdict(list), defaultdict(list)
    names = [f"out{k}" for k in range(len(outs))]
    mx.export_to_dot(text, loss, loss=loss, **dict(zip(names, outs, strict=True)))
    for node, label, start, end in re.findall(
        r'(\d+) \[label ="([^"]*)", shape=rectangle|^"?(\w+)"? -> "?(\w+)"?$', text.getvalue(), re.M
    ):
        if node:
            labels[node] = label
        else:
            before[end].append(start)
            after[start].append(end)
    checkpointed = {
        array
        for node, label in labels.items()
        if label == "CustomTransforms"
        for array in before[node][-len(after[node]) :]
    }

    def reached(start: str, edges: dict) -> set:
        """Return the nodes on paths from start along edges; a path ends at StopGradient."""
        found, stack = {start}, [start]
        while stack:
            node = stack.pop()
            new = {*edges[node]} - found if labels.get(node) != "StopGradient" else set()
            found |= new
            stack += new
        return found

    graded = reached("loss", before)
    for k, name in enumerate(names):
        if name not in graded and not checkpointed.isdisjoint(
            array
            for node in reached(name, after)
            if labels.get(node) == "StopGradient"
            for array in after[node]
        ):
            return k
    return None


def _without_arrays(a: Any) -> Any:
    return a.tolist() if isinstance(a, mx.array) else a


def stability_report(
    model: nn.Module,
    batch: mx.array | tuple[Any, ...],
    loss_fn: Callable[..., Any] | None = None,
    *,
    before: StabilityReport | None = None,
) -> StabilityReport:
    """Run a model once and report on its connections in the order of their calls.

    Connections are the `HyperConnection`, `MHCLayer` and `GatedResidual` modules of the model,
    static or dynamic, with any convention, also inside `MHCBlock`, its subclasses and blocks of
    `widen`. A write-back in `GatedResidual.read` is not seen. With a loss function the model runs
    once more, for gradients. The model and its parameters do not change.

    The composite multiplies the h_res of each token in that order, in float32 without TF32. It
    starts anew at a connection where the number of streams or the leading axes change.

    Args:
        model: The model. It must not be compiled, because mx.compile hides its connections. With a
            loss function it must not use mx.checkpoint, which hides the gradients inside.
        batch: The model's input: an array, or a tuple of positional arguments.
        loss_fn: A function that returns a scalar loss, called as ``loss_fn(model, *batch)`` instead
            of ``model(*batch)``.
        before: An earlier report of the same model, relative to which ``h_pre_moved`` and
            ``h_post_moved`` are measured. With None they are measured relative to the nearest of
            the n starts of a connection: h_pre starts at 0.9 on stream ``layer_idx % n``, and a
            connection does not store its layer_idx.

    Returns:
        A report of numbers and nested lists; `ConnectionReport` has the formulas.

    Raises:
        TypeError: An argument has another type.
        ValueError: No connection ran, one ran in mx.checkpoint, the loss is not a scalar, the batch
            has no tokens, or ``before`` is a report of another model.
    """
    op = "stability_report"
    if not isinstance(model, nn.Module):
        raise TypeError(f"[{op}] model must be an mlx.nn.Module but got {type(model).__name__}.")
    if not isinstance(batch, (mx.array, tuple)):
        must = "be an mx.array or a tuple of arguments"
        raise TypeError(f"[{op}] batch must {must} but got {type(batch).__name__}.")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"[{op}] loss_fn must be a function but got {type(loss_fn).__name__}.")
    if before is not None and not isinstance(before, StabilityReport):
        must = "be a StabilityReport"
        raise TypeError(f"[{op}] before must {must} but got {type(before).__name__}.")
    batch = batch if isinstance(batch, tuple) else (batch,)
    kinds = (HyperConnection, GatedResidual)
    names = {id(m): k for k, m in model.named_modules() if isinstance(m, kinds)}
    found, outs, composite = [], [], None

    def record(connection, x, out):
        nonlocal composite
        if id(connection) not in names:
            return out
        if x.size == 0:
            raise ValueError(f"[{op}] batch must have tokens but got streams {list(x.shape)}.")
        n, made = connection.num_streams, _coefficients(connection, x)
        h_res = made["h_res"]
        composite = _composed(h_res, composite)
        k, means = len(found), (_mean(made["h_pre"], 1), _mean(made["h_post"], 1))
        start = before.connections[k] if before and k < len(before.connections) else None
        if start is not None and start.streams != n:
            must, got = f"be of connections with {n} streams", f"one with {start.streams}"
            raise ValueError(f"[{op}] before must {must} but got {got}.")
        pre_moved, post_moved = _moved(connection, *means, start)
        found.append(
            {
                "name": names[id(connection)] or type(connection).__name__,
                "streams": n,
                **made,
                "h_pre": means[0],
                "h_post": means[1],
                "h_res": _mean(h_res, 2),
                "composite": _mean(composite, 2),
                **_gains(h_res, ""),
                **_gains(composite, "composite_"),
                "row_error": mx.abs(h_res.sum(-1) - 1).max(),
                "column_error": mx.abs(h_res.sum(-2) - 1).max(),
                "similarity": None if n == 1 else stream_similarity(out),
                "h_pre_moved": pre_moved,
                "h_post_moved": post_moved,
            }
        )
        outs.append(out)
        return out

    with _observed(record):
        loss = model(*batch) if loss_fn is None else loss_fn(model, *batch)
    if not found:
        must = "run a HyperConnection, MHCLayer or GatedResidual of its own, outside mx.compile"
        got = f"{type(model).__name__}, which ran none"
        raise ValueError(f"[{op}] model must {must} but got {got}.")
    if before is not None and len(before.connections) != len(found):
        got = f"{len(before.connections)} connections"
        raise ValueError(f"[{op}] before must be of {len(found)} connections but got {got}.")
    if loss_fn is not None:
        if not isinstance(loss, mx.array) or loss.size != 1:
            got = list(loss.shape) if isinstance(loss, mx.array) else type(loss).__name__
            raise ValueError(f"[{op}] loss_fn must return a scalar but got {got}.")

        hidden = _recomputed(loss, outs)
        if hidden is not None:
            must, name = "run without mx.checkpoint", found[hidden]["name"]
            raise ValueError(f"[{op}] model must {must} but got one around {name}.")

        others = f"[{op}] model must run the same {len(outs)} connections each time but got"

        def loss_of(deltas):
            remaining = list(deltas)

            def shift(connection, x, out):
                if id(connection) not in names:
                    return out
                if not remaining:
                    raise ValueError(f"{others} more.")
                return out + remaining.pop(0)

            with _observed(shift):
                loss = loss_fn(model, *batch).squeeze()
            if remaining:
                raise ValueError(f"{others} {len(remaining)} fewer.")
            return loss

        gradients = mx.grad(loss_of)([mx.zeros_like(out) for out in outs])
        for fields, g in zip(found, gradients, strict=True):
            g = g.astype(mx.float32).moveaxis(-2, 0).reshape(fields["streams"], -1)
            fields["gradient_norms"] = mx.sqrt((g * g).sum(-1))
    mx.eval(found)
    data = [{k: _without_arrays(v) for k, v in fields.items()} for fields in found]
    connections = [ConnectionReport(**fields) for fields in data]
    value: Any = None if loss_fn is None else loss.item()
    return StabilityReport(connections, value)
