"""Units as graphs of cuDNN's graph API: convolution, bias and activation in one, as its runtime fusion engines run it.

It needs the package `nvidia-cudnn-frontend`; its interface: https://github.com/NVIDIA/cudnn-frontend. The plan is the
first that cuDNN's own heuristics recommend.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Fused kernels load eight 16-bit channels at a time.
CHANNELS_MULTIPLE = 8


@torch.no_grad()
def fuse_units(model: nn.Module) -> None:
    """Replace each convolution that a batch norm and a LeakyReLU follow among a module's children by a `CudnnUnit`.

    Holds for the networks here, whose children are registered in the order in which they run. A unit whose channels
    are no multiple of eight stays as it is.

    Raises:
        ImportError: there is no nvidia-cudnn-frontend.
        ValueError: the model is not bf16 or fp16, or has no unit to fuse.
    """
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"written for bf16 and fp16, not {dtype}")
    cudnn = importlib.import_module("cudnn")
    if not _fuse(model, cudnn):
        raise ValueError("no convolution with a batch norm and a LeakyReLU behind it")


@dataclass(frozen=True)
class _Built:
    """A graph for one input shape: cuDNN's graph, its tensors x, weight, bias and y, and the workspace it needs."""

    graph: Any
    tensors: tuple[Any, Any, Any, Any]
    workspace: Tensor
    output_size: tuple[int, ...]


class CudnnUnit(nn.Module):
    """y = leaky_relu(conv(x) + bias), [batch, c_in, height, width] in channels_last, by one graph of cuDNN's.

    The graph is built at the first call with a shape.

    Args:
        conv: the convolution, with batch norm folded in, in the dtype and on the device of the inputs.
    """

    def __init__(self, conv: nn.Conv2d, slope: float, cudnn: Any) -> None:
        super().__init__()
        assert conv.bias is not None
        self.register_buffer("weight", conv.weight.detach().contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", conv.bias.detach().reshape(1, -1, 1, 1))
        self.stride, self.padding, self.dilation = list(conv.stride), _pair(conv.padding), list(conv.dilation)
        self.slope = slope
        self._cudnn = cudnn
        self._built: dict[torch.Size, _Built] = {}

    def forward(self, x: Tensor) -> Tensor:
        handle = _handle(self._cudnn)
        self._cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        built = self._built.get(x.shape)
        if built is None:
            built = self._built[x.shape] = self._build(x, handle)
        y = torch.empty(built.output_size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        values = dict(zip(built.tensors, (x, self.weight, self.bias, y), strict=True))
        built.graph.execute(values, built.workspace, handle=handle)
        return y

    def _build(self, x: Tensor, handle: Any) -> _Built:
        cudnn = self._cudnn
        kind = cudnn.data_type.BFLOAT16 if x.dtype == torch.bfloat16 else cudnn.data_type.HALF
        graph = cudnn.pygraph(
            handle=handle,
            io_data_type=kind,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
        )

        def tensor(name: str, size: Sequence[int]) -> Any:
            return graph.tensor(name=name, dim=list(size), stride=_channels_last_strides(size), data_type=kind)

        sizes = x.shape, self.get_buffer("weight").shape, self.get_buffer("bias").shape
        inputs = [tensor(name, size) for name, size in zip(("x", "weight", "bias"), sizes, strict=True)]
        y = graph.conv_fprop(
            image=inputs[0], weight=inputs[1], padding=self.padding, stride=self.stride, dilation=self.dilation
        )
        y = graph.bias(input=y, bias=inputs[2])
        y = graph.leaky_relu(input=y, negative_slope=self.slope)
        output_size = self._output_size(x)
        y.set_output(True)
        y.set_dim(list(output_size))
        y.set_stride(_channels_last_strides(output_size))
        y.set_data_type(kind)

        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=x.device)
        return _Built(graph, (*inputs, y), workspace, output_size)

    def _output_size(self, x: Tensor) -> tuple[int, ...]:
        weight = self.get_buffer("weight")
        plane = [
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                x.shape[2:], self.padding, self.dilation, weight.shape[2:], self.stride, strict=True
            )
        ]
        return (x.shape[0], weight.shape[0], *plane)


def _fuse(model: nn.Module, cudnn: Any) -> int:
    """Fuse the units below `model`; returns how many."""
    children = list(model.named_children())
    count = 0
    for (conv_name, conv), (bn_name, bn), (act_name, act) in zip(children, children[1:], children[2:], strict=False):
        if (
            isinstance(conv, nn.Conv2d)
            and isinstance(bn, nn.BatchNorm2d)
            and isinstance(act, nn.LeakyReLU)
            and conv.in_channels % CHANNELS_MULTIPLE == conv.out_channels % CHANNELS_MULTIPLE == 0
        ):
            setattr(model, conv_name, CudnnUnit(_folded(conv, bn), act.negative_slope, cudnn))
            setattr(model, bn_name, nn.Identity())
            setattr(model, act_name, nn.Identity())
            count += 1
    return count + sum(_fuse(child, cudnn) for _, child in children)


def _folded(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """Batch norm folded into the convolution in fp32, rounded once."""
    dtype = conv.weight.dtype
    return fuse_conv_bn_eval(conv.float(), bn.float()).to(dtype)


def _pair(padding: str | tuple[int, ...]) -> list[int]:
    assert not isinstance(padding, str), "the networks here give their padding in numbers"
    return list(padding)


def _channels_last_strides(size: Sequence[int]) -> list[int]:
    """Written out, since the strides that PyTorch gives a tensor with planes or channels of 1 are not unique."""
    _, channels, height, width = size
    return [channels * height * width, 1, channels * width, channels]


@functools.cache
def _handle(cudnn: Any) -> Any:
    """cuDNN's handle, one for the process."""
    return cudnn.create_handle()
