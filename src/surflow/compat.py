"""Let torchvision be imported with a torch build for which its extension was not compiled.

torchvision registers shapes for two operators of its extension when it is imported. Where the
extension cannot load (a CPU build of torch with torchvision's CUDA wheel) the operators do not
exist and the import fails, although nothing here uses them. Declaring their schemas is enough.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import library as operators

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: Any = None  # a definition lasts for as long as this object lives


def make_torchvision_importable() -> None:
    """Declare torchvision's missing operators, only where its own extension cannot load."""
    global _library
    if _library is not None or "torchvision" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    for extension in sorted(Path(spec.origin).parent.glob("_C*.*")):
        with contextlib.suppress(OSError):  # what it raises where it cannot load
            torch.ops.load_library(str(extension))
    if hasattr(torch.ops.torchvision, "nms"):
        return
    _library = operators.Library("torchvision", "DEF")
    for schema in _SCHEMAS.values():
        _library.define(schema)
