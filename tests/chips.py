"""A chip that is not there, in the place of this machine's.

What the package takes for a chip goes by what JAX says of it: ``jax.default_backend``,
``jax.devices`` and ``jax.device_count``; and in a program for several platforms
``jax.lax.platform_dependent`` chooses a form. Nothing private is patched.
"""

import contextlib
from functools import partial
from types import SimpleNamespace
from unittest import mock

import jax

KINDS = {"gpu": "NVIDIA H200", "tpu": "TPU v5 lite"}
PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}


@contextlib.contextmanager
def kernels_of(backend, *, kind=None, capability="9.0", chips=None, devices=None, runs=False):
    """Programs are traced as on a chip of ``backend``, one that has kernels unless ``kind`` or
    ``capability`` says otherwise.

    Args:
      chips: what ``jax.devices()`` is, those of a compiler's topology for instance.
      devices: how many there are; None leaves this machine's number. No kernel runs on several
        devices outside of ``shard_map``.
      runs: the programs run here, their kernels interpreted, and by the forms of that platform.
    """
    if chips is None:
        kind = KINDS[backend] if kind is None else kind
        chips = [SimpleNamespace(platform=backend, device_kind=kind, compute_capability=capability)]
    with contextlib.ExitStack() as stack:

        def patch(module, name, value):
            stack.enter_context(mock.patch.object(module, name, value))

        patch(jax, "default_backend", lambda: backend)
        patch(jax, "devices", lambda *_: list(chips))
        if devices is not None:
            patch(jax, "device_count", lambda *_: devices)
        if runs:
            patch(jax.lax, "platform_dependent", forms_of(PLATFORMS[backend]))
            for module, name, value in _interpreters(backend):
                patch(module, name, value)
        stack.enter_context(fresh_programs())
        yield


@contextlib.contextmanager
def fresh_programs():
    """A program that was traced for one chip is not used for another."""
    jax.clear_caches()
    try:
        yield
    finally:
        jax.clear_caches()


def forms_of(platform):
    """A ``platform_dependent`` that takes the form of this platform; None: what accelerators take
    where CPUs alone have a form of their own."""
    return lambda *args, default, **forms: forms.get(platform, default)(*args)


def _interpreters(backend):
    if backend == "gpu":
        from jax.experimental.pallas import mosaic_gpu as plgpu

        if hasattr(plgpu, "InterpretGPUParams"):  # from JAX 0.11 on
            interpreted = partial(plgpu.kernel, interpret=plgpu.InterpretGPUParams())
            yield plgpu, "kernel", interpreted
        return
    from jax.experimental import pallas as pl

    from jaxloss._pallas import linear_tpu, one_pass_tpu

    interpreted = {"pallas_call": partial(pl.pallas_call, interpret=True)}
    for kernels in (linear_tpu, one_pass_tpu):
        yield kernels, "pl", SimpleNamespace(**vars(pl) | interpreted)
