"""g++ takes the precompiled header where MLX compiles."""

import shutil
import subprocess

import mlx.core as mx
import pytest

from proof import precompiled


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_the_header_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(precompiled.tempfile, "gettempdir", lambda: str(tmp_path))
    precompiled.precompile_mlx_header()
    folder = tmp_path / "mlx" / mx.__version__ / "cpu"
    (folder / "fused.cpp").write_text(f'#include "{precompiled.NAME}"\n')
    command = ["g++", *precompiled.FLAGS, "-H", "-fsyntax-only", str(folder / "fused.cpp")]
    headers = subprocess.run(command, capture_output=True, text=True).stderr
    assert headers.startswith(f"! {folder / precompiled.NAME}.gch\n"), headers
