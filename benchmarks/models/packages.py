"""Model packages as they are published, also where torchvision's own operators were built for another PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import torch
from torch import nn


@functools.cache
def package(name: str) -> Any:
    """``"torchvision.models"`` or ``"timm"``; raises ``ModuleNotFoundError`` where it is not installed."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise ModuleNotFoundError(f"{name} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            # It registers what tracing sees of operators that this PyTorch does not have.
            for operator in ("nms", "qnms"):
                _library().define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return importlib.import_module(name)


@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library("torchvision", "DEF")


def build(name: str, device: str = "cpu", **options: Any) -> nn.Module:
    """A model by ``package/name``, with weights drawn from a seed."""
    source, _, model = name.partition("/")
    more = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
    torch.manual_seed(0)
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if source == "timm":
            return package("timm").create_model(model, pretrained=False, **options)
        return getattr(package("torchvision.models"), model)(weights=None, **more.get(model, {}), **options)
