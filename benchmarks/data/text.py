"""Text that every Python has: the standard library's own sources, byte-pair encoded."""

import sysconfig
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
IGNORED = -100  # the label that jaxloss and PyTorch leave out by default


def sources(megabytes: float) -> list[str]:
    """The top-level modules in the order of their names, as many as fit into ``megabytes``."""
    texts, room = [], megabytes * 1e6
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        # Written when Python was built: it differs from one machine to the next.
        if path.name.startswith("_sysconfigdata"):
            continue
        text = path.read_bytes()
        room -= len(text)
        if room < 0:
            break
        texts.append(text.decode("utf-8", errors="replace"))
    return texts


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """A byte-level vocabulary of at most ``vocab`` entries; it is kept in memory alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        # A few megabytes have too few pairs that come twice for the usual vocabularies.
        min_frequency=1,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=ALPHABET,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """One row of token ids, int32, the texts one after the other."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [[*encoding.ids, end] for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate([np.asarray(row, np.int32) for row in ids])


def batches(
    tokens: np.ndarray, steps: int, batch: int, length: int, ignore: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """``(inputs, labels)``, int32 ``[steps, batch, length]``, a label being the next token.

    The windows of the text are shuffled, and none comes twice before each has come once. A share
    ``ignore`` of the labels, on average, is IGNORED: a prompt at the head of each window, as long
    as chance has it, so that the number of labels that count differs from batch to batch.
    """
    rng = np.random.default_rng(seed)
    windows = (len(tokens) - 1) // length
    rounds = -(-steps * batch // windows)
    order = np.concatenate([rng.permutation(windows) for _ in range(rounds)])[: steps * batch]
    at = order[:, None] * length + np.arange(length)
    inputs, labels = tokens[at], tokens[at + 1]
    spread = min(ignore, 1 - ignore)
    prompt = rng.uniform(ignore - spread, ignore + spread, size=(len(order), 1)) * length
    # At least one label a window counts: a mean over none is NaN.
    labels = np.where(np.arange(length) < np.minimum(np.round(prompt), length - 1), IGNORED, labels)
    shape = (steps, batch, length)
    return inputs.reshape(shape), labels.reshape(shape)
