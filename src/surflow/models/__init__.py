"""The papers' architectures."""

from surflow.models.coupling_flow import coupling_flow, coupling_net, image_of

__all__ = ["coupling_flow", "coupling_net", "image_of"]
