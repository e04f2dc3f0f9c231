"""The instructions that the TPU compiler scheduled: what its estimates leave out.

It takes an accurate exponential for one instruction, and knows nothing of hand-written kernels. Its
dumps have each operation as the bundles that a core issues, one a cycle, and do not know memory.
"""

import os
import re
from pathlib import Path

from benchmarks.harness.hlo import Scheduled

_LENGTH = "final_hlo-static-per-bundle-utilization"


def dump_to(folder: Path) -> None:
    """Read when libtpu starts."""
    options = {"to": folder, "llo_text": "true", "llo_pass_label_regex": "final_.*"}
    flags = (f"--xla_jf_dump_{name}={value}" for name, value in options.items())
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(flags)


def take(folder: Path) -> Scheduled:
    """Of the program that was dumped last, whose files go.

    The pipeline of the loop around a kernel starts and ends with a step more.
    """
    bundles, steps = {}, {}
    for path in folder.glob(f"*{_LENGTH}.txt"):
        name = re.sub(r"^\d+-(.*)-\d+-final_.*", r"\1", path.name)
        text = path.read_text()
        bundles[name] = text[text.index("UTILIZATION") :].count("\n") - 1
        program = next(folder.glob(f"*-{name}-*-final_bundles.txt"), None)
        tests = re.findall(r", (\d+) /\* loop exit test", program.read_text()) if program else []
        if tests:
            steps[name] = int(tests[-1]) - 2
    for path in folder.iterdir():
        path.unlink()
    return Scheduled(bundles, steps)
