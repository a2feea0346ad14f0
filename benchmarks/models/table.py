"""Writes the table of docs/models.md, what ``pointfuse.plan`` finds in published models: a module to run by ``-m``."""

from __future__ import annotations

import collections
import re
import warnings
from importlib.metadata import version
from pathlib import Path

import pointfuse
import torch
from torch import nn

from benchmarks.models.packages import build

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- made by benchmarks/models/table.py -->\n", "<!-- end -->\n"
_TIMM = """darknet53 cspdarknet53 cspresnet50 resnet50 resnext50_32x4d seresnet50 res2net50_26w_4s resnetv2_50
        inception_v3 inception_v4 inception_resnet_v2 xception41 mobilenetv2_100 mobilenetv3_large_100 efficientnet_b0
        tf_efficientnet_b0 mixnet_s rexnet_100 ghostnet_100 regnety_032 gernet_s tresnet_m repvgg_a2 mobileone_s1
        hrnet_w18_small dla34 vovnet39a ese_vovnet19b_dw selecsls42b skresnet18 densenet121 dpn68 fastvit_t8
        efficientvit_b0 levit_128 nfnet_f0 convnext_tiny"""
_TORCHVISION = """resnet18 resnet50 resnet152 resnext50_32x4d wide_resnet50_2 mobilenet_v2 mobilenet_v3_large
        efficientnet_b0 efficientnet_v2_s regnet_y_400mf densenet121 vgg11_bn googlenet inception_v3
        shufflenet_v2_x1_0 mnasnet1_0 squeezenet1_1"""
MODELS = {"timm": _TIMM.split(), "torchvision": _TORCHVISION.split()}


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "\n" + table() + "\n" + END + after, encoding="utf-8")


def table() -> str:
    """The table in Markdown."""
    rows = [
        "| model | convolutions | of them 1x1 and 3x3 | units | with residual | left alone |",
        "|---|--:|--:|--:|--:|---|",
    ]
    rows += [row(source, name) for source, names in MODELS.items() for name in names]
    versions = ", ".join(f"{source} {version(source)}" for source in MODELS)
    return "\n".join([*rows, "", f"Models of {versions}."]) + "\n"


def row(source: str, name: str) -> str:
    """One model's row. It and its input have shapes and no data."""
    # Some of torchvision's compute while they are made.
    model = build(f"{source}/{name}", "meta" if source == "timm" else "cpu").eval().to("meta")
    height, width = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = pointfuse.plan(model, torch.empty(2, 3, max(height, 224), max(width, 224), device="meta"))
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    small = sum(m.kernel_size in ((1, 1), (3, 3)) for m in convs)
    # A module is named by its path, which differs from block to block.
    reasons = collections.Counter(re.sub(r"goes to \S+ \((\w+)\)", r"goes to \1", s.reason) for s in plan.skipped)
    left = "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common())
    units = {u.conv for u in plan.units}
    residuals = {u.conv for u in plan.units if u.residual is not None}
    return f"| {source} {name} | {len(convs)} | {small} | {len(units)} | {len(residuals)} | {left} |"


if __name__ == "__main__":
    main()
