"""The comparison with other libraries, where of them optax alone is sure to be here."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.harness import products
from benchmarks.methods import answers, calls, libraries
from benchmarks.parts import peers


@pytest.fixture(autouse=True)
def _defaults():
    # The peers are not written for stricter promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def rows():
    with (
        jax.debug_nans(False),  # a module's fixture is set up before a test's marks are in force
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        ours = libraries.LOADERS["jaxloss"]()
        theirs = libraries.LOADERS["optax"]()
        logits = {"jaxloss": libraries.Peer(ours.logits), "optax": theirs}
        return answers.run(logits)


def wrong(rows, name):
    return {(row["question"], row["of"]) for row in rows if row["logits"][name]["wrong"]}


def test_jaxloss_is_right(rows):
    # A row that holds +inf is NaN, says its docstring.
    off = {("+inf at another class", "loss"), ("+inf at another class", "gradient at the label")}
    assert wrong(rows, "jaxloss") == off
    assert not [row for row in rows if row["logits"]["jaxloss"]["text"] in ("-", "TypeError")]


def test_what_is_wrong_is_seen(rows):
    found = wrong(rows, "optax")
    for question in ("margin 20", "label -1", "label -100, one of two", "bfloat16, margin 5"):
        assert question in {q for q, _ in found}
    assert ("margin 40", "loss") in found
    assert "label C" not in {q for q, _ in found}  # NaN
    (shown,) = peers.answers_tables([{**row, "linear": {}} for row in rows])[:1]
    cells = [line[4] for line in shown.rows]
    assert sum(cell.endswith(peers.WRONG) for cell in cells) == len(found)
    assert "-" in cells  # it has no ignore_index


def test_absent_peers_are_listed_with_a_reason(monkeypatch):
    def load():
        raise ModuleNotFoundError("No module named 'cce'\nand more")

    few = {"optax": libraries.LOADERS["optax"], "cce": load}
    monkeypatch.setattr(libraries, "LOADERS", few)
    found, absent = libraries.load(few)
    assert list(found) == ["optax"]
    assert absent == {"cce": "ModuleNotFoundError: No module named 'cce'"}
    assert peers.versions()["optax"]


def test_products_are_counted():
    """Loops as often as they run: of scan, of while (whose trips depend on data), of branches."""
    a, n = jnp.ones((4, 5)), jnp.int32(2)

    def program(a, n):
        c, _ = jax.lax.scan(lambda c, x: (c + (x @ x.T).sum(), c), 0.0, jnp.stack([a] * 3))
        c = jax.lax.fori_loop(0, n, lambda i, c: c + (a @ a.T).sum(), c)
        return jax.lax.cond(n > 5, lambda: c, lambda: c + (a @ a.T).sum())

    assert products.jax_products(program, (a, n), (4, 5, 4)) == 3 + 2 + 1


def test_a_method_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(calls, "jax_products", lambda *args: 3)  # it takes seconds
    optax = libraries.LOADERS["optax"]()
    off = libraries.Peer(lambda x, labels: 1.1 * optax.logits(x, labels))
    both, one = {"optax": optax, "off": off}, ((8, 4, 16),)
    data = peers.cost(both, 0.01, lambda share: None, one, ("float32",))
    (row,) = data["rows"]
    assert "optax" in row["of_products"]
    assert "off" not in row["median_ms"]
    assert row["left_out"]["off"].startswith("AssertionError")
    assert peers.cost_tables(data)[-1].rows[0][1] == "off"
