"""What the numbers were measured on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jaxloss", "jax", "jaxlib", "optax", "flax", "numpy")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    # What this process may use, which in a container is fewer than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def installed(name: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def environment(*packages: str) -> dict[str, Any]:
    """The machine and the versions; of ``packages`` too, which need not be installed."""
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": _cpu_model(),
        "cores": _cores(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        **{name: installed(name) for name in packages},
    }


def describe(env: dict[str, Any]) -> str:
    where = f"{env['cpu']}, {env['cores']} core{'s' if env['cores'] > 1 else ''}"
    if env["device"] != "cpu":
        where = f"{env['device']} ({where})"
    versions = ", ".join(f"{name} {env[name]}" for name in ("jax", "jaxlib", "optax", "flax"))
    return f"{where}; Python {env['python']}, {versions}"
