"""State dicts of the SurVAE authors' PoolFlow, read into ours.

Parameters correspond one to one, with equal values. Their constants (log of the number of levels,
shift, temperature) are checked against the flow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surflow.errors import UserError
from surflow.flow import Flow, FlowDistribution
from surflow.models.downsampling import max_pool, slice_off
from surflow.models.pool_flow import pool_flow
from surflow.nets import DenseBlock, DenseNet, GatedConv2d, ImageEmbedding
from surflow.transforms import (
    ActNorm,
    Affine,
    AffineCoupling,
    Conv1x1,
    Dequantization,
    Inverse,
    MaxPool2d,
    Sequential,
    Slice,
    Transform,
)

# Reading


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU: a ``.safetensors`` file, or a checkpoint of torch.

    A checkpoint is read with ``weights_only=True``: nothing in it can run. It is a state dict, or
    has one under ``model``. Numbers of NumPy are allowed.

    Raises:
        UserError: for a file that is missing, damaged, or without a state dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights.path: no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(_numpy_numbers()):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # pickle, zipfile and safetensors have error classes of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"weights.path: cannot read tensors from {path}: {reason}") from error
    if isinstance(found, Mapping) and isinstance(found.get("model"), Mapping):
        found = found["model"]
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"weights.path: expected a state dict in {path}, found none")
    wrong = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if wrong:
        raise UserError(
            f"weights.path: expected a state dict of tensors in {path}, but {wrong[0]!r} is none; "
            "a checkpoint of the official repository has its state dict under 'model'"
        )
    if all(name.startswith("module.") for name in found):  # saved by a data-parallel wrapper
        found = {name.removeprefix("module."): value for name, value in found.items()}
    return dict(found)


RELEASE = "https://github.com/didriknielsen/survae_flows/releases/tag/v1.0.0"
"""Where the official repository keeps its trained weights."""

_DATA_WORDS = {"cifar10": "c10", "imagenet32": "i32", "imagenet64": "i64"}
_POOLING_WORDS = {
    "max_pool": ("max_pool", "maxpool", "max"),
    "slice": ("slice", "nonpool", "none", "non"),
}
_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")


def find_checkpoint(path: str | Path | None, data: str, surjection: str) -> Path:
    """The released checkpoint for a dataset and a downsampling: a file, or the one in a folder.

    In a folder it is the only checkpoint whose path below the folder names both, in our words or
    theirs: ``cifar10_max_pool.pt``, ``c10_max/check/checkpoint.pt``, ``cifar10/nonpool.pt``.

    Raises:
        UserError: where there is none, or more than one, or for a surjection other than max_pool
            and slice.
    """
    if surjection not in _POOLING_WORDS:
        raise UserError(
            f"weights.source=official: expected surjection={' or '.join(_POOLING_WORDS)}, got "
            f"{surjection!r}"
        )
    wanted = f"{data}_{surjection}.pt"
    if path is None:
        raise UserError(
            "weights.path: expected the file of the released weights, or a folder that has it as "
            f"{wanted}; the official repository releases them at {RELEASE}"
        )
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"weights.path: no file or folder {path}; released at {RELEASE}")
    words = ((data, _DATA_WORDS.get(data, data)), _POOLING_WORDS[surjection])
    found = sorted(
        p
        for p in path.rglob("*")
        if p.suffix in _SUFFIXES and all(_names(p.relative_to(path), some) for some in words)
    )
    if len(found) != 1:
        which = ", ".join(str(p.relative_to(path)) for p in found[:3]) or "none"
        raise UserError(
            f"weights.path: expected one checkpoint for data={data} surjection={surjection} in "
            f"{path}, such as {wanted}, got {which}"
        )
    return found[0]


def _names(path: Path, words: Sequence[str]) -> bool:
    """Whether a path has one of these words in it, not within another word."""
    text = path.as_posix().lower()
    return any(re.search(rf"(?<![a-z0-9]){word}(?![a-z0-9])", text) for word in words)


def _numpy_numbers() -> list[Any]:
    """What a pickled NumPy number consists of, under its old names and its new ones."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64, np.bool_)]
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]


# Configurations


def official_configuration(
    state: Mapping[str, Tensor], image_size: int | Sequence[int] = 32
) -> dict[str, Any]:
    """Arguments of :func:`pool_flow` read off an official state dict's names and shapes.

    Args:
        state: the state dict.
        image_size: height and width, which no parameter shows.

    Raises:
        ValueError: for a state dict that is not of a PoolFlow.
    """
    layers: dict[int, set[str]] = {}
    for name in state:
        match = re.match(r"transforms\.(\d+)\.(.+)", name)
        if match:
            layers.setdefault(int(match[1]), set()).add(match[2])
    couplings = [
        i for i, names in layers.items() if i and any(n.startswith("coupling_net.") for n in names)
    ]
    cuts = [i for i, names in layers.items() if i and "decoder.buffer" in names]
    if not couplings or "base_dist.loc" not in state or "transforms.0.ldj_per_dim" not in state:
        raise ValueError(
            "official weights: expected the state dict of a PoolFlow with couplings "
            "(transforms.N.coupling_net...), base_dist.loc and transforms.0.ldj_per_dim, got "
            f"{len(state)} names such as {next(iter(state), 'none')!r}"
        )
    scales = len(cuts) + 1
    if len(couplings) % scales:
        raise ValueError(
            f"official weights: {len(couplings)} couplings do not part into {scales} scales"
        )
    net = f"transforms.{min(couplings)}.coupling_net.0"
    depth = next(i for i in count() if f"{net}.1.dense.{i}.nn.0.weight" not in state)
    blocks = next(i for i in count(1) if f"{net}.{i + 1}.dense.0.nn.0.weight" not in state)
    if not depth:
        raise ValueError(f"official weights: expected dense layers {net}.1.dense.0.nn...")
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    arguments: dict[str, Any] = {
        "shape": (state[f"{net}.0.weight"].shape[1] // 2, height, width),
        # a slice has a squeeze, without parameters, before it; pooling follows the last coupling
        "downsampling": slice_off if any(c - 1 not in layers for c in cuts) else max_pool,
        "num_levels": round(math.exp(-float(state["transforms.0.ldj_per_dim"]))),
        "num_scales": scales,
        "num_steps": len(couplings) // scales,
        "mid_channels": state[f"{net}.0.weight"].shape[0],
        "depth": depth,
        "growth": state[f"{net}.1.dense.0.nn.2.weight"].shape[0],
        "gated": f"{net}.1.dense.{depth}.conv.weight" in state,
        "num_blocks": blocks,
        "actnorm": any("log_scale" in names for names in layers.values()),
        "dequantization": "uniform",
    }
    inner = [name.split(".") for name in layers[0] if name.startswith("encoder.")]
    if inner:
        first = state.get("transforms.0.encoder.transforms.1.coupling_net.0.0.weight")
        arguments["dequantization"] = "variational"
        arguments["dequant_steps"] = len({n[2] for n in inner if "coupling_net" in n})
        if first is not None:
            arguments["context_channels"] = first.shape[1] - 2 * arguments["shape"][0]
    return arguments


# Names


def official_names(flow: Flow) -> dict[str, str]:
    """Official name -> our name, for every parameter of a :func:`pool_flow`.

    Raises:
        ValueError: for a flow with a layer that the official model has not.
    """
    ours = {id(module): name for name, module in flow.named_modules()}
    names: dict[str, str] = {}

    def plain(module: nn.Module, prefix: str, parts: Sequence[str] = ("weight", "bias")) -> None:
        for part in parts:
            names[f"{prefix}.{part}"] = f"{ours[id(module)]}.{part}"

    def dense(block: DenseBlock, prefix: str) -> None:
        for i, layer in enumerate(block.layers):
            plain(layer.mix, f"{prefix}.{i}.nn.0")
            plain(layer.grow, f"{prefix}.{i}.nn.2")
        last, gated = f"{prefix}.{len(block.layers)}", isinstance(block.outlet, GatedConv2d)
        plain(block.outlet.conv if gated else block.outlet, f"{last}.conv" if gated else last)

    def layer_names(layer: Transform, prefix: str) -> None:
        if isinstance(layer, Conv1x1) and layer.linear is None:
            plain(layer, prefix, ("weight",))
        elif isinstance(layer, ActNorm):
            plain(layer, prefix, ("shift", "log_scale"))
        elif isinstance(layer, AffineCoupling) and isinstance(layer.net, DenseNet):
            net = f"{prefix}.coupling_net.0"
            plain(layer.net.inlet, f"{net}.0")
            for i, block in enumerate(layer.net.blocks):
                dense(block, f"{net}.{i + 1}.dense")
            outlet = f"{net}.{len(layer.net.blocks) + 1}"
            plain(layer.net.outlet, outlet)
        elif next(layer.parameters(), None) is not None:
            raise ValueError(
                f"official weights: the official model has no layer like {ours[id(layer)]}, "
                f"{layer.label}"
            )

    for i, layer in enumerate(flow.transforms):
        noise = _noise_of(layer)
        if noise is None:
            layer_names(layer, f"transforms.{i}")
            continue
        encoder = f"transforms.{i}.encoder"
        plain(noise.flow.base, f"{encoder}.base_dist", ("loc", "log_scale"))
        for j, inner in enumerate(_draws(noise)):
            layer_names(inner, f"{encoder}.transforms.{j}")
        embed: ImageEmbedding = noise.net
        dense(embed.fine, f"{encoder}.context_init.1")
        plain(embed.halve, f"{encoder}.context_init.2")
        dense(embed.coarse, f"{encoder}.context_init.3")
    plain(flow.base, "base_dist", ("loc", "log_scale"))
    return names


def _noise_of(layer: Transform) -> FlowDistribution | None:
    """The flow inside a dequantization, None for any other layer."""
    noise = layer.transform.noise if isinstance(layer, Dequantization) else None
    return noise if isinstance(noise, FlowDistribution) else None


def _draws(noise: FlowDistribution) -> Sequential:
    """The layers of :func:`flow_noise` in the direction that draws."""
    turned = noise.flow.transforms[0]
    if not (isinstance(turned, Inverse) and isinstance(turned.transform, Sequential)):
        raise ValueError("official weights: expected the dequantizer of pool_flow")
    return turned.transform


def official_constants(flow: Flow) -> dict[str, float | None]:
    """Official name -> value, for the constants in its state dict; None where any value will do."""
    constants: dict[str, float | None] = {}
    for i, layer in enumerate(flow.transforms):
        prefix = f"transforms.{i}"
        if isinstance(layer, Dequantization):
            constants[f"{prefix}.ldj_per_dim"] = -math.log(layer.transform.num_levels)
            noise = _noise_of(layer)
            if noise is not None:
                last = len(_draws(noise)) - 1
                constants[f"{prefix}.encoder.transforms.{last}.temperature"] = 1.0
        elif isinstance(layer, Affine):
            constants |= {f"{prefix}._scale": 1.0, f"{prefix}._shift": -0.5}
        elif isinstance(layer, MaxPool2d | Slice):
            constants[f"{prefix}.decoder.buffer"] = None
        elif isinstance(layer, ActNorm):
            constants[f"{prefix}.initialized"] = None
    return constants


# Converting


def convert_official(state: Mapping[str, Tensor], flow: Flow) -> dict[str, Tensor]:
    """An official state dict as one for ``flow``, a :func:`pool_flow` of the same configuration,
    which supplies its own buffers.

    Raises:
        ValueError: for names that are missing or too many, a shape that does not fit, a constant
            with another value, or values that are not finite.
    """
    names, constants = official_names(flow), official_constants(flow)
    missing = [name for name in names if name not in state]
    surplus = [name for name in state if name not in names and name not in constants]
    if missing or surplus:
        raise ValueError(
            "official weights: the names are not those of this configuration: "
            + "; ".join(
                f"{len(some)} {what} ({', '.join(some[:3])}{', ...' if len(some) > 3 else ''})"
                for what, some in (("missing", missing), ("unexpected", surplus))
                if some
            )
        )
    for name, value in constants.items():
        if value is None or name not in state:
            continue
        got = state[name]
        if got.numel() != 1 or not math.isclose(float(got), value, rel_tol=1e-5):
            raise ValueError(
                f"official weights: expected {name} = {value:.6g}, got {got.flatten().tolist()}"
            )
    converted = dict(flow.state_dict())
    for name, own in names.items():
        value, like = state[name], converted[own]
        # theirs has a dimension for the batch, and actnorm those for the pixels
        if _without_ones(value.shape) != _without_ones(like.shape):
            raise ValueError(
                f"official weights: expected {name} of shape {tuple(like.shape)}, "
                f"got {tuple(value.shape)}"
            )
        if value.device.type != "meta" and not bool(value.isfinite().all()):
            raise ValueError(f"official weights: {name} has values that are not finite")
        converted[own] = value.reshape(like.shape).to(like.dtype)
    for i, layer in enumerate(flow.transforms):
        if isinstance(layer, ActNorm):
            own = f"transforms.transforms.{i}.initialised"
            ready = state.get(f"transforms.{i}.initialized", torch.tensor(True))
            converted[own] = ready.bool().all()
    return converted


def _without_ones(shape: Sequence[int]) -> Sequence[int]:
    """A shape without the ones at its start and end."""
    kept = [i for i, size in enumerate(shape) if size != 1]
    return tuple(shape[kept[0] : kept[-1] + 1]) if kept else ()


def load_official(flow: Flow, state: Mapping[str, Tensor]) -> Flow:
    """Copy an official state dict into ``flow``, a :func:`pool_flow` of the same configuration.

    Raises:
        ValueError: see :func:`convert_official`; ``flow`` is then as it was.
    """
    flow.load_state_dict(convert_official(state, flow), strict=True)
    return flow


def official_flow(state: Mapping[str, Tensor], image_size: int | Sequence[int] = 32) -> Flow:
    """A :func:`pool_flow` with the configuration and weights of an official state dict.

    Args:
        state: the official state dict; see :func:`read_tensors`.
        image_size: height and width of the images.

    Raises:
        ValueError: for a state dict that is not of a PoolFlow.
    """
    return load_official(pool_flow(**official_configuration(state, image_size)), state).eval()
