"""Training in several processes, over gloo on the CPU: synchronised batch norm, DistributedDataParallel and FSDP2."""

from __future__ import annotations

import copy
import itertools
import os
from datetime import timedelta

import pointfuse
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pointfuse.backends import aten_training
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch is built without gloo")


def network() -> nn.Sequential:
    """Three units in float64, the last with a residual's geometry, from one seed."""
    torch.manual_seed(1)
    units = [
        (nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.1)),
        (nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6, momentum=None), nn.SiLU()),
        (nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5, affine=False), nn.Identity()),
    ]
    return nn.Sequential(*itertools.chain(*units)).double()


def batch() -> Tensor:
    return torch.randn(6, 4, 7, 7, generator=torch.Generator().manual_seed(2)).double()


def gradient_of(y: Tensor) -> Tensor:
    """What the loss sends back to each image, whatever the images beside it."""
    shape = y.shape[1:]
    return torch.linspace(-1, 2, shape.numel(), dtype=y.dtype).reshape(shape).expand_as(y)


def full_batch(steps: int = 2) -> dict[str, Tensor]:
    """One process and plain modules: outputs, input gradients, the sums of the parameters' gradients, buffers."""
    model, x = network(), batch().requires_grad_()
    for _ in range(steps):
        model.zero_grad()
        x.grad = None
        y = model(x)
        y.backward(gradient_of(y))
    return {"y": y.detach(), "x": x.grad} | _tensors(model)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters()}
    return found | {n: b.clone() for n, b in model.named_buffers()}


def converted(recompute: bool = False) -> nn.Module:
    return pointfuse.convert(nn.SyncBatchNorm.convert_sync_batchnorm(network()), recompute=recompute)


def synchronised(share: slice, recompute: bool = False) -> dict[str, Tensor]:
    model = converted(recompute)
    x = batch()[share].requires_grad_()
    for _ in range(2):
        model.zero_grad()
        x.grad = None
        y = model(x)
        y.backward(gradient_of(y))
    assert type(y.grad_fn).__name__ == "_ConvBNActBackward"
    return {"y": y.detach(), "x": x.grad} | _tensors(model)


def run_even(rank: int) -> dict[str, Tensor]:
    return synchronised(slice(rank * 3, rank * 3 + 3))


def run_recompute(rank: int) -> dict[str, Tensor]:
    return synchronised(slice(rank * 3, rank * 3 + 3), recompute=True)


def run_uneven(rank: int) -> dict[str, Tensor]:
    return synchronised(slice(0, 1) if rank == 0 else slice(1, 6))


def run_with_an_empty_share(rank: int) -> dict[str, Tensor]:
    return synchronised(slice(0, 0) if rank == 0 else slice(0, 6))


def run_data_parallel(rank: int) -> dict[str, Tensor]:
    """DistributedDataParallel wants a GPU for SyncBatchNorm: on the CPU it is made after the wrapping."""
    wrapped = DistributedDataParallel(network())
    wrapped.module = pointfuse.convert(nn.SyncBatchNorm.convert_sync_batchnorm(wrapped.module), inplace=True)
    x = batch()[rank * 3 : rank * 3 + 3].requires_grad_()
    for _ in range(2):
        wrapped.zero_grad()
        x.grad = None
        y = wrapped(x)
        y.backward(gradient_of(y))
    found = {n.removeprefix("module."): t for n, t in _tensors(wrapped).items()}
    # Averaged by DistributedDataParallel.
    found = {n: 2 * t if n in dict(network().named_parameters()) else t for n, t in found.items()}
    return {"y": y.detach(), "x": x.grad} | found


def run_fully_sharded(rank: int) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = converted()
    fully_shard(model, mesh=mesh)
    x = batch()[rank * 3 : rank * 3 + 3].requires_grad_()
    for _ in range(2):
        model.zero_grad()
        x.grad = None
        y = model(x)
        y.backward(gradient_of(y))
    assert type(y.grad_fn).__name__ != "SyncBatchNormBackward"
    found = {n: 2 * p.grad.full_tensor() for n, p in model.named_parameters()}
    return {"y": y.detach(), "x": x.grad} | found | {n: b.clone() for n, b in model.named_buffers()}


def run_converted_first(rank: int) -> dict[str, Tensor]:
    """Units of a module of its own, whose batch norms are replaced after the conversion."""

    class Units(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, module in network().named_children():
                self.add_module(f"layer{name}", module)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer2(self.layer1(self.layer0(x)))
            x = self.layer5(self.layer4(self.layer3(x)))
            return self.layer8(self.layer7(self.layer6(x)))

    model = nn.SyncBatchNorm.convert_sync_batchnorm(pointfuse.convert(Units()))
    x = batch()[rank * 3 : rank * 3 + 3].requires_grad_()
    for _ in range(2):
        model.zero_grad()
        x.grad = None
        y = model(x)
        y.backward(gradient_of(y))
    return {"y": y.detach(), "x": x.grad} | {n.removeprefix("layer"): t for n, t in _tensors(model).items()}


def run_statistics_without_gradients(rank: int) -> dict[str, Tensor]:
    model = converted()
    with torch.no_grad():
        for _ in range(2):
            y = model(batch()[rank * 3 : rank * 3 + 3])
    assert y.grad_fn is None
    return {"y": y} | {n: b.clone() for n, b in model.named_buffers()}


def run_double_backward(rank: int) -> dict[str, Tensor]:
    x = batch()[:2].requires_grad_()
    with pytest.raises(RuntimeError, match="synchronised over processes cannot be differentiated twice"):
        torch.autograd.grad(converted()(x).sum(), x, create_graph=True)
    return {}


SHARES = {
    "even shares": run_even,
    "recomputed": run_recompute,
    "uneven shares": run_uneven,
    "an empty share": run_with_an_empty_share,
    "converted before it was synchronised": run_converted_first,
}
WRAPPERS = {"DistributedDataParallel": run_data_parallel, "FSDP2": run_fully_sharded}
OTHERS = {"without gradients": run_statistics_without_gradients, "double backward": run_double_backward}
SUMMED = {n for n, _ in network().named_parameters()}

Results = dict[str, list[dict[str, Tensor]]]


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    aten_training.MIN_MACS_PER_THREAD = aten_training.MIN_MACS_PER_OUTPUT = 0
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store, timeout=timedelta(seconds=60))
    try:
        found = {name: run(rank) for name, run in (SHARES | WRAPPERS | OTHERS).items()}
        torch.save(found, os.path.join(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What two processes found, by run."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(_work, (str(folder),), nprocs=2)
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return {name: [each[name] for each in found] for name in found[0]}


@pytest.mark.parametrize("name", SHARES)
def test_synchronised_batch_norm_is_that_of_the_whole_batch(results: Results, name: str) -> None:
    expected, shares = full_batch(), results[name]
    for name, exact in expected.items():
        if name in ("y", "x"):
            actual = torch.cat([share[name] for share in shares])
        elif name in SUMMED:
            actual = sum(share[name] for share in shares)
        else:
            assert torch.equal(shares[0][name], shares[1][name])
            actual = shares[0][name]
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", WRAPPERS)
def test_parallel_training_is_that_of_the_whole_batch(results: Results, name: str) -> None:
    expected, shares = full_batch(), results[name]
    for name, exact in expected.items():
        joined = torch.cat([share[name] for share in shares]) if name in ("y", "x") else shares[0][name]
        torch.testing.assert_close(joined, exact, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_statistics_are_synchronised_without_gradients_too(results: Results) -> None:
    model = network()
    with torch.no_grad():
        for _ in range(2):
            y = model(batch())
    shares = results["without gradients"]
    torch.testing.assert_close(torch.cat([share["y"] for share in shares]), y)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(shares[0][name], buffer)


def test_a_second_derivative_over_processes_is_refused(results: Results) -> None:
    assert results["double backward"] == [{}, {}]  # raised, and said why


def test_in_one_process_it_is_plain_batch_norm() -> None:
    model = network()
    alone = pointfuse.convert(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)))
    x = batch()
    for mode in (True, False):
        torch.testing.assert_close(alone.train(mode)(x), model.train(mode)(x))
    assert len(pointfuse.plan(alone).units) == 3
    frozen = pointfuse.freeze(alone.eval())
    torch.testing.assert_close(frozen(x), model(x))


def test_a_group_of_one_process_trains_units_of_any_size_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyTorch's SyncBatchNorm, to which units too small to gain would be left, wants a GPU."""
    monkeypatch.setattr(aten_training, "MIN_MACS_PER_THREAD", 1 << 28)
    monkeypatch.setattr(aten_training, "MIN_MACS_PER_OUTPUT", 1152)
    model, x = network(), batch()
    expected = model(x)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        alone = converted()
        y = alone(x)
        y.backward(gradient_of(y))
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(y, expected)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(alone.get_buffer(name), buffer)
