"""torch-fidelity's Inception: its weights, found and checked, and its features."""

from __future__ import annotations

import importlib.metadata
import io
import socket
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from surflow.errors import UserError
from surflow.files import sha256_of

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_FILE = INCEPTION_URL.rsplit("/", 1)[1]
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_TIMEOUT = 60  # seconds without an answer


class Unavailable(Exception):
    """Why a metric cannot be computed here, in one line; all others can."""


def inception_file(path: str | None = None) -> Path:
    """Where the weights are: the path, else torch hub's folder, downloaded into it if need be.

    Raises UserError for a path that is no file, Unavailable where no file can be downloaded.
    """
    if path is not None:
        file = Path(path).expanduser()
        if file.is_file():
            return file
        got = f"{path}: {'a folder' if file.is_dir() else 'no such file'}"
        want = f"a file such as {INCEPTION_FILE} ({INCEPTION_URL})"
        raise UserError(f"measures.samples.weights: expected {want}, got {got}")
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if file.is_file():
        return file
    before = socket.getdefaulttimeout()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(_TIMEOUT)
        torch.hub.download_url_to_file(
            INCEPTION_URL, str(file), INCEPTION_SHA256, progress=sys.stderr.isatty()
        )
    except (OSError, RuntimeError) as error:  # no network, no room; another checksum
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise Unavailable(
            f"no Inception weights, and they cannot be downloaded ({reason}): get {INCEPTION_URL} "
            f"(sha256 {INCEPTION_SHA256[:8]}…) and give measures.samples.weights=PATH"
        ) from None
    finally:
        socket.setdefaulttimeout(before)
    return file


def load_inception_weights(path: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The tensors of a weights file, and the file's SHA-256. Nothing in it is run.

    A file with another checksum than the published one's is taken, with a warning on stderr.

    Raises UserError for a file that is no mapping of tensors; else as :func:`inception_file`.
    """
    file = inception_file(path)
    where = "measures.samples.weights" if path is not None else "inception weights"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file leads to
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{where}: {file} holds no plain tensors ({first[:120]})") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{where}: expected a mapping of tensors in {file}")
    digest = sha256_of(file)
    if digest != INCEPTION_SHA256:
        print(
            f"surflow: warning: {where}: {file} is not the published file: expected sha256 "
            f"{INCEPTION_SHA256}, got {digest}; scores with it compare with no published ones",
            file=sys.stderr,
        )
    return state, digest


class InceptionFeatures:
    """The 2048 features and 1008 logits of the Inception that TensorFlow released in 2015.

    torch-fidelity's port, which resizes images to 299×299 as TensorFlow 1 did. The logits are
    without their bias, as in the published Inception score.

    C = ``channels`` of the images is 3 or 1, which is repeated; see :func:`inception_file`.

    Raises UserError for a weights file that is missing, damaged or of another net; Unavailable
    without weights, or for another number of channels.

    Cost: about 5.7 billion multiplications an image, whatever its size.

    Source: Szegedy et al. 2016, arXiv 1512.00567; torch-fidelity, Obukhov et al. 2020.
    """

    name: ClassVar[str] = "inception"
    distance: ClassVar[str] = "sample/fid"
    inception_score: ClassVar[str | None] = "sample/inception_score"
    dim: ClassVar[int] = 2048
    what: ClassVar[str] = "Inception features"

    def __init__(
        self, channels: int, weights: str | None = None, device: torch.device | str = "cpu"
    ) -> None:
        if channels not in (1, 3):
            raise Unavailable(f"Inception takes images of 1 or 3 channels, got {channels}")
        state, self.sha256 = load_inception_weights(weights)
        from surflow.compat import make_torchvision_importable

        make_torchvision_importable()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # it unpickles its file: so it gets one written anew from what was read safely
        plain = io.BytesIO()
        torch.save(state, plain)
        plain.seek(0)
        try:
            self.net = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=plain,
            ).to(device)
        except RuntimeError as error:  # other names or shapes
            reason = " ".join(str(error).split())
            raise UserError(
                f"measures.samples.weights: the file is not of torch-fidelity's Inception "
                f"({reason[:160]}…); expected {INCEPTION_FILE}"
            ) from None
        published = self.sha256 == INCEPTION_SHA256
        self.caution = "" if published else "; weights are not the published ones"
        self.details: dict[str, Any] = {
            "name": "Inception v3, TensorFlow 2015-12-05, torch-fidelity's port",
            "sha256": self.sha256,
            "published_weights": published,
            "features": self.dim,
            "resize": "299x299, bilinear as in TensorFlow 1",
            "library": f"torch-fidelity {importlib.metadata.version('torch-fidelity')}",
            **({"channels": "1, repeated three times"} if channels == 1 else {}),
        }

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of uint8 images (B, C, H, W) with levels 0 ... 255: (B, 2048) and (B, 1008)."""
        return self.net(images if images.shape[1] == 3 else images.expand(-1, 3, -1, -1))
