"""A residual that a module adds to the result of a child whose last unit can take it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from pointfuse.modules import add_and_act, has_hooks, in_graph, note_refusal


def call_and_add(
    child: nn.Module,
    x: Any,
    residual: Any,
    act: nn.Module | tuple[Any, ...] | None,
    residual_order: str,
    residual_inplace: bool,
) -> Any:
    """``act(child(x) + residual)``, with the sum and the activation in the child's last unit where it takes them.

    ``residual_order`` says what that unit needs: ``"act_add"`` where it has an activation, else ``"add_act"``.
    """
    run = getattr(child, "_pointfuse_tail", None)
    if (
        run is not None
        and isinstance(x, Tensor)
        and isinstance(residual, Tensor)
        and not in_graph()
        and not torch_module._has_any_global_hook()
        and not has_hooks(child)
        and type(child).__call__ is nn.Module.__call__
    ):
        y = run(x, residual, act, residual_order, residual_inplace)
        if y is not None:
            return y
    note_refusal()
    return add_and_act(child(x), residual, act, residual_inplace)
