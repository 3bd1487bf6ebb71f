"""Compile C++ for OpenCL with clang-19, and read LLVM's IR and AMD's assembly."""

import functools
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from proof.optimiser.opencl import ENTRY

HEADER = Path(__file__).parent / "metal.hpp"
COMPILER = "clang-19"
FLAGS = ["-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-w", "-O2", "-ffp-contract=fast"]
FLAGS += ["-Xclang", "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space"]
FLAGS += ["-include", str(HEADER), "-S", "-o", "-", "-"]
# spir64 has LLVM's own costs of inlining and unrolling. amdgcn is a GPU with 32 lanes in a wave;
# VOPD would write two operations as one instruction, which Apple's GPUs do not have.
SPIR64 = ["--target=spir64-unknown-unknown", "-emit-llvm", "-fno-discard-value-names"]
AMDGCN = ["--target=amdgcn-amd-amdhsa", "-mcpu=gfx1100", "-nogpulib"]
AMDGCN += ["-mllvm", "-amdgpu-enable-vopd=false"]
FIGURES = {
    "registers": r"\.vgpr_count:\s+(\d+)",
    "spills": r"\.vgpr_spill_count:\s+(\d+)",
    "scratch_bytes": r"\.private_segment_fixed_size:\s+(\d+)",
    "code_bytes": r"; codeLenInByte = (\d+)",
}
KINDS = (  # the first pattern that a mnemonic matches says what kind it is
    ("shuffles", r"simd_shuffle"),
    ("simd_sums", r"simd_sum"),
    ("products", r"simdgroup_multiply"),
    ("barriers", r"s_barrier"),
    ("branches", r"s_(cbranch|branch|setpc|swappc)"),
    ("device_loads", r"(global|flat|buffer)_load|s_load|s_buffer_load"),
    ("device_stores", r"(global|flat|buffer)_store"),
    ("threadgroup_loads", r"ds_(load|read)"),
    ("threadgroup_stores", r"ds_(store|write)"),
    ("scratch", r"scratch_"),
    ("transcendental", r"v_(s_)?(exp|log|rcp|rsq|sqrt|sin|cos)_"),
    ("fma", r"v_(fma|fmac|fmaak|fmamk|pk_fma)_"),
    ("moves", r"v_(mov|accvgpr|readfirstlane|readlane|writelane|swap)"),
    ("other_alu", r"v_"),
    ("scalar", r"s_(?!waitcnt|nop|delay|endpgm|clause|code_end|sendmsg|set_inst)"),
)


class Access(NamedTuple):
    """A load or store of device memory in IR."""

    kind: str  # "load" or "store"
    buffers: tuple[str, ...]  # that it may touch: parameters of the entry
    bytes: int  # that it moves at once: no more than its alignment

    @property
    def words(self) -> str:
        return f"{self.kind} {'|'.join(self.buffers)} {self.bytes}"


def available() -> bool:
    return shutil.which(COMPILER) is not None


@functools.cache
def version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout


def compiled(program: str, target: list[str], registers: int | None = None) -> str:
    """Return IR or assembly; raise RuntimeError with clang's message if it refuses."""
    limit = [f"-DREGISTERS={registers}"] if registers else []
    command = [COMPILER, *target, *limit, *FLAGS]
    done = subprocess.run(command, input=program, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"[optimiser] clang refuses a program:\n{done.stderr[:3000]}")
    return done.stdout


# ---- IR

POINTER = r"ptr(?: addrspace\(\d+\))? ([%@][-\w.$]+|null|undef|poison)"
SIZES = {"half": 2, "float": 4, "double": 8, "ptr": 8}


def size_of(kind: str) -> int:
    """Return the bytes of a type of IR that is loaded or stored."""
    if vector := re.fullmatch(r"<(\d+) x (.*)>", kind):
        return int(vector[1]) * size_of(vector[2])
    if array := re.fullmatch(r"\[(\d+) x (.*)\]", kind):
        return int(array[1]) * size_of(array[2])
    if integer := re.fullmatch(r"i(\d+)", kind):
        return (int(integer[1]) + 7) // 8
    return SIZES[kind.split()[0]]


def entry_of(ir: str) -> tuple[dict[str, bool], list[str]]:
    """Return the parameters of the entry, with whether they lie in device memory, and its lines."""
    pattern = rf"^define [^\n]*@{ENTRY}\(([^\n]*)\) [^\n]*\{{\n(.*?)^\}}"
    found = re.search(pattern, ir, re.S | re.M)
    parameters = re.findall(r"(?:^|, )(ptr addrspace\(1\)|\w+)[^%]*%([-\w.$]+)", found[1])
    return {name: "(1)" in kind for kind, name in parameters}, found[2].split("\n")


def arrays(ir: str) -> list[str]:
    """Return the types of private arrays that lie in memory, of the entry or a function."""
    return [a.replace("struct.mhc::", "") for a in re.findall(r"= alloca ([^\n]*?), align", ir)]


def functions(ir: str, entry: str = ENTRY) -> list[str]:
    """Return the functions that are left besides the entry, whose name matches a pattern."""
    found = re.findall(r'(?m)^define [^\n]*?@"?([\w.$]+)"?\(', ir)
    return [plain_name(f) for f in found if not re.fullmatch(entry, f)]


def plain_name(symbol: str) -> str:
    """Return the name of a function of namespace mhc, without its arguments."""
    mangled = re.match(r"_ZN3mhc(\d+)(\w+)", symbol)
    return mangled[2][: int(mangled[1])] if mangled else symbol


def accesses(ir: str) -> list[Access]:
    """Return the accesses of the entry to device memory, each with the buffers behind its pointer.

    A pointer is followed through getelementptr, phi, select and casts to parameters. What does not
    end at one, as a pointer made of an integer, is named by its instruction.
    """
    parameters, lines = entry_of(ir)
    pointers: dict[str, list[str]] = {}  # the pointers of which a value is made
    arrays = set()
    for line in lines:
        made = re.match(r"\s+(%[-\w.$]+) = (\w+) (.*)", line)
        if not made:
            continue
        value, instruction, rest = made.groups()
        if instruction in ("getelementptr", "addrspacecast", "bitcast", "freeze"):
            pointers[value] = re.findall(POINTER, rest)[:1]
        elif instruction == "select":
            pointers[value] = re.findall(POINTER, rest)
        elif instruction == "phi" and rest.startswith("ptr"):
            pointers[value] = re.findall(r"\[ ([^,]+), ", rest)
        elif instruction == "alloca":
            arrays.add(value)

    @functools.cache
    def behind(pointer: str) -> tuple[str, ...]:
        """The device buffers; threadgroup memory, private arrays and constants are none."""
        seen, left, found = set(), [pointer], set()
        while left:
            one = left.pop()
            if one in seen or one in arrays or one[0] != "%":
                continue
            seen.add(one)
            if pointers.get(one):
                left += pointers[one]
            elif parameters.get(one[1:], True):
                found.add(one[1:])
        return tuple(sorted(found))

    found = []
    access = re.compile(
        r"\s(?:(load) (?:volatile )?(.*?), |(store) (?:volatile )?(.*) [^ ]+, )"
        r"ptr addrspace\(\d+\) ([%@][-\w.$]+).*?, align (\d+)"
    )
    to = r"ptr(?: addrspace\(\d+\))? [^%@]*align (\d+)[^%@]* ([%@][-\w.$]+)"
    copy = re.compile(rf"@llvm\.mem(?:cpy|move)\S*\({to}, {to},")
    for line in lines:
        if made := access.search(line):
            load, loaded, _, stored, pointer, align = made.groups()
            kind = loaded if load else stored_type(stored)
            moved = min(size_of(kind), int(align))
            if buffers := behind(pointer):
                found.append(Access(load or "store", buffers, moved))
        elif made := copy.search(line):
            for kind, align, pointer in (
                ("store", *made.groups()[:2]),
                ("load", *made.groups()[2:]),
            ):
                if buffers := behind(pointer):
                    found.append(Access(kind, buffers, int(align)))
    return found


def stored_type(text: str) -> str:
    """Return the type at the start of `type value`, whose value may itself have blanks."""
    return re.match(r"<[^>]*>|\[[^\]]*\]|ptr addrspace\(\d+\)|\w+", text)[0]


# ---- assembly


def assembly_figures(assembly: str) -> dict[str, int]:
    """Return registers, spills, bytes of scratch and bytes of code."""
    return {name: int(re.search(pattern, assembly)[1]) for name, pattern in FIGURES.items()}


def instructions(assembly: str) -> list[Counter[str]]:
    """Return the instructions of the entry by kind: of each depth of loops, outside them first."""
    text = assembly[re.search(rf"(?m)^{ENTRY}:", assembly).end() :]
    text = text[: text.index(".Lfunc_end")]
    loop = re.compile(r"(?:Loop Header: |in Loop: Header=\w+ )Depth=(\d+)")
    counts, depth, fresh = [Counter()], 0, True
    for line in text.split("\n"):
        if re.match(r"(\.LBB|; %bb)", line):
            depth, fresh = 0, True
        if fresh and (
            loop := re.search(r"(?:Loop Header: |in Loop: Header=\w+ )Depth=(\d+)", line)
        ):
            depth = int(loop[1])
        found = re.match(r"\s+;? ?(\w+)", line)
        if not found or re.match(r"\s+; (?!simd)", line) or line.lstrip().startswith("."):
            continue
        fresh = False
        kind = next((kind for kind, pattern in KINDS if re.match(pattern, found[1])), None)
        if kind:
            counts += [Counter() for _ in range(depth + 1 - len(counts))]
            counts[depth][kind] += 1
    return counts
