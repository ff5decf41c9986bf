"""One answer on every x86-64 CPU, for a price in speed: `SURFLOW_PORTABLE=1`. Imports no torch.

A sum of floats depends on the order of its terms, and that order on the width of the vectors that a
CPU has, on the kernels that were chosen or compiled for it, and on the number of threads. Training
enlarges such differences until they are seen in the printed digits.
"""

from __future__ import annotations

import os
import sys

KERNELS = {
    "ATEN_CPU_CAPABILITY": "default",  # torch's own kernels
    "MKL_CBWR": "COMPATIBLE",  # matrix products
    "DNNL_MAX_CPU_ISA": "SSE41",  # convolutions
    "OMP_NUM_THREADS": "1",
}
"""What the libraries read when they start: kernels that every x86-64 CPU has, and one thread."""


def portable() -> bool:
    """Whether the environment asks for it."""
    return os.environ.get("SURFLOW_PORTABLE", "0") not in ("", "0")


def fix_kernels() -> None:
    """Set the environment of the libraries, before torch is there; raises RuntimeError after."""
    if any(os.environ.get(key) != value for key, value in KERNELS.items()):
        if "torch" in sys.modules:
            raise RuntimeError("SURFLOW_PORTABLE: expected surflow to be imported before torch")
        os.environ |= KERNELS
