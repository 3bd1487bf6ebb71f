"""The table of families: which class of which package makes a model one of a family.

To add a family, add a row here and its file (ONBOARDING.md, "Add a family of models").
"""

import importlib
import importlib.metadata
import re
from typing import Any, NamedTuple

import mlx.nn as nn

from ..family import Family


class Row(NamedTuple):
    """A family: what its models are called, and the class that each of them contains."""

    models: str
    package: str
    oldest: tuple[int, ...]
    before: tuple[int, ...]
    known_by: str  # full name of a class; a module of the model has it or derives from it
    file: str  # in this folder; it has FAMILY

    @property
    def title(self) -> str:
        oldest, before = (".".join(map(str, v)) for v in (self.oldest, self.before))
        return f"{self.models} of {self.package} >={oldest},<{before}"


VLM = ("mlx-vlm", (0, 7, 10), (0, 8))
ROWS = (
    Row(
        *("deepseek_v41", "mlx-lm", (0, 32, 2), (0, 33)),
        "mlx_lm.models.deepseek_v41.HyperConnection",
        "lm_deepseek_v41",
    ),
    Row(
        *("deepseek_v41", *VLM),
        "mlx_vlm.models.deepseek_v41.language.DeepseekV41Block",
        "vlm_deepseek_v41",
    ),
    Row(
        *("deepseek_v4, glm5_next", *VLM),
        "mlx_vlm.models.deepseek_v4.hyper_connection.HyperConnection",
        "vlm_deepseek_v4",
    ),
    Row(*("hy_v4", *VLM), "mlx_vlm.models.hy_v4.language.HyV4Model", "vlm_hy_v4"),
    Row(*("xing4_0", *VLM), "mlx_vlm.models.xing4_0.language.Xing4_0Model", "vlm_xing4_0"),
    Row(
        *("qwen4_exp", *VLM),
        "mlx_vlm.models.qwen4_exp.language.Qwen4ExpGatedResidual",
        "vlm_qwen4_exp",
    ),
)


def titles() -> str:
    """Return all families with their packages and versions."""
    return "; ".join(row.title for row in ROWS)


def _check_version(op: str, row: Row, found: str) -> None:
    if not row.oldest <= tuple(map(int, re.findall(r"\d+", found)[:3])) < row.before:
        raise ValueError(f"[{op}] model must be a {row.title} but {row.package} is {found}.")


def full_name(kind: type) -> str:
    """Return the name of a class with its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def family_of(op: str, model: Any) -> Family:
    """Return the family of a model, patched or not.

    Raises:
        TypeError: The model is no `nn.Module`.
        ValueError: It is of no family, or its package has another version.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"[{op}] model must be an nn.Module but got {full_name(type(model))}.")
    names = {full_name(base) for kind in {type(m) for m in model.modules()} for base in kind.mro()}
    for row in ROWS:
        if row.known_by in names:
            return named(op, row.file)
    got = full_name(type(model))
    raise ValueError(f"[{op}] model must be one of these: {titles()}; but got {got}.")


def named(op: str, file: str) -> Family:
    """Return the family of this file; ValueError if there is none or its package is missing."""
    rows = {row.file: row for row in ROWS}
    if not isinstance(file, str) or file not in rows:
        raise ValueError(f"[{op}] family must be one of {', '.join(rows)} but got {file!r}.")
    row = rows[file]
    try:
        found = importlib.metadata.version(row.package)
    except importlib.metadata.PackageNotFoundError:
        must = f"have its package: pip install 'mhc-metal[{row.package}]'"
        raise ValueError(f"[{op}] family {file} must {must}, but it is missing.") from None
    _check_version(op, row, found)
    return importlib.import_module(f".{file}", __name__).FAMILY
