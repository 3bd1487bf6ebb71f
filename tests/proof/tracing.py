"""Capture the Metal source of launches in this process. This is fast, and for one thread only."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from unittest import mock

import mlx.core as mx

from mhc_mlx import launch


def metal_source(f: Callable, *arrays: mx.array) -> str:
    """Return what MLX prints on standard output while `mx.export_function` records f.

    f must launch with ``verbose=True``. Its ops launch by `launch.run`, with Metal as the backend.
    """
    sys.stdout.flush()
    saved = os.dup(1)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, saved)
        out = stack.enter_context(tempfile.TemporaryFile())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.object(launch, "backend", lambda: "metal"))
        os.dup2(out.fileno(), 1)
        try:
            mx.export_function(os.path.join(folder, "f.mlxfn"), f, *arrays)
        finally:
            os.dup2(saved, 1)
        out.seek(0)
        return out.read().decode()
