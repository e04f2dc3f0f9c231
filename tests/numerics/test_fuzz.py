"""Every public function against its definition in 80 bits, on values drawn to hurt.

A case is a configuration (static: shapes, dtypes, options), kinds of rows and a seed. The ordinary
suite draws many values for few configurations, since each is a compilation; ``pytest -m soak``
draws from all of the options, ``JAXLOSS_SOAK_EXAMPLES`` configurations a function and number of
devices. First and second derivatives in all operands, in every mode, are compared in float64 with
those of plain jnp.

What is allowed is derived, per entry. Roundings are of the accumulator's dtype, ``eps`` apart:

- a probability's exponent is known to a rounding of its size, the rest of a loss to 16, a sum of n
  positive terms to n / 2: ``condition``;
- each slope is ``p_j (T - t_j) - t_j (1 - p_j)`` for targets ``t`` of sum ``T``, two terms that the
  library forms to that precision each: what is allowed is of their magnitudes, not their
  difference;
- logits that are a product are known to ``(D + 2) / 2 eps |h| |k|``, and move loss and slopes by
  their own derivatives; half of the products are of small integers, and exact.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from chips import forms_of
from hypothesis import given
from oracle.draw import KINDS

import jaxloss
from numerics.fuzz.binary import (
    fuzz_focal_loss,
    fuzz_sigmoid_cross_entropy,
    fuzz_sigmoid_focal_loss,
    program_of_focal,
    program_of_sigmoid,
)
from numerics.fuzz.derivatives import SPACES, fuzz_derivatives, program_of_derivatives
from numerics.fuzz.divergence import (
    SIDES,
    fuzz_kl_divergence,
    fuzz_linear_kl_divergence,
    program_of_divergence,
)
from numerics.fuzz.log_probs import (
    NAMED,
    NAMED_LINEAR,
    fuzz_linear_log_probs_at,
    fuzz_linear_sample,
    fuzz_linear_stats_loss,
    fuzz_linear_top_k,
    fuzz_log_probs_at,
    program_of_log_probs,
)
from numerics.fuzz.logits import SOFTMAX, fuzz_cross_entropy, program_of_logits, sanitized
from numerics.fuzz.pairs import (
    PAIRS,
    fuzz_contrastive_loss,
    fuzz_sigmoid_contrastive_loss,
    program_of_pairs,
)
from numerics.fuzz.product import (
    LINEAR,
    SCHEDULES,
    fuzz_linear_cross_entropy,
    fuzz_linear_loss,
    program_of_product,
)
from numerics.fuzz.rows import (
    fuzz_linear_token_stats,
    fuzz_log_softmax,
    fuzz_nll_loss,
    fuzz_token_stats,
    program_of_log_softmax,
    program_of_nll_loss,
    program_of_stats,
)
from numerics.fuzz.sums import (
    DIVERGENCE,
    FOCAL,
    SEQUENCES,
    SIGMOID,
    SMALL,
    STATS,
    fuzz_check_labels,
    fuzz_metric_sums,
    fuzz_next_token_labels,
    fuzz_sequence_weight,
    fuzz_total_weight,
)

pytestmark = pytest.mark.nan_is_meant


class Fuzz(NamedTuple):
    check: Callable
    space: dict  # of options
    few: tuple  # what the ordinary suite takes: changes of each option's first choice


FUZZ = {
    "cross_entropy": Fuzz(
        fuzz_cross_entropy,
        SOFTMAX,
        (
            {"c": 12, "reduction": "none"},
            {
                "c": 5,
                "dtype": "bfloat16",
                "labels": "probabilities",
                "weight": True,
                "sample_weight": "float",
                "label_smoothing": 0.1,
                "reduction": "mean",
            },
            {"c": 12, "dtype": "float16", "labels": "uniform", "where": "classes", "z_loss": 1e-3},
        ),
    ),
    "linear_cross_entropy": Fuzz(
        fuzz_linear_cross_entropy,
        SCHEDULES,
        (
            {"c": 13, "d": 4, "padding": 3, "exact": True, "chunk_size": 4, "poison": True},
            {
                "c": 13,
                "d": 4,
                "dtype": "bfloat16",
                "bias": True,
                "weight": True,
                "chunk_size": 5,
                "reduction": "mean",
                "sample_weight": "float",
                "implementation": "vocab_blocks",
            },
            {
                "c": 13,
                "d": 4,
                "padding": 3,
                "weight": True,
                "chunk_size": 4,
                "reduction": "mean",
                "label_smoothing": 0.1,
                "implementation": "stored_exponentials",
            },
            {
                "c": 13,
                "d": 4,
                "padding": 3,
                "chunk_size": 4,
                "head": "qlora",
                "products": "bfloat16",
            },
            {"c": 13, "d": 4, "bias": True, "chunk_size": 2, "head": "groups", "heads": "shared"},
        ),
    ),
    "linear_loss": Fuzz(
        fuzz_linear_loss,
        {**LINEAR, "labels": ["index"], "ignore_index": [None]},
        (
            {
                "c": 5,
                "d": 4,
                "padding": 3,
                "chunk_size": 4,
                "sample_weight": "float",
                "reduction": "mean",
            },
            {"c": 5, "d": 4, "chunk_size": 2, "head": "low rank", "heads": 2},
        ),
    ),
    "log_softmax": Fuzz(
        fuzz_log_softmax,
        {k: SOFTMAX[k] for k in ("c", "dtype", "layout", "where", "way")},
        ({"c": 12, "where": "classes"}, {"c": 5, "dtype": "bfloat16", "layout": "middle"}),
    ),
    "nll_loss": Fuzz(fuzz_nll_loss, SMALL, ({"c": 5, "weight": True, "layout": "first"},)),
    "token_stats": Fuzz(fuzz_token_stats, {**SMALL, **STATS}, ({"c": 12, "temperature": 0.3},)),
    "linear_token_stats": Fuzz(
        fuzz_linear_token_stats,
        {**LINEAR, **STATS},
        (
            {"c": 13, "d": 4, "chunk_size": 4, "implementation": "vocab_blocks"},
            {"c": 13, "d": 4, "chunk_size": 4, "head": "int8", "products": "bfloat16"},
        ),
    ),
    "focal_loss": Fuzz(
        fuzz_focal_loss, {**SMALL, **FOCAL, "labels": ["index"]}, ({"c": 5, "gamma": 0.5},)
    ),
    "sigmoid_cross_entropy": Fuzz(
        fuzz_sigmoid_cross_entropy, SIGMOID, ({"c": 7, "pos_weight": "class", "weight": True},)
    ),
    "sigmoid_focal_loss": Fuzz(
        fuzz_sigmoid_focal_loss,
        {**SIGMOID, **FOCAL},
        ({"c": 7, "labels": "probabilities", "gamma": 0.5, "alpha": 0.25},),
    ),
    "kl_divergence": Fuzz(
        fuzz_kl_divergence,
        DIVERGENCE,
        (
            {"c": 5, "divergence": "forward", "temperature": 1.7},
            {"c": 5, "divergence": "jensen_shannon"},
        ),
    ),
    "linear_kl_divergence": Fuzz(
        fuzz_linear_kl_divergence,
        {**DIVERGENCE, **SIDES, "d": [1, 4], "chunk_size": [1, 2, None]},
        (
            {"c": 5, "d": 4, "chunk_size": 2, "divergence": "reverse"},
            {"c": 5, "d": 4, "chunk_size": 2, "head": "low rank", "teacher": "int4", "heads": 2},
        ),
    ),
    "log_probs_at": Fuzz(
        fuzz_log_probs_at, NAMED, ({"c": 12, "where": "classes"}, {"c": 5, "dtype": "bfloat16"})
    ),
    "linear_log_probs_at": Fuzz(
        fuzz_linear_log_probs_at,
        NAMED_LINEAR,
        ({"c": 12, "chunk_size": 4}, {"c": 12, "chunk_size": 4, "head": "qlora"}),
    ),
    "linear_top_k": Fuzz(
        fuzz_linear_top_k,
        NAMED_LINEAR,
        (
            {"c": 12, "chunk_size": 4},
            {"c": 12, "chunk_size": 4, "head": "float8_e5m2"},
        ),
    ),
    "linear_sample": Fuzz(
        fuzz_linear_sample,
        NAMED_LINEAR,
        ({"c": 12, "chunk_size": 4}, {"c": 12, "chunk_size": 4, "head": "int4", "heads": 2}),
    ),
    "linear_stats_loss": Fuzz(
        fuzz_linear_stats_loss,
        NAMED_LINEAR,
        ({"c": 12, "chunk_size": 4}, {"c": 12, "chunk_size": 4, "head": "groups"}),
    ),
    "contrastive_loss": Fuzz(
        fuzz_contrastive_loss,
        PAIRS,
        ({"scale": 100.0}, {"where": "entries", "sample_weight": "float", "reduction": "none"}),
    ),
    "sigmoid_contrastive_loss": Fuzz(
        fuzz_sigmoid_contrastive_loss,
        PAIRS,
        ({"bias": -10.0, "more": 3, "symmetric": False}, {"dtype": "bfloat16", "where": "pairs"}),
    ),
    "metric_sums": Fuzz(
        fuzz_metric_sums,
        {"bins": [1, 4, 15], "top_k": [(1, 5), (3,), ()], "sample_weight": [None, "bool", "float"]},
        ({"bins": 15, "sample_weight": "float"},),
    ),
    "next_token_labels": Fuzz(
        fuzz_next_token_labels, SEQUENCES, ({"t": 9, "lead": (3,), "segments": True},)
    ),
    "sequence_weight": Fuzz(
        fuzz_sequence_weight,
        SEQUENCES,
        ({"t": 9, "lead": (3,), "segments": True, "sample_weight": "float"},),
    ),
    "total_weight": Fuzz(
        fuzz_total_weight,
        {**SMALL, "where": [None, "tokens"]},
        ({"c": 5, "weight": True, "sample_weight": "float"},),
    ),
    "check_labels": Fuzz(
        fuzz_check_labels,
        {"c": [1, 5, 200], "ignore_index": [-100, None, 0], "label_dtype": SOFTMAX["label_dtype"]},
        ({"c": 5},),
    ),
}


# Of derivatives, what the ordinary suite takes.
FEW = {
    "cross_entropy": {
        "c": 5,
        "labels": "uniform",
        "weight": True,
        "where": "classes",
        "logit_softcap": 5.0,
        "sample_weight": "float",
    },
    "linear_cross_entropy": {
        "c": 5,
        "labels": "drop",
        "weight": True,
        "label_smoothing": 1.0,
        "sample_weight": "bool",
        "padding": 3,
        "chunk_size": 2,
        "implementation": "vocab_blocks",
    },
    "linear_token_stats": {
        "c": 5,
        "labels": "bucket",
        "where": "classes",
        "chunk_size": 2,
        "head": "qlora",
    },
    "focal_loss": {"c": 5, "weight": True, "gamma": 0.5, "temperature": 0.3},
}


# The two modes

PROGRAMS = (
    program_of_logits,
    program_of_product,
    program_of_log_softmax,
    program_of_nll_loss,
    program_of_stats,
    program_of_log_probs,
    program_of_focal,
    program_of_sigmoid,
    program_of_divergence,
    program_of_pairs,
    program_of_derivatives,
)
CLASSES = {"TopKLabels": "labels", "TokenStats": "token_stats", "MetricSums": "metric_sums"}
CLASSES |= dict.fromkeys(("Reference", "ReferenceStats"), "linear_stats_loss")
CLASSES |= dict.fromkeys(("LowRankKernel", "QuantizedKernel"), "linear_cross_entropy")
VALUES = st.tuples(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=3), st.integers(0, 2**32 - 1)
)


def run(name, config, kinds, seed):
    config = sanitized(config)
    try:
        FUZZ[name].check(config, np.random.default_rng(seed), kinds)
    except Exception as error:
        error.add_note(f"check: FUZZ[{name!r}].check; config: {config}; {kinds}; seed {seed}")
        raise


def test_every_function_is_here():
    functions = {n for n in jaxloss.__all__ if not isinstance(getattr(jaxloss, n), type)}
    # metrics are those of metric_sums; the classes are arguments or results.
    assert functions - {"metrics"} == set(FUZZ)
    assert set(jaxloss.__all__) - functions == set(CLASSES)


def run_a_few(name):
    space = FUZZ[name].space
    first = {k: v[0] for k, v in space.items()}
    if "way" in space:
        first["way"] = "quick"

    @given(st.sampled_from(FUZZ[name].few), VALUES)
    def check(changes, values):
        run(name, {**first, **changes}, *values)

    check()


@pytest.mark.parametrize("name", FUZZ)
def test_a_few_programs_on_many_values(name):
    run_a_few(name)


@pytest.mark.parametrize("name", FEW)
def test_derivatives_of_a_few_programs_on_many_values(name):
    first = {k: v[0] for k, v in SPACES[name].items()}

    @given(st.integers(0, 2**32 - 1))
    def check(seed):
        fuzz_derivatives(name, {**first, **FEW[name], "way": "quick"}, seed)

    check()


@pytest.fixture
def fresh_programs():
    """A program compiled for one device must not be used for eight."""

    def clear():
        jax.clear_caches()
        for program in PROGRAMS:
            program.cache_clear()

    clear()
    yield
    clear()


def as_on_accelerators(monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", forms_of(None))


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy", "token_stats"])
def test_a_few_programs_as_on_accelerators(name, monkeypatch, fresh_programs):
    as_on_accelerators(monkeypatch)
    run_a_few(name)


@pytest.fixture
def soak(monkeypatch, fresh_programs, record_property):
    def soak(place, space, cases, run_one):
        devices = 8 if place == "eight CPUs" else 1
        monkeypatch.setattr(jax, "device_count", lambda *_: devices)
        if place == "an accelerator":
            as_on_accelerators(monkeypatch)
        count = 0
        options = st.fixed_dictionaries({k: st.sampled_from(v) for k, v in space.items()})

        @given(options, cases)
        def check(config, many):
            nonlocal count
            for case in many:
                count += 1
                run_one(config, case)

        try:
            check()
        finally:
            record_property("cases", count)

    return soak


@pytest.mark.soak
@pytest.mark.parametrize("place", ["one CPU", "eight CPUs", "an accelerator"])
@pytest.mark.parametrize("name", FUZZ)
def test_soak(name, place, soak):
    cases = st.lists(VALUES, min_size=12, max_size=20)
    soak(place, FUZZ[name].space, cases, lambda config, values: run(name, config, *values))


@pytest.mark.soak
@pytest.mark.parametrize("place", ["one CPU", "an accelerator"])
@pytest.mark.parametrize("name", SPACES)
def test_soak_of_derivatives(name, place, soak):
    seeds = st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6)
    soak(place, SPACES[name], seeds, partial(fuzz_derivatives, name))
