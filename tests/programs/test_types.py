"""The package and a user's program pass pyright and mypy; public names have complete types."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from programs.test_packaging import ROOT, unpack_wheel

PROGRAM = Path(__file__).with_name("typed_program.py")
ROOMS = ("sinkhorn", "streams", "static", "pre", "seam", "gated")
MODULES = ("adapters", "commands", "conventions", "diagnostics", "gated")
MODULES += (
    "launch",
    "layers",
    "loading",
    "models",
    "ops",
    "reference",
    "sources",
    "streams",
    "widening",
)
MODULES += tuple(f"ops.{room}" for room in ROOMS)
PUBLIC = ("mhc_mlx", *(f"mhc_mlx.{name}" for name in MODULES))


@pytest.fixture
def checker(request):
    """checker(name, ...) runs a checker, and returns its code and what it printed.

    It skips, or with --all-rungs fails, where the checker is not installed.
    """

    def run(name: str, *arguments: object, folder: Path, path: str = "") -> tuple[int, str]:
        here = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        program = shutil.which(name, path=here)
        if program is None:
            reason = f"{name} is not installed: pip install -e '.[test]'"
            (pytest.fail if request.config.getoption("--all-rungs") else pytest.skip)(reason)
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
        environment["PATH"] = os.pathsep.join([path, here] if path else [here])
        command = [program, *map(str, arguments)]
        process = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        return process.returncode, process.stdout + process.stderr

    return run


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin of an environment that has the wheel and MLX, and not this checkout."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    unpack_wheel(site)
    (site / "mlx").symlink_to(Path(mx.__file__).parent)
    return folder / "bin"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_module_lists_its_names(name):
    module = importlib.import_module(name)
    assert module.__all__ and len(set(module.__all__)) == len(module.__all__)
    missing = [k for k in module.__all__ if not hasattr(module, k)]
    assert not missing, f"{name} has no {', '.join(missing)}"


def test_pyright_passes_on_the_package(checker):
    code, printed = checker("pyright", "--pythonpath", sys.executable, folder=ROOT)
    assert code == 0, printed


@pytest.mark.parametrize("name", ("pyright", "mypy"))
def test_a_users_program_passes(name, checker, installed, tmp_path):
    """All errors are those of a second program, whose mistakes show that the types are read."""
    arguments = {
        "pyright": ["--pythonpath", installed / "python"],
        "mypy": ["--strict", "--python-executable", installed / "python", "--cache-dir", tmp_path],
    }
    program, mistaken = shutil.copy(PROGRAM, tmp_path), tmp_path / "mistaken.py"
    mistaken.write_text("import mhc_mlx\n\nmhc_mlx.MHCLayer(4, 64, eps='1e-6')\nmhc_mlx.widem\n")
    _, printed = checker(name, *arguments[name], program, mistaken, folder=tmp_path)
    errors = re.findall(r"(\w+\.py):(\d+):.*error", printed)
    assert sorted(errors) == [("mistaken.py", "3"), ("mistaken.py", "4")], printed


def test_public_names_have_complete_types(checker, installed, tmp_path):
    """As pyright judges a package that ships py.typed; what MLX's classes leave open is allowed."""
    pytest.importorskip("mlx_lm", reason="mlx-lm, whose classes have types, is not installed")
    verify = ("--verifytypes", "mhc_mlx", "--ignoreexternal", "--outputjson")
    _, printed = checker("pyright", *verify, folder=tmp_path, path=str(installed))
    report = json.loads(printed)["typeCompleteness"]
    assert report["packageRootDirectory"].startswith(str(installed.parent)), "not the wheel"
    public = {f"{name}.{k}" for name in PUBLIC for k in importlib.import_module(name).__all__}
    found = set()
    for symbol in report["symbols"]:
        name, owner = symbol["name"], symbol["name"].rpartition(".")[0]
        if name in public or owner in public:
            found.add(name)
            for message in (d["message"] for d in symbol["diagnostics"]):
                assert "annotation" not in message and "Unknown" not in message, (name, message)
    assert found >= {"mhc_mlx.widen", "mhc_mlx.ops.mhc_pre", "mhc_mlx.layers.MHCLayer.__call__"}
