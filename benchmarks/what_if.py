"""Compare two tilings by the model: the one in use, and one with other numbers.

    python -m benchmarks.what_if --device "M4 Max" --op single_pass --shape 64,4,5120 \\
        --set partial_logits_tokens=16

Each --set names a number of the records of mhc_mlx/devices.py, or of mhc_mlx/ops/tiling.py. No time
is measured; it needs what benchmark.py --model needs.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping

from benchmarks import listings, model
from benchmarks.model import launches_of
from benchmarks.rates import DEVICES
from mhc_mlx import devices
from mhc_mlx.commands import make_parser
from mhc_mlx.device_report.suite import DIRECTIONS, DTYPES, OPS
from mhc_mlx.ops import tiling

COMMAND = "python -m benchmarks.what_if"


def records() -> list[object]:
    """What holds the numbers by which launches are cut."""
    return [tiling, *(v for v in vars(devices).values() if isinstance(v, devices.Device))]


@contextlib.contextmanager
def numbers(changed: Mapping[str, int]) -> Iterator[None]:
    """Let launches be cut by other numbers.

    Raises:
        ValueError: Nothing has a number of that name.
    """
    holders, before = records(), []
    for name in changed:
        if not any(type(getattr(holder, name, None)) in (int, bool) for holder in holders):
            raise ValueError(f"--set must name a number of a tiling but is {name}")

    def forget() -> None:
        for name, module in list(sys.modules.items()):  # the ops keep launches that tilings made
            for function in vars(module).values() if name.startswith("mhc_mlx.ops") else ():
                if hasattr(function, "cache_clear"):
                    function.cache_clear()

    for holder in holders:
        for name, value in changed.items():
            if type(getattr(holder, name, None)) in (int, bool):
                before.append((holder, name, getattr(holder, name)))
                object.__setattr__(holder, name, value)
    forget()
    try:
        yield
    finally:
        for holder, name, value in before:
            object.__setattr__(holder, name, value)
        forget()


def compared(case: tuple, device: str, changed: Mapping[str, int], threads: int | None) -> str:
    """Both tilings' launches with their times, and what the other one gains."""
    rates, lines, totals = DEVICES[device], [], []
    for label, values in (("in use", {}), ("changed", changed)):
        with numbers(values):
            calls = launches_of(*case, rates.backend, threads if label == "changed" else None)
        found = [model.predict(call, rates) for call in calls]
        totals.append(sum(row.us for row in found))
        lines += [
            f"{label:8} {row.kernel:36} {row.groups:6} threadgroups of {call.threads:4}, "
            f"{row.resident} a core, {row.registers} registers, {row.spilled} spilled: "
            f"{row.us:9.1f} us, {row.binds}"
            for row, call in zip(found, calls, strict=True)
        ]
        lines.append(f"{label:8} all: {totals[-1]:.1f} us")
    lines.append(f"{100 * (totals[1] / totals[0] - 1):+.1f} % by the model on {device}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(COMMAND, __doc__)
    parser.add_argument("--device", choices=list(DEVICES), required=True)
    parser.add_argument("--op", choices=sorted(OPS), required=True)
    parser.add_argument("--direction", choices=DIRECTIONS, default="forward")
    parser.add_argument("--shape", metavar="B,n,C", required=True)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--threads", type=int, help="threads_per_group of the changed tiling")
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[])
    args = parser.parse_args(argv)
    try:
        changed = {name: int(value) for name, _, value in (s.partition("=") for s in args.set)}
        shape = tuple(map(int, args.shape.split(",")))
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"--shape must be three positive numbers B,n,C but is {args.shape}")
        if reason := listings.missing(DEVICES[args.device].backend):
            raise ValueError(reason)
        case = (args.op, args.direction, shape, args.dtype)
        print(compared(case, args.device, changed, args.threads))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
