"""What the examples learn from: handwritten digits, and the standard library's own sources.

A training step measures its batch before it learns from it, and the last batch holds nothing that
came before: what the last step measures is what held-out data would say.
"""

from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks.data import text

BATCH, LENGTH = 128, 64


def digits(steps: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """``steps`` batches of (images [n, 64] float32, labels [n] int32); the last are test images."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    images, test_images, labels, test_labels = train_test_split(
        images, labels, test_size=BATCH, random_state=seed, stratify=labels
    )
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(len(images), BATCH, replace=False) for _ in range(steps - 1)]
    return [(images[i], labels[i]) for i in chosen] + [(test_images, test_labels)]


def python_sources(steps: int, seed: int = 0) -> list[tuple[np.ndarray]]:
    """``steps`` batches of (bytes [n, LENGTH] int32,); no window of the text comes twice."""
    source = "".join(text.sources(megabytes=1)).encode()
    tokens = np.frombuffer(source, np.uint8).astype(np.int32)
    inputs, _ = text.batches(tokens, steps, BATCH // 8, LENGTH, ignore=0.0, seed=seed)
    return [(batch,) for batch in inputs]


def byte_pairs(steps: int, vocabulary: int, seed: int = 0) -> list[np.ndarray]:
    """``steps`` batches [n, LENGTH] int32 of pairs of bytes: the most frequent ones, and one token
    for all others."""
    source = np.frombuffer("".join(text.sources(megabytes=1)).encode(), np.uint8).astype(np.int32)
    pairs = source[: len(source) // 2 * 2].reshape(-1, 2) @ np.array([256, 1], np.int32)
    kinds, counts = np.unique(pairs, return_counts=True)
    rank = np.full(2**16, vocabulary - 1, np.int32)
    often = kinds[np.argsort(-counts, kind="stable")][: vocabulary - 1]
    rank[often] = np.arange(len(often))
    batches, _ = text.batches(rank[pairs], steps, BATCH // 8, LENGTH, ignore=0.0, seed=seed)
    return list(batches)


def show(results: dict[str, list[Any]]) -> None:
    for name, history in results.items():
        (loss, accuracy), (end_loss, end_accuracy) = history[0], history[-1]
        print(
            f"{name}: loss {loss:.3f} -> {end_loss:.3f}, "
            f"accuracy {accuracy:.1%} -> {end_accuracy:.1%}"
        )
