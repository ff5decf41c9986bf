"""The papers' architectures."""

from surflow.models.coupling_flow import coupling_flow, coupling_net, image_of
from surflow.models.vae import vae_flow

__all__ = ["coupling_flow", "coupling_net", "image_of", "vae_flow"]
