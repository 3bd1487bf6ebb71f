"""A training step is one function: forward, backward, clipping, and AdamW at two rates."""

import functools
import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from examples.train_lm.byte_lm import loss_fn

# Weights of products over channels, in connections too; the products of a gated residual are these.
MATRICES = ("phi", "down.weight", "up.weight", "inject.weight")


def make_optimizer(lr: float, steps: int, warmup: int, gates: float = 10) -> optim.Optimizer:
    """Make an AdamW whose rate rises for ``warmup`` steps and falls as a cosine to a tenth at
    ``steps``.

    Without the long warm-up and an eps Adam turns the rounding noise of parameters that have no
    gradient yet into full steps.
    """

    def adam(lr: float) -> optim.AdamW:
        def schedule(step: mx.array) -> mx.array:
            step = step.astype(mx.float32)
            done = mx.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
            return lr * mx.minimum(step / max(warmup, 1), 0.55 + 0.45 * mx.cos(math.pi * done))

        return optim.AdamW(schedule, eps=1e-6, weight_decay=0.01)

    # Gates and mixing logits move by whole units where matrices, phi among them, move by
    # hundredths: their rate is ``gates`` times as high.
    return optim.MultiOptimizer(
        [adam(gates * lr), adam(lr)],
        [lambda name, _: "connections" in name and not name.endswith(MATRICES)],
    )


def make_step(model, optimizer, data: mx.array, context: int, clip: float, group):
    """Compile the step, a function of starts ``[accumulate, batch]`` and of whether to stop.

    It returns loss, similarity, gradient norm, and how many processes stop. They are separate
    arrays, because on CUDA the host reads a number at once, a row of them after all that waits.
    """
    state = [model.state, optimizer.state]
    backward = nn.value_and_grad(model, loss_fn)

    @functools.partial(mx.compile, inputs=state, outputs=state)
    def step(starts: mx.array, late: mx.array) -> tuple[mx.array, ...]:
        count, values, gradients = starts.shape[0], None, None
        for k in range(count):
            chosen = starts[k]
            if k:  # parts run one after another, so that one has activations at a time
                done = [*values, *(g for _, g in tree_flatten(gradients))]
                chosen = mx.depends([chosen], done)[0]
            batch = data[chosen[:, None] + mx.arange(context + 1)].astype(mx.int32)
            part = backward(model, batch)
            values, gradients = part if k == 0 else tree_map(mx.add, (values, gradients), part)
        if count > 1:
            values, gradients = tree_map(lambda v: v / count, (values, gradients))
        if group.size() > 1:
            shares = mx.array([group.size(), group.size(), 1])
            *values, late = mx.distributed.all_sum(mx.stack([*values, late]), group=group) / shares
            gradients = nn.average_gradients(gradients, group)
        gradients, norm = optim.clip_grad_norm(gradients, clip)
        optimizer.update(model, gradients)
        return *values, norm, late

    return step
