"""What PTX's arithmetic makes of values of all threads. Products of matrices are not here."""

from collections.abc import Callable

import numpy as np

from benchmarks.ptx import TYPES

Take = Callable[[str, np.dtype], np.ndarray]


def convert(parts: list[str], a: np.ndarray, source: str) -> np.ndarray:
    """Return a, of the PTX type source, as the type that the instruction makes of it."""
    target = parts[-2]
    if target == "bf16x2" or target == "f16x2":
        return np.array([0x3F803F80], np.uint32)
    if target in ("bf16", "f16"):
        return np.ascontiguousarray(a.astype("f4")).view(np.uint32) >> 16
    if source in ("bf16", "f16"):
        return (a.astype(np.uint32) << 16).view("f4")
    if TYPES[target].kind == "f":
        a = a.astype(TYPES[target])
        return np.clip(a, 0, 1) if "sat" in parts else a
    if a.dtype.kind == "f":
        return np.nan_to_num(np.trunc(a), posinf=0, neginf=0).astype(np.int64).astype(TYPES[target])
    return a.astype(TYPES[target])


def compare(how: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return where a comparison holds."""
    how = how[:2] if how not in ("num", "nan") else how
    table = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
    table |= {"gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal}
    table |= {"hi": np.greater, "hs": np.greater_equal}
    if how == "nan":
        return np.isnan(a) | np.isnan(b)
    if how == "num":
        return ~(np.isnan(a) | np.isnan(b))
    if how == "eq" or how == "ne":
        return table[how](a, b)
    return table[how](a, b)


def floats(word: str, v: list[np.ndarray]) -> np.ndarray:
    """Return the result for floats."""
    with np.errstate(all="ignore"):
        match word:
            case "fma" | "mad":
                return v[0] * v[1] + v[2]
            case "add":
                return v[0] + v[1]
            case "sub":
                return v[0] - v[1]
            case "mul":
                return v[0] * v[1]
            case "div":
                return v[0] / v[1]
            case "max":
                return np.fmax(v[0], v[1])
            case "min":
                return np.fmin(v[0], v[1])
            case "neg":
                return -v[0]
            case "abs":
                return np.abs(v[0])
            case "ex2":
                return np.exp2(v[0])
            case "lg2":
                return np.log2(v[0])
            case "rcp":
                return np.reciprocal(v[0])
            case "sqrt":
                return np.sqrt(v[0])
            case "rsqrt":
                return 1 / np.sqrt(v[0])
    raise NotImplementedError(word)


def integers(take: Take, parts: list[str], word: str, dtype: np.dtype, s: list[str]) -> np.ndarray:
    """Return the result for integers of this dtype; `take` returns the value of an operand."""
    if word in ("mul", "mad") and "wide" in parts:
        wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        product = take(s[0], dtype).astype(wide) * take(s[1], dtype).astype(wide)
        return product + take(s[2], wide) if word == "mad" else product
    if word in ("mul", "mad") and "hi" in parts:
        if dtype.itemsize == 8:
            return take(s[0], dtype) * 0
        wide = np.dtype(f"{dtype.kind}8")
        product = take(s[0], dtype).astype(wide) * take(s[1], dtype).astype(wide)
        return (product >> np.array(8 * dtype.itemsize, wide)).astype(dtype)
    v = [take(x, dtype) for x in s]
    with np.errstate(all="ignore"):
        match word:
            case "add":
                return v[0] + v[1]
            case "sub":
                return v[0] - v[1]
            case "mul":
                return v[0] * v[1]
            case "mad":
                return v[0] * v[1] + v[2]
            case "neg":
                return (0 - v[0]).astype(dtype)
            case "not":
                return ~v[0]
            case "abs":
                return np.abs(v[0])
            case "and":
                return v[0] & v[1]
            case "or":
                return v[0] | v[1]
            case "xor":
                return v[0] ^ v[1]
            case "max":
                return np.maximum(v[0], v[1])
            case "min":
                return np.minimum(v[0], v[1])
            case "div":
                return (v[0] // np.where(v[1] == 0, 1, v[1])).astype(dtype)
            case "rem":
                return (v[0] % np.where(v[1] == 0, 1, v[1])).astype(dtype)
            case "shl" | "shr":
                by = take(s[1], np.dtype("u4")).astype(np.int64)
                bits = 8 * dtype.itemsize
                gone, by = by >= bits, np.minimum(by, bits - 1).astype(dtype)
                moved = v[0] << by if word == "shl" else v[0] >> by
                return np.where(
                    gone & (dtype.kind == "u" or word == "shl"), np.zeros(1, dtype), moved
                )
            case "bfi":
                at, count = take(s[2], np.dtype("u4")), take(s[3], np.dtype("u4"))
                bits = ((np.uint32(1) << count) - np.uint32(1)) << at
                return (v[1] & ~bits) | ((v[0] << at) & bits)
            case "bfe":
                at, count = take(s[1], np.dtype("u4")), take(s[2], np.dtype("u4"))
                return (
                    (v[0] >> at.astype(dtype))
                    & ((np.uint32(1) << count) - np.uint32(1)).astype(dtype)
                ).astype(dtype)
            case "popc" | "clz" | "brev":
                return v[0]
            case "prmt":
                return v[0]
            case "shf":
                both = (take(s[1], np.dtype("u4")).astype(np.uint64) << np.uint64(32)) | take(
                    s[0], np.dtype("u4")
                )
                by = take(s[2], np.dtype("u4")).astype(np.uint64) & np.uint64(31)
                return ((both >> by) if "r" in parts else ((both << by) >> np.uint64(32))).astype(
                    np.uint32
                )
            case "lop3":
                a, b, c, table = (take(x, np.dtype("u4")) for x in s[:4])
                out = np.zeros(1, np.uint32)
                for k in range(8):
                    if int(table[0]) >> k & 1:
                        out = out | (
                            (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
                        )
                return out
    raise NotImplementedError(f"{word} {parts}")
