"""Neural nets; nothing probabilistic in here."""

import inspect

from surflow.nets.conv_lstm import ConvLSTM
from surflow.nets.conv_resnet import ImageDecoder, ImageEncoder, PlainBlock
from surflow.nets.densenet import DenseBlock, DenseLayer, DenseNet, GatedConv2d, ImageEmbedding
from surflow.nets.gated_attention import ConvAttentionBlock, ConvAttentionNet
from surflow.nets.glow_net import GlowNet, StandardisedConv2d, ZeroConv2d
from surflow.nets.lipschitz import LipschitzMLP
from surflow.nets.made import MADE, MaskedLinear
from surflow.nets.masked_conv import LocalPixelCNN, MaskedConv2d
from surflow.nets.maxout import Maxout
from surflow.nets.mlp import ACTIVATIONS, MLP, FourierFeatures, make_activation
from surflow.nets.resnet import ResidualBlock, ResNet, TanhScale, WeightNormConv2d
from surflow.nets.transformer import SelfAttention, SetTransformer, TransformerBlock

__all__ = [
    name for name, value in list(vars().items()) if name[0] != "_" and not inspect.ismodule(value)
]
