"""YOLOv3 has the layers and keys of published checkpoints, usable weights without one, and refuses a wrong one."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models.yolov3 import (
    ResidualBlock,
    YOLOv3,
    calibrate,
    initialise,
    last_layer_stack,
    load_weights,
    noise_image,
    stack_input,
    yolov3,
)


@pytest.fixture(scope="module")
def model() -> YOLOv3:
    return yolov3()


@pytest.fixture
def small_stack() -> nn.Sequential:
    """The smallest of the heads, to be changed at will."""
    return last_layer_stack(52, num_classes=1)


def bn_keys(name: str) -> list[str]:
    return [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def expected_keys() -> list[str]:
    keys = ["backbone.conv1.weight", *bn_keys("backbone.bn1")]
    for layer, blocks in enumerate([1, 2, 8, 8, 4], start=1):
        keys += [f"backbone.layer{layer}.ds_conv.weight", *bn_keys(f"backbone.layer{layer}.ds_bn")]
        for block in range(blocks):
            for half in (1, 2):
                prefix = f"backbone.layer{layer}.residual_{block}"
                keys += [f"{prefix}.conv{half}.weight", *bn_keys(f"{prefix}.bn{half}")]
    for head in range(3):
        units = [f"last_layer{head}.{unit}" for unit in range(6)]
        if head:
            units.insert(0, f"last_layer{head}_conv")
        for unit in units:
            keys += [f"{unit}.conv.weight", *bn_keys(f"{unit}.bn")]
        keys += [f"last_layer{head}.6.weight", f"last_layer{head}.6.bias"]
    return keys


def test_the_keys_are_those_of_published_checkpoints(model: YOLOv3) -> None:
    assert list(model.state_dict()) == expected_keys()
    assert len(expected_keys()) == 438


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("backbone.conv1.weight", (32, 3, 3, 3)),
        ("backbone.layer1.ds_conv.weight", (64, 32, 3, 3)),
        ("backbone.layer5.residual_3.conv1.weight", (512, 1024, 1, 1)),
        ("backbone.layer5.residual_3.conv2.weight", (1024, 512, 3, 3)),
        ("last_layer0.0.conv.weight", (512, 1024, 1, 1)),
        ("last_layer0.5.conv.weight", (1024, 512, 3, 3)),
        ("last_layer0.6.weight", (255, 1024, 1, 1)),
        ("last_layer1_conv.conv.weight", (256, 512, 1, 1)),
        ("last_layer1.0.conv.weight", (256, 768, 1, 1)),
        ("last_layer2_conv.conv.weight", (128, 256, 1, 1)),
        ("last_layer2.0.conv.weight", (128, 384, 1, 1)),
        ("last_layer2.6.bias", (255,)),
    ],
)
def test_the_widths_are_those_of_the_paper(model: YOLOv3, key: str, shape: tuple[int, ...]) -> None:
    assert tuple(model.state_dict()[key].shape) == shape


@torch.no_grad()
def test_the_heads_come_out_coarse_to_fine(model: YOLOv3) -> None:
    outputs = model(noise_image(64))
    assert [tuple(output.shape) for output in outputs] == [(1, 255, 2, 2), (1, 255, 4, 4), (1, 255, 8, 8)]
    assert all(output.isfinite().all() for output in outputs)


@torch.no_grad()
def test_the_branch_leaves_after_the_fifth_unit(model: YOLOv3) -> None:
    x = stack_input(13)[:, :, :2, :2]
    branch = model.last_layer0[:5](x)
    assert branch.shape[1] == 512
    torch.testing.assert_close(model.last_layer0[5:](branch), model.last_layer0(x), rtol=0, atol=0)


def test_the_residual_is_added_after_the_activation(model: YOLOv3) -> None:
    block = copy.deepcopy(model.backbone.layer1.get_submodule("residual_0"))
    assert isinstance(block, ResidualBlock)
    nn.init.zeros_(block.bn2.weight)
    nn.init.constant_(block.bn2.bias, -1.0)
    x = torch.ones(1, 64, 2, 2)
    # LeakyReLU(-1) + 1 is 0.9; added before the activation it would be LeakyReLU(-1 + 1), 0.
    torch.testing.assert_close(block(x), torch.full_like(x, 0.9))


@pytest.mark.parametrize(("head", "c_in"), [(13, 1024), (26, 768), (52, 384)])
@torch.no_grad()
def test_a_stack_maps_its_features_to_its_head(head: int, c_in: int) -> None:
    x = stack_input(head, batch=1)
    assert tuple(x.shape) == (1, c_in, head, head)
    stack = last_layer_stack(head)
    assert (len(stack), stack.training) == (7, False)
    assert tuple(stack(x).shape) == (1, 75, head, head)


def test_an_unknown_head_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no head has a 14x14 plane; the heads are 13, 26, 52"):
        last_layer_stack(14)


def test_a_head_needs_a_class() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        YOLOv3(num_classes=0)


def statistics_of_normalised(model: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For every batch norm the mean and variance of each channel before scale and shift."""
    found = []

    def record(bn: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        assert isinstance(bn, nn.BatchNorm2d)
        normalised = (output - bn.bias[:, None, None]) / bn.weight[:, None, None]
        found.append(torch.var_mean(normalised, dim=(0, 2, 3), correction=0)[::-1])

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def test_calibration_makes_every_channel_zero_mean_and_unit_variance(model: YOLOv3) -> None:
    calibrated = copy.deepcopy(model)
    x = noise_image(96, batch=2, seed=3)
    calibrate(calibrated, x)
    found = statistics_of_normalised(calibrated, x)
    assert len(found) == 72
    for mean, var in found:
        assert mean.abs().max() < 1e-4
        # eps takes a little from channels whose own variance is small.
        assert (var - 1).abs().max() < 1e-2


def test_activations_keep_their_scale_on_an_image_not_calibrated_on(model: YOLOv3) -> None:
    for mean, var in statistics_of_normalised(model, noise_image(256, seed=7)):
        assert mean.abs().median() < 0.7
        assert 0.2 < var.median() < 3


def test_residual_sums_stay_on_the_scale_of_one(model: YOLOv3) -> None:
    with torch.no_grad():
        features = model.backbone(noise_image(256, seed=7))
    assert all(0.3 < feature.std() < 3 for feature in features)


def test_scales_and_shifts_are_not_ones_and_zeros(small_stack: nn.Sequential) -> None:
    bn = small_stack[0].get_submodule("bn")
    assert isinstance(bn, nn.BatchNorm2d)
    assert bn.weight.std() > 0.05
    assert bn.bias.std() > 0.05


def test_one_seed_gives_one_model_and_leaves_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (last_layer_stack(52, seed=seed).state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["0.conv.weight"], other["0.conv.weight"])
    assert torch.equal(torch.get_rng_state(), state)


def test_building_the_whole_model_leaves_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    yolov3(num_classes=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_initialisation_leaves_no_storage_unset() -> None:
    with torch.device("meta"):
        model = YOLOv3(num_classes=1)
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(float("nan") if value.is_floating_point() else -1)
    initialise(model, seed=0)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert all(value == 0 for key, value in model.state_dict().items() if key.endswith("num_batches_tracked"))


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda state: state, id="a bare state_dict"),
        pytest.param(lambda state: {"state_dict": state, "epoch": 3}, id="under state_dict"),
        pytest.param(lambda state: {"model": state}, id="under model"),
        pytest.param(lambda state: {f"module.{key}": value for key, value in state.items()}, id="with module. prefix"),
    ],
)
def test_weights_load_in_each_accepted_form(
    small_stack: nn.Sequential, tmp_path: Path, wrap: Callable[[dict[str, Tensor]], object]
) -> None:
    torch.save(wrap(small_stack.state_dict()), tmp_path / "weights.pt")
    loaded = last_layer_stack(52, num_classes=1, seed=1)
    load_weights(loaded, tmp_path / "weights.pt")
    expected = small_stack.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def test_the_whole_model_takes_weights_from_a_file(model: YOLOv3, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "yolov3.pt")
    loaded = yolov3(weights=tmp_path / "yolov3.pt")
    assert not loaded.training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_a_wrong_checkpoint_is_named_key_by_key_and_changes_nothing(small_stack: nn.Sequential, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in small_stack.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    del state["0.conv.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["6.bias"] = torch.zeros(75)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="does not fit Sequential") as caught:
        load_weights(small_stack, tmp_path / "other.pt")
    message = str(caught.value)
    assert "1 missing keys: 0.conv.weight" in message
    assert "1 unexpected keys: extra.weight" in message
    assert "1 shapes that differ: 6.bias 75 where the model has 18" in message
    assert "Accepted: a file written by torch.save" in message
    assert all(torch.equal(value, before[key]) for key, value in small_stack.state_dict().items())


def test_many_wrong_keys_are_counted_and_the_first_named(small_stack: nn.Sequential, tmp_path: Path) -> None:
    torch.save({f"other.{index}": torch.zeros(1) for index in range(9)}, tmp_path / "other.pt")
    pattern = "38 missing keys: 0.conv.weight, .*…\n  9 unexpected keys: other.0, other.1, other.2, other.3, other.4, …"
    with pytest.raises(ValueError, match=pattern):
        load_weights(small_stack, tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param([1, 2], "holds a list, not a state_dict", id="a list"),
        pytest.param({}, "holds an empty dict", id="an empty dict"),
        pytest.param({"epoch": 3, "lr": 0.1}, "entries that are not tensors: epoch, lr", id="no tensors"),
    ],
)
def test_a_file_without_weights_is_refused(
    small_stack: nn.Sequential, tmp_path: Path, content: object, message: str
) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message):
        load_weights(small_stack, tmp_path / "other.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"], ids=["empty", "text", "zip"])
def test_a_file_that_is_no_checkpoint_is_refused(small_stack: nn.Sequential, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.pt is not a checkpoint that can be loaded safely") as caught:
        load_weights(small_stack, tmp_path / "broken.pt")
    assert caught.value.__cause__ is not None


def test_a_pickle_that_would_run_code_is_refused(small_stack: nn.Sequential, tmp_path: Path) -> None:
    torch.save({"model": small_stack}, tmp_path / "module.pt")
    with pytest.raises(ValueError, match="is not a checkpoint that can be loaded safely"):
        load_weights(small_stack, tmp_path / "module.pt")


def test_a_missing_file_is_an_os_error_with_its_name(small_stack: nn.Sequential, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("nowhere.pt")):
        load_weights(small_stack, tmp_path / "nowhere.pt")
