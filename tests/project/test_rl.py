"""The comparison of objectives with TRL and Liger, where jaxloss alone is sure to be here."""

import jax
import numpy as np
import pytest

from benchmarks.methods import calls, objectives, torch_objectives
from benchmarks.parts import rl

TINY = 4, 8, 8, 40  # answers, tokens, D, V
CASES = [(name, "flat") for name in objectives.OBJECTIVES]
CASES += [("DAPO", "confident"), ("JSD", "close")]


@pytest.fixture(autouse=True)
def _defaults():
    # What is timed is not written for stricter promotion.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
    ):
        yield


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_ours_are_the_formulas(name, setting):
    batch = objectives.batch_of(TINY, setting, full=False)
    assert (batch.labels == -100).any()
    truth = objectives.truth(name, batch)
    assert truth[0].dtype == np.float64

    def off(function):
        found = jax.jit(objectives.with_gradients(function))(*batch)
        return rl.error_of(jax.tree.map(np.asarray, found), truth)

    objective = objectives.OBJECTIVES[name]
    ours, plain = off(objective.ours), off(objective.plain)
    # A clipped token's gradient in GRPO is that of an estimate near 0, which float32 blurs for all.
    assert all(ours[kind] < 3 * plain[kind] + 1e-5 for kind in ours)
    assert ours["kernel"] < (1e-3 if (name, setting) == ("JSD", "close") else 1e-5)


def test_what_is_wrong_is_seen():
    batch = objectives.batch_of(TINY, full=False)
    value, (d_hidden, d_kernel) = objectives.truth("DAPO", batch)
    wrong = d_hidden.copy()
    row = np.argwhere(np.any(wrong != 0, axis=-1))[0]
    wrong[tuple(row)] *= 1.5
    off = rl.error_of((1.1 * value, (wrong, d_kernel)), (value, (d_hidden, d_kernel)))
    assert off == pytest.approx({"value": 0.1, "token": 0.5, "kernel": 0.0})


def test_tables_without_a_library(monkeypatch):
    def load(batch):
        raise ModuleNotFoundError("No module named 'trl'")

    monkeypatch.setattr(torch_objectives, "LOADERS", {"TRL": load})
    monkeypatch.setattr(rl, "METHODS", (rl.OURS, rl.PLAIN, "TRL"))
    monkeypatch.setattr(rl, "SMALL", TINY)
    monkeypatch.setattr(objectives, "SETTINGS", ("flat",))
    found, absent = rl.errors(lambda share, *note: None)
    few = [rl.cost("entropy", TINY, 0.01, lambda share: None)]
    data = {"environment": {}, "errors": found, "cost": few, "absent": absent}
    shown = {table.title: table for table in rl.tables(data | {"shape_of_errors": list(TINY)})}
    assert absent == {"TRL": "ModuleNotFoundError: No module named 'trl'"}
    assert shown["Not compared"].rows == [list(*absent.items())]
    times = next(table for title, table in shown.items() if "time of a value" in title)
    assert times.rows[0][:3] == ["entropy", "32 x 8 x 40", "3"]
    assert times.rows[0][-1] == "-"
    assert len(found) == len(objectives.OBJECTIVES)
    assert rl.missed(data) is None
    found[0]["errors"][rl.OURS]["value"] = float("nan")
    assert rl.missed(data).startswith("GRPO, flat")


def test_a_method_that_is_wrong_is_not_timed(monkeypatch):
    real = rl.calls_of

    def with_wrong(name, batch, losses):
        wrong = lambda x: 1.1 * objectives.OBJECTIVES[name].ours(x)  # noqa: E731
        return real(name, batch, {}) | {"TRL": calls.Jax(objectives.with_gradients(wrong), batch)}

    monkeypatch.setattr(rl, "calls_of", with_wrong)
    monkeypatch.setattr(torch_objectives, "LOADERS", {})
    row = rl.cost("DAPO", TINY, 0.01, lambda share: None)
    assert {rl.OURS, rl.PLAIN} == set(row["of_products"])
    assert row["left_out"]["TRL"].startswith("AssertionError")
