"""Record what the kernels are and do, and compare two recordings. This needs no GPU.

    python tests/proof/freeze.py record OUT.json
    python tests/proof/freeze.py compare OLD.json NEW.json --allow 'bits .*mhc_lite'

`record` uses tests/ and mhc_mlx of the working directory, which must be the root of a checkout. To
record another checkout with this file, run it there, with that root as PYTHONPATH.

A recording has these entries for each launch, forward and backward, of each case in the lists of
tests/cases.py:

    launch    body, threadgroups, threads and template arguments, for Metal and for CUDA
    ptx       NVRTC's PTX of the CUDA form, without comments and lines; names are numbered
    figures   registers, and bytes of spills, stack and shared memory
    bits      each output in the simulator's first schedule, and the results of the op
    traffic   loads and stores of each buffer

and the signatures of all public names of the package. OUT.json has digests in place of long texts.
The folder freeze-texts beside it has the PTX and the sources, compressed, by digest; a source that
lies there is not compiled again, and `compare --diff` prints how the PTX of a launch has changed.

`compare` identifies a case by its name. It fails if an entry has changed or is gone, unless the
regular expression of --allow is found in the line "kind key" that it prints. Entries that are new
are printed and do not fail. --renamed FILE gives the new names of bodies, template arguments and
arrays of OLD: each line is "old new", or "old new body..." if only these bodies of OLD have it.
"""

import argparse
import ctypes
import difflib
import gzip
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):  # import from the working directory's checkout
    sys.path[:0] = [os.path.join(os.getcwd(), "tests"), os.getcwd()]

import mlx.core as mx
import numpy as np

MODULES = ("mhc_mlx", "mhc_mlx.ops", "mhc_mlx.reference", "mhc_mlx.diagnostics", "mhc_mlx.models")
FORMS = ("simulator", "simulator, CUDA")
KINDS = ("signature", "launch", "ptx", "figures", "bits", "traffic", "inputs")


def digest(*parts: str | bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()


def array_digest(a) -> str:
    """Return the digest of an array's shape, dtype and bits."""
    if a is None:
        return "None"
    bits = np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)
    return digest(f"{a.dtype} {a.shape} ", bits.tobytes())


def all_cases() -> list:
    """Return the cases of all lists in tests/cases.py, each once."""
    import cases

    lists = [v for v in vars(cases).values() if isinstance(v, list)]
    return list(dict.fromkeys(c for v in lists for c in v if isinstance(c, cases.Case)))


def named(cases: list) -> dict:
    """Return cases by name; a name that recurs gets a number."""
    found = {}
    for case in cases:
        name, k = str(case), 2
        while name in found:
            name, k = f"{case} #{k}", k + 1
        found[name] = case
    return found


# --- PTX ------------------------------------------------------------------------------------------


def normalized(ptx: str) -> str:
    """Return PTX without comments, source lines and paths, its symbols numbered by appearance."""
    ptx = re.sub(r"/\*.*?\*/", "", ptx, flags=re.S)
    lines = [re.sub(r"\s*//.*", "", line).rstrip() for line in ptx.split("\n")]
    ptx = "\n".join(k for k in lines if k and not re.match(r"\s*\.(file|loc)\b", k))
    names: dict[str, str] = {}
    return re.sub(
        r"\b_Z\w+|\$L__\w+|\b__local_depot\w+",
        lambda found: names.setdefault(found.group(), f"symbol{len(names)}"),
        ptx,
    )


def compiled(job: tuple[str, str, str]) -> dict:
    """Return the result of NVRTC on a body's CUDA source, which the folder keeps by digest."""
    name, source, folder = job
    from proof import nvrtc

    library, includes = nvrtc.toolkit()
    version = (ctypes.c_int(), ctypes.c_int())
    library.nvrtcVersion(*map(ctypes.byref, version))
    key = digest(f"{name} {version[0].value}.{version[1].value} 1 ", source)
    kept = Path(folder, f"{key}.json")
    if kept.exists():
        return json.loads(kept.read_text())
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    header = (ctypes.c_char_p * 1)(b"mlx/backend/cuda/device/utils.cuh")
    texts = (ctypes.c_char_p * 1)(nvrtc.UTILS)
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"body.cu", 1, texts, header)
    library.nvrtcAddNameExpression(program, f"mlx::core::cu::custom_kernel_{name}".encode())
    flags = ["--device-as-default-execution-space", "--gpu-architecture=sm_90a"]
    flags += ["--ptxas-options=-v", "--pch", "--pch-messages=false"]
    flags = [f.encode() for f in flags + [f"--include-path={p}" for p in includes]]
    failed = library.nvrtcCompileProgram(
        program, len(flags), (ctypes.c_char_p * len(flags))(*flags)
    )

    def text(what: str) -> str:
        getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        room = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{what}")(program, room)
        return room.value.decode()

    log = text("ProgramLog")
    if failed:
        found = {"error": log[:2000], "ptx": "", "source": key}
    else:
        ptx = normalized(text("PTX"))
        found = {"ptx": digest(ptx), "source": key}
        for figure, pattern in (
            ("registers", r"Used (\d+) registers"),
            ("spills", r"(\d+) bytes spill stores"),
            ("shared", r"(\d+) bytes smem"),
            ("stack", r"(\d+) bytes stack frame"),
        ):
            number = re.search(pattern, log)
            found[figure] = int(number.group(1)) if number else 0
        keep(folder, found["ptx"], ptx)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    keep(folder, key, source)
    replace(kept, json.dumps(found).encode())
    return found


def replace(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as f:
        f.write(data)
    os.replace(f.name, path)


def keep(folder: str | Path, key: str, text: str) -> None:
    if not (path := Path(folder, f"{key}.gz")).exists():
        replace(path, gzip.compress(text.encode(), 6, mtime=0))


def kept(folder: str | Path, key: str) -> str:
    path = Path(folder, f"{key}.gz")
    return gzip.decompress(path.read_bytes()).decode() if path.exists() else ""


# --- a case ---------------------------------------------------------------------------------------


def launch_words(name, groups, threads, template) -> str:
    options = ", ".join(f"{k}={v}" for k, v in template.items())
    return f"{name}, {groups} threadgroups of {threads}: {options}"


def sources(case) -> list[tuple[str, str, str]]:
    """Return (body, launch in words, source) of each launch of a case on CUDA."""
    from mhc_mlx import launch, ops
    from proof import executor, nvrtc, results

    found = []

    def run(name, inputs, outputs, groups, threads, template, verbose=False):
        source = nvrtc.cuda_source(name, inputs, outputs, threads, template)
        found.append((name, launch_words(name, groups, threads, template), source))
        return [mx.zeros(*spec) for spec in outputs.values() if spec is not None]

    with executor("nvrtc"):
        launch.run = run
        results(getattr(ops, case.op), case, [a for a in case.arrays() if a is not None])
    return found


def counts(buffer) -> str:
    """Return the least, the most and all loads and stores of the elements of a buffer, in words."""
    words = []
    for kind, each in (("loads", buffer.loads), ("stores", buffer.stores)):
        if each.size and each.any():
            words.append(f"{kind} {each.min()} to {each.max()}, {each.sum(dtype=np.uint64)} in all")
    return "; ".join(words) or "untouched"


def simulated(case, form: str) -> dict:
    """Return the launches of a case in the simulator, and the bits of its results."""
    from mhc_mlx import launch, ops
    from proof import executor, results, simulator

    launches, schedules = [], simulator.SCHEDULES

    def run(name, inputs, outputs, groups, threads, template, verbose=False):
        with simulator.recording() as records:
            out = simulator.run(name, inputs, outputs, groups, threads, template)
        made = [k for k, spec in outputs.items() if spec is not None]
        buffers = records[0].buffers.items()
        launches.append(
            {
                "launch": launch_words(name, groups, threads, template),
                "bits": {k: array_digest(a) for k, a in zip(made, out, strict=True)},
                "traffic": {k: counts(b) for k, b in buffers if not k.endswith("_shape")},
            }
        )
        return out

    simulator.SCHEDULES = schedules[:1]
    try:
        with executor(form):
            launch.run = run
            given = [a for a in case.arrays() if a is not None]
            out = results(getattr(ops, case.op), case, given)
    finally:
        simulator.SCHEDULES = schedules
    return {"launches": launches, "results": [array_digest(a) for a in out]}


def of_case(case) -> dict:
    """Return all entries of a case but its PTX, with the sources for it, or the error it raised."""
    found = {"inputs": digest(*(array_digest(a) for a in case.arrays()))}
    try:
        found["cuda"] = sources(case)
        for form in FORMS:
            found[form] = simulated(case, form)
    except Exception as error:  # it is recorded: a case that fails must not hide the others
        found["error"] = f"{type(error).__name__}: {error}"[:2000]
    return found


# --- signatures -----------------------------------------------------------------------------------


def signature(f) -> str:
    try:
        text = str(inspect.signature(f))
    except (TypeError, ValueError):
        text = "no signature"
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def signatures() -> dict[str, str]:
    """Return the signatures of all public names of the package, and of its classes' methods."""
    found = {}
    for module in map(importlib.import_module, MODULES):
        for name, v in sorted(vars(module).items()):
            mine = getattr(v, "__module__", "mhc_mlx") or ""
            if name.startswith("_") or inspect.ismodule(v) or not mine.startswith("mhc_mlx"):
                continue
            path = f"{module.__name__}.{name}"
            if not callable(v):
                found[path] = re.sub(r" at 0x[0-9a-f]+", "", repr(v))
                continue
            found[path] = signature(v)
            bases = v.__mro__ if inspect.isclass(v) else ()
            for base in (b for b in bases if b.__module__.startswith("mhc_mlx")):
                for method, m in vars(base).items():
                    public = not method.startswith("_") or method == "__call__"
                    if public and isinstance(m, property):
                        found.setdefault(f"{path}.{method}", "property")
                    elif public and callable(getattr(v, method)):
                        found.setdefault(f"{path}.{method}", signature(getattr(v, method)))
    return found


# --- a recording ----------------------------------------------------------------------------------


def record(cases: dict, folder: Path, workers: int = 0) -> dict[str, dict[str, str]]:
    """Return the entries of cases, by kind and key; with 0 workers this process computes them."""
    folder.mkdir(parents=True, exist_ok=True)
    if workers:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            made = dict(zip(cases, pool.map(of_case, cases.values()), strict=True))
            jobs = jobs_of(made, folder)
            ptx = dict(zip(jobs, pool.map(compiled, jobs, chunksize=2), strict=True))
    else:
        made = {k: of_case(case) for k, case in cases.items()}
        ptx = {job: compiled(job) for job in jobs_of(made, folder)}
    found = {kind: {} for kind in (*KINDS, "error")} | {"signature": signatures(), "source": {}}
    for case, one in made.items():
        found["inputs"][case] = one["inputs"]
        if "error" in one:
            found["error"][case] = one["error"]
        names = []
        for k, (name, words, source) in enumerate(one.get("cuda", [])):
            key, result = f"{case} / {k} {name}", ptx[name, source, str(folder)]
            names.append(name)
            found["launch"][f"{key}, CUDA"] = words
            found["ptx"][key], found["source"][key] = result["ptx"], result["source"]
            found["figures"][key] = "; ".join(
                f"{n} {v}" for n, v in result.items() if n not in ("ptx", "source")
            )
        found["launch"][f"{case}, CUDA"] = ", ".join(names)
        for form in (form for form in FORMS if form in one):
            names = []
            for k, one_launch in enumerate(one[form]["launches"]):
                name = one_launch["launch"].partition(",")[0]
                names.append(name)
                key = f"{case} / {k} {name}, {form}"
                found["launch"][key] = one_launch["launch"]
                for buffer, text in one_launch["traffic"].items():
                    found["traffic"][f"{key} / {buffer}"] = text
                for output, bits in one_launch["bits"].items():
                    found["bits"][f"{key} / {output}"] = bits
            found["launch"][f"{case}, {form}"] = ", ".join(names)
            for k, bits in enumerate(one[form]["results"]):
                found["bits"][f"{case}, {form} / result {k}"] = bits
    return found


def jobs_of(made: dict, folder: Path) -> list[tuple[str, str, str]]:
    """Return the arguments of `compiled` for all sources, each once."""
    each = [(name, s, str(folder)) for one in made.values() for name, _, s in one.get("cuda", [])]
    return list(dict.fromkeys(each))


def renamed(recording: dict, lines: str) -> dict:
    """Return a recording with new names in its launches, and in its keys after the case's name."""
    rules = [line.split() for line in lines.splitlines() if line.strip()]

    def renew(text: str) -> str:
        found = re.search(r"^(?:\d+ )?(\w*)", text)
        names = {old: k for old, k, *bodies in rules if not bodies or found[1] in bodies}
        return re.sub(r"\w+", lambda word: names.get(word.group(), word.group()), text)

    def of_key(key: str) -> str:
        case, slash, rest = key.partition(" / ")
        return case + slash + (renew(rest) if rest else "")

    return {
        kind: {of_key(k): renew(v) if kind == "launch" else v for k, v in each.items()}
        for kind, each in recording.items()
    }


def compared(old: dict, new: dict) -> dict[str, dict[str, list[str]]]:
    """Return, by kind, the keys of entries that are equal, changed, new and gone."""
    found = {}
    for kind in (*KINDS, "error"):
        a, b = old.get(kind, {}), new.get(kind, {})
        both = [k for k in a if k in b]
        found[kind] = {
            "equal": [k for k in both if a[k] == b[k]],
            "changed": [k for k in both if a[k] != b[k]],
            "new": [k for k in b if k not in a],
            "gone": [k for k in a if k not in b],
        }
    return found


def report(old: dict, new: dict, allow: str | None, most: int, diff: tuple | None) -> bool:
    """Print what differs, and return whether all of it is allowed."""
    right = True
    for kind, lists in compared(old, new).items():
        line = ", ".join(f"{len(keys)} {word}" for word, keys in lists.items())
        print(f"{kind}: {line}")
        for word in ("changed", "gone", "new"):
            fails = [k for k in lists[word] if not (allow and re.search(allow, f"{kind} {k}"))]
            if word == "new" and kind != "error":
                fails = []
            right = right and not fails
            if lists[word] and word != "new":
                print(f"  {word}: {len(lists[word]) - len(fails)} allowed, {len(fails)} not")
            bodies = Counter(m.group(1) for k in fails if (m := re.search(r"/ \d+ (\w+)", k)))
            if bodies:
                print("  by body: " + ", ".join(f"{b} {n}" for b, n in bodies.most_common()))
            for k in (fails or lists["new"] * (word == "new"))[:most]:
                a, b = old[kind].get(k, "nothing"), new[kind].get(k, "nothing")
                short = kind in ("ptx", "bits", "inputs")
                print(f"  {word} {kind} {k}" + ("" if short else f"\n    {a}\n    {b}"))
                if diff and kind == "ptx" and word == "changed":
                    texts = [kept(f, t).split("\n") for f, t in zip(diff, (a, b), strict=True)]
                    print("\n".join(difflib.unified_diff(*texts, "old", "new", "", "", 2, "")))
            if len(fails) > most:
                print(f"  and {len(fails) - most} more {word}: --most")
    return right


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record", help="record the checkout in which this runs")
    recorder.add_argument("out", type=Path)
    recorder.add_argument("--case", default="", help="part of the names of the cases")
    recorder.add_argument("--workers", type=int, default=os.cpu_count())
    comparer = commands.add_parser("compare", help="say what differs")
    comparer.add_argument("old", type=Path)
    comparer.add_argument("new", type=Path)
    comparer.add_argument("--case", default="", help="part of the names of the cases")
    comparer.add_argument("--allow", help="regular expression: lines 'kind key' that may differ")
    comparer.add_argument("--renamed", type=Path, help="file: lines 'old new' or 'old new body...'")
    comparer.add_argument("--most", type=int, default=20, help="lines printed of each sort")
    comparer.add_argument("--diff", action="store_true", help="print how the PTX differs")
    args = parser.parse_args()
    if args.command == "record":
        os.nice(10)
        cases = {k: c for k, c in named(all_cases()).items() if args.case in k}
        if not cases:
            parser.error(f"no case has {args.case!r} in its name")
        made = record(cases, args.out.parent / "freeze-texts", max(1, args.workers))
        replace(args.out, (json.dumps(made, indent=0) + "\n").encode())
        print(", ".join(f"{len(v)} {k}" for k, v in made.items()))
        for k, error in made["error"].items():
            print(f"{k}: {error}")
        sys.exit(bool(made["error"]))
    old, new = (
        {
            kind: {k: v for k, v in each.items() if args.case in re.split(" / |, ", k)[0]}
            for kind, each in json.loads(path.read_text()).items()
        }
        for path in (args.old, args.new)
    )
    if args.renamed:
        old = renamed(old, args.renamed.read_text())
    folders = (args.old.parent / "freeze-texts", args.new.parent / "freeze-texts")
    sys.exit(not report(old, new, args.allow, args.most, folders if args.diff else None))


if __name__ == "__main__":
    main()
