"""Tests of the trainer and of what runs it share a text, a short run, and its log."""

import csv

import mlx.core as mx
import pytest

from examples.train_lm import train as program
from examples.train_lm.checkpoints import list_checkpoints
from examples.train_lm.log import Log
from examples.train_lm.options import parse

# A loss, relative, may differ by rounding of float32 sums in another order, which AdamW carries on
# for twelve steps. Seen: 1.3e-6.
BOUND = 1e-5
STEPS, EVERY = 12, 4
OPTIONS = ["--connection", "static", "--dim", 8, "--depth", 1, "--heads", 2, "--context", 16]
OPTIONS += ["--batch", 8, "--steps", STEPS, "--seconds", 1e9, "--warmup", 4, "--lr", 0.01]
OPTIONS += ["--validate-every", EVERY, "--validation-batch", 4]


@pytest.fixture(autouse=True)
def on_the_cpu():
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@pytest.fixture
def uncompiled():
    """Compile nothing: on a CPU a second for each fused kernel would be most of a test."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Write a text whose bytes foretell the next."""
    path = tmp_path_factory.mktemp("corpus") / "text"
    path.write_text("".join(f"{k} squared is {k * k}.\n" for k in range(1200)))
    return path


def command(corpus, folder=None, *more):
    options = [*OPTIONS, "--data", corpus, "--sample", 0]
    if folder:
        options += ["--log", folder / "log.csv", "--checkpoint", folder / "checkpoints"]
        options += ["--save-every", EVERY]
    return [str(a) for a in (*options, *more)]


def train(*args):
    return program.train(parse(command(*args)))


def rows(log):
    """Read what must be the same in two runs: all but speed and memory."""
    with open(log, newline="") as f:
        found = list(csv.DictReader(f))
    return [[r[k] for k in Log.FIELDS if k[:4] not in ("toke", "peak")] for r in found]


def steps_kept(folder):
    """Return the steps of the checkpoints that a run has left, the newest first."""
    found = list_checkpoints(folder / "checkpoints")
    return [int(p.name.split("-")[1]) for p in found]
