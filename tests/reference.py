"""Configurations of the reference fixtures."""

from surflow.errors import check_choice
from surflow.models.downsampling import max_pool, slice_off

POOLING = {"max": max_pool, "none": slice_off}
DEQUANTIZATION = {"uniform": "uniform", "flow": "variational"}
KEYS = {
    "shape": "shape",
    "scales": "num_scales",
    "num_scales": "num_scales",
    "steps": "num_steps",
    "mid": "mid_channels",
    "depth": "depth",
    "growth": "growth",
    "gated": "gated",
    "dsteps": "dequant_steps",
    "ctx": "context_channels",
    "actnorm": "actnorm",
}


def reference_configuration(config):
    """Arguments of ``pool_flow`` from a fixture's configuration; a key left out has the published
    value."""
    arguments = {}
    for key, value in config.items():
        if key == "pooling":
            check_choice("reference pooling", value, POOLING)
            arguments["downsampling"] = POOLING[value]
        elif key == "dequant":
            check_choice("reference dequant", value, DEQUANTIZATION)
            arguments["dequantization"] = DEQUANTIZATION[value]
        elif key == "bits":
            arguments["num_levels"] = 2**value
        else:
            check_choice("reference key", key, KEYS)
            arguments[KEYS[key]] = value
    return arguments
