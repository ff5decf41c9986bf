"""Features of a small net with fixed random weights: checks that run without a trained one."""

from __future__ import annotations

import hashlib
import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class RandomFeatures:
    r"""64 features of an image: three convolutions with fixed random weights, then the mean.

    .. math:: f = \mathrm{mean}_{hw}\, r(W_3 * r(W_2 * r(W_1 * (x / 127.5 - 1)))), \quad
              r(a) = \sqrt{2} \max(a, 0)

    The kernels are 3×3, with strides 1, 2, 2 and 16, 32, 64 channels; the weights are uniform with
    variance 1/fan-in, from the raw bits of PCG64 with the seed 20200706: the same everywhere.
    A Fréchet distance of such features tells sets of images apart, but it is no FID and compares
    with no published number.

    There are no ``weights`` to load.

    Cost: about 30 C H W + 2,000 H W multiplications an image.
    """

    name: ClassVar[str] = "random_features"
    distance: ClassVar[str] = "sample/fid_random_features"
    inception_score: ClassVar[str | None] = None
    dim: ClassVar[int] = 64
    seed: ClassVar[int] = 20200706
    what: ClassVar[str] = "features of a random net"

    def __init__(
        self, channels: int, weights: str | None = None, device: torch.device | str = "cpu"
    ) -> None:
        bits = np.random.PCG64(self.seed)
        digest = hashlib.sha256()
        self.weights = []
        for out_channels in (16, 32, self.dim):
            shape = (out_channels, channels, 3, 3)
            # not of a Generator, whose streams may change with NumPy's version
            unit = (bits.random_raw(math.prod(shape)) >> 11) * 2.0**-53
            drawn = (2 * unit - 1) * math.sqrt(3 / (9 * channels))
            kernel = np.ascontiguousarray(drawn.reshape(shape), "<f4")
            digest.update(kernel)
            self.weights.append(torch.from_numpy(kernel).to(device))
            channels = out_channels
        self.sha256 = digest.hexdigest()
        self.caution = ""
        self.details: dict[str, Any] = {"name": self.name, "sha256": self.sha256}
        self.details |= {"features": self.dim, "resize": "none"}

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        """Features of uint8 images (B, C, H, W) with levels 0 ... 255: (B, 64); no logits."""
        x = images.to(self.weights[0]) / 127.5 - 1
        for kernel, stride in zip(self.weights, (1, 2, 2), strict=True):
            x = math.sqrt(2.0) * F.conv2d(x, kernel, stride=stride, padding=1).relu()
        return x.mean((2, 3)), None
