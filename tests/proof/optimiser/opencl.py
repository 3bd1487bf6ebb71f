"""Write the Metal text that MLX generates as one kernel of C++ for OpenCL, which LLVM compiles."""

import re

ENTRY = "entry"
POSITIONS = {
    "thread_position_in_threadgroup": "(uint3)(of_optimiser::position(), 0u, 0u)",
    "threadgroup_position_in_grid": "(uint3)(of_optimiser::group(), 0u, 0u)",
    "threadgroups_per_grid": "(uint3)(groups, 1u, 1u)",
    "threads_per_threadgroup": "(uint3)({threads}u, 1u, 1u)",
    "thread_index_in_simdgroup": "(of_optimiser::position() & 31u)",
    "simdgroup_index_in_threadgroup": "of_optimiser::simdgroup()",
}
ATTRIBUTES = """
#ifdef __AMDGCN__
__attribute__((amdgpu_flat_work_group_size({threads}, {threads})))
#ifdef REGISTERS
__attribute__((amdgpu_num_vgpr(REGISTERS)))
#endif
#endif
"""
# Whole packs of every array lie at multiples of their size, and rows hold whole runs of 32.
IS_ALIGNED = re.compile(r"(\bbool is_aligned\(P p\) \{)")
ROW = "__builtin_assume(x_shape[2] % 32 == 0);\n"
# In OpenCL the type of an object has an address space, so `a ? object : value` has two types.
OBJECT_OR_VALUE = re.compile(r"(\w+ \? )(\w+\[[^\]]*\])( : mhc::load<)")


def program(source: str, threads: int, aligned: bool = False) -> str:
    """Return C++ for OpenCL with a kernel `entry`, whose buffers have the names of the body.

    With ``aligned``, `is_aligned` returns true and C is a multiple of 32: what is left is the path
    that a row of a model takes.
    """
    name, arguments = re.search(r"decltype\((\w+)(<.*>)\) ", source).groups()
    source = source[: source.rindex("\ntemplate [[host_name")]
    signature = re.search(rf"\[\[kernel\]\] void {re.escape(name)}\(\n(.*?)\) \{{\n", source, re.S)
    parameters = [re.sub(r" ?\[\[[^\]]*\]\]", "", p.strip()) for p in signature[1].split(",\n")]
    head, body = source[: signature.start()], source[signature.end() :]
    body = OBJECT_OR_VALUE.sub(r"\1of_optimiser::value(\2)\3", body)
    if aligned:
        head, found = IS_ALIGNED.subn(r"\1 if (true) return true;", head)
        if not found:
            raise ValueError("[optimiser] the text must define is_aligned as common.h does.")
        body = ROW + body if any(" x_shape" in p for p in parameters) else body
    locals_: list[str] = []

    def threadgroup_array(found: re.Match) -> str:
        """A parameter: OpenCL has no array in threadgroup memory whose size a template gives."""
        declared = []
        for array, sizes in re.findall(r"(\w+)((?:\[[^\]]*\])+)", found[2]):
            locals_.append(f"of_{array}")
            declared.append(
                f"threadgroup {found[1]} (&{array}){sizes} = "
                f"*(threadgroup {found[1]} (*){sizes})of_{array};"
            )
        return " ".join(declared)

    body = re.sub(r"(?m)^threadgroup ([\w:]+(?:<[^;=]*?>)?) ([^;=]*);", threadgroup_array, body)
    buffers, passed = ["uint groups"], []
    for parameter in parameters:
        kind, word = parameter.rsplit(" ", 1)
        if kind.endswith("*"):
            buffers.append(f"__global char* {word}")
            passed.append(f"({kind}){word}")
        else:
            passed.append(POSITIONS[word].format(threads=threads))
    inner = parameters + [f"threadgroup char* {local}" for local in locals_]
    buffers += [f"__local char* __restrict {local}" for local in locals_]
    attributes = ATTRIBUTES.format(threads=threads)
    return (
        f"{head}METAL_FUNC void {name}({', '.join(inner)}) {{\n{body}\n"
        f"__kernel {attributes} void {ENTRY}({', '.join(buffers)}) {{\n"
        f"{name}{arguments}({', '.join(passed + locals_)});\n}}\n"
    )
