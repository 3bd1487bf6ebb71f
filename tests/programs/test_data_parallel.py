"""Two processes that average their gradients over MLX's ring train as one does on the whole batch.

Each runs this file: `mlx.launch -n 2 --backend ring --python python test_data_parallel.py . here`.
"""

import sys

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from models.modules import TOKENS, Tiny, loss_fn, running, shaken

from programs import processes

STEPS = 8
# Of a loss, and of the largest change of a parameter: 80 roundings, for sums over 32 tokens in
# another order and eight steps. Seen: 1.5e-6; without the average 0.7.
BOUND = 1e-5


def train(folder: str, where: str) -> None:
    """A compiled step on this process's share of the batch; its parameters and, for each step, the
    loss of each half that it has, into a file."""
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(backend="ring")
    rank, size = group.rank(), group.size()
    halves = [TOKENS[::2], TOKENS[1::2]][rank : rank + 2 // size]
    with running(where) as launched:
        model = shaken(Tiny(), 0.1)
        optimizer = optim.SGD(0.2, momentum=0.9)  # linear in gradients: Adam makes more of rounding
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]

        def step(tokens):
            _, gradients = nn.value_and_grad(model, loss_fn)(model, tokens)
            optimizer.update(model, nn.average_gradients(gradients, group))

        step = mx.compile(step, inputs=state, outputs=state)
        losses, start = [], dict(tree_flatten(model.parameters()))
        for _ in range(STEPS):
            losses.append(mx.stack([loss_fn(model, half) for half in halves]))
            step(mx.concatenate(halves))
            mx.eval(losses, state)
        assert launched or where == "here", "nothing was launched"
    ends = tree_flatten(model.parameters())
    moved = {f"moved {name}": p - start[name] for name, p in ends}
    made = dict(ends) | moved | {"losses": mx.stack(losses)}
    mx.save_safetensors(f"{folder}/{rank} of {size}.safetensors", made)


@pytest.mark.parametrize("where", ["here", "stand-in"])
def test_two_processes_train_as_one(where, tmp_path):
    arguments = [__file__, tmp_path, where]
    printed = processes.run_two(arguments, tmp_path / "two.txt")
    printed += processes.run([sys.executable, *arguments], tmp_path / "one.txt")[1]
    files = [tmp_path / f"{name}.safetensors" for name in ("0 of 1", "0 of 2", "1 of 2")]
    assert all(f.exists() for f in files), printed  # mlx.launch returns 0 whatever happens
    one, *ranks = (mx.load(str(f)) for f in files)
    assert one["losses"][-1].max() < one["losses"][0].min() - 1
    for rank, got in enumerate(ranks):
        error = mx.abs(got["losses"][:, 0] / one["losses"][:, rank] - 1).max().item()
        assert error < BOUND, f"losses of process {rank}: {error}"
        for name in (k for k in one if f"moved {k}" in one):
            moved = mx.abs(one[f"moved {name}"]).max().item()
            error = mx.abs(got[name] - one[name]).max().item() / moved
            assert moved > 1e-2 and error < BOUND, f"{name} of process {rank}: {error} of {moved}"
            assert (got[name] == ranks[0][name]).all(), f"{name} differs between processes"


if __name__ == "__main__":
    train(*sys.argv[1:])
