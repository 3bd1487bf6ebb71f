"""These are the options of the trainer, and checks that programs which run it share."""

import argparse
import importlib.util
import math

from examples.train_lm.byte_lm import CONNECTIONS, CONVENTIONS, DTYPES
from mhc_mlx.commands import make_parser, memory

COMMAND = "python -m examples.train_lm"
MOST_STEPS = 10**8 - 1  # a checkpoint's name has 8 digits


def options_named(
    parser: argparse.ArgumentParser, command: list[str] | None, args: argparse.Namespace
) -> set[str]:
    """Return the options that a command line, from which args was parsed, names, also with their
    usual values."""
    absent = object()
    unset = argparse.Namespace(**dict.fromkeys(vars(args), absent))
    found = parser.parse_known_args(command, unset)[0]
    return {name for name, value in vars(found).items() if value is not absent}


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def refuse_empty(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Refuse an empty path, which a shell makes of a variable that is not set."""
    for name in names:
        if getattr(args, name) == "":
            parser.error(f"{option(name)} must be a path but is empty")


def least_bytes(args: argparse.Namespace) -> int:
    """Return the bytes that a step takes in any case: weights, gradients and both moments; the
    streams before each block, and logits."""
    width = args.mlp or 4 * args.dim
    weights = args.depth * (4 * args.dim**2 + 2 * args.dim * width) + 2 * 256 * args.dim
    streams = 1 if args.connection == "plain" else args.streams
    size = DTYPES[args.dtype].size
    token_bytes = args.depth * streams * args.dim * size + 256 * size
    return 16 * weights + args.batch * args.context * token_bytes


def check_memory(parser: argparse.ArgumentParser, args: argparse.Namespace, names: str) -> None:
    least, most = least_bytes(args), memory()
    if least > most:
        gib = min(least, 2**200) / 2**30
        parser.error(f"{names} need at least {gib:.3g} GiB but the device has {most / 2**30:.3g}")


def trainer_parser(description: str | None = None) -> argparse.ArgumentParser:
    parser = make_parser(COMMAND, description)
    add = parser.add_argument
    add("--data", metavar="FILE", help="text to train on")
    add("--seconds", type=float, default=120, help="stop after this long")
    add("--steps", type=int, default=10_000, help="or after so many steps, where the cosine ends")
    add("--connection", choices=CONNECTIONS, default="static")
    add("--streams", type=int, default=4, help="of every connection but plain")
    add("--dim", type=int, default=64)
    add("--depth", type=int, default=2, help="blocks of attention and MLP")
    add("--heads", type=int, default=4)
    add("--mlp", type=int, metavar="WIDTH", help="of the MLP: 4 x dim")
    add("--context", type=int, default=64)
    add("--batch", type=int, default=8, help="sequences that each process takes at once")
    add("--accumulate", type=int, default=1, help="so many of them, in turn, make a step")
    add("--lr", type=float, default=3e-3)
    add(
        "--gates-rate",
        type=float,
        default=10,
        help="of connections, but for matrices: times --lr",
    )
    add("--warmup", type=int, default=300, help="steps")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--dtype", choices=DTYPES, default="float32")
    add("--recompute", action="store_true", help="blocks again for the gradient: less memory")
    add("--seed", type=int, default=0)
    add("--no-metal", action="store_true", help="the reference instead of the kernels")
    add("--validate-every", type=int, default=250, metavar="STEPS")
    add("--validation-batch", type=int, help="sequences of the last 32nd of the text: 32")
    add("--sample", type=int, default=200, metavar="BYTES", help="to write at the end")
    add("--log", metavar="FILE", help="new: a CSV line per step; other processes: FILE.rank1.csv")
    add("--plot", metavar="DIR", help="pictures at the end, and on SIGUSR1")
    add("--checkpoint", metavar="DIR", help="the last two checkpoints")
    add("--save-every", type=int, default=500, metavar="STEPS")
    add("--resume", action="store_true", help="from the newest whole checkpoint, if there is one")
    return parser


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    positive = ("steps", "streams", "dim", "depth", "heads", "context", "batch", "accumulate")
    positive += ("clip", "validate_every", "save_every", "mlp", "validation_batch")
    finite, least = ("lr", "gates_rate"), ("seconds", "warmup", "sample")
    values = {k: v for k, v in vars(args).items() if v is not None}
    for name in positive:
        if name in values and not values[name] > 0:  # a NaN is not either
            parser.error(f"{option(name)} must be positive but is {values[name]}")
    for name in finite:
        if not 0 <= values[name] < math.inf:
            parser.error(f"{option(name)} must be finite and at least 0 but is {values[name]}")
    for name in least:
        if not values[name] >= 0:
            parser.error(f"--{name} must be at least 0 but is {values[name]}")
    for name in ("steps", "warmup"):
        if values[name] > MOST_STEPS:
            parser.error(f"--{name} must be at most {MOST_STEPS} but is {values[name]}")
    if not 0 <= args.seed < 2**64:
        parser.error(f"--seed must be from 0 to 2**64 - 1 but is {args.seed}")
    if args.streams > 64:
        parser.error(f"--streams must be at most 64 but is {args.streams}")


def parse(command: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Parse the command line, or a list, and check it; SystemExit names what is wrong."""
    parser = trainer_parser(description)
    args = parser.parse_args(command)
    named = options_named(parser, command, args)
    refuse_empty(parser, args, "data", "log", "plot", "checkpoint")
    check_numbers(parser, args)
    if args.connection in CONVENTIONS:
        try:
            CONVENTIONS[args.connection].check_streams("--streams", args.streams)
        except ValueError as error:
            parser.error(str(error).replace("[--streams] n", "--streams"))
    if args.dim % (2 * args.heads):
        parser.error(f"--dim must be a multiple of 2 x --heads but is {args.dim}, {args.heads}")
    check_memory(parser, args, "--dim, --depth, --mlp, --streams, --batch and --context")
    if args.resume and not args.checkpoint:
        parser.error("--resume needs --checkpoint")
    if "save_every" in named and not args.checkpoint:
        parser.error(f"--save-every needs --checkpoint but is {args.save_every} without")
    if args.no_metal and args.connection == "plain":
        parser.error("--no-metal needs a --connection with kernels but it is plain")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'mhc-metal[plot]'")
    return args
