"""``python -m mhc_mlx.models`` patches a model, checks it, and times it."""

import argparse
import functools
import importlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from ..commands import Output, check_strings, make_parser, memory, read
from .check import check
from .families import ROWS, family_of, named, titles
from .family import Family
from .patching import patch
from .times import bench, bench_sites, check_bits, machine

PACKAGES = sorted({row.package for row in ROWS})
COMMAND = "python -m mhc_mlx.models"


def _random_model(family: Family, kind: str, d: int, layers: int) -> nn.Module:
    """Make a small random model with 4-bit weights and bfloat16 activations.

    Matrices that the package starts as zeros are drawn, so that every part of the model shows.
    """
    model = family.new_model(d, layers, kind)
    drawn = []
    leaves: list[Any] = list(tree_flatten(model.parameters()))
    for k, (name, a) in enumerate(leaves):
        if a.ndim > 1 and mx.issubdtype(a.dtype, mx.floating) and not a.any():
            noise = mx.random.normal(a.shape, a.dtype, key=mx.random.key(1000 + k))
            drawn.append((name, noise * a.shape[-1] ** -0.5))
    model.update(tree_unflatten(drawn))
    for k, site in enumerate(family.sites(model)):
        site.draw(k)
    cast = getattr(family.text(model), "cast_predicate", lambda name: "hc_" not in name)

    def bfloat16(name: str, a: mx.array) -> mx.array:
        return a.astype(mx.bfloat16) if a.dtype == mx.float32 and cast(name) else a

    model.update(tree_map_with_path(bfloat16, model.parameters()))
    nn.quantize(model, group_size=32, bits=4, class_predicate=_quantised)
    mx.eval(model.parameters())
    return model.eval()


def _quantised(_name: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module["weight"].shape[-1] % 32 == 0


def _check_report(report) -> None:
    """Raise ValueError unless --json of this command has written the report."""
    check_strings(report, "device", "mlx", "date", "command")
    if not report["command"].startswith(COMMAND):
        raise ValueError(f"its command is {report['command']}")


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 12 and int(part) > 0 for part in parts):
        must = "be positive numbers with commas between"
        raise ValueError(f"{option} must {must} but is {text!r}")
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers) and option != "--random":
        raise ValueError(f"{option} must be numbers that differ but is {text!r}")
    return numbers


def _check_tokens(tokens: Sequence[int], d: int) -> None:
    """Raise ValueError if the device's memory is too small for this number of tokens.

    With 4 streams the packages make up to 32 float32 arrays of the size of x.
    """
    needed, size = 4 * 4 * d * 32 * max(tokens), memory()
    if needed > size:
        got = f"{max(tokens)} of d = {d} need {needed / 2**30:.1f} of its {size / 2**30:.1f} GiB"
        raise ValueError(f"--tokens must fit in the device's memory but {got}")


def _check_folder(model: str, package: str) -> None:
    """Raise ValueError unless model is a name, or a folder with a model of the package's families.

    This reads config.json alone, so that a wrong folder fails before its weights are read.
    """
    path = Path(model)
    if not model or path.is_file():
        raise ValueError(f"--model must be a folder or a name but is {model or 'empty'}")
    if path.is_dir():
        name = "--model must be a model's folder: its config.json"
        config = read(name, str(path / "config.json"))
        kind = config.get("model_type") if isinstance(config, dict) else None
        if kind not in [m for r in ROWS if r.package == package for m in r.models.split(", ")]:
            raise ValueError(f"--model must be one of these: {titles()}; but {model} is {kind}")
    elif model.startswith(("/", ".", "~")):
        raise ValueError(f"--model must be a folder that exists but is {model}")


def _kind(args: argparse.Namespace) -> str:
    """Return the model type of --random."""
    kinds = next((r.models.split(", ") for r in ROWS if r.file == args.family), [""])
    if args.kind is not None and args.random is None:
        raise ValueError("--kind goes with --random alone")
    if args.kind is not None and args.kind not in kinds:
        raise ValueError(f"--kind must be one of {', '.join(kinds)} but is {args.kind!r}")
    return args.kind or kinds[0]


def _chain(args: argparse.Namespace) -> int | None:
    """Return the number of sites of --chain, or None without it."""
    if args.chain is None:
        return None
    if args.sites is None:
        raise ValueError("--chain goes with --sites alone")
    numbers = _numbers("--chain", args.chain)
    if len(numbers) > 1 or numbers[0] < 3:
        raise ValueError(f"--chain must be one number of at least 3 but is {args.chain!r}")
    return numbers[0]


def _bits(args: argparse.Namespace) -> int | None:
    """Return the number of --bits, or None without it."""
    if args.bits is None:
        return None
    if args.sites is None:
        raise ValueError("--bits goes with --sites alone")
    (bits, *others), sizes = _numbers("--bits", args.bits), _numbers("--sites", args.sites)
    if others:
        raise ValueError(f"--bits must be one number but is {args.bits!r}")
    for d in sizes:
        check_bits("--sites", bits, d, args.of)
    return bits


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check the options.

    The result has three more attributes: sizes (of --sites or --random), lengths (numbers of
    tokens) and output.
    """
    description = "Patch a model, check it against float64 and its package, and time it."
    parser = make_parser(COMMAND, description)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="path or name that the package loads")
    parser.add_argument("--package", choices=PACKAGES, default="mlx-lm", help="of --model")
    parser.add_argument("--family", default=ROWS[0].file, help=", ".join(row.file for row in ROWS))
    parser.add_argument("--kind", help="of --random: a model type of the family; its first without")
    what.add_argument("--random", metavar="D[,LAYERS]", help="a small model of random weights")
    what.add_argument("--sites", metavar="D[,D...]", help="hyper-connections of these sizes alone")
    parser.add_argument("--chain", metavar="N", help="how many of --sites run in a row: 122")
    parser.add_argument("--bits", metavar="N", help="of the linear layers that --sites may have")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--check", action="store_true", help="errors and times of each site, alone")
    part.add_argument("--bench", action="store_true", help="prefill and decode, alone")
    parser.add_argument("--no-verify", action="store_true", help="patch(verify=False)")
    parser.add_argument(
        "--rounding", choices=("stock", "once"), default="stock", help="patch(rounding=...)"
    )
    parser.add_argument("--tokens", metavar="L[,L...]", help="numbers of tokens to time")
    parser.add_argument("--prompts", metavar="L[,L...]", help="compare tokens after random prompts")
    parser.add_argument("--prompt", action="append", help="compare tokens after this text; again")
    parser.add_argument("--json", metavar="FILE", help="new, or an earlier one: what is printed")
    args = parser.parse_args(argv)
    args.error = parser.error
    try:
        tokens = None if args.tokens is None else _numbers("--tokens", args.tokens)
        args.lengths, args.sizes = tokens and tuple(tokens), [1]
        args.random_prompts = [] if args.prompts is None else _numbers("--prompts", args.prompts)
        if args.prompt is not None and args.model is None:
            raise ValueError("--prompt needs the tokenizer of --model")
        if args.model is None:
            args.of = named("models", args.family)
        args.kind = _kind(args)
        args.count = _chain(args)
        args.bits = _bits(args)
        if args.sites is not None:
            of_model = (args.check, args.bench, args.no_verify, args.random_prompts)
            if any(of_model) or args.rounding != "stock":
                must = "are of a model: they go not with --sites"
                raise ValueError(f"--check, --bench, --no-verify, --rounding and --prompts {must}")
            args.sizes = _numbers("--sites", args.sites)
        elif args.random is not None:
            args.sizes = _numbers("--random", args.random)
            if len(args.sizes) > 2:
                raise ValueError(f"--random must be D or D,LAYERS but is {args.random}")
            if args.sizes[0] % 32:
                raise ValueError(f"--random must have D a multiple of 32 but has {args.sizes[0]}")
        else:
            _check_folder(str(args.model), args.package)
        largest = max(args.sizes) if args.sites is not None else args.sizes[0]
        _check_tokens(args.lengths or (2048,), largest)
        args.output = Output("--json", args.json, f"a report of {COMMAND}", _check_report)
    except ValueError as error:
        parser.error(str(error))
    return args


def _load(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Return the model, and a tokenizer or None."""
    if args.random is not None:
        d, layers = (*args.sizes, 3)[:2]
        return _random_model(args.of, args.kind, d, layers), None
    try:
        package: Any = importlib.import_module(args.package.replace("-", "_"))
        return package.load(args.model)
    except (OSError, ValueError, ImportError) as error:
        must = f"be what {args.package} loads"
        return args.error(f"--model must {must} but is {args.model}: {error}")


def _prompts(args: argparse.Namespace, model: nn.Module, tokenizer: Any) -> list[Any] | None:
    """Return the prompts whose tokens are compared, or None."""
    vocabulary = family_of("models", model).vocabulary(model) if args.random_prompts else 0
    encoder: Any = tokenizer
    if not hasattr(tokenizer, "encode"):  # a processor
        encoder = getattr(tokenizer, "tokenizer", None)
    found: list[Any] = [list(map(int, encoder.encode(text))) for text in args.prompt or ()]
    for k, length in enumerate(args.random_prompts):
        found.append(mx.random.randint(0, vocabulary, (length,), key=mx.random.key(k)))
    return found or None


def _measures(args: argparse.Namespace):
    """Yield for each part of the report its name and the function that measures it."""
    if args.sites is not None:
        for d in args.sizes:
            lengths = args.lengths or (1, 8, 512, 2048)
            options = {"family": args.family, "count": args.count, "bits": args.bits}
            yield "per sublayer", functools.partial(bench_sites, d, lengths, **options)
        return
    model, tokenizer = _load(args)
    prompts = _prompts(args, model, tokenizer)
    start = time.perf_counter()
    patch(model, verify=not args.no_verify, rounding=args.rounding)
    print(f"patched in {time.perf_counter() - start:.1f} s", flush=True)
    if not args.bench:
        lengths = args.lengths or (1, 512)
        yield "check", functools.partial(check, model, prompts, times=lengths)
    if not args.check:
        yield "bench", functools.partial(bench, model, args.lengths or (512, 2048))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run ``python -m mhc_mlx.models`` with these arguments and return its report.

    It exits with a message if parity fails or the report cannot be written.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    report = {"command": f"{COMMAND} {shlex.join(argv)}", **machine()}
    if args.sites is not None:
        report["per sublayer"] = []
    parts = ("per sublayer", "check", "bench")
    with args.output.finishing(report, lambda: any(report.get(name) for name in parts)) as wrong:
        for name, run in _measures(args):
            if name == "per sublayer":
                report[name].append(run())
            else:
                report[name] = run()
            args.output.update(report)
    failed = [str(part["d"]) for part in report.get("per sublayer", []) if not part["ok"]]
    wrong += [f"parity fails: d = {', '.join(failed)}"] * bool(failed)
    if wrong:
        sys.exit("\n".join(wrong))
    return report


if __name__ == "__main__":
    main()
