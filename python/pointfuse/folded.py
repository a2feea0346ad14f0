"""What ``freeze`` puts in the place of a convolution and its batch norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pointfuse.backends import Preferred, aten, select
from pointfuse.problem import IDENTITY, Activation, Geometry

NO_TRAINING = (
    "a frozen model cannot be trained: its batch norms are folded into its weights; train the model that was given to "
    "freeze, or one made by pointfuse.convert"
)
NO_LOADING = (
    "this model is frozen, and the state_dict is not of a frozen model: load it into the model that was given to "
    "pointfuse.freeze, and freeze that again"
)


class FoldedConv2d(nn.Module):
    """A convolution for inference alone, with the batch norm behind it folded in.

    It stands at the convolution's path, and the batch norm's place is held by :class:`FoldedBatchNorm2d`, so calling
    one after the other gives what it gave. ``scale`` is a factor of the model's forward that is folded in too: ``run``
    has it applied, and a plain call, which the model multiplies itself, has not. On the CPU the weight is packed for
    oneDNN at the first call, for that call's input shape, and the plain weight is dropped; ``state_dict``,
    ``deepcopy``, pickling and ``.to()`` see it plain.
    """

    folded_weight: Tensor
    folded_bias: Tensor | None

    def __init__(
        self,
        conv: nn.Conv2d,
        weight: Tensor,
        bias: Tensor | None,
        has_bn: bool,
        packable: bool = True,
        channels_last: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.has_bn = has_bn
        self.scale = scale
        self.packable = packable
        self.channels_last = channels_last
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.groups, self.padding_mode = conv.dilation, conv.groups, conv.padding_mode
        self.geometry = Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]
        self.register_buffer("folded_weight", weight.contiguous(memory_format=self._format))
        self.register_buffer("folded_bias", bias)
        self._packed: Tensor | None = None
        self.training = False

    def __getattr__(self, name: str) -> Any:
        """``weight`` and ``bias`` are the convolution's own, where nothing is folded into them."""
        if name not in ("weight", "bias"):
            return super().__getattr__(name)
        if self.has_bn:
            raise AttributeError(f"this convolution's {name} is folded together with its batch norm by freeze")
        if self.scale != 1:
            raise AttributeError(
                f"this convolution's {name} is folded together with a factor of {self.scale} by freeze"
            )
        return self.dense_weight() if name == "weight" else self.folded_bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.run(x, IDENTITY)
        return y if self.scale == 1 else y / self.scale

    def run(
        self,
        x: Tensor,
        activation: Activation,
        residual: Tensor | None = None,
        residual_order: str = "add_act",
        residual_inplace: bool = False,
    ) -> Tensor:
        """The unit's output, in the frozen memory format. Raises ``RuntimeError`` where a gradient is asked for."""
        if torch.is_grad_enabled() and isinstance(x, Tensor):
            if x.requires_grad or (residual is not None and residual.requires_grad):
                raise RuntimeError(
                    "a frozen model has no gradient: call it under torch.no_grad(), or use pointfuse.convert to train"
                )
            with torch.no_grad():
                return self.run(x, activation, residual, residual_order, residual_inplace)
        if self.has_bn and isinstance(x, Tensor) and x.dim() == 3:
            raise ValueError("expected 4D input (got 3D input)")  # conv2d takes it, nn.BatchNorm2d does not
        packed = self._packed_for(x)
        act_first = residual is None or residual_order == "act_add"
        if packed is None:
            y = self._by_backend(x, activation, residual, residual_order)
            if y is not None:
                return y
            if isinstance(x, Tensor) and x.dim() == 4:
                x = x.contiguous(memory_format=self._format)
            weight = self.dense_weight()
            bias = None if self.folded_bias is None else self.folded_bias.to(weight.dtype)
            z = aten.conv(x, weight, bias, self.geometry)
        else:
            epilogue = aten.onednn_epilogue(activation) if act_first else None
            z = aten.onednn_conv(x, packed, self.folded_bias, epilogue or ("none", ()), self.geometry)
            activation = IDENTITY if epilogue else activation
        return aten.finish(z, activation, residual, residual_order, residual_inplace, owned=True)

    def _by_backend(
        self, x: Tensor, activation: Activation, residual: Tensor | None, residual_order: str
    ) -> Tensor | None:
        """The unit by the backend that is asked before ATen, if there is one and it serves the call."""
        backend = select()
        if not isinstance(backend, Preferred):
            return None
        if not self.channels_last and isinstance(x, Tensor):
            x = x.contiguous()
        weight, bias = self.dense_weight(), self._buffers["folded_bias"]
        unit = (x, weight, bias, None, activation, self.geometry, residual, residual_order)
        return backend.frozen_conv_act(*unit, channels_last=self.channels_last)

    def dense_weight(self) -> Tensor:
        """The folded weight ``[c_out, c_in / groups, kh, kw]`` in plain strides."""
        # By attribute it would cost 1 us. The packed weight is not looked at in a graph, for no tracer can.
        weight = self._buffers.get("folded_weight")
        if weight is not None:
            return weight
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            _refuse_graph()
        assert self._packed is not None
        with torch.inference_mode(False), torch.no_grad():
            return self._packed.to_dense()

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            "torch.jit.script takes no frozen model: use torch.jit.trace, or script the model before freeze"
        )

    def train(self, mode: bool = True) -> FoldedConv2d:
        if mode:
            raise RuntimeError(NO_TRAINING)
        return super().train(mode)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, has_bn={self.has_bn}, "
            f"packed={self._packed is not None}"
        )

    @property
    def _format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def _packed_for(self, x: Tensor) -> Tensor | None:
        if not self.packable or not aten.onednn_accepts(x):
            return None
        # Before what is packed, which other threads set first and drop the plain weight then.
        weight = self._buffers.get("folded_weight")
        packed = self._packed
        if packed is None:
            assert weight is not None
            geometry = self.geometry
            fits = x.dtype == weight.dtype and x.shape[1] == self.in_channels
            if not fits or not geometry.well_formed or not aten.onednn_takes_dtype(x.dtype):
                return None
            with torch.inference_mode(False), torch.no_grad():
                packed = aten.pack(weight, geometry, x.shape)
            if packed is None:
                return None
            self._packed = packed
            self._buffers.pop("folded_weight", None)
        return packed if packed.dtype == x.dtype else None

    def _unpack(self) -> None:
        if self._packed is not None:
            self._buffers["folded_weight"] = self.dense_weight().contiguous(memory_format=self._format)
            self._packed = None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FoldedConv2d:
        self._unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "folded_weight"] = self.dense_weight()
        if self.folded_bias is not None:
            destination[prefix + "folded_bias"] = self.folded_bias

    def _load_from_state_dict(self, *args: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {"folded_weight": self.dense_weight(), "folded_bias": self.folded_bias}
        state["_packed"] = None
        return state


def _refuse_graph() -> None:
    raise RuntimeError(
        "this frozen model is packed for oneDNN; to compile, export or trace it: freeze(..., pack=False)"
    )


# A compiler runs this while it traces: an error in what it traces would only break the graph, and the weight would be
# unpacked on every call.
_refuse_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


class FoldedBatchNorm2d(nn.Identity):
    """Holds the place of a batch norm that ``freeze`` folded into the convolution before it; passes its input on.

    Of a batch norm that applies an activation too, it has the children and applies it: the one at the path ``act``, or
    ``activation``.
    """

    def __init__(self, bn: nn.Module | None = None, act: str | None = None, activation: Activation = IDENTITY) -> None:
        super().__init__()
        self.training = False
        self.act_path, self.activation = act, activation
        if bn is not None:
            self._modules.update(bn._modules)

    def inner(self) -> nn.Module | Activation | None:
        """The activation that calling this applies."""
        if self.act_path is not None:
            return self.get_submodule(self.act_path)
        return None if self.activation == IDENTITY else self.activation

    def forward(self, input: Tensor) -> Tensor:
        inner = self.inner()
        if isinstance(inner, nn.Module):
            return inner(input)
        return input if inner is None else aten.activate(input, inner, inplace=inner.inplace)
