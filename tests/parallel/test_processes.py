"""Training across processes: JAX's own runtime, on the loopback device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

WORKER = Path(__file__).parent / "worker.py"


def start(count, steps):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={8 // count}"
    return [
        subprocess.Popen(
            [sys.executable, WORKER, *map(str, (rank, count, port, steps))],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def results(processes):
    try:
        outputs = [p.communicate(timeout=180) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, (_, err) in zip(processes, outputs, strict=True):
        assert p.returncode == 0, err[-2000:]
    return json.loads(outputs[0][0].splitlines()[-1])


def test_two_processes_train_as_one():
    one, two = (results(start(count, steps=5)) for count in (1, 2))
    assert one["losses"][-1] < one["losses"][0] - 0.5
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    for name in one["sums"]:
        np.testing.assert_allclose(two["sums"][name], one["sums"][name], rtol=1e-4, atol=1e-4)
