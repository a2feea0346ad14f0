"""Small modules that are hard to convert, and what the conversion tests share. Nothing here knows pointfuse."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

M = TypeVar("M", bound=nn.Module)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Run on one thread: the models here are so small that two threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def unit(c_in: int = 4, c_out: int = 4, kernel: int = 3, act: nn.Module | None = None) -> list[nn.Module]:
    """Convolution, batch norm and activation that keep the plane."""
    return [
        nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(c_out),
        nn.LeakyReLU(0.1) if act is None else act,
    ]


def trained(model: M, seed: int = 0) -> M:
    """The model with batch norm parameters and statistics that a training run might have left."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for bn in model.modules():
            if isinstance(bn, nn.modules.batchnorm._BatchNorm):
                if bn.running_mean is not None:
                    bn.running_mean.normal_(0, 0.3, generator=generator)
                    bn.running_var.uniform_(0.5, 2, generator=generator)
                if bn.weight is not None:
                    bn.weight.uniform_(0.5, 1.5, generator=generator)
                if bn.bias is not None:
                    bn.bias.normal_(0, 0.3, generator=generator)
    return model


def images(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Seeded noise, ``[2, 4, 8, 8]`` unless told otherwise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (2, 4, 8, 8)), generator=generator).to(dtype)


def tensors_of(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def gap(actual: Any, expected: Any) -> float:
    """Largest difference over the largest magnitude, over all tensors of two outputs; shapes and dtypes must agree."""
    pairs = list(zip(tensors_of(actual), tensors_of(expected), strict=True))
    assert pairs
    worst = 0.0
    for a, b in pairs:
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if b.numel():
            torch.testing.assert_close(a.isnan(), b.isnan())
            difference = (a.double() - b.double()).abs().nan_to_num(0.0).max().item()
            worst = max(worst, difference / max(b.double().abs().nan_to_num(0.0, 0.0, 0.0).max().item(), 1e-30))
    return worst


def training_step(model: nn.Module, *inputs: Any) -> list[Any]:
    """All that one training step gives: outputs, gradients and buffers, or the error that autograd raises."""
    model.train()
    model.zero_grad()
    fresh = copy.deepcopy(inputs)
    leaves = [t.requires_grad_() for t in tensors_of(fresh) if t.is_floating_point()]
    torch.manual_seed(0)
    try:
        outputs = tensors_of(model(*fresh))
        weighted = [(t * torch.linspace(-1, 1, t.numel()).reshape(t.shape)).sum() for t in outputs if t.requires_grad]
        if weighted:
            torch.stack([w.double() for w in weighted]).sum().backward()
    except RuntimeError as error:  # for one, an in-place write to what autograd keeps
        return [str(error).partition(":")[0]]
    gradients = [t.grad for t in (*leaves, *model.parameters())]
    return [*outputs, *gradients, *model.buffers()]


def assert_trains_like(converted: nn.Module, eager: nn.Module, *inputs: Any, tolerance: float = 1e-9) -> None:
    """Assert that one training step in float64 gives the same outputs, gradients and buffers.

    ``tolerance`` is of a tensor's largest magnitude, or absolute where that is less than 1. Where PyTorch refuses
    because the model overwrites what its autograd keeps, a unit that does not keep it may not.
    """
    wide = copy.deepcopy((eager, converted, inputs))
    for t in tensors_of(wide[2]):
        t.data = t.double() if t.is_floating_point() else t
    expected, actual = (training_step(model.double(), *wide[2]) for model in wide[:2])
    if isinstance(expected[0], str):
        assert actual == expected or isinstance(actual[0], Tensor)
        return
    for a, e in zip(actual, expected, strict=True):
        if isinstance(e, Tensor):
            torch.testing.assert_close(a, e, rtol=0, atol=tolerance * max(1.0, e.abs().max().item()), equal_nan=True)
        else:
            assert a == e


class ConvBNAct(nn.Module):
    """A traced host with one unit; the base of the modules below."""

    def __init__(self, c_in: int = 4, c_out: int = 4, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.bn, self.act = unit(c_in, c_out, act=act)

    def unit(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward(self, x: Tensor) -> Any:
        return self.unit(x)


class Forward(ConvBNAct):
    """``ConvBNAct`` with any forward: ``Forward(lambda self, x: ...)``."""

    def __init__(self, body: Callable[..., Any], act: nn.Module | None = None, **attributes: Any) -> None:
        super().__init__(act=act)
        self.body = body
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class Bottleneck(nn.Module):
    """ResNet's block: one activation object for three call sites, the residual before the last."""

    def __init__(self, channels: int = 4, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1, _ = unit(channels, channels, 1)
        self.conv2, self.bn2, _ = unit(channels, channels, 3)
        self.conv3, self.bn3, _ = unit(channels, channels, 1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class DarknetBlock(nn.Module):
    """Darknet's block: the residual after the last activation."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = unit(channels, 2 * channels, 1)
        self.conv2, self.bn2, self.relu2 = unit(2 * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        out += x
        return out


class DefinedBackwards(nn.Module):
    """Children defined in another order than they are called in."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.LeakyReLU(0.1)
        self.bn_b = nn.BatchNorm2d(4)
        self.bn_a = nn.BatchNorm2d(4)
        self.conv_b = nn.Conv2d(4, 4, 3, padding=1)
        self.conv_a = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn_b(self.conv_b(self.act(self.bn_a(self.conv_a(x))))))


class PreActivation(nn.Module):
    """DenseNet's order: batch norm and activation before the convolution."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))], 1)


class ListOrTensor(ConvBNAct):
    """DenseNet's way to take its input."""

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        parts = [x] if isinstance(x, Tensor) else x
        return self.unit(torch.cat(parts, 1))


class OptionalMask(ConvBNAct):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        y = self.unit(x)
        if mask is not None:
            y = y * mask
        return y * scale


class TwoInputs(ConvBNAct):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)) + other)


class Loop(nn.Module):
    """Units in lists, called in a loop."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.convs = nn.ModuleList(unit()[0] for _ in range(depth))
        self.bns = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(depth))
        self.acts = nn.ModuleDict({"relu": nn.ReLU(), "leaky": nn.LeakyReLU(0.2)})

    def forward(self, x: Tensor) -> Tensor:
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            x = self.acts["leaky" if i % 2 else "relu"](bn(conv(x)))
        return x


class FrozenBatchNorm2d(nn.Module):
    """A batch norm whose statistics and parameters are buffers, as detection models have."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.full((channels,), 1.5))
        self.register_buffer("bias", torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.reshape(1, -1, 1, 1) + self.bias.reshape(1, -1, 1, 1)


class LoudConv(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class QuietConv(nn.Conv2d):
    """A subclass that changes nothing about forward."""


class BiasFreeBN(nn.BatchNorm2d):
    """A batch norm with a weight and no bias."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.bias = None


def functional_unit(self: Any, x: Tensor) -> Tensor:
    """Batch norm and activation as functions."""
    bn = self.bn
    z = F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, 0.1, bn.eps)
    return F.leaky_relu(z, 0.1)
