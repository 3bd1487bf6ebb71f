"""What tests of the examples share: a text, a short run, its log. Finds examples/ for an import."""

import csv
import sys
from pathlib import Path

import mlx.core as mx
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import train_lm  # noqa: E402
from checkpoints import Log  # noqa: E402
from options import parse  # noqa: E402

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
    """Where compiling for the CPU, a second for each fused kernel, would be most of a test."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Text whose bytes foretell the next."""
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
    return train_lm.train(parse(command(*args)))


def rows(log):
    """What must be the same in two runs: all but speed and memory."""
    with open(log, newline="") as f:
        found = list(csv.DictReader(f))
    return [[r[k] for k in Log.FIELDS if k[:4] not in ("toke", "peak")] for r in found]
