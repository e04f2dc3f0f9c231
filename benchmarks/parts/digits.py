"""The same classifier trained with two losses: handwritten digits, a Flax NNX MLP, Adam."""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks.harness import report
from benchmarks.methods.libraries import LOADERS

SEED, EPOCHS, BATCH, HIDDEN, LEARNING_RATE = 0, 30, 128, 128, 3e-3
LOSSES = ("jaxloss", "optax")


class MLP(nnx.Module):
    def __init__(self, features: int, classes: int, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(features, HIDDEN, rngs=rngs)
        self.out = nnx.Linear(HIDDEN, classes, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def about_seconds(args: argparse.Namespace) -> float:
    return 20.0


def _data():
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    return train_test_split(
        images, labels.astype(np.int32), test_size=0.2, random_state=SEED, stratify=labels
    )


def _train(loss_function: Callable, tick: Callable[..., None]) -> dict[str, Any]:
    train_x, test_x, train_y, test_y = _data()
    model = MLP(train_x.shape[1], 10, nnx.Rngs(SEED))
    optimizer = nnx.Optimizer(model, optax.adam(LEARNING_RATE), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, images, labels):
        loss, grads = nnx.value_and_grad(lambda m: loss_function(m(images), labels))(model)
        optimizer.update(model, grads)
        return loss

    order = np.random.default_rng(SEED)
    losses = []
    for epoch in range(EPOCHS):
        shuffled = order.permutation(len(train_x))
        # The last, shorter batch is left out: a second shape would be a second compilation.
        for i in range(0, len(shuffled) - BATCH + 1, BATCH):
            batch = shuffled[i : i + BATCH]
            losses.append(step(model, optimizer, train_x[batch], train_y[batch]))
        tick((epoch + 1) / EPOCHS)
    predictions = jnp.argmax(model(jnp.asarray(test_x)), axis=-1)
    return {
        "correct": int(jnp.sum(predictions == test_y)),
        "of": len(test_y),
        "losses": [float(loss) for loss in jax.device_get(losses)],
    }


def run(args: argparse.Namespace, tick: Callable[..., None]) -> dict[str, Any]:
    runs = {}
    for name, each in report.shares(tick, LOSSES):
        each(0, f"trains with {name}")
        runs[name] = _train(LOADERS[name]().logits, each)  # pyright: ignore
    apart = np.subtract(runs["jaxloss"]["losses"], runs["optax"]["losses"])
    return {"runs": runs, "curves_apart": float(np.abs(apart).max())}


def tables(data: dict[str, Any]) -> list[report.Table]:
    rows = []
    for name, result in data["runs"].items():
        right, of, losses = result["correct"], result["of"], result["losses"]
        first, last = f"{losses[0]:.6f}", f"{losses[-1]:.6f}"
        rows.append([name, f"{right}/{of}", f"{right / of:.2%}", first, last])
    title = (
        f"Handwritten digits, {len(data['runs']['jaxloss']['losses'])} steps from the same seed; "
        f"the loss curves are {data['curves_apart']:.1e} apart at most"
    )
    header = ["loss function", "test images\nright", "test\naccuracy", "first loss", "last loss"]
    right = {name: run["correct"] for name, run in data["runs"].items()}
    found = f"Trained with jaxloss the classifier has {right['jaxloss']} test images right, with "
    found += f"optax {right['optax']}; the losses are {data['curves_apart']:.0e} apart at most."
    return [report.Table(title, header, rows, found=found)]
