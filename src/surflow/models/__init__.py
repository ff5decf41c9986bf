"""The papers' architectures."""

from surflow.models.autoregressive_flow import autoregressive_flow
from surflow.models.coupling_flow import coupling_flow, coupling_net, image_of
from surflow.models.vae import vae_flow

__all__ = ["autoregressive_flow", "coupling_flow", "coupling_net", "image_of", "vae_flow"]
