"""A frozen model is as accurate as PyTorch, stands by itself, cannot be trained, and holds its weights once."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from typing import Any

import pointfuse
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from models_for_tests import (
    Bottleneck,
    ConvBNAct,
    DarknetBlock,
    DefinedBackwards,
    Forward,
    FrozenBatchNorm2d,
    ListOrTensor,
    Loop,
    LoudConv,
    OptionalMask,
    PreActivation,
    functional_unit,
    gap,
    images,
    tensors_of,
    trained,
    unit,
)
from models_for_tests import one_thread as one_thread
from pointfuse.folded import FoldedConv2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from yardstick import error


def assert_accurate(frozen: nn.Module, eager: nn.Module, *inputs: Any) -> None:
    """Assert the accuracy rule against float64, and PyTorch's shapes and dtypes."""
    inputs = copy.deepcopy(inputs)
    wide = copy.deepcopy(eager).double()
    doubled = [[t.double() for t in i] if isinstance(i, list) else i.double() for i in copy.deepcopy(inputs)]
    with torch.no_grad():
        exact, expected = tensors_of(wide(*doubled)), tensors_of(eager(*copy.deepcopy(inputs)))
        actual = tensors_of(frozen(*inputs))
    for ours, theirs, right in zip(actual, expected, exact, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert error(ours, right) <= 2 * error(theirs, right) + 1e-6


def wide_unit(act: nn.Module | None = None, **conv: Any) -> nn.Sequential:
    """A unit worth packing on ``wide_images()``."""
    options = {"kernel_size": 3, "padding": 1} | conv
    return trained(nn.Sequential(nn.Conv2d(16, 16, **options), nn.BatchNorm2d(16), act or nn.LeakyReLU(0.1))).eval()


def wide_images(batch: int = 2, plane: int = 24, **options: Any) -> Tensor:
    return images(batch, 16, plane, plane, **options)


def is_packed(model: nn.Module) -> list[bool]:
    return [m._packed is not None for m in model.modules() if isinstance(m, FoldedConv2d)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "NCHW"])
@pytest.mark.parametrize(
    "conv",
    [
        pytest.param({}, id="3x3"),
        pytest.param({"kernel_size": 1, "padding": 0}, id="1x1"),
        pytest.param({"bias": False, "stride": 2}, id="stride 2 without bias"),
        pytest.param({"groups": 4}, id="groups"),
        pytest.param({"groups": 16}, id="depthwise"),
        pytest.param({"dilation": 2, "padding": 2}, id="dilated"),
        pytest.param({"kernel_size": 5, "padding": "same"}, id="5x5 same"),
        pytest.param({"kernel_size": (1, 3), "padding": (0, 2), "stride": (2, 1)}, id="oblong"),
    ],
)
def test_every_geometry_is_as_accurate_as_pytorch(
    dtype: torch.dtype, pack: bool, memory_format: torch.memory_format, conv: dict[str, Any]
) -> None:
    model = wide_unit(**conv).to(dtype)
    frozen = pointfuse.freeze(model, pack=pack, memory_format=memory_format)
    for batch, plane in ((2, 24), (1, 24), (3, 17), (2, 5)):
        assert_accurate(frozen, model, wide_images(batch, plane, dtype=dtype))
        assert_accurate(frozen, model, wide_images(batch, plane, dtype=dtype).to(memory_format=torch.channels_last))
    if not pack:
        assert is_packed(frozen) == [False]


@pytest.mark.parametrize(
    "act",
    [
        nn.LeakyReLU(0.1), nn.LeakyReLU(0.0), nn.LeakyReLU(-0.2), nn.ReLU(inplace=True), nn.ReLU6(), nn.SiLU(),
        nn.Identity(), nn.Tanh(),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "plain"])
def test_every_activation_is_accurate_and_propagates_nan_and_infinity(act: nn.Module, pack: bool) -> None:
    model = wide_unit(act)
    frozen = pointfuse.freeze(model, pack=pack)
    assert_accurate(frozen, model, wide_images())
    x = wide_images()
    x[0, 0, 5, 5], x[0, 1, 9, 9], x[1, 2, 3, 3] = float("nan"), float("inf"), -float("inf")
    with torch.no_grad():
        expected, actual = model(x.clone()), frozen(x.clone())
    assert torch.equal(actual.isnan(), expected.isnan())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


HOSTS = [
    pytest.param(Bottleneck(), id="bottleneck"),
    pytest.param(Bottleneck(downsample=nn.Sequential(*unit()[:2])), id="bottleneck with downsampling"),
    pytest.param(DarknetBlock(), id="darknet block"),
    pytest.param(DefinedBackwards(), id="defined backwards"),
    pytest.param(PreActivation(), id="pre-activation"),
    pytest.param(Loop(), id="loop over lists"),
    pytest.param(Forward(functional_unit), id="functional batch norm"),
    pytest.param(Forward(lambda s, x: s.conv(s.unit(x))), id="convolution used alone too"),
    pytest.param(Forward(lambda s, x: s.bn(s.unit(x))), id="batch norm used alone too"),
    pytest.param(Forward(lambda s, x: s.unit(s.unit(x))), id="unit used twice"),
    pytest.param(Forward(lambda s, x: s.bn(s.conv(x)) - s.bn(s.more(x)), more=nn.Conv2d(4, 4, 1)), id="one batch norm"),
    pytest.param(Forward(lambda s, x: s.act(s.unit(x) - 0.5)), id="activation used alone too"),
    pytest.param(Forward(lambda s, x: F.conv_transpose2d(s.unit(x), s.conv.weight)), id="weight read elsewhere"),
    pytest.param(Forward(lambda s, x: s.unit(x) * s.bn.running_mean.mean()), id="statistic read elsewhere"),
    pytest.param(Forward(lambda s, x: F.pad(s.unit(x), (s.conv.kernel_size[0],) * 4)), id="kernel size read"),
    pytest.param(Forward(lambda s, x: setattr(s, "n", 1) or s.unit(x)), id="untraceable"),
    pytest.param(
        Forward(lambda s, x: setattr(s, "n", 1) or F.conv2d(s.conv(x), s.conv.weight, None, s.conv.stride)),
        id="untraceable and reads the convolution",
    ),
    pytest.param(Forward(lambda s, x: s.act(s.bn(s.conv(x)) + x[:, :1])), id="broadcast residual"),
    pytest.param(Forward(lambda s, x: s.act(s.bn(s.conv(x)) + x.shape[0])), id="sum with a size"),
    pytest.param(nn.Sequential(*unit(), nn.Conv2d(4, 3, 1)), id="lone convolution"),
    pytest.param(nn.Sequential(LoudConv(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *unit()), id="own forward"),
    pytest.param(nn.Sequential(nn.Conv2d(4, 4, 3), FrozenBatchNorm2d(4), nn.ReLU()), id="frozen batch norm"),
    pytest.param(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU6()), id="not affine"),
    pytest.param(
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()), id="no statistics"
    ),
    pytest.param(nn.Sequential(pointfuse.ConvBNAct2d(4, 4, 3), pointfuse.ConvBNAct2d(4, 4, 1)), id="units already"),
    pytest.param(pointfuse.ConvBNAct2d(4, 4, 3), id="one unit"),
    pytest.param(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), *unit()[1:]), id="weight_norm"),
    pytest.param((lambda a: nn.Sequential(*unit(act=a), *unit(act=a), *unit(act=a)))(nn.ReLU()), id="one activation"),
    pytest.param((lambda c: nn.Sequential(c, *unit()[1:], c, *unit()[1:]))(unit()[0]), id="shared convolution"),
    pytest.param((lambda b: nn.Sequential(unit()[0], b, nn.ReLU(), unit()[0], b))(nn.BatchNorm2d(4)), id="shared bn"),
    pytest.param((lambda b: nn.Sequential(b, nn.Sequential(b)))(ConvBNAct()), id="shared block"),
]  # fmt: skip


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("model", HOSTS)
def test_every_kind_of_module_stays_right(model: nn.Module, pack: bool) -> None:
    model = trained(copy.deepcopy(model)).eval()
    frozen = pointfuse.freeze(model, pack=pack)
    assert_accurate(frozen, model, images())
    assert_accurate(frozen, model, images())
    assert_accurate(pointfuse.freeze(pointfuse.convert(model, images()), images(), pack=pack), model, images())


@pytest.mark.filterwarnings("ignore:pointfuse")
def test_calls_outside_what_was_traced_stay_right() -> None:
    model = trained(OptionalMask()).eval()
    frozen = pointfuse.freeze(model)
    assert_accurate(frozen, model, images())
    assert_accurate(frozen, model, images(), images(2, 1, 8, 8))


@pytest.mark.filterwarnings("ignore:pointfuse")
@pytest.mark.parametrize("example", [None, (images(),)], ids=["no example", "a tensor as example"])
def test_a_forward_that_takes_a_list_or_a_tensor_takes_both(example: Any) -> None:
    model = trained(ListOrTensor()).eval()
    frozen = pointfuse.freeze(model, example)
    assert_accurate(frozen, model, images())
    assert_accurate(frozen, model, [images(2, 2, 8, 8), images(2, 2, 8, 8)])


@pytest.mark.filterwarnings("ignore:pointfuse")
def test_the_other_side_of_a_branch_on_shapes_stays_right() -> None:
    model = trained(Forward(lambda s, x: s.unit(x) * 2 if x.shape[0] > 1 else s.unit(x))).eval()
    frozen = pointfuse.freeze(model, images())
    assert_accurate(frozen, model, images())
    assert_accurate(frozen, model, images(1, 4, 8, 8))


def test_a_parent_that_iterates_over_a_sequential_stays_right() -> None:
    class Iterates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(*unit(), *unit())

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.features:
                x = layer(x)
            return x

    model = trained(Iterates()).eval()
    assert_accurate(pointfuse.freeze(model), model, images())


def test_a_parent_that_reads_a_folded_weight_is_told_so() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(*unit())

        def forward(self, x: Tensor) -> Tensor:
            return F.conv_transpose2d(self.encoder(x), self.encoder[0].weight)

    model = trained(Tied()).eval()
    with pytest.raises(AttributeError, match="weight is folded together with its batch norm"):
        pointfuse.freeze(model, images())
    with pytest.raises(AttributeError, match="weight is folded together with its batch norm"), torch.no_grad():
        pointfuse.freeze(model)(images())


@pytest.mark.parametrize("kind", ["sequential", "traced", "unit"])
def test_a_batch_norm_left_in_training_mode_keeps_the_batchs_statistics(kind: str) -> None:
    kinds = {"sequential": nn.Sequential(*unit()), "traced": ConvBNAct(), "unit": pointfuse.ConvBNAct2d(4, 4, 3)}
    model = trained(kinds[kind]).eval()
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).train()
    frozen = pointfuse.freeze(copy.deepcopy(model))
    with torch.no_grad():
        assert gap(frozen(images()), model(images())) <= 2e-6


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_module_with_a_hook_stays_and_its_hook_fires(place: int) -> None:
    model = trained(nn.Sequential(*unit(), *unit())).eval()
    seen: list[int] = []
    model[place].register_forward_hook(lambda m, a, y: seen.append(1) or y * 2)
    frozen = pointfuse.freeze(model)
    with torch.no_grad():
        assert gap(frozen(images()), model(images())) <= 2e-6
    assert len(seen) == 2


def test_a_frozen_model_stands_by_itself() -> None:
    model = trained(nn.Sequential(Bottleneck(), PreActivation(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))).eval()
    frozen = pointfuse.freeze(model)
    with torch.no_grad():
        before, original = frozen(images()), model(images())
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    model(images()).pow(2).mean().backward()
    optimiser.step()
    with torch.no_grad():
        assert torch.equal(frozen(images()), before)
        model.eval()
        assert gap(model(images()), original) > 1e-3
        after = model(images())
        for tensor in (*frozen.parameters(), *frozen.buffers()):
            tensor.zero_()
        assert torch.equal(model(images()), after)
    assert [type(m) for m in model][:2] == [Bottleneck, PreActivation]


def test_freezing_in_place_keeps_identity_and_freezing_twice_changes_nothing() -> None:
    model = trained(nn.Sequential(Bottleneck(), *unit())).eval()
    plain = copy.deepcopy(model)
    frozen = pointfuse.freeze(model, inplace=True)
    assert frozen is model
    modules = list(frozen.modules())
    assert pointfuse.freeze(frozen) is frozen
    assert list(frozen.modules()) == modules
    assert_accurate(frozen, plain, images())


def test_a_model_with_a_frozen_part_is_frozen_whole() -> None:
    part = trained(nn.Sequential(*unit())).eval()
    model = nn.Sequential(pointfuse.freeze(part), trained(nn.Sequential(*unit()))).eval()
    frozen = pointfuse.freeze(model)
    assert sum(isinstance(m, FoldedConv2d) for m in frozen.modules()) == 2


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\) first"):
        pointfuse.freeze(nn.Sequential(*unit()))


def test_a_frozen_model_cannot_be_reverted() -> None:
    with pytest.raises(RuntimeError, match="cannot be reverted"):
        pointfuse.revert(pointfuse.freeze(wide_unit()))


@pytest.mark.parametrize("part", ["the model", "a submodule", "a copy"])
def test_training_a_frozen_model_raises_and_changes_no_mode(part: str) -> None:
    frozen = pointfuse.freeze(trained(nn.Sequential(nn.Sequential(nn.Dropout(), *unit()), Bottleneck())).eval())
    refusing = {"the model": frozen, "a submodule": frozen[0], "a copy": copy.deepcopy(frozen)}[part]
    with pytest.raises(RuntimeError, match="cannot be trained"):
        refusing.train()
    assert not any(m.training for m in (*frozen.modules(), *refusing.modules()))
    assert frozen.eval() is frozen


def test_a_gradient_is_refused() -> None:
    frozen = pointfuse.freeze(wide_unit())
    with pytest.raises(RuntimeError, match="no gradient"):
        frozen(wide_images().requires_grad_())
    assert not frozen(wide_images()).requires_grad


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(PreActivation(), id="batch norm first"),
        pytest.param(nn.Sequential(LoudConv(4, 4, 3), *unit()), id="live convolution first"),
        pytest.param(nn.Sequential(nn.Conv2d(4, 4, 3), FrozenBatchNorm2d(4), nn.PReLU(), *unit()), id="PReLU before"),
    ],
)
def test_a_call_that_asks_for_no_gradient_needs_no_no_grad(model: nn.Module) -> None:
    model = trained(copy.deepcopy(model)).eval()
    frozen = pointfuse.freeze(model)
    assert gap(frozen(images()), model(images())) <= 2e-6


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("when", ["before the first call", "after the first call"])
def test_copies_and_pickles_and_states_give_the_same_answers(pack: bool, when: str) -> None:
    model = trained(nn.Sequential(wide_unit(), nn.Conv2d(16, 4, 1), DarknetBlock())).eval()
    frozen = pointfuse.freeze(model, pack=pack)
    x = wide_images()
    with torch.no_grad():
        expected = model(x)
        if when == "after the first call":
            frozen(x)
            assert any(is_packed(frozen)) == pack
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    other = pointfuse.freeze(trained(copy.deepcopy(model), seed=7), x, pack=pack)
    state = io.BytesIO()
    torch.save(frozen.state_dict(), state)
    state.seek(0)
    assert (
        str(other.load_state_dict(torch.load(state, weights_only=True), strict=True))
        == "<All keys matched successfully>"
    )
    copies = [copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), torch.load(file, weights_only=False), other]
    for copied in copies:
        assert_accurate(copied, model, x)
        with torch.no_grad():
            assert gap(copied(x), expected) <= 2e-6
        with pytest.raises(RuntimeError, match="cannot be trained"):
            copied.train()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=["fp64", "bf16", "fp16"])
def test_a_packed_model_moves_to_another_dtype(dtype: torch.dtype) -> None:
    model = wide_unit()
    frozen = pointfuse.freeze(model, wide_images())
    assert is_packed(frozen) == [True]
    frozen.to(dtype)
    with torch.no_grad():
        y = frozen(wide_images(dtype=dtype))
        assert y.dtype == dtype
        tolerance = {torch.float64: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
        assert error(y, copy.deepcopy(model).double()(wide_images().double())) <= tolerance
    frozen.to(torch.float32)
    assert_accurate(frozen, model.to(dtype).float(), wide_images()) if dtype == torch.float64 else None


def test_example_inputs_pack_at_once_and_otherwise_the_first_call_does() -> None:
    model = trained(nn.Sequential(wide_unit(), nn.Conv2d(16, 16, 3))).eval()
    assert is_packed(pointfuse.freeze(model, wide_images())) == [True, True]
    frozen = pointfuse.freeze(model)
    assert is_packed(frozen) == [False, False]
    frozen(wide_images())
    assert is_packed(frozen) == [True, True]


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(images(2, 8, 24, 24), id="too few channels"),
        pytest.param(images(2, 32, 24, 24), id="too many channels"),
        pytest.param(wide_images(dtype=torch.float64), id="float64"),
        pytest.param(wide_images().long(), id="integers"),
        pytest.param(images(16), id="one dimension"),
        pytest.param(images(1, 2, 16, 8, 8), id="five dimensions"),
        pytest.param(images(2, 16, 0, 4), id="an empty plane"),
        pytest.param(None, id="None"),
    ],
)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_bad_input_raises_the_type_of_error_that_pytorch_raises(bad: Any, packed: bool) -> None:
    model = wide_unit()
    frozen = pointfuse.freeze(model, wide_images() if packed else None)
    with torch.no_grad():
        with pytest.raises(Exception) as expected:  # noqa: PT011
            model(bad)
        with pytest.raises(expected.type):
            frozen(bad)
    assert_accurate(frozen, model, wide_images())


def test_a_plane_smaller_than_the_kernel_raises_and_an_empty_batch_is_empty() -> None:
    model = wide_unit(kernel_size=5, padding=0)
    frozen = pointfuse.freeze(model, wide_images())
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            frozen(wide_images(plane=4))
        assert frozen(wide_images(batch=0)).shape == (0, 16, 20, 20)


def test_three_dimensional_input_is_one_image_without_a_batch() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.LeakyReLU(0.1), nn.Conv2d(16, 4, 1)).eval()
    for frozen in (pointfuse.freeze(model), pointfuse.freeze(model, wide_images())):
        assert_accurate(frozen, model, wide_images()[0])


def test_sliced_expanded_and_transposed_inputs_are_read_right() -> None:
    model = wide_unit()
    frozen = pointfuse.freeze(model, wide_images())
    base = images(4, 32, 30, 30)
    for x in (
        base[::2, 3:19, 1:25, 2:26],
        base[:1, :16, :24, :24].expand(2, -1, -1, -1),
        base[:2, :16].transpose(2, 3),
    ):
        assert_accurate(frozen, model, x)


def test_autocast_gives_pytorchs_dtype() -> None:
    model = wide_unit()
    frozen = pointfuse.freeze(model, wide_images())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert frozen(wide_images()).dtype == model(wide_images()).dtype
        assert gap(frozen(wide_images()).float(), model(wide_images()).float()) <= 3e-2


@pytest.mark.parametrize("kind", [torch.int32, torch.preserve_format, None], ids=str)
def test_an_unknown_memory_format_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"must be torch\.channels_last or torch\.contiguous_format"):
        pointfuse.freeze(wide_unit(), memory_format=kind)


@pytest.mark.filterwarnings("ignore")
def test_a_plain_frozen_model_compiles_and_exports() -> None:
    torch._dynamo.reset()
    model = trained(nn.Sequential(Bottleneck(), DarknetBlock(), *unit())).eval()
    frozen = pointfuse.freeze(model, pack=False)
    with torch.no_grad():
        expected = model(images())
        assert gap(torch.compile(frozen, fullgraph=True, backend="aot_eager")(images()), expected) <= 2e-6
        exported = torch.export.export(frozen, (images(),))
        assert gap(exported.module()(images()), expected) <= 2e-6


class StorageMeter(TorchDispatchMode):
    """The bytes of all storages that operators make while it is on and that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage()._cdata
            for t in tensors_of((args, kwargs or {}))
            if t.layout is torch.strided and not t.is_mkldnn
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_of(out):
            if tensor.is_mkldnn:
                self._add(tensor, id(tensor), tensor.numel() * tensor.element_size())
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.live:
                self._add(storage, storage._cdata, storage.nbytes())
        return out

    def _add(self, owner: Any, key: int, size: int) -> None:
        self.live[key] = size
        self.peak = max(self.peak, sum(self.live.values()))
        weakref.finalize(owner, self.live.pop, key, None)


def equal_layers(count: int = 12) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()) for _ in range(count))
    )


def size_of(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("example", [None, images(1, 64, 16, 16)], ids=["folded", "folded and packed"])
@pytest.mark.parametrize("inplace", [True, False], ids=["in place", "copied"])
def test_freezing_needs_less_than_one_and_a_half_models(inplace: bool, example: Tensor | None) -> None:
    model = trained(equal_layers()).eval()
    whole = size_of(model)
    gc.collect()
    with StorageMeter() as meter:
        frozen = pointfuse.freeze(model, example, inplace=inplace)
    assert meter.peak < 1.5 * whole
    assert isinstance(frozen[0][0], FoldedConv2d)


def test_freezing_in_place_releases_each_weight_as_it_is_folded() -> None:
    model = trained(equal_layers()).eval()
    originals = [weakref.ref(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d)]
    pointfuse.freeze(model, inplace=True)
    gc.collect()
    assert [r() for r in originals] == [None] * len(originals)


def test_packing_leaves_no_plain_copy_of_the_weights() -> None:
    def plain_weights() -> list[Tensor]:
        gc.collect()
        return [
            t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and not t.is_mkldnn and t.shape == shape
        ]

    shape = (72, 72, 3, 3)
    layers = (nn.Sequential(nn.Conv2d(72, 72, 3), nn.BatchNorm2d(72), nn.ReLU()) for _ in range(4))
    model = trained(nn.Sequential(*layers)).eval()
    assert len(plain_weights()) == 4
    frozen = pointfuse.freeze(model, images(1, 72, 24, 24))
    assert is_packed(frozen) == [True] * 4
    del model
    assert plain_weights() == []


BLOCKS = st.lists(
    st.sampled_from(["unit", "lone", "darknet", "bottleneck", "pool", "dropout", "pre", "bn"]), min_size=1, max_size=5
)


@hypothesis_settings(max_examples=25)
@given(BLOCKS, st.booleans(), st.booleans(), st.integers(0, 5), st.integers(0, 5))
def test_any_stack_of_blocks_is_as_accurate_as_pytorch(
    kinds: list[str], pack: bool, channels_last: bool, start: int, stop: int
) -> None:
    made = {
        "unit": lambda: nn.Sequential(*unit()), "lone": lambda: nn.Conv2d(4, 4, 1), "darknet": DarknetBlock,
        "bottleneck": Bottleneck, "pool": lambda: nn.MaxPool2d(3, 1, 1), "dropout": nn.Dropout,
        "pre": lambda: nn.Sequential(PreActivation(), nn.Conv2d(8, 4, 1)), "bn": lambda: nn.BatchNorm2d(4),
    }  # fmt: skip
    model = trained(nn.Sequential(*(made[k]() for k in kinds))).eval()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frozen = pointfuse.freeze(model, pack=pack, memory_format=memory_format)
    assert_accurate(frozen, model, images(2, 4, 9, 9))
    if len(model[start:stop]):
        assert_accurate(frozen[start:stop], model[start:stop], images(2, 4, 9, 9))


@pytest.mark.parametrize("way", ["compile", "export", "jit"])
def test_an_unpacked_model_deploys_and_a_packed_one_says_how(way: str) -> None:
    model = trained(nn.Sequential(*unit(), *unit())).eval()
    plain, packed = pointfuse.freeze(model, pack=False), pointfuse.freeze(model, images())

    def deploy(frozen: nn.Module) -> Any:
        torch._dynamo.reset()
        if way == "compile":
            return torch.compile(frozen, fullgraph=True, backend="aot_eager")
        if way == "export":
            return torch.export.export(frozen, (images(),)).module()
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.trace(frozen, images()), buffer)
        buffer.seek(0)
        return torch.jit.load(buffer)

    with torch.no_grad():
        assert gap(deploy(plain)(images()), model(images())) <= 2e-6
        with pytest.raises(Exception, match="pack=False") as raised:
            deploy(packed)(images())
        assert isinstance(raised.value, RuntimeError)


def test_a_fold_beyond_the_range_of_half_precision_is_left_live() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2)).eval()
    nn.init.constant_(model[0].weight, 300.0)
    nn.init.constant_(model[1].running_var, 1e-9)  # with eps, a scale of 316: 94 868 does not fit into fp16
    model, x = model.half(), torch.full((1, 2, 4, 4), 1e-3).half()
    frozen = pointfuse.freeze(model, x)
    assert not any(isinstance(m, FoldedConv2d) for m in frozen.modules())
    with torch.no_grad():
        assert frozen(x).isfinite().all()
        assert torch.equal(frozen(x), model(x))
