"""The papers' architectures."""

import inspect

from surflow.models.autoregressive_flow import autoregressive_flow
from surflow.models.contract import takes
from surflow.models.coupling_flow import coupling_flow, coupling_net
from surflow.models.glow import glow
from surflow.models.interpolation import all_latents, from_latents, latent_interpolation
from surflow.models.mar_scf import mar_scf
from surflow.models.official import load_official, official_flow, read_tensors
from surflow.models.pool_flow import flow_noise, pool_flow
from surflow.models.posteriors import POSTERIORS, flow_posterior
from surflow.models.priors import PRIORS, VampPrior
from surflow.models.pronf import PyramidFlow, pronf
from surflow.models.realnvp import realnvp
from surflow.models.set_flow import ORDERS, set_flow
from surflow.models.surjections import symmetry, with_net
from surflow.models.vae import vae_flow
from surflow.models.vae_studies import vae_of_images, vae_of_vectors

__all__ = [
    name for name, value in list(vars().items()) if name[0] != "_" and not inspect.ismodule(value)
]
