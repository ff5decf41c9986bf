"""Training: the LightningModule, callbacks, checkpoints, logging, evaluation."""

from surflow.compat import make_torchvision_importable

make_torchvision_importable()  # Lightning imports torchmetrics, and that torchvision
