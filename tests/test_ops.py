"""``torch.ops.pointfuse.conv_bn_act`` is a well-behaved operator: opcheck, gradcheck, export."""

from __future__ import annotations

from typing import Any

import pointfuse
import pytest
import torch
from pointfuse.problem import ACTIVATIONS
from torch import Tensor
from torch.library import opcheck

OP = torch.ops.pointfuse.conv_bn_act.default


def arguments(
    x: Tensor, residual: Tensor | None = None, bn: bool = True, bias: bool = True, affine: bool = True,
    activation: str = "leaky_relu", order: str = "add_act", groups: int = 1, c_out: int = 6, kernel: int = 3,
    stride: int = 1, requires_grad: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    dtype = x.dtype
    weight = torch.randn(c_out, x.shape[1] // groups, kernel, kernel, dtype=dtype, requires_grad=requires_grad)

    def vector(present: bool = True, positive: bool = False, leaf: bool = True) -> Tensor | None:
        t = torch.rand(c_out, dtype=dtype) + 0.5 if positive else torch.randn(c_out, dtype=dtype)
        return t.requires_grad_(requires_grad and leaf) if present else None

    return (
        x, weight, vector(bias), vector(bn, leaf=False), vector(bn, positive=True, leaf=False), vector(bn and affine),
        vector(bn and affine), residual, [stride, stride], [1, 1], [1, 1], groups, 1e-3, activation, -0.2, order,
    )  # fmt: skip


SAMPLES = {
    "contiguous": lambda: torch.randn(2, 4, 5, 6),
    "channels_last": lambda: torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last),
    "permuted": lambda: torch.randn(2, 4, 6, 5).transpose(2, 3),
    "sliced": lambda: torch.randn(4, 8, 6, 7)[::2, ::2, 1:, 1:],
    "empty": lambda: torch.randn(0, 4, 5, 6),
    "large": lambda: torch.randn(1, 32, 40, 40),
}


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_opcheck(sample: Any, residual: bool) -> None:
    x = sample()
    args = arguments(x.clone(memory_format=torch.preserve_format).requires_grad_(), requires_grad=True, kernel=3)
    if residual:
        args = (*args[:7], torch.randn_like(OP(*args)).detach().requires_grad_(), *args[8:])
    opcheck(OP, args)


def test_opcheck_without_batch_norm_or_gradients() -> None:
    opcheck(OP, arguments(torch.randn(2, 4, 5, 6), bn=False, groups=2, stride=2, activation="silu"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("order", ["add_act", "act_add"])
@pytest.mark.parametrize("bn", ["affine", "plain", "none"])
def test_gradcheck(activation: str, order: str, bn: str) -> None:
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    args = arguments(x, bn=bn != "none", affine=bn == "affine", c_out=2, requires_grad=True, activation=activation)
    residual = torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True)
    args = (*args[:7], residual, *args[8:15], order)
    assert torch.autograd.gradcheck(OP, args)
    if activation in ("silu", "leaky_relu"):
        assert torch.autograd.gradgradcheck(OP, args)


def test_it_gives_what_the_function_gives() -> None:
    args = arguments(torch.randn(2, 24, 40, 40), residual=torch.randn(2, 6, 40, 40))
    with torch.no_grad():
        expected = pointfuse.conv_bn_act(
            *args[:7], residual=args[7], padding=1, eps=1e-3, negative_slope=-0.2, residual_order="add_act"
        )
        assert torch.equal(OP(*args), expected)


def test_only_wanted_gradients_are_computed() -> None:
    args = list(arguments(torch.randn(2, 4, 5, 5), residual=torch.randn(2, 6, 5, 5)))
    args[1] = args[1].requires_grad_()
    OP(*args).sum().backward()
    assert args[1].grad is not None
    assert all(a.grad is None for a in args if isinstance(a, Tensor) and a is not args[1])


def test_export_keeps_the_unit_whole() -> None:
    args = arguments(torch.randn(2, 4, 5, 6))

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return OP(x, *args[1:])

    exported = torch.export.export(Model(), (args[0],))
    assert [n.target for n in exported.graph.nodes if n.op == "call_function"] == [OP]
    torch.testing.assert_close(exported.module()(args[0]), OP(*args))


def test_bad_names_raise() -> None:
    args = list(arguments(torch.randn(1, 4, 5, 5)))
    with pytest.raises(ValueError, match="'gelu'; it must be one of"):
        OP(*args[:13], "gelu", *args[14:])
    with pytest.raises(ValueError, match="'before'; it must be 'add_act'"):
        OP(*args[:15], "before")
