"""Sloppiness is loud here: no implicit promotion of dtypes or ranks, 8 devices, warnings raise.

The suite also passes under JAX's stricter settings, each an environment variable: JAX_ENABLE_X64,
JAX_DEBUG_NANS, JAX_TRANSFER_GUARD, JAX_CHECK_TRACER_LEAKS (`.ci/settings` runs them all).
"""

import collections
import contextlib
import functools
import gc
import itertools
import os

# Both are read when JAX starts; subprocesses that tests start inherit the promotion rules too.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)
if os.environ.get("JAX_PLATFORMS") != "cuda":  # for test_kernels_gpu and the soak
    os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# The tests hand numpy arrays to JAX at will: the guard is for what the library itself does.
os.environ["GUARD"] = os.environ.pop("JAX_TRANSFER_GUARD", "")

import hypothesis
import jax
import numpy as np
import pytest
from forms import FORMS, SCHEDULES

import jaxloss
from jaxloss._linear import budget, packing

hypothesis.settings.register_profile(
    "suite",
    deadline=None,  # an example that compiles takes 100 times as long as one that does not
    derandomize=True,
    max_examples=25,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "soak",
    deadline=None,
    max_examples=int(os.environ.get("JAXLOSS_SOAK_EXAMPLES", "50")),
    database=None,
    phases=[hypothesis.Phase.generate],  # each step of shrinking would be a compilation
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("suite")


# pytest -m soak: thousands of random cases, and programs that take long, which nothing else runs.


def pytest_configure(config):
    config.addinivalue_line("markers", "nan_is_meant: a NaN is what is tested; JAX_DEBUG_NANS off")
    config.addinivalue_line("markers", "jax_leaks(what): it is JAX; JAX_CHECK_TRACER_LEAKS off")
    config.addinivalue_line("markers", "every_case: of which --each leaves nothing out")
    config.addinivalue_line("markers", "soak: for as long as one likes; -m soak")
    if "soak" in config.option.markexpr:
        hypothesis.settings.load_profile("soak")


def pytest_addoption(parser):
    parser.addoption(
        "--each",
        type=int,
        default=1,
        help="N: of a test's cases each N-th alone, the first among them",
    )


def pytest_collection_modifyitems(config, items):
    def taken(item):
        if item.get_closest_marker("soak"):
            return "soak" in config.option.markexpr
        nth = next(counts[item.module, item.originalname])
        return nth % config.option.each == 0 or item.get_closest_marker("every_case")

    counts = collections.defaultdict(itertools.count)
    kept = {item: taken(item) for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not kept[item]])
    items[:] = [item for item in items if kept[item]]


def pytest_terminal_summary(terminalreporter):
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    properties = [dict(getattr(r, "user_properties", ())) for r in reports if r.when == "call"]
    cases = sum(p.get("cases", 0) for p in properties)
    if cases:
        terminalreporter.write_line(f"soak: {cases} cases")


@pytest.fixture(autouse=True)
def _nans(request):
    # By a context: leaving one of debug_nans(False), as JAX does inside, would end the check.
    on, meant = jax.config.jax_debug_nans, request.node.get_closest_marker("nan_is_meant")
    with jax.debug_nans(not meant) if on else contextlib.nullcontext():
        yield


@pytest.fixture
def old_objects_are_left_alone():
    """The leak checker collects garbage at the end of each trace: among what the test has made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _leaks(request):
    # JAX 0.10 to 0.12 leak tracers of jit(grad(shard_map(f))), f = sum(x * x) included, and of a
    # plgpu.kernel that does no more than copy, 0.11 and 0.12 of such a kernel for TPUs interpreted.
    if not jax.config.jax_check_tracer_leaks:
        yield
        return
    request.getfixturevalue("old_objects_are_left_alone")
    with jax.check_tracer_leaks(not request.node.get_closest_marker("jax_leaks")):
        yield


@pytest.fixture(autouse=True)
def _quarters_of_few_tokens(monkeypatch):
    """A test's few tokens go through the programs that many take."""
    monkeypatch.setattr(packing, "FEWEST", 4)


@pytest.fixture(params=FORMS)
def form(request):
    """What holds for each of them is said once: whole rows, and every schedule of a product."""
    return FORMS[request.param]


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    """The name of each schedule of a product."""
    return request.param


@pytest.fixture(params=[None, 2], ids=["whole", "blocks"])
def block(request, monkeypatch):
    """How many tokens' logits a loss reads at a time, None for all of a chunk: on one CPU device
    blocks of a MiB, of which a test's few columns would make one."""
    monkeypatch.setattr(budget, "block_of_rows", lambda *_: request.param)
    return request.param


def guarded(function):
    """Calls with concrete arrays run under the guard, their operands on the device beforehand."""

    def put(x):
        return jax.device_put(x) if isinstance(x, np.ndarray) else x

    @functools.wraps(function)
    def call(*args, **kwargs):
        operands = jax.tree.leaves(args)
        concrete = all(isinstance(x, np.ndarray | jax.Array) for x in operands)
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, kwargs)))
        if not operands or not concrete or traced or jax.config.jax_disable_jit:
            return function(*args, **kwargs)
        args, kwargs = jax.tree.map(put, (args, kwargs))
        with jax.transfer_guard(GUARD):
            return function(*args, **kwargs)

    return call


GUARD = os.environ.pop("GUARD")
if GUARD:
    for name in jaxloss.__all__:
        if not isinstance(vars(jaxloss)[name], type):
            setattr(jaxloss, name, guarded(vars(jaxloss)[name]))
