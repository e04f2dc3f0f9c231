"""Sloppiness is loud here: no implicit promotion of dtypes or ranks, 8 devices, warnings raise."""

import os

# Both are read when JAX starts; subprocesses that tests start inherit the promotion rules too.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

import hypothesis

hypothesis.settings.register_profile(
    "suite",
    deadline=None,  # an example that compiles takes 100 times as long as one that does not
    derandomize=True,
    max_examples=25,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")
