"""A run trains a model as the options say; it can stop, and goes on bit for bit."""

import argparse
import hashlib
import math
import os
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from tqdm import tqdm

from examples.train_lm.byte_lm import Windows, loss_fn, make_model, read_corpus, sample
from examples.train_lm.checkpoints import (
    difference,
    is_checkpoint,
    list_checkpoints,
    load_checkpoint,
    lock_folder,
    save_checkpoint,
    step_of,
)
from examples.train_lm.files import check_new, make_folder
from examples.train_lm.log import Log
from examples.train_lm.training_step import make_optimizer, make_step
from mhc_mlx import backend
from mhc_mlx.commands import is_stream
from mhc_mlx.diagnostics import StabilityReport, plot, stability_report

# These must be the same for a checkpoint to fit, and for its position in the data to mean the same.
FIXED = ("connection", "streams", "dim", "depth", "heads", "mlp", "context", "seed")
PICTURES = ("gains.png", "streams.png", "h_res.png", "gates.png", "loss.png")


class Step(NamedTuple):
    """A step is done; it may be the last of its run."""

    number: int
    seconds: float
    last: bool
    bits: float
    similarity: float
    norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.bits) and math.isfinite(self.norm)


class Run:
    """A run has a model in training, its text, and how far it is; each process has its part."""

    def __init__(self, args: argparse.Namespace, at_end: ExitStack):
        """Make a run; ``at_end`` gives back the lock of its checkpoints."""
        self.args, self.group = args, mx.distributed.init()
        self.asked = []  # a signal asks for pictures; without a handler it would end the process
        if args.plot:
            signal.signal(signal.SIGUSR1, lambda *_: self.asked.append(True))
        self.rank, self.processes = self.group.rank(), self.group.size()
        self.folder = Path(args.checkpoint) if args.checkpoint else None
        self.step_sequences = args.batch * args.accumulate * self.processes
        self.log_path = self._log_path()
        self.at_start = None  # later reports compare with this StabilityReport
        text = read_corpus(args.data)
        size = len(text)
        tail_size = max(size // 32, 2 * args.context + 1)  # the tail is for validation
        if size < 2 * tail_size:
            raise SystemExit(f"--context {args.context} is too long for a text of {size} bytes")
        self._check_files(at_end)
        self.data = mx.array(memoryview(text[:-tail_size]))
        self.windows = Windows(self.data.size, args.context, args.seed)
        self._check_sequences(
            "--batch x --accumulate x processes", self.windows, self.step_sequences
        )
        tail = mx.array(memoryview(text[-tail_size:]))
        tests = Windows(tail.size, args.context, 0)
        self._check_sequences("--validation-batch", tests, args.validation_batch or 1)
        starts = tests.starts(0, args.validation_batch or min(tests.count, 32))
        self.held_out = tail[starts[:, None] + mx.arange(args.context + 1)].astype(mx.int32)

        self.step = self.position = self.saved = 0
        # A residual has one stream, whatever --streams says.
        fixed = [k for k in FIXED if k != "streams" or args.connection != "plain"]
        self.about = {k: getattr(args, k) for k in fixed}
        self.about["data"] = hashlib.sha256(text).hexdigest()

        mx.random.seed(args.seed)
        self.model = make_model(args)
        self.optimizer = make_optimizer(args.lr, args.steps, args.warmup, args.gates_rate)
        self.optimizer.init(self.model.trainable_parameters())
        parameters = tree_flatten(self.model.parameters())
        mx.eval(parameters)
        self.size = sum(v.size for _, v in parameters)
        kernels = backend() if backend() and not args.no_metal else "none"
        self.say(f"{self.size:,} parameters, {self.data.size:,} bytes of text, kernels: {kernels}")

    def _log_path(self) -> Path | None:
        args = self.args
        path = Path(args.log) if args.log else Path(args.plot, "log.csv") if args.plot else None
        if path and self.rank:
            if is_stream(path):  # only the first process writes to it
                return None
            path = path.with_suffix(f".rank{self.rank}{path.suffix}")
        return path

    def _check_files(self, at_end: ExitStack) -> None:
        """Raise SystemExit where what the options ask for cannot be written, or would be written
        over what this run has not written itself."""
        args = self.args
        if self.folder and self.rank == 0:
            make_folder("--checkpoint", self.folder)
            at_end.enter_context(lock_folder(self.folder))
            found = [p.name for p in list_checkpoints(self.folder)]
            unfinished = self.folder / "unfinished"
            if unfinished.is_dir() and not unfinished.is_symlink():
                raise SystemExit(f"--checkpoint: checkpoints need {unfinished}, which is a folder")
            if os.path.lexists(unfinished):
                found.append("unfinished")
            if found and not args.resume:
                raise SystemExit(
                    "--checkpoint must be a folder without checkpoints, or go with --resume, "
                    f"but {self.folder} has {found[0]}"
                )
        if args.log:
            make_folder("--log", Path(args.log).parent)
            if args.plot and is_stream(Path(args.log)):
                raise SystemExit(f"--plot needs a --log that can be read again, not {args.log}")
        if args.plot:
            make_folder("--plot", Path(args.plot))
        pictures = [Path(args.plot, name) for name in PICTURES] if args.plot else []
        for path in (self.log_path, *pictures, self.folder and self.folder / "unfinished"):
            if path and args.data and path.exists() and path.samefile(args.data):
                raise SystemExit(f"--data must not be written to but {path} is the same file")
        named = [("--log" if args.log else "--plot: the log", self.log_path)]
        for what, path in [*named, *(("--plot: a picture", path) for path in pictures)]:
            if path and (path.is_dir() or not args.resume):
                check_new(what, path, ", or go with --resume,")
        if self.log_path and self._is_anothers(self.log_path, pictures):
            raise SystemExit(f"--log must be a file of its own but {self.log_path} is another's")

    def _is_anothers(self, log: Path, pictures: list[Path]) -> bool:
        """Tell whether pictures or checkpoints are written where the log is to be."""
        log = Path(os.path.realpath(log))
        if log in [Path(os.path.realpath(path)) for path in pictures]:
            return True
        reserved = is_checkpoint(log) or log.name in ("lock", "unfinished")
        return reserved and self.folder is not None and log.parent == self.folder.resolve()

    def _check_sequences(self, what: str, windows: Windows, count: int) -> None:
        if count > windows.count:
            most = f"the {windows.count} sequences of --context {windows.context} that the text has"
            raise SystemExit(f"{what} must be at most {most} for it but is {count}")

    def say(self, *words) -> None:
        if self.rank == 0:
            print(*words, flush=True)  # must come before what --log /dev/stdout has next

    def everything(self) -> dict[str, mx.array]:
        """Return all that a run is, as arrays by name."""
        where = {"step": mx.array(self.step), "position": mx.array(self.position, mx.int64)}
        tree = {"model": self.model.parameters(), "optimizer": self.optimizer.state}
        return dict(tree_flatten(tree | {"at": where, "random": {"state": mx.random.state[0]}}))

    def save(self) -> None:
        if self.rank == 0:
            save_checkpoint(self.folder, self.step, self.everything(), self.about)
        self.saved = self.step

    def restore(self, arrays: dict[str, mx.array]) -> None:
        tree = tree_unflatten(list(arrays.items()))
        self.model.update(tree["model"])
        self.optimizer.state = tree["optimizer"]
        high, low = tree["random"]["state"].tolist()
        mx.random.seed(high << 32 | low)
        self.step, self.position = (tree["at"][k].item() for k in ("step", "position"))
        self.saved = self.step

    def _share(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return what the first process has; sums must come in the same order in all."""
        parts = {k: v if self.rank == 0 else mx.zeros_like(v) for k, v in sorted(arrays.items())}
        shared = {k: mx.distributed.all_sum(v, group=self.group) for k, v in parts.items()}
        mx.eval(shared)
        return shared

    def _fault(self, path: Path, arrays: dict[str, mx.array], about: dict) -> str | None:
        """Say what keeps an undamaged checkpoint from use; SystemExit if it is another run's."""
        for k, ours in self.about.items():
            if k not in about:
                return f"does not say its {k}"
            if about[k] != ours:
                theirs, ours = (str(v)[:12] if k == "data" else v for v in (about[k], ours))
                raise SystemExit(f"{path} was made with {k} {theirs}, not {ours}")
        if found := difference(arrays, self.everything()):
            return found
        if arrays["at.step"].item() != step_of(path) or arrays["at.position"].item() < 0:
            return "is of another step than its name says"
        return None

    def begin(self) -> None:
        """Begin, with --resume from the newest usable checkpoint; all processes from the same."""
        loaded = None
        if self.args.resume and self.rank == 0:
            loaded = load_checkpoint(self.folder, self._fault)
        if loaded:
            path, arrays, _ = loaded
        else:
            arrays = self.everything()
        if self.processes > 1:
            arrays = self._share(arrays)
        self.restore(arrays)
        if self.args.resume:
            found = f"resumed after step {self.step} from {path}" if loaded else None
            self.say(found or "no checkpoint: a new run")

    def steps(self) -> Iterator[Step]:
        """Train. A step is read once the next has begun, or at once if it is validated or saved."""
        args = self.args
        share = self.step_sequences // self.processes
        step = make_step(self.model, self.optimizer, self.data, args.context, args.clip, self.group)
        pending = []  # holds steps that run, and what they return
        stop = False
        start = before = time.perf_counter()

        def read(count: int) -> list[tuple]:
            """Wait for the oldest of them."""
            oldest = [pending.pop(0) for _ in range(count)]
            return [(k, *(v.item() for v in values)) for k, values in oldest]

        while self.step < args.steps and not stop:
            starts = self.windows.starts(self.position + self.rank * share, share)
            # A process that is late says so to all, so that all stop after the same step.
            late = mx.array(float(time.perf_counter() - start > args.seconds))
            values = step(starts.reshape(args.accumulate, args.batch), late)
            mx.async_eval(values, self.model.state, self.optimizer.state)
            self.step, self.position = self.step + 1, self.position + self.step_sequences
            pending.append((self.step, values))
            due = self.step == args.steps or self.step % args.validate_every == 0
            due |= self.folder is not None and self.step % args.save_every == 0
            rows = read(len(pending) if due else len(pending) - 1)
            stop = any(late > 0 for *_, late in rows)
            rows += read(len(pending)) if stop else []
            # Steps that are read at once share the time.
            seconds = (time.perf_counter() - before) / max(1, len(rows))
            for number, *figures, _ in rows:
                last = number == args.steps or stop and number == rows[-1][0]
                yield Step(number, seconds, last, *figures)
            before = time.perf_counter() if rows else before

    def diagnose(self) -> StabilityReport | None:
        """Report what connections do now, and what they have moved since ``at_start``, if any."""
        if self.args.connection == "plain":
            return None
        self.model.recompute = False  # what mx.checkpoint runs cannot be seen
        batch = self.held_out[:4]
        report = stability_report(
            self.model, batch, lambda *a: loss_fn(*a)[0], before=self.at_start
        )
        self.model.recompute = self.args.recompute
        return report

    def draw(self, report: StabilityReport | None) -> None:
        name = self.args.connection
        reports = {name: report} if report else {}
        try:
            drawn = plot(reports, self.args.plot, logs={name: self.log_path})
        except OSError as error:
            raise SystemExit(f"cannot draw into --plot {self.args.plot}: {error}") from error
        self.say("pictures:", *drawn)


def follow(run: Run, log: Log | None) -> tuple[list[Step], float | None]:
    """Train, with a bar, a line of the log per step, validation, checkpoints, and pictures on a
    signal. Return the steps, and the last validation; only at the end may they not be finite.
    """
    args, done, validation = run.args, [], None
    tokens = run.step_sequences * args.context
    validate = mx.compile(lambda: loss_fn(run.model, run.held_out)[0], inputs=run.model.state)
    bar = tqdm(total=args.steps, initial=run.step, unit="step", mininterval=1, disable=run.rank > 0)
    for step in run.steps():
        done.append(step)
        tested = None
        if step.finite and (step.last or step.number % args.validate_every == 0):
            validation = tested = validate().item()
        finite = step.finite and (tested is None or math.isfinite(tested))
        rate, peak = tokens / step.seconds, mx.get_peak_memory() / 2**20
        several = run.model.streams > 1
        if log:
            similarity = step.similarity if several else ""
            figures = (step.bits, similarity, step.norm, round(rate), round(peak), tested)
            log.write(step.number, *figures)
        validated = f"{validation:.3f}" if validation is not None else "-"
        between = f"similarity {step.similarity:.3f}, " if several else ""
        bar.set_postfix_str(
            f"bits/byte {step.bits:.3f}, validation {validated}, {between}"
            f"gradient {step.norm:.2g}, {rate:,.0f} tokens/s, {peak:.0f} MiB",
            refresh=False,
        )
        bar.update()
        if finite and run.folder and (step.last or step.number % args.save_every == 0):
            if log:
                log.sync()
            run.save()
        if run.asked and run.rank == 0:
            run.asked.clear()
            run.draw(run.diagnose())
        if not finite:
            break
    bar.close()
    return done, validation


def summarise(run: Run, done: list[Step], validation: float | None, seconds: float) -> dict:
    """Return the figures of a run, and print them."""
    end = done[-1]
    finite = end.finite and (validation is None or math.isfinite(validation))
    if not finite:
        saved = f"; the last checkpoint is of step {run.saved}" if run.saved else ""
        figures = f"loss {end.bits}, gradient norm {end.norm}, validation {validation}"
        run.say(f"{figures} in step {end.number}: stopped{saved}")
    recent, several = done[-100:], run.model.streams > 1
    bits, similarity = (
        sum(getattr(s, k) for s in recent) / len(recent) for k in ("bits", "similarity")
    )
    result = {
        "steps": end.number,
        "finite": finite,
        "bits_per_byte": bits,
        "validation": validation,
        "similarity": similarity if several else None,
        "parameters": run.size,
        "ms_per_step": 1e3 * statistics.median(s.seconds for s in done),
        "seconds": seconds,
        "peak_mib": mx.get_peak_memory() / 2**20,
        "losses": [s.bits for s in done],
        "report": None,
    }
    run.say(
        f"{len(done)} steps in {seconds:.0f} s, {result['ms_per_step']:.1f} ms per step, "
        f"peak memory {result['peak_mib']:.0f} MiB"
    )
    between = f", similarity between streams {similarity:.3f}" if several else ""
    run.say(f"bits per byte {bits:.3f}{between} (mean of the last {len(recent)} steps)")
    if validation is not None:
        run.say(f"validation {validation:.3f} bits per byte")
    return result


def train(args: argparse.Namespace, diagnosed: bool = False) -> dict:
    """Train as the command line says. Return the figures that it prints and, if diagnosed or
    drawn, the StabilityReport.
    """
    with ExitStack() as at_end:
        return _train(Run(args, at_end), diagnosed, at_end)


def _train(run: Run, diagnosed: bool, at_end: ExitStack) -> dict:
    args = run.args
    drawn = args.plot is not None and run.rank == 0
    diagnosed = drawn or diagnosed and run.rank == 0
    if diagnosed:
        run.at_start = run.diagnose()
    run.begin()
    if run.step >= args.steps:
        run.say(f"nothing to do: {run.step} of {args.steps} steps are done")
        raise SystemExit(0)
    log = None
    if run.log_path:
        log = at_end.enter_context(closing(Log(run.log_path, run.step, args.resume)))
    mx.reset_peak_memory()
    start = time.perf_counter()
    done, validation = follow(run, log)
    result = summarise(run, done, validation, time.perf_counter() - start)
    if args.sample and result["finite"] and run.rank == 0:
        run.say("sample:", sample(run.model, b"def ", args.sample, args.context))
    if diagnosed:
        result["report"] = run.diagnose()
    if drawn:
        run.draw(result["report"])
    return result
