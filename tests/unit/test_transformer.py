"""Transformers over sets: against PyTorch's own modules, and what an order does to them."""

import math

import pytest
import torch
from torch import nn

from surflow.nets import SelfAttention, SetTransformer, TransformerBlock


@pytest.fixture(autouse=True)
def _double(double):
    """All in float64."""


def copied(attention: SelfAttention, theirs: nn.MultiheadAttention) -> None:
    with torch.no_grad():
        for bias in (attention.queries_keys_values.bias, attention.out.bias):
            bias.normal_()
        theirs.in_proj_weight.copy_(attention.queries_keys_values.weight)
        theirs.in_proj_bias.copy_(attention.queries_keys_values.bias)
        theirs.out_proj.weight.copy_(attention.out.weight)
        theirs.out_proj.bias.copy_(attention.out.bias)


def shaken(net: nn.Module) -> nn.Module:
    """With weights other than those it begins with."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net


def test_attention_is_that_of_torch():
    mine, theirs = SelfAttention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True)
    copied(mine, theirs)
    x = torch.randn(4, 7, 12)
    assert torch.allclose(mine(x), theirs(x, x, x, need_weights=False)[0], atol=1e-12)


def test_block_is_an_encoder_layer_with_the_norms_in_front():
    mine = shaken(TransformerBlock(12, 3, 20, activation="gelu"))
    theirs = nn.TransformerEncoderLayer(
        12, 3, 20, 0.0, activation="gelu", batch_first=True, norm_first=True
    )
    copied(mine.attention[1], theirs.self_attn)
    theirs.norm1.load_state_dict(mine.attention[0].state_dict())
    theirs.norm2.load_state_dict(mine.feedforward[0].state_dict())
    theirs.linear1.load_state_dict(mine.feedforward[1].state_dict())
    theirs.linear2.load_state_dict(mine.feedforward[3].state_dict())
    x = torch.randn(4, 7, 12)
    assert torch.allclose(mine(x), theirs(x), atol=1e-12)


@pytest.mark.parametrize("num_positions", [None, 6])
def test_equivariant_unless_places_count(num_positions):
    net = shaken(SetTransformer(2, 3, 16, 4, 2, num_positions=num_positions))
    x = torch.randn(5, 6, 2)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    difference = (net(x[:, order]) - net(x)[:, order]).abs().max()
    assert (difference < 1e-12) == (num_positions is None)
    assert torch.allclose(net(x)[2:3], net(x[2:3]), atol=1e-12)  # rows are independent


def test_any_number_of_points_without_positions():
    net = SetTransformer(2, 3, 16, 4)
    assert net(torch.randn(2, 9, 2)).shape == (2, 9, 3)
    assert net(torch.randn(2, 1, 2)).shape == (2, 1, 3)


def test_it_begins_as_published():
    net = SetTransformer(1, 2, 64, 8, 2, num_positions=25)
    assert net(torch.randn(3, 25, 1)).abs().max() == 0
    attention, first, last = (
        net.blocks[0].attention[1].queries_keys_values,
        net.blocks[0].feedforward[1],
        net.blocks[1].feedforward[3],
    )
    for weight, std in (
        (attention.weight, 0.125 / 8),
        (first.weight, 0.125 / 8),
        (last.weight, 0.125 / 16 / 2),  # over the root of 256 inputs, and of twice two blocks
        (net.blocks[1].attention[1].out.weight, 0.125 / 8 / 2),
        (net.positions, 0.125 / 8),
    ):
        assert weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * weight.numel()))
    assert first.bias.abs().max() == 0


def test_dropout_in_training_alone():
    net = shaken(SetTransformer(2, 2, 16, 4, dropout=0.5))
    x = torch.randn(3, 4, 2)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    attention = SelfAttention(8, 2, dropout=0.5)
    x = torch.randn(3, 4, 8)
    assert not torch.equal(attention(x), attention(x))  # weights of the attention, too


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfAttention(10, 4), "features that num_heads divides, got 10 and 4"),
        (lambda: SetTransformer(2, 0), "expected positive sizes, got .*out_features=0"),
        (lambda: SetTransformer(2, 2, dropout=1.0), r"a dropout in \[0, 1\), got 1.0"),
        (lambda: SetTransformer(2, 2)(torch.randn(3, 2)), r"shape \(batch, any, 2\), got \(3, 2\)"),
        (lambda: SetTransformer(2, 2)(torch.randn(3, 4, 3)), r"got \(3, 4, 3\)"),
        (
            lambda: SetTransformer(2, 2, num_positions=5)(torch.randn(3, 4, 2)),
            r"shape \(batch, 5, 2\), got \(3, 4, 2\)",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
