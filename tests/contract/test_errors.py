"""What a wrong call is told: the argument, the rule, what came; and what is no error."""

import dataclasses
import inspect
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxloss
from jaxloss._checks import messages

X, Y = np.zeros((4, 3), np.float32), np.zeros(4, np.int32)
BOX = np.zeros((2, 3, 4), np.float32)
SQUARE = np.zeros((3, 3), np.float32)
H, K = np.zeros((4, 2), np.float32), np.zeros((2, 3), np.float32)

RIGHT = {
    "log_softmax": {"logits": X},
    "nll_loss": {"log_probs": X, "labels": Y},
    "cross_entropy": {"logits": X, "labels": Y},
    "check_labels": {"labels": Y, "num_classes": 3},
    "linear_cross_entropy": {"hidden": H, "kernel": K, "labels": Y},
}


def array_rows(x):
    floating = f"{x} must have a real floating dtype"
    return [
        ({x: None}, TypeError, f"{x} must be an array; got None"),
        ({x: "abc"}, TypeError, f"{x} must be an array; got str"),
        ({x: [[1.0, 2.0], [3.0]]}, TypeError, f"{x} must be an array; got list"),
        (
            {x: X.astype(np.int32)},
            TypeError,
            rf"{floating}; got int32\(4, 3\).*{x}.astype\(jnp.float32\)",
        ),
        ({x: X.astype(np.complex64)}, TypeError, rf"{floating}; got complex64\(4, 3\)"),
        ({x: X.astype(bool)}, TypeError, rf"{floating}; got bool\(4, 3\)"),
    ]


def axis_rows(x):
    kind, outside = "axis must be an int or a tuple of ints", rf"axis must be in \[-2, 1\] for {x}"
    return [
        ({x: np.float32(1)}, ValueError, rf"{x} must have a class axis; got a scalar, float32\(\)"),
        ({"axis": 2}, ValueError, rf"{outside} of rank 2; got axis 2, {x} float32\(4, 3\)"),
        ({"axis": -3}, ValueError, f"{outside}.*got axis -3"),
        ({"axis": (0, 2)}, ValueError, rf"{outside}.*got axis \(0, 2\)"),
        ({"axis": (1, 1)}, ValueError, r"axis must name each axis once; got \(1, 1\)"),
        ({"axis": (0, -2)}, ValueError, r"axis must name each axis once; got \(0, -2\)"),
        ({"axis": ()}, ValueError, r"axis must name at least one axis; got \(\)"),
        ({"axis": 1.0}, TypeError, rf"{kind}; got 1\.0"),
        ({"axis": (0, 1.0)}, TypeError, rf"{kind}; got \(0, 1\.0\)"),
        ({"axis": True}, TypeError, f"{kind}; got True"),
        ({"axis": None}, TypeError, f"{kind}; got None"),
        ({"axis": "1"}, TypeError, f"{kind}; got '1'"),
    ]


def token_rows(x):
    """What every loss of logits takes, here 4 tokens of 3 classes."""
    indices = r"labels must have the shape of .* without axis 1, \(4,\)"
    probabilities = r"labels must have the shape of .* \(floating\), \(4, 3\)"
    kinds = r"labels must be class indices \(an integer dtype\) or class probabilities \(floating\)"
    where = r"where must broadcast to .* or have the shape of the losses, \(4,\)"
    reduction = "reduction must be one of 'none', 'mean', 'sum'"
    return [
        ({"labels": None}, TypeError, "labels must be an array; got None"),
        ({"labels": Y[:1]}, ValueError, rf"{indices}; got int32\(1,\)\. .*float32\(4, 3\)"),
        ({"labels": Y[0]}, ValueError, rf"{indices}; got int32\(\)"),
        ({"labels": Y[None]}, ValueError, rf"{indices}; got int32\(1, 4\)"),
        ({"labels": X.astype(np.int8)}, ValueError, rf"{indices}; got int8\(4, 3\).*are prob"),
        ({"labels": Y.astype(np.float32)}, ValueError, rf"{probabilities}; got .*\(4,\).*are int"),
        ({"labels": X[:, :1]}, ValueError, rf"{probabilities}; got float32\(4, 1\)"),
        ({"labels": X.T}, ValueError, rf"{probabilities}; got float32\(3, 4\)"),
        ({"labels": Y.astype(bool)}, TypeError, rf"{kinds}; got bool\(4,\)"),
        ({"labels": Y.astype(np.complex64)}, TypeError, rf"{kinds}; got complex64\(4,\)"),
        ({"weight": X[0, :1]}, ValueError, r"weight must .* a class, \(3,\); got float32\(1,\)"),
        ({"weight": X}, ValueError, r"weight must .* a class, \(3,\); got float32\(4, 3\)"),
        ({"weight": 1.0}, ValueError, r"weight must .* a class, \(3,\); got float\d+\(\)"),
        (
            {"weight": Y[:3]},
            TypeError,
            r"weight must have a real floating dtype; got int32\(3,\).*weight.astype",
        ),
        ({"weight": np.ones(3, np.complex64)}, TypeError, r"weight must .*; got complex64\(3,\)"),
        (
            {"sample_weight": X[0]},
            ValueError,
            r"sample_weight must have the shape of the losses, \(4,\); got float32\(3,\)",
        ),
        ({"sample_weight": X[:, :1]}, ValueError, r"sample_weight must .*; got float32\(4, 1\)"),
        ({"sample_weight": 1.0}, ValueError, r"sample_weight must .*; got float\d+\(\)"),
        (
            {"sample_weight": np.ones(4, np.complex64)},
            TypeError,
            r"sample_weight must be real or boolean; got complex64\(4,\)",
        ),
        ({"where": X}, TypeError, r"where must be boolean; got float32\(4, 3\).*sample_weight"),
        ({"where": Y}, TypeError, r"where must be boolean; got int32\(4,\)"),
        (
            {"where": np.ones((2, 3), bool)},
            ValueError,
            rf"{where} .*; got bool\(2, 3\), {x} float32\(4, 3\)",
        ),
        ({"where": np.ones((1, 4, 3), bool)}, ValueError, rf"{where} .*; got bool\(1, 4, 3\)"),
        ({"where": np.ones(2, bool)}, ValueError, rf"{where} .*; got bool\(2,\)"),
        ({"reduction": "avg"}, ValueError, f"{reduction}; got 'avg'"),
        ({"reduction": None}, ValueError, f"{reduction}; got None"),
        ({"ignore_index": 1.0}, TypeError, r"ignore_index must be an int or None; got 1\.0"),
        ({"ignore_index": True}, TypeError, "ignore_index must be an int or None; got True"),
        ({"ignore_index": "pad"}, TypeError, "ignore_index must be an int or None; got 'pad'"),
    ]


def batch_rows(x):
    """Labels and masks of other shapes than 4 tokens of 3 classes."""
    square = {x: SQUARE, "labels": Y[:3], "where": np.ones(3, bool)}
    column = (
        r"labels must .* without axis 1, \(4,\); got int32\(4, 1\)\. Drop .* labels\.squeeze\(1\)"
    )
    return [
        ({"labels": Y[:, None]}, ValueError, column),
        ({x: X[0]}, ValueError, r"labels must .* without axis 0, \(\); got int32\(4,\)"),
        ({"axis": 0}, ValueError, r"labels must .* without axis 0, \(3,\); got int32\(4,\)"),
        (
            {x: BOX, "labels": BOX[:, :1].astype(np.int32), "axis": 1},
            ValueError,
            r"labels .* axis 1, \(2, 4\); got int32\(2, 1, 4\)\. Drop .* labels\.squeeze\(1\)",
        ),
        (
            {x: BOX, "labels": Y[:2], "axis": (0, 2)},
            ValueError,
            r"labels must .* without axis \(0, 2\), \(3,\); got int32\(2,\)",
        ),
        (
            {x: BOX, "labels": Y[:2], "axis": (1, 2), "weight": X[0]},
            ValueError,
            r"weight must .* a class, \(12,\); got float32\(3,\)",
        ),
        (
            square,
            ValueError,
            rf"where must be either classes .* or tokens .*; got bool\(3,\), which fits {x} "
            r"float32\(3, 3\) both ways.*where\[None, :\].*sample_weight=where",
        ),
    ]


def number_rows():
    number, flag = "must be a Python number; got", "return_stats must be True or False; got"
    scalar = "must be a number, or a real scalar array; got"
    cap = r"logit_softcap must be in \[1\.17549e-38, 8\.50706e\+37\]; got"
    return [
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\]; got -0\.1"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]; got 1\.5"),
        ({"label_smoothing": np.nan}, ValueError, r"label_smoothing must be in \[0, 1\]; got nan"),
        ({"label_smoothing": np.float32(7)}, ValueError, r"label_smoothing must be in \[0, 1\]"),
        ({"label_smoothing": True}, TypeError, f"label_smoothing {scalar} bool"),
        (
            {"label_smoothing": np.zeros((2,), np.float32)},
            ValueError,
            rf"label_smoothing {scalar} float32\(2,\)",
        ),
        ({"label_smoothing": jnp.zeros(1)}, ValueError, rf"label_smoothing {scalar} float32\(1,\)"),
        ({"label_smoothing": jnp.array(True)}, TypeError, rf"label_smoothing {scalar} bool\(\)"),
        ({"z_loss": -1e-4}, ValueError, r"z_loss must be in \[0, .*; got -0\.0001"),
        ({"z_loss": np.nan}, ValueError, r"z_loss must be in \[0, .*; got nan"),
        ({"z_loss": np.inf}, ValueError, r"z_loss must be in \[0, .*; got inf"),
        ({"z_loss": 10**400}, ValueError, r"z_loss must be in \[0, .*; got 1000"),
        ({"z_loss": "1"}, TypeError, f"z_loss {scalar} str"),
        ({"z_loss": 1j}, TypeError, f"z_loss {scalar} complex"),
        (
            {"logit_softcap": 0.0},
            ValueError,
            r"logit_softcap must be positive, or None; got 0\.0\. No cap is logit_softcap=None\.$",
        ),
        ({"empty_mean": "0"}, TypeError, f"empty_mean {number} str"),
        ({"empty_mean": np.nan}, ValueError, "empty_mean must be in .*; got nan"),
        ({"logit_softcap": -30.0}, ValueError, rf"{cap} -30\.0"),
        ({"logit_softcap": np.inf}, ValueError, f"{cap} inf"),
        ({"logit_softcap": 1e39}, ValueError, rf"{cap} 1e\+39"),
        ({"logit_softcap": 1e-38}, ValueError, f"{cap} 1e-38"),
        ({"logit_softcap": np.nan}, ValueError, f"{cap} nan"),
        ({"logit_softcap": "30"}, TypeError, f"logit_softcap {number} str"),
        ({"return_stats": 1}, TypeError, f"{flag} 1"),
        ({"return_stats": None}, TypeError, f"{flag} None"),
        ({"return_stats": np.True_}, TypeError, f"{flag} .*True"),
    ]


def linear_rows():
    columns = r"bias must have one entry a column of kernel, \(3,\); got"
    products = "hidden @ kernel"
    return [
        ({"hidden": None}, TypeError, "hidden must be an array; got None"),
        ({"hidden": np.float32(1)}, ValueError, r"hidden must be \[\.\.\., D\]; got float32\(\)"),
        (
            {"hidden": H.astype(np.complex64)},
            TypeError,
            r"hidden must .* floating .*complex64\(4, 2",
        ),
        (
            {"hidden": H.astype(np.float16)},
            TypeError,
            "hidden and kernel .* one dtype; got float16 and float32",
        ),
        (
            {"hidden": X},
            ValueError,
            r"kernel must .* D = 3, at axis 0; .*\(4, 3\), kernel .*\(2, 3\).*vocab_axis=0",
        ),
        ({"kernel": None}, TypeError, "kernel must be an array; got None"),
        ({"precision": "low"}, ValueError, "precision must be one of .*; got 'low'"),
        ({"precision": ["high"]}, ValueError, r"precision must be one of .*; got \['high'\]"),
        (
            {"kernel": K[None]},
            ValueError,
            r"hidden must be \[..., K, D\] or .*kernel float32\(1, 2, 3\)",
        ),
        (
            {"kernel": K[None, None]},
            ValueError,
            r"kernel must be \[D, V\].*got float32\(1, 1, 2, 3\)",
        ),
        (
            {"kernel": K.astype(np.int32)},
            TypeError,
            r"kernel must .* floating .*; got int32\(2, 3\)",
        ),
        ({"kernel": K, "vocab_axis": 0}, ValueError, "kernel must .* D = 2, at axis 1; got .*=1"),
        ({"bias": X}, ValueError, rf"{columns} float32\(4, 3\)"),
        ({"bias": 1.0}, ValueError, rf"{columns} float\d+\(\)"),
        (
            {"bias": Y[:3]},
            TypeError,
            r"bias must have a real floating dtype; got int32\(3,\)",
        ),
        (
            {"vocab_axis": -3},
            ValueError,
            r"vocab_axis must be in \[-2, 1\] for kernel .*got vocab_.* -3",
        ),
        ({"vocab_axis": (0, 1)}, ValueError, r"vocab_axis must be one axis; got \(0, 1\)"),
        ({"vocab_axis": 1.0}, TypeError, r"vocab_axis must be an int .*; got 1\.0"),
        ({"vocab_axis": None}, TypeError, "vocab_axis must be an int .*; got None"),
        ({"num_classes": -1}, ValueError, r"num_classes must be in \[0, 3\]; got -1"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int or None; got float"),
        ({"num_classes": True}, TypeError, "num_classes must be an int or None; got bool"),
        ({"num_classes": 2, "weight": X[0]}, ValueError, r"weight .*\(2,\); got float32\(3,\)"),
        ({"num_classes": 2, "labels": X}, ValueError, r"labels .*\(4, 2\); got float32\(4, 3\)"),
        (
            {"num_classes": 2, "where": np.ones((1, 3), bool)},
            ValueError,
            rf"where .*; got bool\(1, 3\), {products} float32\(4, 2\)",
        ),
        (
            {"hidden": H[:3], "labels": Y[:3], "where": np.ones(3, bool)},
            ValueError,
            rf"where must be either .*; got bool\(3,\), which fits {products} .* both ways",
        ),
        ({"chunk_size": -2}, ValueError, "chunk_size must be at least 1; got -2"),
        ({"chunk_size": True}, TypeError, "chunk_size must be an int or None; got bool"),
    ]


ROWS = {
    "log_softmax": [
        *array_rows("logits"),
        *axis_rows("logits"),
        ({"where": X}, TypeError, r"where must be boolean; got float32\(4, 3\)"),
        ({"where": "all"}, TypeError, "where must be an array; got str"),
        (
            {"where": np.ones(4, bool)},
            ValueError,
            r"where must broadcast to logits; got bool\(4,\), logits float32\(4, 3\)",
        ),
        ({"where": np.ones((1, 4, 3), bool)}, ValueError, r"where .*; got bool\(1, 4, 3\)"),
    ],
    "nll_loss": [
        *array_rows("log_probs"),
        *axis_rows("log_probs"),
        *token_rows("log_probs"),
        *batch_rows("log_probs"),
    ],
    "cross_entropy": [
        *array_rows("logits"),
        *axis_rows("logits"),
        *token_rows("logits"),
        *batch_rows("logits"),
        *number_rows(),
    ],
    "check_labels": [
        ({"labels": None}, TypeError, "labels must be an array; got None"),
        ({"labels": "abc"}, TypeError, "labels must be an array; got str"),
        (
            {"labels": Y.astype(bool)},
            TypeError,
            r"labels must be class indices \(an integer dtype\); got bool\(4,\)",
        ),
        ({"labels": Y.astype(np.complex64)}, TypeError, r"labels must .*; got complex64\(4,\)"),
    ],
    "linear_cross_entropy": [*linear_rows(), *token_rows("hidden @ kernel"), *number_rows()],
}
CASES = [
    pytest.param(name, *row, id=f"{name}-{i}-{'-'.join(row[0])}")
    for name, rows in ROWS.items()
    for i, row in enumerate(rows)
]


@pytest.mark.parametrize(("name", "wrong", "kind", "text"), CASES)
def test_a_wrong_call_is_told_what_is_wrong_in_every_way_of_tracing(name, wrong, kind, text):
    arguments = {**RIGHT[name], **wrong}
    arrays = {k: v for k, v in arguments.items() if isinstance(v, np.ndarray)}
    others = {k: v for k, v in arguments.items() if k not in arrays}

    def call(arrays):
        return getattr(jaxloss, name)(**arrays, **others)

    with pytest.raises(kind, match=f"{name}: {text}") as eager:
        call(arrays)
    assert str(eager.value).startswith(f"{name}: ")  # no other library has the first word
    for traced in (jax.jit(call), lambda x: jax.eval_shape(call, x)):
        with pytest.raises(kind) as told:
            traced(arrays)
        assert str(told.value) == str(eager.value)


STATS = jaxloss.token_stats(X, Y)
SUMS = jaxloss.metric_sums(STATS)
TOP = jaxloss.TopKLabels(np.zeros((4, 2), np.int32), np.ones((4, 1), np.float32))
BESIDE = {"linear_kl_divergence": {"hidden": H, "kernel": K}}
BESIDE["linear_kl_divergence"] |= {"teacher_hidden": H, "teacher_kernel": K}
# Of each public function calls that would broadcast, divide by 0 or take a number that is none.
PROMISES = {
    "check_labels": [{"labels": Y, "num_classes": -1}],
    "contrastive_loss": [
        {"x": X, "y": X[:1]},
        {"x": X, "y": X[:1], "symmetric": False},
        {"x": X, "y": X, "where": np.ones((1, 4), bool)},
        {"x": X, "y": X, "sample_weight": X[:1, 0]},
        {"x": X, "y": X, "logit_scale": X[0, :1]},
    ],
    "cross_entropy": [
        {"logits": X, "labels": Y[:1]},
        {"logits": X, "labels": X[:1]},
        {"logits": X, "labels": TOP},
        {"logits": X, "labels": Y, "weight": X[0, :1]},
        {"logits": X, "labels": Y, "sample_weight": X[:1, 0]},
        {"logits": X, "labels": Y, "label_smoothing": 7.0},
        {"logits": X, "labels": Y, "z_loss": -1.0},
        {"logits": X, "labels": Y, "logit_softcap": 0.0},
    ],
    "focal_loss": [
        {"logits": X, "labels": Y[:1]},
        {"logits": X, "labels": Y, "gamma": -1.0},
        {"logits": X, "labels": Y, "gamma": X[0, :1]},
        {"logits": X, "labels": Y, "temperature": X[:1, 0]},
        {"logits": X, "labels": Y, "weight": X[0, :1]},
    ],
    "kl_divergence": [
        {"logits": X, "teacher_logits": X[:1]},
        {"logits": X, "teacher_logits": X, "temperature": 0.0},
        {"logits": X, "teacher_logits": X, "beta": 2.0},
        {"logits": X, "teacher_logits": X, "beta": X[0, :1]},
        {"logits": X, "teacher_logits": X, "sample_weight": X[:1, 0]},
    ],
    "linear_cross_entropy": [
        {"hidden": H, "kernel": K, "labels": Y[:1]},
        {"hidden": H, "kernel": K, "labels": Y, "bias": X[0, :1]},
        {"hidden": H, "kernel": K, "labels": Y, "label_smoothing": 7.0},
        {"hidden": H, "kernel": K, "labels": Y, "weight": X[0, :1]},
    ],
    "linear_kl_divergence": [
        {**BESIDE["linear_kl_divergence"], "temperature": 0.0},
        {**BESIDE["linear_kl_divergence"], "teacher_bias": X[0, :1]},
        {**BESIDE["linear_kl_divergence"], "sample_weight": X[:1, 0]},
    ],
    "linear_loss": [
        {"loss_fn": lambda x: x[:, 0], "hidden": H, "kernel": K, "sample_weight": X[:1, 0]},
        {"loss_fn": lambda x: x[:, 0], "hidden": H, "kernel": K, "bias": X[0, :1]},
    ],
    "linear_log_probs_at": [
        {"hidden": H, "kernel": K, "indices": Y},
        {"hidden": H, "kernel": K, "indices": Y[:, None], "temperature": 0.0},
    ],
    "linear_sample": [
        {"key": jax.random.key(0), "hidden": H, "kernel": K, "bias": X[0, :1]},
        {"key": jax.random.key(0), "hidden": H, "kernel": K, "num_samples": 0},
        {"key": jax.random.key(0), "hidden": H, "kernel": K, "temperature": 0.0},
    ],
    "linear_stats_loss": [
        {"loss_fn": lambda s: s.log_prob, "hidden": H, "kernel": K, "labels": Y[:1]},
        {"loss_fn": lambda s: s.log_prob[0], "hidden": H, "kernel": K, "labels": Y},
    ],
    "linear_top_k": [{"hidden": H, "kernel": K, "k": 99}],
    "log_probs_at": [
        {"logits": X, "indices": Y},
        {"logits": X, "indices": Y[:, None], "temperature": X[:1, 0]},
    ],
    "linear_token_stats": [
        {"hidden": H, "kernel": K, "labels": Y[:1]},
        {"hidden": H, "kernel": K, "labels": Y, "reference": (H, K), "beta": 1.0},
        {"hidden": H, "kernel": K, "labels": Y, "temperature": 0.0},
    ],
    "log_softmax": [
        {"logits": X, "where": np.ones((4, 2), bool)},
        {"logits": X, "temperature": 0.0},
        {"logits": X, "temperature": X[:1, 0]},
    ],
    "metric_sums": [
        {"stats": STATS._replace(rank=Y[:1])},
        {"stats": STATS, "sample_weight": X[:1, 0]},
    ],
    "metrics": [{"sums": jax.tree.map(lambda x: jnp.stack([x] * 2), SUMS)}],
    "next_token_labels": [
        {"tokens": Y, "segment_ids": Y[:1]},
        {"tokens": Y, "where": np.ones(1, bool)},
    ],
    "nll_loss": [
        {"log_probs": X, "labels": Y[:1]},
        {"log_probs": X, "labels": Y, "weight": X[0, :1]},
        {"log_probs": X, "labels": Y, "sample_weight": X[:1, 0]},
    ],
    "sequence_weight": [
        {"labels": Y, "segment_ids": Y[:1]},
        {"labels": Y, "sample_weight": X[:1, 0]},
    ],
    "sigmoid_contrastive_loss": [
        {"x": X, "y": X[:1]},
        {"x": X, "y": X, "where": np.ones((4, 1), bool)},
        {"x": X, "y": X, "logit_bias": np.nan},
    ],
    "sigmoid_cross_entropy": [
        {"logits": X, "labels": X[:1]},
        {"logits": X, "labels": X, "where": np.ones((1, 3), bool)},
        {"logits": X, "labels": X, "label_smoothing": 7.0},
        {"logits": X, "labels": X, "pos_weight": -1.0},
        {"logits": X, "labels": X, "sample_weight": X[:1]},
    ],
    "sigmoid_focal_loss": [
        {"logits": X, "labels": X[:1]},
        {"logits": X, "labels": X, "alpha": 2.0},
        {"logits": X, "labels": X, "gamma": -1.0},
        {"logits": X, "labels": X, "gamma": X[0, :1]},
    ],
    "token_stats": [
        {"logits": X, "labels": Y[:1]},
        {"logits": X, "labels": Y, "temperature": 0.0},
        {"logits": X, "labels": Y, "reference": X[:1]},
        {"logits": X, "labels": Y, "kl_temperature": 1.0},
    ],
    "total_weight": [
        {"labels": Y, "sample_weight": X[:1, 0]},
        {"labels": Y, "where": np.ones(1, bool)},
        {"labels": X, "weight": X[0, :1]},
    ],
}


@pytest.fixture
def without_chex_assertions():
    chex.disable_asserts()
    yield
    chex.enable_asserts()


@pytest.mark.usefixtures("without_chex_assertions")
@pytest.mark.parametrize("name", jaxloss.__all__)
def test_what_is_promised_does_not_hang_on_assertions_of_chex(name):
    """Training code calls chex.disable_asserts() for speed."""
    if isinstance(getattr(jaxloss, name), type):
        return
    for arguments in PROMISES[name]:
        given = dict(arguments)
        loss_fn = [given.pop("loss_fn")] if "loss_fn" in given else []
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: [^\n]+; got [^\n]+\.$"):
            getattr(jaxloss, name)(*loss_fn, **given)


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_call_is_accepted(name):
    getattr(jaxloss, name)(**RIGHT[name])


def test_an_array_is_no_word():
    with pytest.raises(ValueError, match=r"reduction must be one of .*; got array\(\[1, 2\]\)"):
        jaxloss.cross_entropy(X, Y, reduction=np.array([1, 2]))


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("option", ["logit_softcap", "empty_mean"])
def test_a_traced_number_is_told_to_be_static(name, option):
    with pytest.raises(TypeError, match=f"{name}: {option} must be a Python number.*under jit"):
        jax.jit(lambda v: getattr(jaxloss, name)(**RIGHT[name], **{option: v}))(0.5)


@pytest.mark.parametrize("name", ["log_softmax", "nll_loss", "cross_entropy"])
def test_options_are_keywords(name):
    with pytest.raises(TypeError, match="positional argument"):
        getattr(jaxloss, name)(*RIGHT[name].values(), -1, None)


# Nothing to compute is no error


@pytest.mark.parametrize("where", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("shape", "axis"), [((0,), 0), ((0, 3), 0), ((2, 0, 3), -1), ((2, 0, 3), (1, 2)), ((0, 0), 1)]
)
def test_log_softmax_of_nothing(shape, axis, dtype, where):
    x = jnp.zeros(shape, dtype)
    mask = jnp.ones(shape, bool) if where else None
    for f in (jaxloss.log_softmax, jax.jit(jaxloss.log_softmax, static_argnums=1)):
        out = f(x, axis, where=mask)
        assert (out.shape, out.dtype) == (shape, dtype)
    grad = jax.grad(lambda x: jaxloss.log_softmax(x, axis, where=mask).sum())(x)
    assert (grad.shape, grad.dtype) == (shape, dtype)


EMPTY = {
    "leading": ((2, 0, 3), (2, 0), -1),
    "first axis": ((3, 0), (0,), 0),
    "two axes": ((0, 3, 2), (0,), (1, 2)),
}
EMPTY_CALLS = [
    *((name, shape) for name in ("nll_loss", "cross_entropy") for shape in EMPTY),
    ("linear_cross_entropy", "leading"),
]


@pytest.mark.nan_is_meant
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize(("name", "case"), EMPTY_CALLS)
def test_an_empty_batch_with_every_option(name, case, probabilities):
    shape, batch, axis = EMPTY[case]
    classes = 6 if case == "two axes" else 3
    labels = jnp.zeros(shape) if probabilities else jnp.zeros(batch, jnp.int32)
    options = {"weight": jnp.ones(classes), "sample_weight": jnp.ones(batch)}
    options["where"] = jnp.ones((1,) * len(shape), bool)
    if name != "nll_loss":
        options |= {"label_smoothing": 0.1, "z_loss": 0.1, "logit_softcap": 3.0}
    if name == "linear_cross_entropy":
        arrays = (jnp.zeros((*batch, 2)), jnp.zeros((2, 3)))
    else:
        arrays, options["axis"] = (jnp.zeros(shape),), axis

    def loss(*arrays, reduction):
        return getattr(jaxloss, name)(*arrays, labels, reduction=reduction, **options)

    assert loss(*arrays, reduction="none").shape == batch
    assert loss(*arrays, reduction="sum") == 0
    assert np.isnan(loss(*arrays, reduction="mean"))
    for reduction in ("sum", "mean"):
        grads = jax.grad(loss, tuple(range(len(arrays))))(*arrays, reduction=reduction)
        for g, x in zip(grads, arrays, strict=True):
            np.testing.assert_array_equal(g, np.zeros(x.shape))


@pytest.mark.parametrize(
    "reduction", ["none", pytest.param("mean", marks=pytest.mark.nan_is_meant)]
)
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_statistics_of_nothing(name, reduction):
    right = {k: v[:0] if k in ("logits", "labels", "hidden") else v for k, v in RIGHT[name].items()}
    _, stats = getattr(jaxloss, name)(**right, return_stats=True, reduction=reduction)
    integers = ("prediction", "rank")
    for field, v in stats._asdict().items():
        assert v.shape == (0,)
        assert v.dtype == (jnp.int32 if field in integers else jnp.float32), field


def test_an_empty_batch_is_checked_too():
    with pytest.raises(ValueError, match=r"labels must .*\(0,\); got int32\(1,\)"):
        jaxloss.cross_entropy(X[:0], Y[:1])


def test_features_of_size_zero_leave_the_bias():
    bias = jnp.array([0.0, 1.0, 3.0])
    loss = jaxloss.linear_cross_entropy(H[:, :0], K[:0], Y, bias=bias)
    expected = jaxloss.cross_entropy(jnp.tile(bias, (4, 1)), Y)
    np.testing.assert_allclose(loss, expected, rtol=4 * np.finfo(np.float32).eps)


ONE_AND_A_HALF, TWO_NUMBERS = np.array(1.5), np.array([1, 2])


@pytest.mark.parametrize("x", [ONE_AND_A_HALF, TWO_NUMBERS, 1.5, "1"])
def test_what_is_no_single_integer_is_never_cut_to_one(x):
    for call in (
        lambda: jaxloss.log_softmax(X, x),
        lambda: jaxloss.cross_entropy(X, Y, axis=x),
        lambda: jaxloss.cross_entropy(X, Y, ignore_index=x),
        lambda: jaxloss.linear_cross_entropy(H, K, Y, chunk_size=x),
        lambda: jaxloss.linear_cross_entropy(H, K, Y, num_classes=x),
        lambda: jaxloss.check_labels(Y, x),
        lambda: jaxloss.check_labels(Y, 3, ignore_index=x),
    ):
        with pytest.raises(TypeError, match=r"(axis|index|size|classes) must be an int"):
            call()


@pytest.mark.parametrize("x", [float("inf"), float("nan"), -float("inf")])
@pytest.mark.parametrize("name", ["z_loss", "logit_softcap", "label_smoothing"])
def test_numbers_are_finite(name, x):
    with pytest.raises(ValueError, match=f"{name} must be .*; got {x}"):
        jaxloss.cross_entropy(X, Y, **{name: x})


@pytest.mark.nan_is_meant
def test_no_classes_that_exist():
    loss = jaxloss.linear_cross_entropy(H, K, Y, num_classes=0, where=np.ones((4, 0), bool))
    assert np.isnan(loss)


# Every array argument of every public function


def pick(x):
    return x[:, 0]


BESIDE_TEACHER = {"hidden": H, "kernel": K, "teacher_hidden": H, "teacher_kernel": K}
# A call, and which of its arguments are arrays: of real numbers, of integers, masks, or anything.
OF_ARRAYS = {
    "check_labels": ({"labels": Y, "num_classes": 3}, {"labels": "i"}),
    "contrastive_loss": (
        {"x": X, "y": X},
        {"x": "f", "y": "f", "sample_weight": "w", "where": "b"},
    ),
    "cross_entropy": (
        {"logits": X, "labels": Y},
        {"logits": "f", "labels": "y", "weight": "f", "sample_weight": "w", "where": "b"},
    ),
    "focal_loss": (
        {"logits": X, "labels": Y},
        {"logits": "f", "labels": "y", "weight": "f", "sample_weight": "w", "where": "b"},
    ),
    "kl_divergence": (
        {"logits": X, "teacher_logits": X},
        {"logits": "f", "teacher_logits": "f", "sample_weight": "w", "where": "b"},
    ),
    "linear_cross_entropy": (
        {"hidden": H, "kernel": K, "labels": Y},
        {"hidden": "f", "kernel": "f", "labels": "y", "bias": "f", "weight": "f"}
        | {"sample_weight": "w", "where": "b"},
    ),
    "linear_kl_divergence": (
        BESIDE_TEACHER,
        {**dict.fromkeys(BESIDE_TEACHER, "f"), "bias": "f", "teacher_bias": "f"}
        | {"sample_weight": "w", "where": "b"},
    ),
    "linear_loss": (
        {"loss_fn": pick, "hidden": H, "kernel": K},
        {"hidden": "f", "kernel": "f", "bias": "f", "sample_weight": "w"},
    ),
    "linear_token_stats": (
        {"hidden": H, "kernel": K, "labels": Y},
        {"hidden": "f", "kernel": "f", "labels": "y", "bias": "f", "where": "b"},
    ),
    "linear_log_probs_at": (
        {"hidden": H, "kernel": K, "indices": Y[:, None]},
        {"hidden": "f", "kernel": "f", "indices": "i", "bias": "f", "where": "b"},
    ),
    "linear_sample": (
        {"key": jax.random.key(0), "hidden": H, "kernel": K},
        {"hidden": "f", "kernel": "f", "bias": "f", "where": "b"},
    ),
    "linear_stats_loss": (
        {"loss_fn": lambda stats: stats.log_prob, "hidden": H, "kernel": K, "labels": Y},
        {"hidden": "f", "kernel": "f", "labels": "y", "bias": "f", "where": "b"}
        | {"sample_weight": "w"},
    ),
    "linear_top_k": (
        {"hidden": H, "kernel": K, "k": 2},
        {"hidden": "f", "kernel": "f", "bias": "f", "where": "b"},
    ),
    "log_probs_at": (
        {"logits": X, "indices": Y[:, None]},
        {"logits": "f", "indices": "i", "where": "b"},
    ),
    "log_softmax": ({"logits": X}, {"logits": "f", "where": "b"}),
    "metric_sums": ({"stats": STATS}, {"sample_weight": "w"}),
    "metrics": ({"sums": SUMS}, {}),
    "next_token_labels": ({"tokens": Y}, {"tokens": "i", "segment_ids": "i", "where": "b"}),
    "nll_loss": (
        {"log_probs": X, "labels": Y},
        {"log_probs": "f", "labels": "y", "weight": "f", "sample_weight": "w", "where": "b"},
    ),
    "sequence_weight": ({"labels": Y}, {"labels": "i", "segment_ids": "i", "sample_weight": "w"}),
    "sigmoid_contrastive_loss": (
        {"x": X, "y": X},
        {"x": "f", "y": "f", "sample_weight": "w", "where": "b"},
    ),
    "sigmoid_cross_entropy": (
        {"logits": X, "labels": X},
        {"logits": "f", "labels": "y", "weight": "f", "pos_weight": "f"}
        | {"sample_weight": "w", "where": "b"},
    ),
    "sigmoid_focal_loss": (
        {"logits": X, "labels": X},
        {"logits": "f", "labels": "y", "weight": "f", "pos_weight": "f"}
        | {"sample_weight": "w", "where": "b"},
    ),
    "token_stats": ({"logits": X, "labels": Y}, {"logits": "f", "labels": "y", "where": "b"}),
    "total_weight": ({"labels": Y}, {"labels": "y", "weight": "f", "sample_weight": "w"}),
}
FUNCTIONS = sorted(OF_ARRAYS)


# That may be scalar arrays; that have checks of their own.
NUMBERS = ("label_smoothing", "z_loss", "temperature", "kl_temperature", "beta", "gamma")
NUMBERS += "logit_scale", "logit_bias"
OTHERS = ("reference", "key")


def test_no_array_argument_is_left_out():
    """An ``Args`` of a docstring that may be an array has that type in the signature."""
    names = [n for n in jaxloss.__all__ if not isinstance(getattr(jaxloss, n), type)]
    assert names == FUNCTIONS
    for name in names:
        parameters = inspect.signature(getattr(jaxloss, name)).parameters
        _, arrays = OF_ARRAYS[name]
        for argument, parameter in parameters.items():
            if "ArrayLike" in str(parameter.annotation) and parameter.kind != 2:
                known = argument in arrays or (name, argument) == ("total_weight", "where")
                assert known or argument in (*NUMBERS, *OTHERS), (name, argument)


@pytest.mark.parametrize("name", ["cross_entropy", "linear_sample", "linear_stats_loss"])
def test_a_list_of_temperatures_is_told_to_be_an_array(name):
    right, _ = OF_ARRAYS[name]
    text = r"got list\. One a token is an array: jnp\.asarray\(temperature\)\."
    with pytest.raises(TypeError, match=f"^{name}: temperature must be a number, .*{text}$"):
        call_of(name, right | {"temperature": [1.0] * 4})


class Tensor:
    """As a tensor of PyTorch that requires a gradient."""

    requires_grad = True

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use detach.")


def strange():
    """What is no array of numbers, and what is said of it."""
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "None of a list": ([None], r"list \(.*\)"),
        "ragged": ([[1], [1, 2]], r"list \(.*inhomogeneous.*\)"),
        "text": ("abc", r"str \(.*\)"),
        "tensor": (Tensor(), r"Tensor \(Can't call .*\)\. Detach it: {}\.detach\(\)"),
        "ref": (
            jax.new_ref(jnp.ones((4, 3), jnp.float32)),
            r"Ref.float32\[4,3\].\. Read it: {}\[\.\.\.\]",
        ),
        "keys": (keys, r"key<fry>\(4,\).*"),
        "float0": (np.zeros((4, 3), jax.dtypes.float0), r".*float0.*\(4, 3\).*"),
        "objects": (np.full(4, None), r"ndarray \(.*\)"),
        "dates": (np.zeros(4, "datetime64[s]"), r"ndarray \(.*\)"),
        "shape": (jax.ShapeDtypeStruct((4,), jnp.float32), r"ShapeDtypeStruct \(.*\)"),
    }


@pytest.mark.parametrize("what", strange())
def test_what_is_no_array_of_numbers_is_told_by_its_argument(what):
    wrong, got = strange()[what]
    for name, (right, arrays) in OF_ARRAYS.items():
        for argument in arrays:
            with pytest.raises(TypeError) as told:
                call_of(name, right | {argument: wrong})
            expected = rf"{name}: {argument} must [^\n]+; got {got.format(argument)}\."
            assert re.fullmatch(expected, str(told.value)), (name, argument, told.value)


def call_of(name, arguments):
    arguments = dict(arguments)
    first = [arguments.pop("loss_fn")] if "loss_fn" in arguments else []
    return getattr(jaxloss, name)(*first, **arguments)


NARROW = [
    d for d in (*vars(ml_dtypes).values(),) if isinstance(d, type) and d.__name__.startswith("flo")
]


@pytest.mark.parametrize("dtype", NARROW, ids=lambda d: d.__name__)
def test_floats_of_fewer_than_16_bits_are_refused_by_name(dtype):
    """Their gradients would be 0."""
    assert jnp.finfo(dtype).bits < 16
    wrong = X.astype(dtype)
    for name, (right, arrays) in OF_ARRAYS.items():
        for argument, kind in arrays.items():
            if kind in ("f", "y", "w"):
                rule = rf"{name}: {argument} must have a floating dtype of at least 16 bits"
                got = rf"{dtype.__name__}\(4, 3\)\. Convert it: {argument}\.astype\(jnp\.bfloat16"
                with pytest.raises(TypeError, match=f"^{rule}; got {got}"):
                    call_of(name, right | {argument: wrong})
    top = jaxloss.TopKLabels(Y[:, None], X[:, :1].astype(dtype))
    with pytest.raises(TypeError, match=r"labels\.probabilities must have .* at least 16 bits"):
        jaxloss.cross_entropy(logits=X, labels=top)
    for field in ("log_prob", "entropy", "confidence"):
        with pytest.raises(TypeError, match=rf"stats\.{field} must have .* at least 16 bits"):
            jaxloss.metric_sums(stats=STATS._replace(**{field: wrong}))


@pytest.mark.parametrize("traced", [False, True])
def test_float8_arrays_of_jax_are_refused(traced):
    def call(x):
        return jaxloss.cross_entropy(x, Y)

    with pytest.raises(TypeError, match=r"logits must .* at least 16 bits; got float8_e4m3fn\(4"):
        (jax.jit(call) if traced else call)(jnp.zeros((4, 3), jnp.float8_e4m3fn))


def test_a_ref_of_a_program_is_told_to_be_read():
    def step(x):
        ref = jax.new_ref(x)
        return jaxloss.cross_entropy(ref, Y)

    with pytest.raises(TypeError, match=r"got Ref\{float32\[4,3\]\}\. Read it: logits\[\.\.\.\]"):
        jax.jit(step)(X)


def test_a_transfer_guard_is_heard():
    with (
        jax.transfer_guard("disallow"),
        pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"),
    ):
        messages.array("log_softmax", "logits", X)


def test_random_keys_may_be_one_a_token():
    keys = jax.random.split(jax.random.key(0), 4)
    noise_of = jax.vmap(partial(jax.random.normal, dtype=jnp.float32))
    noise = noise_of(keys)

    def loss_fn(x, key):
        return x[:, 0] + noise_of(key)

    got = jaxloss.linear_loss(loss_fn, H, K, keys, reduction="none")
    np.testing.assert_array_equal(got, noise)


@pytest.mark.parametrize("name", ["int2", "uint2", "int4", "uint4"])
def test_integers_of_a_few_bits_of_numpy_are_labels(name):
    y = np.array([0, 1, 0, 1])
    narrow, rng = y.astype(getattr(ml_dtypes, name)), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    h, k = (jnp.asarray(rng.normal(size=v.shape), jnp.float32) for v in (H, K))
    calls = {
        "cross_entropy": lambda y: jaxloss.cross_entropy(x, y),
        "nll_loss": lambda y: jaxloss.nll_loss(x, y),
        "focal_loss": lambda y: jaxloss.focal_loss(x, y),
        "linear_cross_entropy": lambda y: jaxloss.linear_cross_entropy(h, k, y),
        "token_stats": lambda y: jaxloss.token_stats(x, y).log_prob,
        "TopKLabels": lambda y: jaxloss.cross_entropy(
            x, jaxloss.TopKLabels(y[:, None], np.ones((4, 1), np.float32))
        ),
        "sigmoid": lambda y: jaxloss.sigmoid_cross_entropy(x[:, 0], y),
        "total_weight": lambda y: jaxloss.total_weight(y, weight=np.ones(3, np.float32)),
        "sample_weight": lambda y: jaxloss.cross_entropy(x, Y, sample_weight=y),
        "segments": lambda y: jaxloss.sequence_weight(Y, segment_ids=y),
        "check_labels": lambda y: jaxloss.check_labels(y, 3) or 0.0,
    }
    for call, f in calls.items():
        np.testing.assert_array_equal(f(narrow), f(y), err_msg=call)


def test_integers_of_one_bit_are_widened_before_jax_fails_to_read_them():
    x = messages.array("cross_entropy", "labels", np.array([0, 1, 1], ml_dtypes.uint1))
    assert (x.dtype, x.tolist()) == (np.int8, [0, 1, 1])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mask_of_integers_is_told_how_to_become_one(name):
    """sample_weight is offered by the functions that have it."""
    right, _ = OF_ARRAYS[name]
    parameters = inspect.signature(getattr(jaxloss, name)).parameters
    if "where" not in parameters:
        return
    weights = " For weights use sample_weight." if "sample_weight" in parameters else ""
    for mask in (Y, Y.astype(np.uint8), X):
        text = f"{name}: where must be boolean; got {mask.dtype}{mask.shape}."
        with pytest.raises(TypeError) as told:
            call_of(name, right | {"where": mask})
        assert str(told.value) == f"{text} Convert it: where != 0.{weights}"
    with pytest.raises(TypeError, match=r"Convert it: jnp\.asarray\(where\) != 0\."):
        call_of(name, right | {"where": [1, 0, 1, 1]})


WRONG_SUMS = {
    "weight": (None, TypeError, "sums.weight must be an array; got None"),
    "nll": (None, TypeError, "sums.nll must be an array; got None"),
    "hits": (np.zeros((2, 3), np.float32), ValueError, r"sums\.hits must .*\(2, 2\); got .*2, 3"),
    "bin_weight": (np.float32(0), ValueError, r"sums\.bin_\w+ must have .*; got float32"),
    "bin_hits": (np.zeros((2, 3), np.float32), ValueError, r"sums\.bin_hits must .*; got .*2, 3"),
    "entropy": (np.zeros(2, int), TypeError, r"sums\.entropy must have a real floating dtype"),
    "top_k": (None, TypeError, "top_k must be a sequence of ints; got None"),
}


@pytest.mark.parametrize("field", WRONG_SUMS)
def test_sums_that_metric_sums_did_not_make(field):
    wrong, kind, text = WRONG_SUMS[field]
    with pytest.raises(kind, match=f"^metrics: {text}"):
        jaxloss.metrics(dataclasses.replace(SUMS, **{field: wrong}))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"top_k": [2**31]}, r"each of top_k must be at most 2147483647; got 2147483648"),
        ({"top_k": [1, 10**30]}, r"each of top_k must be at most 2147483647; got 1000"),
        ({"bins": 10**30}, r"bins must be at most 16777216; got 1000"),
        ({"bins": 2**24 + 1}, r"bins must be at most 16777216; got 16777217"),
        ({"stats": STATS._replace(rank=Y[:, None])}, r"stats\.rank must have the shape"),
    ],
)
def test_numbers_of_metrics_are_bounded(options, text):
    with pytest.raises(ValueError, match=f"metric_sums: {text}"):
        jaxloss.metric_sums(**{"stats": STATS, **options})


def test_ranks_are_integers():
    with pytest.raises(TypeError, match=r"stats\.rank must have an integer dtype; got float32"):
        jaxloss.metric_sums(STATS._replace(rank=X[:, 0]))


def test_top_k_labels_of_no_arrays():
    ragged = [[1], [1, 2]]
    for y in (jaxloss.TopKLabels(ragged, X[:, :1]), jaxloss.TopKLabels(Y[:, None], ragged)):
        for call in (jaxloss.total_weight, lambda y: jaxloss.cross_entropy(X, y)):
            with pytest.raises(TypeError, match=r"labels\.(indices|prob\w+) must be an array; got"):
                call(y)


# What labels of another layout fit


@pytest.mark.parametrize(
    ("logits", "axis", "labels", "fits"),
    [
        ((2, 3, 5), -1, (2, 5), " The labels fit axis=1."),
        ((2, 3, 5), -1, (3, 5), " The labels fit axis=0."),
        ((2, 3, 5), 0, (2, 3), " The labels fit axis=2."),
        ((2, 3, 5), (0, 1), (2,), " The labels fit axis=(1, 2)."),
        ((4, 3), 1, (3,), " The labels fit axis=0."),
        ((2, 3, 5, 7), -1, (2, 7), " The labels fit axis=(1, 2)."),
        ((2, 3, 5, 7), (1, 2), (2, 5, 7), " The labels fit axis=1."),
        ((2, 3, 3, 5), -1, (2, 3, 5), ""),  # two fit
        ((2, 3, 5), -1, (), ""),
        ((2, 3, 5), -1, (7, 5), ""),
        ((4, 3), 1, (1,), ""),
    ],
)
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "focal_loss", "token_stats"])
def test_labels_that_fit_another_axis(name, logits, axis, labels, fits):
    x, y = np.zeros(logits, np.float32), np.zeros(labels, np.int32)
    with pytest.raises(ValueError, match=rf"^{name}: labels must have the shape of") as told:
        getattr(jaxloss, name)(x, y, axis=axis)
    first = "log_probs" if name == "nll_loss" else "logits"
    assert str(told.value).endswith(f"; got int32{labels}. {first}: float32{logits}.{fits}")


def test_top_k_labels_that_fit_another_axis():
    x, y = np.zeros((2, 3, 5), np.float32), np.zeros((2, 5, 4), np.int32)
    for call in (jaxloss.cross_entropy, jaxloss.token_stats):
        with pytest.raises(ValueError, match=r"got int32\(2, 5, 4\)\. The labels fit axis=1\.$"):
            call(x, jaxloss.TopKLabels(y, np.zeros(y.shape, np.float32)))


def test_a_product_has_no_axis_to_offer():
    for name in ("linear_cross_entropy", "linear_token_stats"):
        with pytest.raises(ValueError, match=rf"^{name}: .*hidden @ kernel: float32\(4, 3\)\.$"):
            getattr(jaxloss, name)(H, K, Y[:3])


@pytest.mark.parametrize("dtype", [bool, np.int8])
def test_one_hot_labels_are_told_to_be_probabilities(dtype):
    one_hot = np.eye(3, dtype=dtype)[Y]
    calls = {
        "cross_entropy": lambda y: jaxloss.cross_entropy(X, y),
        "nll_loss": lambda y: jaxloss.nll_loss(X, y),
        "linear_cross_entropy": lambda y: jaxloss.linear_cross_entropy(H, K, y),
        "token_stats": lambda y: jaxloss.token_stats(X, y),
    }
    for name, call in calls.items():
        for y, code in (
            (one_hot, r"labels\.astype\(jnp\.float32\)"),
            (one_hot.tolist(), r"jnp\.asarray\(labels, jnp\.float32\)"),
        ):
            with pytest.raises((TypeError, ValueError), match=rf"^{name}: labels must .*{code}\.$"):
                call(y)
    with pytest.raises(TypeError, match=r"Class indices are integers: labels\.astype\(jnp\.int32"):
        jaxloss.cross_entropy(X[:, :2], Y.astype(bool))


# ignore_index is no class probability


IGNORING = {
    "cross_entropy": lambda y, **o: jaxloss.cross_entropy(X, y, **o),
    "nll_loss": lambda y, **o: jaxloss.nll_loss(X, y, **o),
    "linear_cross_entropy": lambda y, **o: jaxloss.linear_cross_entropy(H, K, y, **o),
    "token_stats": lambda y, **o: jaxloss.token_stats(X, y, **o),
    "linear_token_stats": lambda y, **o: jaxloss.linear_token_stats(H, K, y, **o),
    "total_weight": lambda y, **o: jaxloss.total_weight(y, **o),
    "sigmoid_cross_entropy": lambda y, **o: jaxloss.sigmoid_cross_entropy(X, y, **o),
    "sigmoid_focal_loss": lambda y, **o: jaxloss.sigmoid_focal_loss(X, y, **o),
}


@pytest.mark.parametrize("name", IGNORING)
def test_ignore_index_beside_probabilities_is_refused(name):
    call = IGNORING[name]
    offers = "sample_weight" in inspect.signature(getattr(jaxloss, name)).parameters
    for ignored in (2, 0, -1, np.int64(255)):
        with pytest.raises(ValueError, match=rf"^{name}: ignore_index is for .* got ") as told:
            call(X, ignore_index=ignored)
        assert f"got ignore_index {ignored} beside labels float32(4, 3). " in str(told.value)
        assert ("sample_weight or where" in str(told.value)) == offers
    if "sigmoid" in name:
        with pytest.raises(ValueError, match="beside labels bool"):
            call(X > 0, ignore_index=1)
    for allowed in (-100, None):
        jax.eval_shape(partial(call, X, ignore_index=allowed))


def test_ignore_index_is_for_empty_slots_of_top_k_labels():
    indices, q = np.array([[0, 1], [2, 7], [7, 7], [1, 0]]), np.full((4, 2), 0.5, np.float32)
    y = jaxloss.TopKLabels(indices, q)
    default = jaxloss.TopKLabels(np.where(indices == 7, -100, indices), q)
    for name in ("cross_entropy", "total_weight"):
        np.testing.assert_array_equal(IGNORING[name](y, ignore_index=7), IGNORING[name](default))
    for name in ("linear_cross_entropy", "token_stats", "linear_token_stats"):
        jax.eval_shape(lambda name=name: IGNORING[name](y, ignore_index=7))
