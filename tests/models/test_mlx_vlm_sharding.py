"""Patched models of mlx-vlm split over processes by `shard`, where mlx-vlm has it: V4 and Xing."""

import json
import os
import socket
import subprocess
import sys

import mlx.core as mx
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: its sharding is not tested")

from mhc_mlx import models as adapter  # noqa: E402
from models.tiny_vlm import MODELS, run, tiny, tokens  # noqa: E402

SHARDED = ["deepseek_v4", "xing4_0"]


def patched(model):
    return adapter.patch(model, verify=False)


def test_which_models_can_be_sharded():
    assert [name for name in MODELS if hasattr(tiny(name), "shard")] == SHARDED


def made(name: str):
    """The model of which all heads of a layer have one attention sink. Otherwise the logits of
    mlx-vlm's own DeepSeek V4 in two processes are not those of the whole model, because it gives
    heads the sinks of others."""
    model = tiny(name)
    for layer in model.layers if name == "deepseek_v4" else ():
        layer.attn.attn_sink = mx.full(layer.attn.attn_sink.shape, layer.attn.attn_sink[0])
    return model


def logits(name: str, order: str) -> mx.array:
    """Logits of a prompt and of tokens after it, of a model that is patched before or after."""
    model = made(name)
    if order == "patched first":
        patched(model)
    model.shard()
    if order == "patched last":
        patched(model)
    sites = adapter.family_of("test", model).sites(model)
    assert all((site.options is None) == (order == "stock") for site in sites)
    cache = model.make_cache()
    return mx.concatenate([run(model, t, cache) for t in (tokens(9), tokens(1, seed=1))], axis=1)


def whole_logits(name: str) -> mx.array:
    model = made(name)
    cache = model.make_cache()
    return mx.concatenate([run(model, t, cache) for t in (tokens(9), tokens(1, seed=1))], axis=1)


@pytest.mark.parametrize("order", ["patched first", "patched last"])
def test_a_group_of_one(order):
    """DeepSeek V4; Xing's is in test_mlx_vlm_xing4_0.py."""
    want = whole_logits("deepseek_v4")
    assert mx.abs(logits("deepseek_v4", order) - want).max() <= 2e-5 * mx.abs(want).max()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.mark.parametrize("name", SHARDED)
def test_two_processes(name, tmp_path):
    """By MLX's ring: the logits of both are those of the whole model."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    paths = os.pathsep.join(p for p in sys.path if p)
    started = []
    for rank in range(2):
        given = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), "PYTHONPATH": paths}
        command = [sys.executable, "-m", "models.test_mlx_vlm_sharding", name, str(tmp_path)]
        started.append(
            subprocess.Popen(command, env=os.environ | given, stderr=subprocess.PIPE, text=True)
        )
    try:
        for process in started:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-2000:]
    finally:
        for process in started:
            process.kill()
    want = whole_logits(name)
    for rank in range(2):
        found = mx.load(str(tmp_path / f"{rank}.safetensors"))
        for order, got in found.items():
            assert mx.abs(got - want).max() <= 2e-5 * mx.abs(want).max(), (rank, order)
        assert set(found) == {"stock", "patched first", "patched last"}


if __name__ == "__main__":
    group = mx.distributed.init(backend="ring", strict=True)
    assert group.size() == 2
    found = {
        order: logits(sys.argv[1], order) for order in ("stock", "patched first", "patched last")
    }
    mx.save_safetensors(f"{sys.argv[2]}/{group.rank()}.safetensors", found)
