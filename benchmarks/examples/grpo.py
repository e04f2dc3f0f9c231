"""GRPO of a small Flax NNX transformer that learns to sort digits.

A prompt is four digits and a token that asks for them in ascending order. A few supervised steps
make a model that is right now and then. It starts the policy, and it is the reference. From there
on an answer earns 1 where it is right as a whole, and 0 where it is not.

Prints the curves' ends, and writes the curves as ``grpo.json`` and ``grpo.png`` beside the other
results.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxloss
from benchmarks.data.language_model import LanguageModel
from benchmarks.harness import report
from benchmarks.harness.environment import environment

DIGITS, ASK = 4, 10  # digits of a prompt; the token after them
LENGTH = 2 * DIGITS + 1
PROMPTS, GROUP, UPDATES = 64, 8, 2  # prompts a step, answers to each, updates from these
LOW, HIGH, BETA = 0.2, 0.28, 0.01  # of the clipped ratio; of the distance to the reference
WARM_UP, STEPS, RATE = 45, 240, 1e-3


def prompts_of(key: jax.Array, count: int) -> jax.Array:
    digits = jax.random.randint(key, (count, DIGITS), 0, 10)
    return jnp.pad(digits, ((0, 0), (0, 1)), constant_values=ASK)


def labels_of(tokens: jax.Array) -> jax.Array:
    """The label of a position is the token that follows, where that is one of the answer."""
    answer = jnp.broadcast_to(jnp.arange(LENGTH) > DIGITS, tokens.shape)
    return jaxloss.next_token_labels(tokens, where=answer)


def reward_of(tokens: jax.Array) -> jax.Array:
    right = tokens[:, DIGITS + 1 :] == jnp.sort(tokens[:, :DIGITS], axis=-1)
    return jnp.all(right, axis=-1).astype(jnp.float32)


def head_of(model: LanguageModel) -> jax.Array:
    return model.tokens.embedding[...]  # [V, D]


@nnx.jit
def rollout(model: LanguageModel, key: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The prompts with sampled answers, and what the sampler gave each label of ``labels_of``."""
    log_probs = []
    for each in jax.random.split(key, DIGITS):
        last = model(tokens)[:, -1]
        sampled, log_prob = jaxloss.linear_sample(each, last, head_of(model), vocab_axis=0)
        tokens = jnp.concatenate([tokens, sampled[:, None]], axis=1)
        log_probs.append(log_prob)
    return tokens, jnp.pad(jnp.stack(log_probs, axis=1), ((0, 0), (DIGITS, 1)))


def advantages_of(reward: jax.Array) -> jax.Array:
    """How far each answer is above the others to its prompt; 0 where all are alike."""
    groups = reward.reshape(-1, GROUP)
    above = groups - groups.mean(axis=1, keepdims=True)
    return (above / (groups.std(axis=1, keepdims=True) + 1e-4)).reshape(-1)


def objective(stats: Any, reference: Any, before: jax.Array, advantage: jax.Array) -> Any:
    ratio = jnp.exp(stats.log_prob - before)
    inside = jnp.clip(ratio, 1 - LOW, 1 + HIGH)
    gain = jnp.minimum(ratio * advantage, inside * advantage)
    found = {
        "clipped": (gain < ratio * advantage).astype(jnp.float32),
        "kl": reference.reverse_kl,  # of all classes, and not an estimate from the sampled one
        "entropy": stats.entropy,
    }
    return BETA * reference.reverse_kl - gain, found


@nnx.jit
def update(
    model: LanguageModel,
    optimizer: nnx.Optimizer,
    reference: LanguageModel,
    tokens: jax.Array,
    before: jax.Array,
    advantage: jax.Array,
) -> dict[str, jax.Array]:
    labels = labels_of(tokens)
    of_tokens = jnp.broadcast_to(advantage[:, None], labels.shape)

    def loss(model):
        return jaxloss.linear_stats_loss(
            objective,
            model(tokens),
            head_of(model),
            labels,
            before,
            of_tokens,
            reference=(reference(tokens), head_of(reference)),
            vocab_axis=0,
            sample_weight=jaxloss.sequence_weight(labels),  # GRPO's mean
            has_aux=True,
        )

    (_, found), grads = nnx.value_and_grad(loss, has_aux=True)(model)
    optimizer.update(model, grads)
    return {name: jnp.sum(x) / jnp.sum(labels >= 0) for name, x in found.items()}


@nnx.jit
def supervised(model: LanguageModel, optimizer: nnx.Optimizer, prompts: jax.Array) -> jax.Array:
    answers = jnp.sort(prompts[:, :DIGITS], axis=-1)
    tokens = jnp.concatenate([prompts, answers], axis=1)

    def loss(model):
        hidden = model(tokens)
        return jaxloss.linear_cross_entropy(hidden, head_of(model), labels_of(tokens), vocab_axis=0)

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def policy(rngs: nnx.Rngs) -> LanguageModel:
    return LanguageModel(11, 64, layers=2, heads=4, length=LENGTH, rngs=rngs)


def main(
    steps: int = STEPS, prompts: int = PROMPTS, seed: int = 0, tick: Callable = lambda *_: None
) -> dict[str, list[float]]:
    """Of each step the mean reward of its answers, and what its last update found."""
    model, keys = policy(nnx.Rngs(seed)), iter(jax.random.split(jax.random.key(seed), 10_000))
    optimizer = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)
    for _ in range(WARM_UP):
        supervised(model, optimizer, prompts_of(next(keys), PROMPTS))

    reference = nnx.clone(model)
    falling = optax.linear_schedule(RATE, RATE / 10, UPDATES * steps)
    optimizer = nnx.Optimizer(model, optax.adam(falling), wrt=nnx.Param)
    history = []
    for step in range(steps):
        asked = jnp.repeat(prompts_of(next(keys), prompts), GROUP, axis=0)
        tokens, before = rollout(model, next(keys), asked)
        reward = reward_of(tokens)
        for _ in range(UPDATES):
            found = update(model, optimizer, reference, tokens, before, advantages_of(reward))
        history.append(jax.device_get({"reward": jnp.mean(reward), **found}))
        tick(step, history[-1])
    return {name: [float(step[name]) for step in history] for name in history[0]}


def smooth(values: list[float], half: int = 5) -> list[float]:
    """The mean of each value's neighbours, up to ``half`` on either side."""
    near = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(few) / len(few) for few in near]


def plot(data: dict[str, Any], path: Path) -> None:
    curves, distances, clipped = report.axes(3)
    steps = range(1, data["steps"] + 1)
    for ax, name, color, label in (
        (curves, "reward", report.COLORS["jaxloss"], "answers of the step"),
        (distances, "kl", report.COLORS["optax"], "KL(policy, reference)"),
        (distances, "entropy", report.COLORS["two-step"], "entropy of the policy"),
        (clipped, "clipped", report.COLORS["floor"], "clipped tokens, of the last update"),
    ):
        scale = 100 if ax is clipped else 1
        values = [scale * value for value in data["history"][name]]
        ax.plot(steps, values, color=color, lw=0.8, alpha=0.35)
        ax.plot(steps, smooth(values), color=color, lw=2, label=label)
        ax.set_xlabel("step")
        ax.legend(frameon=False, loc="lower right" if ax is curves else "upper right")
    answers = f"{data['prompts']} x {data['group']} answers a step"
    curves.set(title=f"Reward: {answers}", ylabel="share of answers that are right", ylim=(0, 1.05))
    distances.set(title="The policy's distance and entropy", ylabel="nats a token", ylim=(0, None))
    clipped.set(title="Ratios where the objective is clipped", ylabel="% of the tokens")
    clipped.set_ylim(0, None)
    figure = curves.get_figure()
    title = f"GRPO, Flax NNX: sorting {data['digits']} digits with jaxloss.linear_stats_loss"
    figure.suptitle(title, y=1.03)  # pyright: ignore
    report.save_figure(curves, path)


def save(history: dict[str, list[float]], seconds: float) -> None:
    data = {
        "environment": environment(),
        "seconds": seconds,
        "digits": DIGITS,
        "prompts": PROMPTS,
        "group": GROUP,
        "updates": UPDATES,
        "steps": len(history["reward"]),
        "history": {name: [round(x, 5) for x in values] for name, values in history.items()},
    }
    report.save(report.RESULTS, "grpo", data)
    plot(data, report.RESULTS / "grpo.png")


if __name__ == "__main__":
    begin = time.perf_counter()
    found = main()
    save(found, time.perf_counter() - begin)
    for name, values in found.items():
        print(f"{name}: {values[0]:.3f} -> {smooth(values)[-1]:.3f}")
