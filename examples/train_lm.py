"""Train a byte-level transformer whose every sublayer sits in a hyper-connection.

By default it reads the source files of Python's standard library and trains a small one for two
minutes. It prints the loss in bits per byte, the mean cosine similarity between streams (1: the
streams are copies and the connection does nothing), and a sample. --connection compares variants;
all but static and plain make their coefficients per token:

    static     mHC with parameters for coefficients    mhc        arXiv 2512.24880
    mhc-lite   arXiv 2601.05732                        kronecker  KromHC
    identity   no mixing of streams                    hc         mixing without constraint
    plain      an ordinary residual, one stream

--checkpoint DIR --save-every N --resume stops and goes on bit for bit. --plot DIR draws what the
streams do at the end, and whenever the process gets SIGUSR1. More processes share the work:

    mlx.launch -n 2 --backend ring -- python examples/train_lm.py    # nccl on NVIDIA GPUs

A step takes batch x accumulate x processes sequences. Weights and the optimiser are float32;
with --dtype bfloat16 streams and products are bfloat16, and weights are rounded where they are
used; coefficients of connections are float32 in any case. Everything follows from the seed.

On an NVIDIA GPU with memory to spare MLX_MAX_MB_PER_BUFFER=2000 in the environment lets MLX's host
run further ahead: a step of 24 layers of dim 1024 takes 81 instead of 87 ms on an H100, and 35
instead of 28 GiB.
"""

import argparse
import csv
import functools
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import signal
import statistics
import sys
import sysconfig
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from tqdm import tqdm

from mhc_mlx import (
    IDENTITY,
    KRONECKER,
    MHC_LITE,
    PAPER,
    ROW_FIRST,
    UNCONSTRAINED,
    MHCLayer,
    backend,
    expand_streams,
    reduce_streams,
)
from mhc_mlx.diagnostics import StabilityReport, plot, stability_report, stream_similarity

CONVENTIONS = {"static": ROW_FIRST, "mhc": PAPER, "mhc-lite": MHC_LITE, "kronecker": KRONECKER}
CONVENTIONS |= {"identity": IDENTITY, "hc": UNCONSTRAINED}
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
# What must be the same for a checkpoint to fit, and for its position in the data to mean the same.
FIXED = ("connection", "streams", "dim", "depth", "heads", "mlp", "context", "seed")


class Linear(nn.Linear):
    """Weights in float32, rounded to the dtype of what they multiply."""

    def __init__(self, ins: int, outs: int):
        super().__init__(ins, outs, bias=False)

    def __call__(self, u: mx.array) -> mx.array:
        return u @ self.weight.astype(u.dtype).T


class Embedding(nn.Embedding):
    """As a product: the gradient of a gather adds with atomics on GPUs, in no fixed order."""

    def __call__(self, tokens: mx.array, dtype: mx.Dtype) -> mx.array:
        chosen = tokens[..., None] == mx.arange(self.weight.shape[0])
        return chosen.astype(dtype) @ self.weight.astype(dtype)


class RMSNorm(nn.RMSNorm):
    def __call__(self, u: mx.array) -> mx.array:
        return mx.fast.rms_norm(u, self.weight.astype(u.dtype), self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = Linear(dim, 3 * dim), Linear(dim, dim)

    def __call__(self, u: mx.array) -> mx.array:
        B, L, dim = u.shape
        heads = self.qkv(u).reshape(B, L, 3, self.heads, -1).transpose(2, 0, 3, 1, 4)
        q, k = (
            mx.fast.rope(a, a.shape[-1], traditional=False, base=1e4, scale=1.0, offset=0)
            for a in heads[:2]
        )
        scale = (dim // self.heads) ** -0.5
        y = mx.fast.scaled_dot_product_attention(q, k, heads[2], scale=scale, mask="causal")
        return self.out(y.transpose(0, 2, 1, 3).reshape(B, L, dim))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.up, self.down = Linear(dim, hidden), Linear(hidden, dim)

    def __call__(self, u: mx.array) -> mx.array:
        return self.down(nn.gelu_approx(self.up(u)))


class Residual(nn.Module):
    """An ordinary pre-norm residual, on one stream."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim)

    def __call__(self, x: mx.array, sublayer: nn.Module) -> mx.array:
        return x + sublayer(self.norm(x[..., 0, :]))[..., None, :]


class Block(nn.Module):
    """Attention and MLP, each in its connection."""

    def __init__(self, dim: int, heads: int, hidden: int, connections: list[nn.Module]):
        super().__init__()
        self.attention, self.mlp = Attention(dim, heads), MLP(dim, hidden)
        self.connections = connections

    def __call__(self, x: mx.array) -> mx.array:
        x = self.connections[0](x, self.attention)
        return self.connections[1](x, self.mlp)


class ByteLM(nn.Module):
    """n streams of ``dim`` channels through ``depth`` blocks, ``2 * depth`` sublayers."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        streams: int,
        connection: str,
        use_metal: bool,
        hidden: int | None = None,
        dtype: mx.Dtype = mx.float32,
        recompute: bool = False,
    ):
        super().__init__()
        self.streams, self.dtype, self.recompute = streams, dtype, recompute
        options = {"dynamic": connection != "static", "use_metal": use_metal}

        def connect(k: int) -> nn.Module:
            if connection == "plain":
                return Residual(dim)
            convention = CONVENTIONS[connection]
            return MHCLayer(streams, dim, convention=convention, layer_idx=k, **options)

        self.embedding = Embedding(256, dim)
        self.blocks = [
            Block(dim, heads, hidden or 4 * dim, [connect(2 * k), connect(2 * k + 1)])
            for k in range(depth)
        ]
        self.norm = RMSNorm(dim)
        self.head = Linear(dim, 256)

    def __call__(self, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """Logits, and the streams before they are reduced."""
        x = expand_streams(self.embedding(tokens, self.dtype), self.streams)
        for block in self.blocks:
            # mx.checkpoint keeps a block's input and computes the rest again for the gradient.
            x = (nn.utils.checkpoint(block) if self.recompute else block)(x)
        return self.head(self.norm(reduce_streams(x))), x


def loss_fn(model: ByteLM, batch: mx.array) -> tuple[mx.array, mx.array]:
    """Bits per byte, and the similarity between streams (0 where there is one)."""
    logits, x = model(batch[:, :-1])
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), batch[:, 1:])
    similarity = stream_similarity(x) if model.streams > 1 else mx.array(0.0)
    return losses.mean() / math.log(2), similarity


def read_corpus(file: str | None, limit: int = 16 << 20) -> bytes:
    """A file, or the standard library's own sources."""
    if file:
        try:
            data = Path(file).read_bytes()
        except OSError as error:
            raise SystemExit(
                f"--data must be a file that can be read but is {file}: {error.strerror}"
            ) from error
    else:
        folder = Path(sysconfig.get_paths()["stdlib"])
        paths = sorted(p for p in folder.rglob("*.py") if "site-packages" not in p.parts)
        data = b""
        for path in paths:
            if len(data) < limit:
                data += path.read_bytes()
    if len(data) < 10_000:
        raise SystemExit(
            f"{file or 'the standard library'} must hold at least 10,000 bytes but has {len(data)}"
        )
    return data


class Windows:
    """Where sequences start: windows side by side, shuffled and shifted anew in each epoch.

    Sequence k of a run depends on the seed and k alone, so that a position, the number of sequences
    taken, is all that a checkpoint must hold, and any number of processes can share them.
    """

    def __init__(self, size: int, context: int, seed: int):
        self.context, self.seed = context, seed
        self.count = (size - context - 1) // context
        self.order = functools.lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> tuple[int, list[int]]:
        rng = random.Random(f"{self.seed} {epoch}")
        return rng.randrange(self.context), rng.sample(range(self.count), self.count)

    def starts(self, position: int, count: int) -> mx.array:
        found = []
        for k in range(position, position + count):
            epoch, index = divmod(k, self.count)
            shift, order = self.order(epoch)
            found.append(shift + self.context * order[index])
        return mx.array(found)


def make_optimizer(lr: float, steps: int, warmup: int, gates: float = 10) -> optim.Optimizer:
    """AdamW whose rate rises for ``warmup`` steps and falls as a cosine to a tenth at ``steps``.

    A long warm-up and an eps: without them Adam turns the rounding noise of parameters that have no
    gradient yet into full steps.
    """

    def adam(lr: float) -> optim.AdamW:
        def schedule(step: mx.array) -> mx.array:
            step = step.astype(mx.float32)
            done = mx.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
            return lr * mx.minimum(step / max(warmup, 1), 0.55 + 0.45 * mx.cos(math.pi * done))

        return optim.AdamW(schedule, eps=1e-6, weight_decay=0.01)

    # Gates and mixing logits move by whole units where weights, phi among them, move by hundredths:
    # their rate is ``gates`` times as high.
    return optim.MultiOptimizer(
        [adam(gates * lr), adam(lr)],
        [lambda name, _: "connections" in name and not name.endswith("phi")],
    )


def make_step(model, optimizer, data: mx.array, context: int, clip: float, group):
    """The whole step, compiled: of starts ``[accumulate, batch]`` and whether to stop.

    Returns a function to loss, similarity, gradient norm, and how many processes stop: arrays of
    their own, because on CUDA the host reads a number at once, a row of them after all that waits.
    """
    state = [model.state, optimizer.state]
    backward = nn.value_and_grad(model, loss_fn)

    @functools.partial(mx.compile, inputs=state, outputs=state)
    def step(starts: mx.array, late: mx.array) -> tuple[mx.array, ...]:
        count, values, gradients = starts.shape[0], None, None
        for k in range(count):
            chosen = starts[k]
            if k:  # one after another: the activations of one part at a time
                done = [*values, *(g for _, g in tree_flatten(gradients))]
                chosen = mx.depends([chosen], done)[0]
            batch = data[chosen[:, None] + mx.arange(context + 1)].astype(mx.int32)
            made, new = backward(model, batch)
            values = made if values is None else tree_map(mx.add, values, made)
            gradients = new if gradients is None else tree_map(mx.add, gradients, new)
        if count > 1:
            values, gradients = tree_map(lambda v: v / count, (values, gradients))
        if group.size() > 1:
            shares = mx.array([group.size(), group.size(), 1])
            *values, late = mx.distributed.all_sum(mx.stack([*values, late]), group=group) / shares
            gradients = nn.average_gradients(gradients, group)
        gradients, norm = optim.clip_grad_norm(gradients, clip)
        optimizer.update(model, gradients)
        return *values, norm, late

    return step


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def checkpoints(folder: Path) -> list[Path]:
    """Of a folder, the newest first; files with other names are not ours."""
    found = folder.glob("step-*.safetensors")
    return sorted(
        (p for p in found if re.fullmatch(r"step-\d+-[0-9a-f]{16}", p.stem)), reverse=True
    )


def make_folder(option: str, folder: Path) -> None:
    """SystemExit where files cannot be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        why = "" if os.access(folder, os.W_OK) else "it is not writable"
    except OSError as error:
        why = error.strerror
    if why:
        raise SystemExit(f"{option} needs a folder to write to but was given {folder}: {why}")


def save_checkpoint(folder: Path, step: int, arrays: dict, about: dict) -> Path:
    """Write arrays, and what they are about, to ``step-STEP-DIGEST.safetensors``; keep two.

    The digest of the file is in its name, so that one rename puts both there: a file under its name
    is whole, or has been damaged since, and then its digest says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "unfinished"
    try:
        with open(temporary, "wb") as f:
            mx.save_safetensors(f, arrays, {"about": json.dumps(about)})
            f.flush()
            os.fsync(f.fileno())
        path = folder / f"step-{step:08}-{_digest(temporary)}.safetensors"
        os.replace(temporary, path)
        entry = os.open(folder, os.O_RDONLY)
        os.fsync(entry)  # the new name too
        os.close(entry)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        left = checkpoints(folder)
        kept = f"the last one is {left[0]}" if left else "there is none before it"
        raise SystemExit(f"cannot write a checkpoint to {folder}: {error}; {kept}") from error
    for old in [p for p in checkpoints(folder) if p != path][1:]:
        old.unlink()
    return path


def load_checkpoint(folder: Path) -> tuple[Path, dict, dict] | None:
    """The newest whole checkpoint: path, arrays, what they are about. None where there is none.

    Damaged ones that are newer are renamed, so that they do not count among the two kept.
    """
    found = checkpoints(folder)
    for k, path in enumerate(found):
        if _digest(path) == path.stem.rpartition("-")[2]:
            arrays, metadata = mx.load(str(path), return_metadata=True)
            for damaged in found[:k]:
                damaged.rename(damaged.with_suffix(".damaged"))
            return path, arrays, json.loads(metadata["about"])
        print(f"warning: {path} is damaged (its SHA-256 is not the one in its name): skipped")
    if found:
        raise SystemExit(f"no checkpoint in {folder} is whole: remove them to start anew")
    return None


class Log:
    """A CSV file with a line per step, there as soon as the next one has begun."""

    FIELDS = ("step", "bits_per_byte", "similarity", "gradient_norm", "tokens_per_second")
    FIELDS += ("peak_mib", "validation")

    def __init__(self, path: Path, after: int):
        """Keeps the lines up to step ``after``, from which a run goes on."""
        kept = []
        if after and path.exists():
            with open(path, newline="") as f:
                kept = [r for r in csv.reader(f) if r and r[0].isdigit() and int(r[0]) <= after]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".unfinished")
        with open(temporary, "w", newline="") as f:
            csv.writer(f).writerows([self.FIELDS, *kept])
        os.replace(temporary, path)
        self._file = open(path, "a", newline="")  # noqa: SIM115

    def write(self, *row) -> None:
        csv.writer(self._file).writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def sample(model: ByteLM, prompt: bytes, length: int, context: int) -> str:
    tokens = list(prompt)
    for _ in range(length):
        logits, _ = model(mx.array([tokens[-context:]]))
        tokens.append(mx.random.categorical(logits[0, -1].astype(mx.float32) / 0.7).item())
    return bytes(tokens).decode(errors="replace")


def make_model(args: argparse.Namespace) -> ByteLM:
    streams = 1 if args.connection == "plain" else args.streams
    sizes = (args.dim, args.depth, args.heads, streams)
    options = {"hidden": args.mlp, "dtype": DTYPES[args.dtype], "recompute": args.recompute}
    return ByteLM(*sizes, args.connection, not args.no_metal, **options)


def train(args: argparse.Namespace, diagnosed: bool = False) -> dict:
    """Train as the command line says. Returns the figures that it prints and, if diagnosed or
    drawn, the StabilityReport.
    """
    diagnosed = diagnosed or args.plot is not None
    group = mx.distributed.init()
    rank, processes = group.rank(), group.size()
    say = print if rank == 0 else lambda *_: None

    text = read_corpus(args.data)
    held = max(len(text) // 32, 2 * args.context + 1)  # the tail, for validation
    if len(text) < 2 * held:
        raise SystemExit(f"--context {args.context} is too long for a text of {len(text)} bytes")
    folder = Path(args.checkpoint) if args.checkpoint else None
    if folder and rank == 0:
        make_folder("--checkpoint", folder)
        if not args.resume and checkpoints(folder):
            raise SystemExit(
                "--checkpoint must be a folder without checkpoints, or go with --resume, "
                f"but {folder} has some"
            )
    if args.log:
        make_folder("--log", Path(args.log).parent)
        if Path(args.log).is_dir():
            raise SystemExit(f"--log must be a file but {args.log} is a folder")
    if args.plot:
        make_folder("--plot", Path(args.plot))
    data, tail = mx.array(memoryview(text[:-held])), mx.array(memoryview(text[-held:]))
    windows = Windows(data.size, args.context, args.seed)
    tests = Windows(tail.size, args.context, 0)
    about = {k: getattr(args, k) for k in FIXED} | {"data": hashlib.sha256(text).hexdigest()}

    mx.random.seed(args.seed)
    model = make_model(args)
    optimizer = make_optimizer(args.lr, args.steps, args.warmup, args.gates_rate)
    optimizer.init(model.trainable_parameters())
    parameters = tree_flatten(model.parameters())
    mx.eval(parameters)
    size = sum(v.size for _, v in parameters)
    kernels = backend() if backend() and not args.no_metal else "none"
    say(f"{size:,} parameters, {data.size:,} bytes of text, kernels: {kernels}")

    held_out = tests.starts(0, min(tests.count, args.validation_batch))
    held_out = tail[held_out[:, None] + mx.arange(args.context + 1)].astype(mx.int32)

    def diagnose(before: StabilityReport | None = None) -> StabilityReport | None:
        if args.connection == "plain":
            return None
        model.recompute = False  # what mx.checkpoint runs cannot be seen
        report = stability_report(model, held_out[:4], lambda *a: loss_fn(*a)[0], before=before)
        model.recompute = args.recompute
        return report

    start_report = diagnose() if diagnosed and rank == 0 else None

    def everything() -> dict:
        """All that a run is, as arrays by name."""
        where = {"step": mx.array(step), "position": mx.array(position, mx.int64)}
        tree = {"model": model.parameters(), "optimizer": optimizer.state}
        return dict(tree_flatten(tree | {"at": where, "random": {"state": mx.random.state[0]}}))

    step = position = 0
    loaded = load_checkpoint(folder) if args.resume and rank == 0 else None
    if loaded:
        path, arrays, made = loaded
        for k in about:
            if made.get(k) != about[k]:
                theirs, ours = (v[:12] if k == "data" else v for v in (made.get(k), about[k]))
                raise SystemExit(f"{path} was made with {k} {theirs}, not {ours}")
    else:
        arrays = everything()
    if processes > 1:  # all go on from what the first has; sums must come in the same order
        arrays = {
            k: mx.distributed.all_sum(v if rank == 0 else mx.zeros_like(v), group=group)
            for k, v in sorted(arrays.items())
        }
        mx.eval(arrays)
    tree = tree_unflatten(list(arrays.items()))
    model.update(tree["model"])
    optimizer.state = tree["optimizer"]
    high, low = tree["random"]["state"].tolist()
    mx.random.seed(high << 32 | low)
    step, position = (tree["at"][k].item() for k in ("step", "position"))
    if args.resume and rank == 0:
        print(f"resumed after step {step} from {path}" if loaded else "no checkpoint: a new run")

    run = make_step(model, optimizer, data, args.context, args.clip, group)
    validate = mx.compile(lambda: loss_fn(model, held_out)[0], inputs=model.state)
    share = args.batch * args.accumulate
    tokens = share * processes * args.context
    log_path = Path(args.log) if args.log else Path(args.plot, "log.csv") if args.plot else None
    if log_path and rank:
        log_path = log_path.with_suffix(f".rank{rank}{log_path.suffix}")
    log = Log(log_path, step) if log_path else None
    wanted = []  # pictures, when a signal asks for them
    if args.plot and rank == 0:
        signal.signal(signal.SIGUSR1, lambda *_: wanted.append(True))

    def draw(report: StabilityReport | None) -> None:
        reports = {args.connection: report} if report else {}
        print("pictures:", *plot(reports, args.plot, logs={args.connection: log_path}))

    def save() -> None:
        if rank == 0:
            save_checkpoint(folder, step, everything(), about)

    if step >= args.steps:
        say(f"nothing to do: {step} of {args.steps} steps are done")
        raise SystemExit(0)

    history, seconds, validation, stop, saved = [], [], None, False, step
    mx.reset_peak_memory()
    start = before = time.perf_counter()
    progress = tqdm(total=args.steps, initial=step, unit="step", mininterval=1, disable=rank > 0)
    pending = []  # steps that run: the next is prepared meanwhile

    def read(count: int) -> list[tuple]:
        """The oldest of them, and what they returned."""
        taken = [pending.pop(0) for _ in range(count)]
        return [(k, *(v.item() for v in values)) for k, values in taken]

    while step < args.steps and not stop:
        starts = windows.starts(position + rank * share, share).reshape(args.accumulate, args.batch)
        # A process that is late says so to all, so that all stop after the same step.
        values = run(starts, mx.array(float(time.perf_counter() - start > args.seconds)))
        mx.async_eval(values, model.state, optimizer.state)
        step, position = step + 1, position + share * processes
        pending.append((step, values))
        due = step == args.steps or step % args.validate_every == 0
        due |= folder is not None and step % args.save_every == 0
        rows = read(len(pending) if due else len(pending) - 1)
        stop = any(late > 0 for *_, late in rows)
        rows += read(len(pending)) if stop else []
        each = (time.perf_counter() - before) / max(1, len(rows))  # read at once, they share it
        for done, bits, similarity, norm, _ in rows:
            seconds.append(each)
            finite = math.isfinite(bits) and math.isfinite(norm)
            history.append((bits, similarity))
            last = done == args.steps or stop and done == rows[-1][0]
            tested = None
            if finite and (last or done % args.validate_every == 0):
                validation = tested = validate().item()
            shown = f"{validation:.3f}" if validation is not None else "-"
            rate, peak = tokens / seconds[-1], mx.get_peak_memory() / 2**20
            if log:
                similar = similarity if model.streams > 1 else ""
                log.write(done, bits, similar, norm, round(rate), round(peak), tested)
            progress.set_postfix_str(
                f"bits/byte {bits:.3f}, validation {shown}, similarity {similarity:.3f}, "
                f"gradient {norm:.2g}, {rate:,.0f} tokens/s, {peak:.0f} MiB",
                refresh=False,
            )
            progress.update()
            if finite and folder and (done % args.save_every == 0 or last):
                save()
                saved = done
            if wanted:
                wanted.clear()
                draw(diagnose(start_report))
            if not finite:
                stop = True
                break
        before = time.perf_counter() if rows else before
    progress.close()
    if log:
        log.close()
    elapsed = time.perf_counter() - start
    if not finite:
        kept = f"; the last checkpoint is of step {saved}" if saved else ""
        say(f"loss {bits} and gradient norm {norm} in step {done}: stopped{kept}")
    recent = history[-100:]
    bits, similarity = (sum(h[k] for h in recent) / len(recent) for k in range(2))
    result = {
        "steps": done,
        "finite": finite,
        "bits_per_byte": bits,
        "validation": validation,
        "similarity": similarity if model.streams > 1 else None,
        "parameters": size,
        "ms_per_step": 1e3 * statistics.median(seconds),
        "seconds": elapsed,
        "peak_mib": mx.get_peak_memory() / 2**20,
        "losses": [h[0] for h in history],
        "report": None,
    }
    say(
        f"{len(history)} steps in {elapsed:.0f} s, {result['ms_per_step']:.1f} ms per step, "
        f"peak memory {result['peak_mib']:.0f} MiB"
    )
    between = f", similarity between streams {similarity:.3f}" if model.streams > 1 else ""
    say(f"bits per byte {bits:.3f}{between} (mean of the last {len(recent)} steps)")
    if validation is not None:
        say(f"validation {validation:.3f} bits per byte")
    if args.sample and finite and rank == 0:
        say("sample:", sample(model, b"def ", args.sample, args.context))
    if diagnosed and rank == 0:
        result["report"] = diagnose(start_report)
    if args.plot and rank == 0:
        draw(result["report"])
    return result


def parse(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", metavar="FILE", help="text to train on")
    add("--seconds", type=float, default=120, help="stop after this long")
    add("--steps", type=int, default=10_000, help="or after so many steps, where the cosine ends")
    add("--connection", choices=[*CONVENTIONS, "plain"], default="static")
    add("--streams", type=int, default=4, help="of every connection but plain")
    add("--dim", type=int, default=64)
    add("--depth", type=int, default=2, help="blocks of attention and MLP")
    add("--heads", type=int, default=4)
    add("--mlp", type=int, metavar="WIDTH", help="of the MLP: 4 x dim")
    add("--context", type=int, default=64)
    add("--batch", type=int, default=8, help="sequences that each process takes at once")
    add("--accumulate", type=int, default=1, help="so many of them, in turn, make a step")
    add("--lr", type=float, default=3e-3)
    add("--gates-rate", type=float, default=10, help="of gates and mixing logits: times --lr")
    add("--warmup", type=int, default=300, help="steps")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--dtype", choices=DTYPES, default="float32")
    add("--recompute", action="store_true", help="blocks again for the gradient: less memory")
    add("--seed", type=int, default=0)
    add("--no-metal", action="store_true", help="the reference instead of the kernels")
    add("--validate-every", type=int, default=250, metavar="STEPS")
    add("--validation-batch", type=int, default=32, help="sequences of the last 32nd of the text")
    add("--sample", type=int, default=200, metavar="BYTES", help="to write at the end")
    add("--log", metavar="FILE", help="a CSV line per step; other processes: FILE.rank1.csv ...")
    add("--plot", metavar="DIR", help="pictures at the end, and on SIGUSR1")
    add("--checkpoint", metavar="DIR", help="the last two checkpoints")
    add("--save-every", type=int, default=500, metavar="STEPS")
    add("--resume", action="store_true", help="from the newest whole checkpoint, if there is one")
    args = parser.parse_args(command)
    positive = ("steps", "streams", "dim", "depth", "heads", "context", "batch", "accumulate")
    for name in (*positive, "clip", "validate_every", "validation_batch", "save_every"):
        if not getattr(args, name) > 0:  # nan neither
            parser.error(
                f"--{name.replace('_', '-')} must be positive but is {getattr(args, name)}"
            )
    for name in ("lr", "gates_rate"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(
                f"--{name.replace('_', '-')} must be finite and at least 0 but is "
                f"{getattr(args, name)}"
            )
    for name in ("seconds", "warmup", "sample"):
        if not getattr(args, name) >= 0:
            parser.error(f"--{name} must be at least 0 but is {getattr(args, name)}")
    if args.mlp is not None and args.mlp <= 0:
        parser.error(f"--mlp must be positive but is {args.mlp}")
    if not 0 <= args.seed < 2**64:
        parser.error(f"--seed must be from 0 to 2**64 - 1 but is {args.seed}")
    if args.streams > 64:
        parser.error(f"--streams must be at most 64 but is {args.streams}")
    if args.connection != "plain":
        try:
            CONVENTIONS[args.connection].check_streams("--streams", args.streams)
        except ValueError as error:
            parser.error(str(error).replace("[--streams] n", "--streams"))
    if args.dim % (2 * args.heads):
        parser.error(f"--dim must be a multiple of 2 x --heads but is {args.dim}, {args.heads}")
    if args.resume and not args.checkpoint:
        parser.error("--resume needs --checkpoint")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'mhc-metal[plot]'")
    return args


if __name__ == "__main__":
    sys.exit(0 if train(parse())["finite"] else 1)
