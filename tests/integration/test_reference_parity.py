"""PoolFlow against values computed with the authors' implementation.

Every fixture in the folder named by SURFLOW_REFERENCE (default: the copies beside these tests) is
checked, whatever its configuration: NAME.json, NAME.weights.safetensors, NAME.values.safetensors.
"""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from doubles import with_noise
from reference import reference_configuration
from safetensors.torch import load_file

from surflow.distributions import StandardNormal
from surflow.models.downsampling import max_pool, slice_off
from surflow.models.official import (
    load_official,
    official_configuration,
    official_constants,
    official_flow,
    official_names,
    read_tensors,
)
from surflow.models.pool_flow import pool_flow
from surflow.transforms import AffineCoupling, AffineMap

OWN = Path(__file__).parents[1] / "fixtures" / "reference"
FOLDER = Path(os.environ.get("SURFLOW_REFERENCE", OWN))
FIXTURES = sorted(
    p.stem for p in FOLDER.glob("*.json") if (FOLDER / f"{p.stem}.values.safetensors").exists()
)


def reference(name):
    config = reference_configuration(json.loads((FOLDER / f"{name}.json").read_text()))
    weights = read_tensors(FOLDER / f"{name}.weights.safetensors")
    return config, weights, load_file(FOLDER / f"{name}.values.safetensors")


def test_there_are_fixtures_of_each_kind():
    names = {p.stem for p in OWN.glob("poolflow_small_*.json")}
    assert names >= {"poolflow_small_max", "poolflow_small_none", "poolflow_small_uniform"}


@pytest.mark.parametrize("name", FIXTURES)
@torch.no_grad()
def test_values_of_the_reference(name):
    config, weights, values = reference(name)
    flow = with_noise(load_official(pool_flow(**config), weights).eval(), values)
    x = values["x"]
    z, ldj = flow.transforms(x)
    base = flow.base.log_prob(z)
    # the values are float32: a unit in the last place is 6e-5 at 800 nats, 2e-3 at 20,000
    torch.testing.assert_close(z, values["z"], atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(base, values["base_log_prob"], atol=1e-4, rtol=2.4e-7)
    torch.testing.assert_close(base + ldj, values["log_prob"], atol=1e-4, rtol=2.4e-7)
    if "log_q_u_given_x" in values:
        rounding = flow.transforms[0].transform
        u, log_q = rounding.noise.sample_and_log_prob(context=rounding._code(x))
        torch.testing.assert_close(u, values["u"], atol=1e-6, rtol=0)
        torch.testing.assert_close(log_q, values["log_q_u_given_x"], atol=1e-3, rtol=2e-6)


@pytest.mark.parametrize("name", FIXTURES)
@torch.no_grad()
def test_values_of_the_reference_hold_in_float64(name, double):
    """Where our own rounding is nothing, what is left is the fixture's."""
    _, weights, values = reference(name)
    flow = official_flow(weights, values["x"].shape[2:])
    flow = with_noise(flow, values)
    z, ldj = flow.transforms(values["x"])
    got = flow.base.log_prob(z) + ldj
    assert got.dtype == torch.float64
    torch.testing.assert_close(z, values["z"].double(), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(got, values["log_prob"].double(), atol=1e-4, rtol=4e-7)


def exponential_scale(flow):
    for layer in flow.transforms:
        if isinstance(layer, AffineCoupling):
            layer.map = AffineMap("exp")


def swapped_halves(flow):
    flow.transforms[4].swap = True


def normal_remainders(flow):
    pool = flow.transforms[7]
    pool.decoder = StandardNormal(pool.decoder.event_shape)


def no_shift(flow):
    flow.transforms[1].shift.zero_()


def columns_first(flow):
    flow.transforms[3].weight.data = flow.transforms[3].weight.data.T


@pytest.mark.parametrize(
    "wrong", [exponential_scale, swapped_halves, normal_remainders, no_shift, columns_first]
)
@torch.no_grad()
def test_the_values_tell_a_wrong_layer(wrong):
    weights = read_tensors(OWN / "poolflow_small_uniform.weights.safetensors")
    values = load_file(OWN / "poolflow_small_uniform.values.safetensors")
    flow = with_noise(official_flow(weights), values)
    torch.testing.assert_close(flow.log_prob(values["x"]), values["log_prob"])
    wrong(flow)
    assert (flow.log_prob(values["x"]) - values["log_prob"]).abs().min() > 0.02


@pytest.mark.parametrize("name", FIXTURES)
def test_the_configuration_is_read_off_the_names(name):
    config, weights, values = reference(name)
    found = official_configuration(weights, values["x"].shape[2:])
    assert {k: found[k] for k in config if k in found} == {
        k: v for k, v in config.items() if k in found
    }
    assert found["dequantization"] == config.get("dequantization", "uniform")
    assert "context_channels" in found or found["dequantization"] == "uniform"


@pytest.mark.parametrize("pooling", ["max", "none"])
def test_the_full_model_has_the_official_names_and_shapes(pooling):
    official = json.loads((OWN / "poolflow_cifar10_state_dict.json").read_text())[pooling]
    flow = pool_flow(downsampling={"max": max_pool, "none": slice_off}[pooling])
    own = {name: tuple(p.shape) for name, p in flow.named_parameters()}
    names, constants = official_names(flow), official_constants(flow)
    assert set(names) | set(constants) == set(official) and not set(names) & set(constants)
    assert sorted(names.values()) == sorted(own)  # each of ours once
    for name, ours in names.items():
        theirs = tuple(official[name])
        assert theirs in (own[ours], (1, *own[ours])), name
    assert sum(math.prod(s) for s in own.values()) == 105_023_968
    meta = {name: torch.empty(shape, device="meta") for name, shape in official.items()}
    found = official_configuration(
        meta | {"transforms.0.ldj_per_dim": torch.tensor(-8 * math.log(2))}
    )
    assert found["downsampling"] is {"max": max_pool, "none": slice_off}[pooling]
    assert (found["num_scales"], found["num_steps"], found["depth"]) == (2, 12, 10)
    assert (found["dequant_steps"], found["context_channels"], found["gated"]) == (4, 32, True)
