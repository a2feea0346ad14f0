"""Converts whole models: ``plan``, ``convert``, ``revert`` and ``freeze``."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pointfuse.backends import fallback_reason
from pointfuse.convert import graphs, verification
from pointfuse.convert.freezing import freeze_hosts, own_tensors
from pointfuse.convert.graphs import NewShapeWarning
from pointfuse.convert.hosts import (
    is_frozen,
    is_host,
    refuse_training,
    replay_graphs,
    shared_copy,
    uninstall,
)
from pointfuse.convert.planning import (
    ExampleInputs,
    HostPlan,
    Plan,
    Skipped,
    Unit,
    analyse,
    check_kind,
    install_hosts,
    summarise,
)
from pointfuse.convert.verification import VerificationError
from pointfuse.folded import FoldedConv2d
from pointfuse.modules import ConvBNAct2d, forget_recompute, set_recompute, warn_once

__all__ = ["NewShapeWarning", "Plan", "Skipped", "Unit", "VerificationError", "convert", "freeze", "plan", "revert"]


def plan(model: nn.Module, example_inputs: ExampleInputs = None) -> Plan:
    """What :func:`convert` would do to a model: its units, and every other convolution with the reason it is left.

    Args:
        model: any module; it is not changed.
        example_inputs: a tensor, a tuple or list of arguments, or a dict of keyword arguments. With them the plan
            knows shapes, and modules whose forward branches on its inputs' shapes can be analysed.

    Returns:
        a :class:`Plan`: ``.units``, ``.skipped``, ``.to_dict()``; it prints as a table.
    """
    _check(model, "plan")
    return summarise(model, analyse(model, example_inputs), example_inputs)


def convert(
    model: nn.Module,
    example_inputs: ExampleInputs = None,
    inplace: bool = False,
    verify: bool = False,
    *,
    recompute: bool = False,
) -> nn.Module:
    """A model whose convolution units run fused, for inference and training.

    Every module keeps its class (as a base), attributes, children and names, so ``state_dict`` keys, checkpoints,
    optimisers, slices and hooks go on working. What cannot be proven from the data flow is left alone: :func:`plan`
    lists it.

    Args:
        model: any module, in any mode.
        example_inputs: as for :func:`plan`; needed for ``verify``.
        inplace: convert ``model`` itself. Otherwise a copy of its structure is converted that *shares* its parameters
            and buffers: training either trains both, and no second copy of the weights is kept.
        verify: run both models on the example inputs in evaluation and training mode first, and raise
            :class:`VerificationError` with the worst module's name and figures where they differ.
        recompute: in training every unit keeps its input alone and convolves again in the backward: half the memory
            of the units, for a third more arithmetic. ``False`` leaves the units that a model already has as they are.

    Returns:
        the converted model; converting it again changes nothing.
    """
    _check(model, "convert")
    _announce_fallback(model)
    if verify and example_inputs is None:
        raise ValueError("verify=True runs the models: pass example_inputs")
    if verify:
        _need_numbers(model, "convert(verify=True)")
    target = model if inplace and not verify else _copy(model)
    found = analyse(target, example_inputs)
    _install(found, recompute)
    if not any(h.sites for h in found) and not any(isinstance(m, ConvBNAct2d) for m in model.modules()):
        why = "pointfuse.plan(model) lists the reason of each convolution"
        if any(isinstance(m, FoldedConv2d) for m in model.modules()):
            why = "it is frozen, and its units run fused already"
        warnings.warn(f"pointfuse.convert found no unit in this model; {why}", UserWarning, stacklevel=2)
    if verify:
        verification.verify(model, target, example_inputs)
        if inplace:
            _install(analyse(model, example_inputs), recompute)
    return model if inplace else target


def revert(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Plain PyTorch again: every module with its own class, every :class:`ConvBNAct2d` a ``Sequential``.

    Parameters and buffers are shared as in :func:`convert`; ``state_dict`` keys stay. A model that was never converted
    comes back as it is; a :class:`ConvBNAct2d` that its parent calls with a residual has no plain form, and the parent
    will raise ``TypeError``. Raises ``RuntimeError`` for a frozen model, whose batch norms are gone.
    """
    _check(model, "revert")
    if any(isinstance(m, FoldedConv2d) for m in model.modules()):
        raise RuntimeError("a frozen model cannot be reverted: use the model that was given to pointfuse.freeze")
    model = model if inplace else _copy(model)
    for module in list(model.modules()):
        if is_host(module):
            uninstall(module)
        forget_recompute(module)
        for name, child in module._modules.items():
            if isinstance(child, ConvBNAct2d):
                module._modules[name] = _sequential(child)
    return _sequential(model) if isinstance(model, ConvBNAct2d) else model


def freeze(
    model: nn.Module,
    example_inputs: ExampleInputs = None,
    inplace: bool = False,
    *,
    pack: bool = True,
    memory_format: torch.memory_format = torch.channels_last,
    cuda_graph: bool = False,
) -> nn.Module:
    """The fastest form for inference: batch norms folded into weights, weights packed, channels_last inside.

    Weights and statistics are read once, here: later changes to ``model`` do not reach the frozen model, which has no
    gradient and refuses ``train()``.

    Args:
        model: a module in evaluation mode, converted or not.
        example_inputs: as for :func:`plan`. With them the model is run before and after, so that weights are packed for
            their shapes, and :class:`VerificationError` is raised where the answers differ; otherwise the first call
            packs.
        inplace: freeze ``model`` itself, releasing each original weight as it is folded; it is then frozen even where
            the check on the example inputs raises. Otherwise ``model`` is left as it was, and shares nothing with the
            frozen model.
        pack: on the CPU, reorder weights into oneDNN's own layout. ``False`` keeps plain tensors, for torch.compile,
            torch.export and torch.jit.trace.
        memory_format: in which the frozen convolutions work and answer, as after
            ``model.to(memory_format=torch.channels_last)``; values and shapes do not depend on it.
        cuda_graph: on a CUDA device, replay the whole model as one CUDA graph for each shape of its inputs, captured at
            the first call with that shape (here, for the example inputs), of which a :class:`NewShapeWarning` tells.
            Sixteen shapes at most; further ones run without. Inputs may be any tree of tensors and constants; outputs
            are copies. A forward that reads values from the GPU, or does other than its inputs' shapes determine, must
            not be captured. Settings such as TF32 are those of the capture.

    Returns:
        the frozen model. Batch norms that do not follow a convolution, or that normalise with the batch's own
        statistics, stay as they are.
    """
    _check(model, "freeze")
    check_kind(example_inputs)
    if model.training:
        raise RuntimeError("freeze needs a model in evaluation mode: call model.eval() first")
    if cuda_graph:
        graphs.check_device(model)
    if is_frozen(model):
        return _graphed(model if inplace else _copy(model), None) if cuda_graph else model
    if memory_format not in (torch.channels_last, torch.contiguous_format):
        raise ValueError(f"memory_format is {memory_format}; it must be torch.channels_last or torch.contiguous_format")
    _announce_fallback(model)
    expected = None if example_inputs is None else verification.outputs(model, example_inputs)
    _need_numbers(model, "freeze")
    originals = set() if inplace else {id(t) for t in (*model.parameters(), *model.buffers())}
    model = model if inplace else _copy(model)
    found = analyse(model, example_inputs)
    channels_last = memory_format == torch.channels_last
    # Tensors made in inference mode could not be loaded into outside of it.
    with torch.inference_mode(False), torch.no_grad():
        freeze_hosts(model, found, pack and channels_last, channels_last)
        own_tensors(model, originals)
    model.requires_grad_(False)
    refuse_training(model)
    for device in {t.device for t in model.buffers() if t.is_cuda}:
        # The kernels fetch a frozen weight ahead of their turn in the stream: whatever wrote it must have ended.
        torch.cuda.synchronize(device)
    if cuda_graph:
        _graphed(model, example_inputs)
    if expected is not None:
        verification.compare(expected, verification.outputs(model, example_inputs))
    return model


def _graphed(model: nn.Module, example_inputs: ExampleInputs) -> nn.Module:
    """Make a frozen model replay graphs, and capture the first one, of which nothing need be said."""
    captured = replay_graphs(model)
    if example_inputs is not None:
        captured.announce = False
        verification.outputs(model, example_inputs)
        captured.announce = True
    return model


def _announce_fallback(model: nn.Module) -> None:
    for device_type in {t.device.type for t in (*model.parameters(), *model.buffers())}:
        if reason := fallback_reason(device_type):
            warn_once(f"units on {device_type} run PyTorch's own operators ({reason})")


def _check(model: nn.Module, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"pointfuse.{function} takes an nn.Module, not a {type(model).__name__}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError(f"this model is compiled: call pointfuse.{function} on the model first, then torch.compile it")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise TypeError(
            f"this model is wrapped in {type(model).__name__}: call pointfuse.{function} first, then wrap the result"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"this model is a ScriptModule: call pointfuse.{function} on the Python model it was made from")


def _need_numbers(model: nn.Module, function: str) -> None:
    """Raise ``ValueError`` where a tensor of the model has no numbers that could be read."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"pointfuse.{function} reads the weights, and {name} is uninitialised: run the model once")
        if tensor.is_meta:
            raise ValueError(
                f"pointfuse.{function} reads the weights, and {name} is on the meta device, without numbers: call "
                "model.to_empty(device=...) and load a state_dict first"
            )


def _install(found: list[HostPlan], recompute: bool) -> None:
    for host in found:
        if recompute and host.sites:
            for site in host.sites:
                set_recompute(host.module.get_submodule(site.conv))
            set_recompute(host.module)
    install_hosts(found)


def _copy(model: nn.Module) -> nn.Module:
    if any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
        warnings.warn(
            "pointfuse: modules of this model were compiled by their method compile(), which their copies are not: "
            "call it on what is returned",
            UserWarning,
            stacklevel=3,
        )
    try:
        return shared_copy(model)
    except Exception as error:
        error.add_note("raised while copying the model's structure; inplace=True needs no copy")
        raise


def _sequential(unit: ConvBNAct2d) -> nn.Sequential:
    sequential = nn.Sequential(OrderedDict(unit.named_children()))
    sequential.training = unit.training
    hooks = {name: value for name, value in vars(unit).items() if "_hooks" in name}
    vars(sequential).update(hooks)
    return sequential
