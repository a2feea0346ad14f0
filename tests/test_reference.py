"""The definition agrees with PyTorch in float64, and its written-out gradients with numerical differentiation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pointfuse import reference
from pointfuse.problem import ACTIVATIONS, Activation, BatchNorm, Geometry
from torch import Tensor
from torch.nn import functional as F

GEOMETRIES = {
    "1x1": dict(kernel=1),
    "3x3 padded": dict(kernel=3, padding=1),
    "3x3 stride 2": dict(kernel=3, padding=1, stride=2),
    "1x1 stride 2": dict(kernel=1, stride=2),
    "2x3 dilated": dict(kernel=(2, 3), dilation=(2, 1), padding=(1, 2)),
    "grouped": dict(kernel=3, groups=2),
}


def operands(kernel: Any = 1, groups: int = 1, c_in: int = 4, c_out: int = 6, plane: int = 6) -> dict[str, Tensor]:
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    draw = {
        "x": (3, c_in, plane, plane + 1),
        "weight": (c_out, c_in // groups, kh, kw),
        "bias": (c_out,),
        "bn_weight": (c_out,),
        "bn_bias": (c_out,),
    }
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in draw.items()}


def composed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    bn: bool,
    training: bool,
    activation: str,
    residual: Tensor | None,
    order: str,
    slope: float,
    **geometry: Any,
) -> Tensor:
    z = F.conv2d(x, weight, bias, **geometry)
    if bn:
        z = F.batch_norm(z, mean, var, bn_weight, bn_bias, training, 0.1, 1e-3)
    if residual is not None and order == "add_act":
        z = z + residual
    act = {"leaky_relu": lambda t: F.leaky_relu(t, slope), "identity": lambda t: t}.get(activation)
    z = (act or getattr(F, activation))(z)
    return z + residual if residual is not None and order == "act_add" else z


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_forward_is_pytorchs_composition(geometry: dict[str, Any], activation: str, training: bool) -> None:
    geometry = dict(geometry)
    kernel = geometry.pop("kernel")
    t = operands(kernel, geometry.get("groups", 1))
    mean, var = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.5
    mean_expected, var_expected = mean.clone(), var.clone()
    expected = composed(
        t["x"], t["weight"], t["bias"], mean_expected, var_expected, t["bn_weight"], t["bn_bias"], True, training,
        activation, None, "add_act", -0.3, **geometry,
    )  # fmt: skip
    actual, _ = reference.forward(
        t["x"], t["weight"], t["bias"], mean, var, t["bn_weight"], t["bn_bias"],
        training=training, eps=1e-3, activation=activation, negative_slope=-0.3, **geometry,
    )  # fmt: skip
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean, mean_expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(var, var_expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bn", ["batch statistics", "running statistics", "no affine", "none"])
@pytest.mark.parametrize("order", ["add_act", "act_add"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_backward_is_autograds_of_pytorch(geometry: dict[str, Any], activation: str, order: str, bn: str) -> None:
    geometry = dict(geometry)
    kernel = geometry.pop("kernel")
    t = operands(kernel, geometry.get("groups", 1))
    if bn in ("none", "no affine"):
        t |= {"bn_weight": None, "bn_bias": None}
    running = (torch.randn(6).double(), torch.rand(6).double() + 0.5)
    mean, var = running if bn in ("running statistics", "no affine") else (None, None)
    training = bn == "batch statistics"
    plain = composed(
        t["x"], t["weight"], t["bias"], mean, var, t["bn_weight"], t["bn_bias"], bn != "none", training, activation,
        None, order, 0.2, **geometry,
    )  # fmt: skip
    t["residual"] = torch.randn_like(plain[:, :, :, :1])  # broadcasts, so its gradient is a sum
    leaves = {name: v.requires_grad_() for name, v in t.items() if v is not None}
    expected = composed(
        t["x"], t["weight"], t["bias"], mean, var, t["bn_weight"], t["bn_bias"], bn != "none", training, activation,
        t["residual"], order, 0.2, **geometry,
    )  # fmt: skip
    upstream = torch.randn_like(expected)
    gradients = dict(zip(leaves, torch.autograd.grad(expected, list(leaves.values()), upstream), strict=True))
    with torch.no_grad():
        _, saved = reference.forward(
            t["x"], t["weight"], t["bias"], mean, var, t["bn_weight"], t["bn_bias"], residual=t["residual"],
            residual_order=order, training=training, eps=1e-3, activation=activation, negative_slope=0.2, **geometry,
        )  # fmt: skip
        actual = reference.backward(upstream, saved)._asdict()
    for name, value in actual.items():
        assert (value is None) == (name not in gradients), name
        if value is not None:
            torch.testing.assert_close(
                value, gradients[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )


class _Definition(torch.autograd.Function):
    """The definition's own forward and backward as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, options: dict[str, Any], x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor,
                residual: Tensor) -> Tensor:  # fmt: skip
        out, ctx.saved = reference.forward(x, weight, bias, None, None, gamma, beta, residual=residual, **options)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        g = reference.backward(grad_out, ctx.saved)
        return None, g.x, g.weight, g.bias, g.bn_weight, g.bn_bias, g.residual


@pytest.mark.parametrize("activation", ["leaky_relu", "silu", "identity"])
@pytest.mark.parametrize("order", ["add_act", "act_add"])
def test_backward_passes_gradcheck(activation: str, order: str) -> None:
    t = operands(3, c_in=2, c_out=2, plane=4)
    options = dict(training=True, activation=activation, residual_order=order, negative_slope=-0.5, padding=1)
    leaves = [v.requires_grad_() for v in t.values()]
    leaves.append(torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(lambda *a: _Definition.apply(options, *a), leaves)


def test_activation_derivative_at_zero_is_pytorchs() -> None:
    for name in ACTIVATIONS:
        z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        act = {"leaky_relu": lambda t: F.leaky_relu(t, 0.25), "identity": lambda t: t * 1}.get(name)
        (act or getattr(F, name))(z).backward()
        assert reference.activation_derivative(z.detach(), name, 0.25).item() == z.grad.item(), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("slope", [0.1, 0.0, -0.5])
def test_activations_propagate_nan_and_infinity_as_pytorchs(activation: str, slope: float) -> None:
    z = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 7.0, -7.0], dtype=torch.float64)
    act = {"leaky_relu": lambda t: F.leaky_relu(t, slope), "identity": lambda t: t}.get(activation)
    torch.testing.assert_close(
        reference.activate(z, activation, slope), (act or getattr(F, activation))(z), equal_nan=True, rtol=0, atol=1e-15
    )


def test_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="'gelu' is not one of leaky_relu"):
        reference.activate(torch.zeros(1), "gelu")
    with pytest.raises(ValueError, match="'gelu' is not one of leaky_relu"):
        reference.activation_derivative(torch.zeros(1), "gelu")


def test_geometry_knows_the_output_plane() -> None:
    for kernel, stride, padding, dilation in [
        ((1, 1), 1, 0, 1),
        ((3, 2), 2, 1, 1),
        ((3, 3), 1, 2, 3),
        ((5, 3), 3, 0, 2),
    ]:
        geometry = Geometry((stride, stride), (padding, padding), (dilation, dilation))
        y = F.conv2d(torch.zeros(1, 1, 23, 17), torch.zeros(1, 1, *kernel), None, stride, padding, dilation)
        assert geometry.output_plane((1, 1, 23, 17), kernel) == y.shape[2:]
    assert not Geometry(stride=(0, 1)).well_formed
    assert not Geometry(padding="same").well_formed
    assert Geometry().well_formed


def test_vocabulary_is_plain_data() -> None:
    assert Activation("relu")._asdict() == {"name": "relu", "negative_slope": 0.01, "inplace": False}
    assert BatchNorm(None, None, None, None, True, 0.1, 1e-5).batch_statistics
