"""A teacher and a student that never meet: one process writes a file, another learns from it.

    python -m benchmarks.examples.distill_top_k teacher labels.npz
    python -m benchmarks.examples.distill_top_k student labels.npz

The file has the teacher's most likely classes at each position of the text, and their
log-probabilities: all that the student's process sees of the teacher. So that both distances can
be told, it also has the teacher's logits of one batch, which nobody trains on. Without arguments
the program runs both, each in a process of its own.
"""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxloss
from benchmarks.data.language_model import LanguageModel
from benchmarks.examples import data

V, K, STEPS = 256, 8, 150  # bytes; classes of a position that are stored; batches
SEED = {"teacher": 0, "student": 1}
DIM = {"teacher": 96, "student": 32}


def model_of(role: str) -> LanguageModel:
    rngs = nnx.Rngs(SEED[role])
    return LanguageModel(V, DIM[role], layers=1, heads=2, length=data.LENGTH, rngs=rngs)


def head_of(model: LanguageModel) -> jax.Array:
    return model.tokens.embedding[...]  # [V, D]


def own_loss(model: LanguageModel, tokens: jax.Array) -> jax.Array:
    """The teacher's: the next byte of the text."""
    labels = jaxloss.next_token_labels(tokens)
    return jaxloss.linear_cross_entropy(model(tokens), head_of(model), labels, vocab_axis=0)


def of_file(
    model: LanguageModel, tokens: jax.Array, indices: jax.Array, log_probs: jax.Array
) -> jax.Array:
    """The student's: the stored classes, and all others as one, whose probability is known."""
    labels = jaxloss.TopKLabels(indices, jnp.exp(log_probs), rest="bucket")
    return jaxloss.linear_cross_entropy(model(tokens), head_of(model), labels, vocab_axis=0)


@partial(nnx.jit, static_argnums=0)
def step(loss_fn, model: LanguageModel, optimizer: nnx.Optimizer, *batch: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_fn)(model, *batch)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def likeliest(model: LanguageModel, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jaxloss.linear_top_k(model(tokens), head_of(model), K, vocab_axis=0)


@nnx.jit
def distance(model: LanguageModel, tokens: jax.Array, logits: jax.Array) -> jax.Array:
    """KL(teacher, student), in nats a position, over all classes."""
    return jaxloss.kl_divergence(model(tokens) @ head_of(model).T, logits)


def teacher(path: Path, steps: int = STEPS) -> None:
    model = model_of("teacher")
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    *batches, (unseen,) = data.python_sources(steps + 1)
    for (tokens,) in batches:
        step(own_loss, model, optimizer, tokens)
    stored = [likeliest(model, tokens) for (tokens,) in batches]
    indices, log_probs = (np.stack(jax.device_get(x)) for x in zip(*stored, strict=True))
    np.savez_compressed(
        path,
        tokens=np.stack([tokens for (tokens,) in batches]).astype(np.uint8),
        indices=indices.astype(np.uint8),
        log_probs=log_probs.astype(np.float16),
        unseen=unseen,
        logits_of_unseen=model(unseen) @ head_of(model).T,
    )


def student(path: Path) -> tuple[float, float]:
    """The distance to the teacher before and after."""
    model = model_of("student")
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    with np.load(path) as file:
        of_teacher = {name: file[name] for name in file.files}
    unseen = of_teacher["unseen"], of_teacher["logits_of_unseen"]
    before = distance(model, *unseen)
    batches = zip(
        of_teacher["tokens"].astype(np.int32),
        of_teacher["indices"].astype(np.int32),
        of_teacher["log_probs"].astype(np.float32),
        strict=True,
    )
    for batch in batches:
        step(of_file, model, optimizer, *batch)
    return float(before), float(distance(model, *unseen))


def run(role: str, path: Path) -> str:
    """What the process of a role prints."""
    command = [sys.executable, "-m", "benchmarks.examples.distill_top_k", role, str(path)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(role: str | None = None, file: str = "labels.npz", steps: str = str(STEPS)) -> None:
    if role is None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, file)
            print(run("teacher", path) + run("student", path), end="")
    elif role == "teacher":
        teacher(Path(file), int(steps))
        print(f"the teacher's file: {Path(file).stat().st_size / 2**20:.2f} MiB")
    else:
        before, after = student(Path(file))
        print(f"KL(teacher, student): {before:.3f} -> {after:.3f} nats a position")


if __name__ == "__main__":
    main(*sys.argv[1:])
