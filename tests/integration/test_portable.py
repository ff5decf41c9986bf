"""SURFLOW_PORTABLE: the same bits whatever kernels the CPU offers."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import hashlib
from functools import partial
import surflow
import torch
from surflow.models import coupling_flow, coupling_net
from surflow.nets import MLP
from surflow.transforms import AffineMap
from surflow.training.hardware import what_to_compile
from surflow.training.origin import machine

torch.manual_seed(0)
flow = coupling_flow(2, AffineMap("exp"), partial(coupling_net, hidden_features=[200, 100]), 4)
conv = torch.nn.Conv2d(6, 12, 3, padding=1)
parameters = [*flow.parameters(), *conv.parameters()]
adam = torch.optim.Adam(parameters, lr=1e-3, fused=True)
x, images = torch.randn(1280, 2), torch.randn(1280, 6, 8, 8)
for rows, pixels in zip(x.split(128), images.split(128)):
    adam.zero_grad()
    loss = conv(pixels).square().mean() - flow.log_prob(rows).mean()
    loss.backward()
    adam.step()
bits = b"".join(p.detach().numpy().tobytes() for p in parameters)
told = machine()
compiled = what_to_compile({"compile": "auto", "memory": "stored"}, 1)
print(hashlib.sha256(bits).hexdigest()[:16], told["kernels"], told["threads"], compiled)
"""

LESS = {  # what a CPU without AVX and FMA would choose by itself
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA,-AVX",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
}


def bits(**environment: str) -> list[str]:
    keep = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "PYTHONPATH", "CXX")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=keep | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_portable_kernels_give_the_same_bits_on_a_lesser_cpu():
    one, other = bits(SURFLOW_PORTABLE="1"), bits(SURFLOW_PORTABLE="1", **LESS)
    assert one == other
    assert one[1:] == ["portable", "1", "None"]
    assert bits(SURFLOW_PORTABLE="0", OMP_NUM_THREADS="1")[1] != "portable"


@pytest.mark.slow
def test_portable_kernels_give_the_bits_of_another_machine():
    """Measured on an AMD EPYC with AVX2; torch 2.13."""
    assert bits(SURFLOW_PORTABLE="1")[0] == "69abf5894b77eb5f"


def test_torch_must_not_be_there_first():
    done = subprocess.run(
        [sys.executable, "-c", "import torch, surflow"],
        env={"SURFLOW_PORTABLE": "1", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "RuntimeError: SURFLOW_PORTABLE: expected surflow to be imported before torch"
