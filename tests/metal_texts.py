"""Give the Metal texts that MLX generates to Apple's compiler, on a Mac. No GPU is needed.

python tests/metal_texts.py write FOLDER          every text of the main shapes and the tests' cases
python tests/metal_texts.py compile FOLDER --standard 3.1 --standard 3.2 --if-known 4.1
python tests/metal_texts.py check FOLDER          what the optimiser left in the .ll files

`write` also runs on Linux. Each text includes the header that MLX puts before it, from the folder
of the installed mlx. `compile` writes FOLDER/STANDARD/NAME.ll, Apple's LLVM IR, and what the
compiler says to failed.txt. `check` takes any folder of .ll files, and fails on a private array
that stays in memory and on a function that is not inlined: on a GPU both are slow.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
from proof.optimiser import llvm

from mhc_mlx import launch, ops
from mhc_mlx.device_report import shapes
from mhc_mlx.device_report.variants import Variant, find_variants, text_key

# What MLX's own custom kernels start with, metal::utils(), is this file and those it includes.
PREFIX = '#include "mlx/backend/metal/kernels/utils.h"\n'
INCLUDE = Path(mx.__file__).parent / "include"
# MLX's default for custom kernels is the safe math mode. Its own build of kernels allows these two
# warnings; of -Wall and -Wextra clang 18 has none for these texts.
FLAGS = ["-fno-fast-math", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-c++17-extensions", "-Wno-c++20-extensions"]
BATCH = 64  # launches that one process prints
EMPTY = "kernel void empty() {}\n"


def case_variants() -> list[Variant]:
    """Return the variants that the cases of tests/cases.py launch on a Mac."""
    from cases import CASES, RINGED, UNUSUAL
    from proof.compare import results

    found: dict[tuple, Variant] = {}
    for case in dict.fromkeys(CASES + RINGED + UNUSUAL):
        arrays = [a for a in case.arrays() if a is not None]
        with launch.record() as launches:
            results(getattr(ops, case.op), case, arrays)
        where = (case.op, str(case), (0, case.n, case.C), case.dtype)
        for call in launches:
            found.setdefault(text_key(call), Variant(call, where))
    return list(found.values())


def texts(variants: list[Variant]) -> Iterable[tuple[Variant, str]]:
    """Yield each variant with its Metal text."""
    for start in range(0, len(variants), BATCH):
        some = variants[start : start + BATCH]
        calls = json.dumps([v.launch for v in some], default=launch._dtype_name)
        printed = re.findall(r"```\n(.*?)```", launch._printed(calls), re.S)
        yield from zip(some, printed, strict=True)


def write(folder: Path, variants: list[Variant]) -> int:
    """Write each text that differs to a file, and index.json, which says what launches it."""
    folder.mkdir(parents=True, exist_ok=True)
    index = {}
    for variant, text in texts(variants):
        name = f"{variant.launch.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if name not in index:
            index[name] = variant.row()
            (folder / f"{name}.metal").write_text(PREFIX + text)
    (folder / "index.json").write_text(json.dumps(index, indent=1))
    return len(index)


def metal(standard: str, text: Path, result: Path) -> str:
    """Compile a text to LLVM's IR; return what the compiler says if it refuses."""
    command = ["xcrun", "-sdk", "macosx", "metal", "-x", "metal", f"-std=metal{standard}", *FLAGS]
    command += ["-isystem", str(INCLUDE), "-S", "-emit-llvm", str(text), "-o", str(result)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr.strip() or f"status {done.returncode}" if done.returncode else ""


def compile_all(folder: Path, standards: list[str], if_known: list[str]) -> list[str]:
    """Compile every text under each standard; return a paragraph for each that fails."""
    wrong, empty = [], folder / "empty.metal.txt"
    sources = sorted(folder.glob("*.metal"))
    if not sources:
        raise ValueError(f"{folder} must have the files that `write` makes but has none")
    empty.write_text(EMPTY)
    for standard in [*standards, *if_known]:
        out = folder / standard
        out.mkdir(exist_ok=True)
        if unknown := metal(standard, empty, out / "empty.ll.txt"):
            if standard in standards:
                wrong.append(f"{standard}: an empty kernel fails\n{unknown}")
            print(f"Metal {standard}: this compiler has it not")
            continue
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            said = pool.map(lambda s, v=standard, o=out: metal(v, s, o / f"{s.stem}.ll"), sources)
            failed = [(s.name, words) for s, words in zip(sources, said, strict=True) if words]
        print(f"Metal {standard}: {len(sources) - len(failed)} of {len(sources)} texts compile")
        wrong += [f"{standard}: {name} fails\n{words}" for name, words in failed]
    (folder / "failed.txt").write_text("\n\n".join(wrong))
    return wrong


def left_over(ir: str) -> list[str]:
    """Return what an optimiser left of a kernel that costs time on a GPU."""
    inner = llvm.functions(ir, entry=r"custom_kernel_\w+")
    return [f"array {a}" for a in llvm.arrays(ir)] + [f"function {f}" for f in inner]


def check(folder: Path) -> list[str]:
    """Return a line for each .ll file, in the folder or below, in which something is left."""
    files = sorted(folder.rglob("*.ll"))
    if not files:
        raise ValueError(f"{folder} must have .ll files but has none")
    wrong = []
    for file in files:
        if left := left_over(file.read_text()):
            wrong.append(f"{file.relative_to(folder)}: {', '.join(left)}")
    print(f"{len(files) - len(wrong)} of {len(files)} kernels are one function without arrays")
    return wrong


def main(argv: list[str] | None = None) -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("command", choices=("write", "compile", "check"))
    parser.add_argument("folder", type=Path)
    option = {"action": "append", "default": [], "metavar": "VERSION"}
    parser.add_argument("--standard", help="of Metal, such as 3.1; repeatable", **option)
    parser.add_argument("--if-known", help="the same, if the compiler has it", **option)
    args = parser.parse_args(argv)
    compiles = args.command == "compile"
    if compiles != bool(args.standard or args.if_known):
        parser.error(f"--standard must come with compile, and compile with it: {args.command}")
    if args.command == "write":
        mx.set_default_device(mx.cpu)  # a hosted Mac's GPU is not needed, and not to be trusted
        variants = find_variants(shapes.variant_cases(True), "metal") + case_variants()
        print(f"{write(args.folder, variants)} texts of {len(variants)} launches")
        return
    try:
        wrong = compile_all(args.folder, args.standard, args.if_known) if compiles else []
        wrong += [] if compiles else check(args.folder)
    except ValueError as error:
        parser.error(str(error))
    if wrong:
        sys.exit("\n\n".join(wrong))


if __name__ == "__main__":
    main()
