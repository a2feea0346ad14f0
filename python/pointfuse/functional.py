"""The unit as a function."""

from __future__ import annotations

from torch import Tensor

from pointfuse import training as with_gradients
from pointfuse.backends import select
from pointfuse.problem import Activation, BatchNorm, Geometry, as_pair, check_activation, check_residual_order


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "leaky_relu",
    negative_slope: float = 0.01,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    residual_order: str = "add_act",
) -> Tensor:
    """Convolution, batch norm and activation as one unit.

        z = bn_weight * (conv(x, weight) + bias - mean) / sqrt(var + eps) + bn_bias
        y = act(z),  act(z + residual)  or  act(z) + residual

    Args:
        x: ``[batch, c_in, height, width]``, in any memory format.
        weight: ``[c_out, c_in / groups, kernel_height, kernel_width]``, of the dtype of ``x``.
        bias: ``[c_out]``, of the convolution.
        running_mean, running_var: ``[c_out]``. Without ``training`` they normalise; with it the batch's own mean and
            biased variance do, and these, where given, are updated in place with the unbiased variance.
        bn_weight, bn_bias: ``[c_out]``, the affine parameters of batch norm. If all four batch norm tensors are
            ``None`` and ``training`` is false, there is no batch norm.
        momentum: weight of the new statistics in the update.
        eps: added to the variance.
        activation: ``"leaky_relu"``, ``"relu"``, ``"relu6"``, ``"silu"`` or ``"identity"``.
        negative_slope: of ``leaky_relu``.
        stride, padding, dilation, groups: as for :func:`torch.nn.functional.conv2d`.
        residual: a tensor that broadcasts with the output.
        residual_order: ``"add_act"``: ``act(z + residual)``, as in ResNet; ``"act_add"``: ``act(z) + residual``, as in
            Darknet.

    Returns:
        ``[batch, c_out, height_out, width_out]``, with the dtype and memory format of PyTorch's own composition.

    Raises:
        ValueError: an unknown activation or residual order, or fewer than two values a channel in training.
        RuntimeError: whatever ``conv2d`` and ``batch_norm`` raise for shapes, dtypes and devices that do not fit.

    Source: S. Ioffe, C. Szegedy, "Batch Normalization", 2015.
    """
    check_activation(activation)
    check_residual_order(residual_order)
    bn = None
    if training or any(t is not None for t in (running_mean, running_var, bn_weight, bn_bias)):
        bn = BatchNorm(running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    geometry = Geometry(
        as_pair(stride, "stride"),
        padding if isinstance(padding, str) else as_pair(padding, "padding"),
        as_pair(dilation, "dilation"),
        groups,
    )
    unit = (x, weight, bias, bn, Activation(activation, negative_slope), geometry, residual, residual_order)
    if (
        bn is not None
        and (training or with_gradients.records(x, weight, bias, bn_weight, bn_bias, residual))
        and with_gradients.serves(x, weight, bias, bn, geometry, residual)
    ):
        return with_gradients.conv_bn_act(*unit)  # type: ignore[arg-type]
    return select().conv_bn_act(*unit)
