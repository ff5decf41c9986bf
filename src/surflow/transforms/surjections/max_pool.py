"""Max pooling as a surjection, in both directions."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surflow.checks import require_at_least
from surflow.distributions import DiagonalNormal, Exponential
from surflow.distributions.base import Distribution, as_shape
from surflow.transforms.base import Example, generated_by
from surflow.transforms.inverse import _InverseOf
from surflow.transforms.surjections.max import _Max


def _lying_as(like: Tensor, image: Tensor) -> Tensor:
    """The image with its channels last in memory if those of ``like`` are."""
    return image.contiguous(memory_format=torch.channels_last) if like.stride(1) == 1 else image


class MaxPool2d(_Max):
    r"""The inference surjection z = maxpool(x), with a model of what pooling forgets.

    .. math:: z_j = \max_k x_{jk}, \quad k_j \sim \mathrm{Cat}(\pi_j(z)),\
              r \sim p(r \mid z),\ x_{j, -k_j} = z_j - r_j, \qquad
              V = \log p(r \mid z) + \sum_j \log \pi_{j k_j}(z)

    Exact. x is cut into blocks of k x k pixels, their pixels in raster
    order; a block's remainders r are the distances of its other k^2 - 1 pixels from the max, in
    raster order, and stand as k^2 - 1 channels a channel: remainder i of channel c is channel
    c (k^2 - 1) + i of the decoder. Of equal maxima the first counts.

    Args:
        event_shape: the shape of x, (C, H, W); z has (C, H/k, W/k).
        kernel_size: k >= 2.
        decoder: a distribution over (C (k^2 - 1), H/k, W/k) on >= 0; a conditional one gets z as
            its context. Half-normal with scale 1 if left out.
        learn: whether the index has learned logits, (C k^2, 1, 1), the same for all blocks of a
            channel; uniform if not.
        net: maps z (and the context, if it has ``context_features``) to logits of the index,
            (B, C k^2, H/k, W/k), place i of channel c at channel c k^2 + i.

    Raises:
        ValueError: for k < 2, H or W that k does not divide, a decoder of a wrong shape, or a net
            whose output has a wrong shape.

    Cost: O(C H W) in both directions, and a pass of the net and of the decoder.
    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 5 (max pooling) and Table 6.

    >>> layer = MaxPool2d((1, 2, 2))
    >>> z, ldj = layer(torch.tensor([[[[1.0, 2.0], [5.0, 3.0]]]]))
    >>> z.flatten(), ldj  # -log 4 + log half-normal of 4, 3, 2
    (tensor([5.]), tensor([-16.5637]))
    """

    dim = 2

    def __init__(
        self,
        event_shape: Sequence[int],
        kernel_size: int = 2,
        decoder: Distribution | None = None,
        learn: bool = False,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = as_shape(event_shape)
        name = type(self).__name__
        if len(self.event_shape) != 3:
            raise ValueError(f"{name}: expected event_shape (C, H, W), got {self.event_shape}")
        c, h, w = self.event_shape
        require_at_least(name, 2, kernel_size=kernel_size)
        if h % kernel_size or w % kernel_size:
            raise ValueError(
                f"{name}: expected a height and a width that {kernel_size} divides, got {h} x {w}"
            )
        self.kernel_size = kernel_size
        k = kernel_size**2
        self.latent_shape = (c, h // kernel_size, w // kernel_size)
        small = self.latent_shape[1:]
        self._setup(k, (c * k, *small), (c * (k - 1), *small), decoder, True, False, net)
        if learn and net is None:
            self.logits = nn.Parameter(torch.zeros(c * k, 1, 1))

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z, ldj = super()._forward(x, context)
        return _lying_as(x, z), ldj

    def _draw(self, z: Tensor, event: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor]:
        x, index = super()._draw(z, event, table)
        return _lying_as(z, x), index

    def _cut(self, x: Tensor) -> Tensor:
        b, (c, h, w), k = x.shape[0], self.latent_shape, self.kernel_size
        blocks = x.reshape(b, c, h, k, w, k).permute(0, 1, 3, 5, 2, 4)
        return blocks.reshape(b, c, k * k, h, w)

    def _join(self, blocks: Tensor) -> Tensor:
        b, (c, h, w), k = blocks.shape[0], self.latent_shape, self.kernel_size
        x = blocks.reshape(b, c, k, k, h, w).permute(0, 1, 4, 2, 5, 3)
        return x.reshape(b, *self.event_shape)

    def _pack(self, remainders: Tensor) -> Tensor:
        return remainders.flatten(1, 2)

    def _unpack(self, event: Tensor) -> Tensor:
        return event.unflatten(1, (self.event_shape[0], self.num_elements - 1))

    def _blocks_of_logits(self, logits: Tensor) -> Tensor:
        c, h, w = self.latent_shape
        return logits.unflatten(1, (c, self.num_elements)).expand(-1, -1, -1, h, w)

    def _squeeze(self, top: Tensor) -> Tensor:
        return top.squeeze(2)

    def _unsqueeze(self, z: Tensor) -> Tensor:
        return z.unsqueeze(2)

    @classmethod
    def example(cls) -> Example:
        transform = cls((1, 2, 2), decoder=Exponential((3, 1, 1), 0.6, learn=True), learn=True)
        with torch.no_grad():
            transform.logits.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]).view(4, 1, 1))
        base = DiagonalNormal((1, 1, 1), 0.3, 0.7)
        # the same structure with wider parts: a normal max, exponentials below, any place
        same = cls((1, 2, 2), decoder=Exponential((3, 1, 1), 0.9))
        return Example(transform, generated_by(same, DiagonalNormal((1, 1, 1), 0.3, 1.0)), base)


class MaxPool2dGenerative(_InverseOf):
    r"""The generative surjection x = maxpool(z): inference unpools by a posterior.

    .. math:: x_j = \max_k z_{jk}, \quad k_j \sim \mathrm{Cat}(\pi_j(x)),\
              r \sim q(r \mid x),\ z_{j, -k_j} = x_j - r_j, \qquad
              V = -\log q(r \mid x) - \sum_j \log \pi_{j k_j}(x)

    A lower bound; x is the small image. A drawn index has no pathwise gradient: the objectives add
    its score-function gradient.

    Args:
        event_shape: the shape of z, (C, H, W); x has (C, H/k, W/k).
        kernel_size, decoder, learn, net, and errors: see :class:`MaxPool2d`; nets see x.

    Cost: O(C H W) in both directions, and a pass of the net and of the decoder.
    Source: Nielsen et al. 2020, arXiv 2007.02731, Table 6.

    >>> layer = MaxPool2dGenerative((1, 2, 2))
    >>> layer.inverse(torch.tensor([[[[1.0, 2.0], [5.0, 3.0]]]])).flatten()
    tensor([5.])
    """

    of = MaxPool2d

    @classmethod
    def example(cls) -> Example:
        transform = cls((1, 2, 2), decoder=Exponential((3, 1, 1), scale=1.4, learn=True))
        sample, base = DiagonalNormal((1, 1, 1), 0.8, 1.2), DiagonalNormal((1, 2, 2), scale=0.8)
        return Example(transform, sample, base)
