"""``python -m mhc_mlx.mlx_lm`` patches a model, checks it, and times it."""

import argparse
import functools
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_map_with_path

from ..commands import Output, check_strings, make_parser, memory, read
from .check import check
from .patch import patch
from .sites import MODELS, stock
from .times import bench, bench_sites, machine, random_sites


def _random_model(d: int, layers: int) -> nn.Module:
    """Make a deepseek_v41 of hidden size d with 8 experts, 4-bit weights, bfloat16 activations."""
    args = stock.ModelArgs(
        hidden_size=d,
        num_hidden_layers=layers,
        vocab_size=1024,
        num_attention_heads=8,
        head_dim=128,
        q_lora_rank=256,
        qk_rope_head_dim=32,
        o_groups=4,
        o_lora_rank=128,
        moe_intermediate_size=256,
        n_routed_experts=8,
        num_experts_per_tok=2,
        compress_ratios=(0, *[4] * (layers - 1)),
        kv_source_layer_ids=tuple(range(1, layers)),
        index_source_layer_ids=tuple(range(1, layers)),
        index_n_heads=4,
        index_head_dim=64,
    )
    model = stock.Model(args)
    sites: list[Any] = [m for m in model.modules() if isinstance(m, stock.HyperConnection)]
    for k, hc in enumerate(sites):
        hc.fn = random_sites(d, 1)[0].hc.fn
        hc.base = mx.random.normal(hc.base.shape, key=mx.random.key(k))
    cast = model.cast_predicate

    def bfloat16(name: str, a: mx.array) -> mx.array:
        return a.astype(mx.bfloat16) if cast(name) else a

    model.update(tree_map_with_path(bfloat16, model.parameters()))
    nn.quantize(model, group_size=32, bits=4)
    mx.eval(model.parameters())
    return model.eval()


COMMAND = "python -m mhc_mlx.mlx_lm"


def _check_report(report) -> None:
    """Raise ValueError unless --json of this command has written the report."""
    check_strings(report, "device", "mlx", "mlx-lm", "date", "command")
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

    With 4 streams mlx-lm makes 32 float32 arrays of the size of x.
    """
    needed, size = 4 * 4 * d * 32 * max(tokens), memory()
    if needed > size:
        got = f"{max(tokens)} of d = {d} need {needed / 2**30:.1f} of its {size / 2**30:.1f} GiB"
        raise ValueError(f"--tokens must fit in the device's memory but {got}")


def _check_folder(model: str) -> None:
    """Raise ValueError unless model is a name, or a folder with a deepseek_v41.

    This reads config.json alone, so that a wrong folder fails before its weights are read.
    """
    path = Path(model)
    if not model or path.is_file():
        raise ValueError(f"--model must be a folder or a name but is {model or 'empty'}")
    if path.is_dir():
        name = "--model must be a model's folder: its config.json"
        config = read(name, str(path / "config.json"))
        kind = config.get("model_type") if isinstance(config, dict) else None
        if kind != "deepseek_v41":
            raise ValueError(f"--model must be a {MODELS} but {model} is {kind}")
    elif model.startswith(("/", ".", "~")):
        raise ValueError(f"--model must be a folder that exists but is {model}")


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check the options.

    The result has three more attributes: sizes (of --sites or --random), lengths (numbers of
    tokens) and output.
    """
    description = "Patch a DeepSeek V4.1 of mlx-lm, check it against float64, and time it."
    parser = make_parser(COMMAND, description)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="path or name that mlx_lm.load takes")
    what.add_argument("--random", metavar="D[,LAYERS]", help="a small model of random weights")
    what.add_argument("--sites", metavar="D[,D...]", help="hyper-connections of these sizes alone")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--check", action="store_true", help="errors and times of each site, alone")
    part.add_argument("--bench", action="store_true", help="prefill and decode, alone")
    parser.add_argument("--no-verify", action="store_true", help="patch(verify=False)")
    parser.add_argument("--tokens", metavar="L[,L...]", help="numbers of tokens to time")
    parser.add_argument("--json", metavar="FILE", help="new, or an earlier one: what is printed")
    args = parser.parse_args(argv)
    args.error = parser.error
    try:
        tokens = None if args.tokens is None else _numbers("--tokens", args.tokens)
        args.lengths, args.sizes = tokens and tuple(tokens), [1]
        if args.sites is not None:
            if args.check or args.bench or args.no_verify:
                must = "are of a model: they go not with --sites"
                raise ValueError(f"--check, --bench and --no-verify {must}")
            args.sizes = _numbers("--sites", args.sites)
        elif args.random is not None:
            args.sizes = _numbers("--random", args.random)
            if len(args.sizes) > 2:
                raise ValueError(f"--random must be D or D,LAYERS but is {args.random}")
            if args.sizes[0] % 32:
                raise ValueError(f"--random must have D a multiple of 32 but has {args.sizes[0]}")
        else:
            _check_folder(args.model)
        largest = max(args.sizes) if args.sites is not None else args.sizes[0]
        _check_tokens(args.lengths or (2048,), largest)
        args.output = Output("--json", args.json, f"a report of {COMMAND}", _check_report)
    except ValueError as error:
        parser.error(str(error))
    return args


def _load(args: argparse.Namespace) -> nn.Module:
    if args.random is not None:
        d, layers = (*args.sizes, 3)[:2]
        return _random_model(d, layers)
    try:
        return mlx_lm.load(args.model)[0]
    except (OSError, ValueError) as error:
        return args.error(f"--model must be what mlx_lm.load takes but is {args.model}: {error}")


def _measures(args: argparse.Namespace):
    """Yield for each part of the report its name and the function that measures it."""
    if args.sites is not None:
        for d in args.sizes:
            lengths = args.lengths or (1, 8, 512, 2048)
            yield "per sublayer", functools.partial(bench_sites, d, lengths)
        return
    model = _load(args)
    start = time.perf_counter()
    patch(model, verify=not args.no_verify)
    print(f"patched in {time.perf_counter() - start:.1f} s", flush=True)
    if not args.bench:
        yield "check", functools.partial(check, model, times=args.lengths or (1, 512))
    if not args.check:
        yield "bench", functools.partial(bench, model, args.lengths or (512, 2048))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run ``python -m mhc_mlx.mlx_lm`` with these arguments and return its report.

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
