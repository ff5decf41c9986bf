"""Image sets of one's own: arrays and folders of image files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surflow.data.images import ImageData
from surflow.data.module import SPLITS
from surflow.data.sources import image_files, pack, read_array, read_image
from surflow.errors import UserError


class ImageArrays(ImageData):
    """Arrays of images in files: ``train``, ``test`` and maybe ``valid`` in one folder.

    Each is an .npz or .safetensors file with a uint8 array ``images`` (N, C, H, W), or an .npy
    file that is one.

    Args:
        folder: in the root, or an absolute path.
        name: None: the folder.
        others: see :class:`~surflow.data.images.ImageData`.
    """

    def __init__(
        self, folder: str, name: str | None = None, valid_size: int | None = 500, **others: Any
    ) -> None:
        super().__init__(name=name or folder, valid_size=valid_size, **others)
        self.folder = self.root / Path(folder).expanduser()

    def load(self) -> dict[str, Tensor]:
        splits = {}
        for split in SPLITS:
            paths = [self.folder / f"{split}{s}" for s in (".npz", ".npy", ".safetensors")]
            path = next((p for p in paths if p.is_file()), None)
            if path is not None:
                splits[split] = torch.from_numpy(read_array(path))
            elif split != "valid":
                raise UserError(
                    f"data.folder: expected {split}.npz, .npy or .safetensors in {self.folder}, "
                    f"got {'none of them' if self.folder.is_dir() else 'no such folder'}"
                )
        return splits


class ImageFolder(ImageData):
    """Image files of a folder and its subfolders, as training data.

    Subfolders ``train`` and ``test`` (and maybe ``valid``) are the splits. Without them the last
    ``test_size`` files are test and the ``valid_size`` before them validation, in the order of
    :func:`~surflow.data.sources.image_files`. Decoded images are kept in one memory-mapped file.

    Args:
        folder: in the root, or an absolute path.
        name: None: the folder.
        resize: cut out the centre and scale images of another size; False: refuse them.
        others: see :class:`~surflow.data.images.ImageData`; one channel makes images grey, three
            RGB.
    """

    def __init__(
        self,
        folder: str,
        name: str | None = None,
        valid_size: int | None = 500,
        resize: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(name=name or folder, valid_size=valid_size, **others)
        if self.event_shape[0] not in (1, 3):
            raise ValueError(
                f"data.event_shape: expected 1 or 3 channels, got {self.event_shape[0]}"
            )
        self.folder = self.root / Path(folder).expanduser()
        self.resize = resize

    def load(self) -> dict[str, Tensor]:
        if not self.folder.is_dir():
            raise UserError(f"data.folder: no folder {self.folder}; expected one of image files")
        if all((self.folder / split).is_dir() for split in ("train", "test")):
            names = [s for s in SPLITS if (self.folder / s).is_dir()]
            return {split: self._read(self.folder / split, split) for split in names}
        train, test = self.hold_out(self._read(self.folder, "all"), "test")
        return {"train": train, "test": test}

    def _read(self, folder: Path, label: str) -> Tensor:
        files = image_files(folder)
        if not files:
            raise UserError(f"data.folder: no image files in {folder}")

        def read(path: Path) -> np.ndarray:
            return read_image(path, self.event_shape, self.resize)[None]

        counts = [1] * len(files)
        return pack(
            files, self.folder, label, self.event_shape, counts, read, f"resize={self.resize}"
        )
