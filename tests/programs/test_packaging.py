"""kernels/ is found from a checkout, an editable install and a wheel; an edited body loads."""

import functools
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from mhc_mlx import launch

ROOT = Path(__file__).parents[2]
READ = "from mhc_mlx import launch; print(launch.text('include/common.h'))"


def read(folder) -> str:
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-c", READ], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_checkout_reads_its_own_folder(tmp_path):
    for name in ("mhc_mlx", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name)
    with open(tmp_path / "kernels/include/common.h", "a") as f:
        f.write("struct Edited {};\n")
    assert "struct Edited" in read(tmp_path)


def test_an_editable_install_reads_the_checkout():
    try:
        origin = importlib.metadata.distribution("mhc-metal").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mhc-metal is not installed: a plain checkout")
    if not origin or not json.loads(origin).get("dir_info", {}).get("editable"):
        pytest.skip("mhc-metal is not installed in editable mode")
    assert Path(launch.__file__).parent.parent == ROOT
    assert launch.text("include/common.h") in read(ROOT)


@functools.cache
def wheel() -> bytes:
    """Build the wheel, which takes seconds, once in a process."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run([*command, "-w", folder, str(ROOT)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        (file,) = Path(folder).glob("mhc_metal-*.whl")
        return file.read_bytes()


def unpack_wheel(folder: Path) -> Path:
    """Put what the wheel holds into the folder, as pip does where it installs it."""
    pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed")
    zipfile.ZipFile(io.BytesIO(wheel())).extractall(folder)
    return folder


def test_a_wheel_holds_the_kernels(tmp_path):
    site = unpack_wheel(tmp_path)
    folders = (site / "mhc_mlx/kernels", ROOT / "kernels")
    packed, ours = ({p.relative_to(f) for p in f.rglob("*")} for f in folders)
    assert packed == ours
    assert (site / "mhc_mlx/py.typed").exists()
    assert "namespace mhc" in read(site)
