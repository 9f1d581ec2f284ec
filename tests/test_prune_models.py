"""Whole models: which weights are pruned, by what names, and that nothing else changes."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
import torch.nn.utils.prune as peer
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import prune
from model import NeuralNetwork

few = settings(max_examples=100, deadline=None)


def mlp(*sizes: int, bias: bool = True) -> nn.Sequential:
    layers = [nn.Linear(fan_in, fan_out, bias=bias) for fan_in, fan_out in pairwise(sizes)]
    return nn.Sequential(*[each for layer in layers for each in (layer, nn.ReLU())][:-1])


class Residual(nn.Module):
    """A small convolutional network with what such networks have: branches, normalization, groups, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.shortcut = nn.Conv2d(8, 8, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        return self.head(self.pool(self.body(features) + self.shortcut(features)).flatten(1))


class Language(nn.Module):
    """Its head shares the embedding's weight, as in many language models."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 12, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def zeros(masks: dict[str, Tensor]) -> int:
    return sum(mask.numel() - int(mask.count_nonzero()) for mask in masks.values())


# what is pruned


def test_masks_cover_all_but_the_last_layer_in_order() -> None:
    masks = prune.find_masks(NeuralNetwork(), "weight", 0.8)
    assert list(masks) == ["fc1.weight", "fc2.weight", "fc3.weight", "fc4.weight"]
    for mask in masks.values():
        assert mask.dtype is torch.bool and mask.numel() - mask.count_nonzero() == round(0.8 * mask.numel())


@pytest.mark.parametrize(
    ("choice", "pruned"),
    [
        ({}, ["0", "2"]),
        ({"prune_output": True}, ["0", "2", "4"]),
        ({"skip": ("2",)}, ["0"]),
        ({"skip": ["4", "0"]}, ["2"]),
        ({"skip": {"0", "2"}, "prune_output": True}, ["4"]),
        ({"skip": ("[02]",), "prune_output": True}, ["4"]),
        ({"only": ("2.weight",)}, ["2"]),
        ({"only": ("*.weight",)}, ["0", "2"]),
        ({"only": ("*",), "prune_output": True}, ["0", "2", "4"]),
        ({"only": ("*",), "skip": ("0",)}, ["2"]),
    ],
)
@pytest.mark.parametrize("method", ["weight", "unit"])
def test_what_is_pruned_and_spared(choice: dict, pruned: list[str], method: str) -> None:
    model = mlp(6, 5, 4, 3)
    masks = prune.find_masks(model, method, 0.5, **choice)
    assert [name for name in masks if name.endswith("weight")] == [f"{name}.weight" for name in pruned]
    total = sum(model.get_submodule(name).weight.numel() for name in pruned)
    weights = {name: mask for name, mask in masks.items() if name.endswith("weight")}
    achieved = prune.achieved_sparsity(prune.prune_model(model, method, 0.5, **choice), **choice)
    assert achieved == zeros(weights) / total
    (point,) = prune.sweep(model, method, [0.5], lambda pruned: None, **choice)
    assert point.achieved == achieved


@pytest.mark.parametrize("method", ["weight", "unit"])
def test_global_scope_matches_torch(method: str) -> None:
    model = mlp(40, 30, 20, 10)
    if method == "weight":
        masks = prune.find_masks(model, method, 0.7, scope="global", prune_output=True)
        layers = [(layer, "weight") for layer in model if isinstance(layer, nn.Linear)]
        peer.global_unstructured(layers, pruning_method=peer.L1Unstructured, amount=0.7)
        for name in masks:
            assert torch.equal(masks[name], model.get_buffer(f"{name}_mask").bool())
    else:
        masks = prune.find_masks(model, method, 0.5, scope="global", prune_output=True)
        weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
        scores = torch.cat([weight.norm(dim=1) / weight.norm(dim=1).max() for weight in weights])
        keep = torch.cat([mask[:, 0] for name, mask in masks.items() if name.endswith("weight")])
        assert len(keep) - keep.count_nonzero() == 30 and scores[keep].min() > scores[~keep].max()


def test_global_scope_ranks_layers_of_different_precision_together() -> None:
    model = mlp(300, 200, 100, 50)
    for layer, dtype in ((model[0], torch.float32), (model[2], torch.float64), (model[4], torch.float16)):
        nn.init.constant_(layer.to(dtype).weight, 0.1)  # 0.1 is 0.1000000015 in fp32 and 0.09998 in fp16
    with pytest.warns(UserWarning, match=r"4\.weight"):
        masks = prune.find_masks(model, "weight", 20_000 / 85_000, scope="global", prune_output=True)
    assert {name: zeros({name: mask}) for name, mask in masks.items()} == {
        "0.weight": 0,
        "2.weight": 15_000,
        "4.weight": 5_000,
    }


def test_raw_norms_would_empty_the_layer_of_small_weights_but_relative_ones_do_not() -> None:
    model = mlp(1000, 100, 100, 100)
    with torch.no_grad():
        model[2].weight.normal_(std=0.001)
        model[0].weight.normal_(std=0.1)
    raw = torch.stack([model[number].weight.norm(dim=1) for number in (0, 2)])
    assert raw[1].max() < raw[0].min()  # ranked by these, half of the units would be all of layer 2
    masks = prune.find_masks(model, "unit", 0.5, scope="global")
    for name in ("0.weight", "2.weight"):
        assert 5 <= masks[name].any(1).count_nonzero() <= 95


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_global_scope_empties_no_layer_of_units_before_the_end(spread: float) -> None:
    model = mlp(50, 100, 40, 4, 10)
    with torch.no_grad():
        for number in (0, 2, 4):
            weight = model[number].weight
            weight.mul_(10.0**-number * torch.rand(len(weight), 1) ** (spread * number))
    for sparsity in (0.5, 0.9, 0.95, 141 / 144):  # 144 units; one of each layer stays to the last
        masks = prune.find_masks(model, "unit", sparsity, scope="global")
        assert all(masks[f"{number}.weight"].any() for number in (0, 2, 4))
    with pytest.warns(UserWarning, match=r"leaves nothing of 0\.weight at"):
        prune.find_masks(model, "unit", 142 / 144, scope="global")


def test_unit_methods_prune_biases_and_weight_methods_do_not() -> None:
    model = mlp(6, 5, 4, 3)
    assert list(prune.find_masks(model, "weight", 0.5)) == ["0.weight", "2.weight"]
    masks = prune.find_masks(model, "unit", 0.5)
    assert list(masks) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(masks["0.bias"], masks["0.weight"].any(1))
    pruned = prune.prune_model(model, "unit", 0.5)
    dead = ~masks["0.bias"]
    assert not pruned[0].bias[dead].any() and not pruned[0](torch.randn(9, 6))[:, dead].any()
    assert torch.equal(pruned[0].bias[~dead], model[0].bias[~dead])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(12, 8),
        nn.Bilinear(3, 4, 8),
        nn.Conv1d(4, 8, 3),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv3d(2, 8, 2),
        nn.ConvTranspose1d(4, 8, 3),
        nn.ConvTranspose2d(4, 8, 3),
        nn.ConvTranspose2d(6, 8, 3, groups=2),
        nn.ConvTranspose3d(4, 8, 2, groups=4),
    ],
    ids=lambda layer: f"{type(layer).__name__}{getattr(layer, 'groups', '')}",
)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_pruned_unit_of_any_layer_has_no_output(layer: nn.Module, scope: str) -> None:
    masks = prune.find_masks(layer, "unit", 3 / 8, prune_output=True, scope=scope)
    assert masks["weight"].shape == layer.weight.shape and masks["weight"].is_contiguous()
    dead = ~masks["bias"]
    assert dead.count_nonzero() == 3
    pruned = prune.prune_model(layer, "unit", 3 / 8, prune_output=True, scope=scope)
    inputs = {
        nn.Linear: (2, 12),
        nn.Bilinear: (2, 3),
        nn.Conv1d: (2, 4, 9),
        nn.ConvTranspose1d: (2, 4, 9),
        nn.Conv3d: (2, 2, 5, 5, 5),
        nn.ConvTranspose3d: (2, 4, 5, 5, 5),
    }.get(type(layer), (2, getattr(layer, "in_channels", 0), 9, 9))
    batch = [torch.randn(inputs)] + ([torch.randn(2, 4)] if isinstance(layer, nn.Bilinear) else [])
    outputs, dense = pruned(*batch), layer(*batch)
    assert not outputs[:, dead].any()
    torch.testing.assert_close(outputs[:, ~dead], dense[:, ~dead])
    norms = torch.stack([dense[:, unit].detach().std() for unit in range(8)])
    assert len(norms) == 8 and prune.achieved_sparsity(pruned, prune_output=True) == 3 / 8


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_weights_of_transposed_convolutions_keep_their_layout(scope: str) -> None:
    layer = nn.ConvTranspose2d(6, 8, 3, groups=2)
    mask = prune.find_masks(layer, "weight", 0.5, prune_output=True, scope=scope)["weight"]
    assert layer.weight[mask].abs().min() >= layer.weight[~mask].abs().max()


def test_a_convolutional_network() -> None:
    model = Residual()
    masks = prune.find_masks(model, "unit", 0.5)
    assert list(masks) == ["stem.0.weight", "body.weight", "body.bias", "shortcut.weight", "shortcut.bias"]
    pruned = prune.prune_model(model.eval(), "unit", 0.5)
    shift = pruned.stem[1].bias.detach()  # a BatchNorm behind a pruned unit still emits its shift
    with torch.no_grad():
        pruned.stem[1].bias.fill_(0.25)
    features = pruned.stem(torch.randn(2, 3, 8, 8))
    assert shift.shape == (8,) and (features[:, ~masks["stem.0.weight"].any(dim=(1, 2, 3))] == 0.25).all()


# shared weights


@pytest.mark.parametrize("method", list(prune.METHODS))
def test_a_weight_tied_to_an_embedding_is_left_alone(method: str) -> None:
    def pruned(**choice: object) -> set[str]:
        return {name.split(".")[0] for name in prune.find_masks(Language(tied=True), method, 0.5, **choice)}

    assert pruned() == {"first", "second"}  # the head is the spared output already
    with pytest.warns(UserWarning, match=r"50% of the weights stay dense.*: embedding\.weight; .*only"):
        assert pruned(prune_output=True) == {"first", "second"}
    assert pruned(prune_output=True, skip=("embedding",)) == {"first", "second"}
    with pytest.raises(ValueError, match=r"'embedding\.weight' names nothing that could be pruned; 'head'"):
        pruned(only=("embedding.weight",))
    if method.endswith("weight"):
        assert pruned(only=("head.weight",), prune_output=True) == {"embedding"}
    else:
        with pytest.raises(ValueError, match=r"embedding\.weight has no units"):
            pruned(only=("head.weight",), prune_output=True)


def test_shared_weights_count_once_and_have_the_first_name() -> None:
    model = mlp(8, 8, 8, 8, 4)
    model[4].weight = model[2].weight
    masks = prune.find_masks(model, "unit", 0.5, scope="global")
    assert list(masks) == ["0.weight", "0.bias", "2.weight", "2.bias", "4.bias"]
    assert masks["0.bias"].numel() + masks["2.bias"].numel() - zeros({k: masks[k] for k in ("0.bias", "2.bias")}) == 8
    pruned = prune.prune_model(model, "weight", 0.5, scope="global")
    assert prune.achieved_sparsity(pruned) == 0.5 and pruned[4].weight is pruned[2].weight
    assert torch.equal(masks["4.bias"], masks["2.bias"])
    prune.apply_masks(model, {"4.weight": masks["2.weight"]})  # any of its names will do


@pytest.mark.parametrize("choice", [{}, {"skip": ("2",)}, {"skip": ("6",), "prune_output": True}])
def test_a_shared_weight_is_spared_if_any_of_its_layers_is(choice: dict) -> None:
    model = mlp(8, 8, 8, 8, 8)
    model[6].weight = model[2].weight
    assert list(prune.find_masks(model, "weight", 0.5, **choice)) == ["0.weight", "4.weight"]


@pytest.mark.parametrize("other", [2, 4])  # the spared output; a layer whose own units go
def test_a_bias_that_other_layers_share_is_left_alone(other: int) -> None:
    model = mlp(4, 4, 4, 4)
    model[other].bias = model[0].bias
    pruned = prune.prune_model(model, "unit", 0.5)
    assert torch.equal(pruned[0].bias, model[0].bias) and pruned[other].bias is pruned[0].bias
    assert prune.achieved_sparsity(pruned) == 0.5


def test_a_layer_used_twice_has_one_mask() -> None:
    layer = nn.Linear(5, 5)
    model = nn.ModuleDict({"first": layer, "again": layer, "head": nn.Linear(5, 2)})
    assert list(prune.find_masks(model, "unit", 0.4)) == ["first.weight", "first.bias"]
    masks = prune.find_masks(model, "unit", 0.5, skip=("again",), prune_output=True)
    assert list(masks) == ["head.weight", "head.bias"]


# which layers are prunable


class Transposed(nn.Module):
    """A linear layer with its weight the other way round, as the Conv1D of transformers has it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.addmm(self.bias, inputs, self.weight)


class Wider(Transposed):
    pass


@pytest.mark.parametrize("layer", [Transposed, Wider])
def test_a_class_of_ones_own(layer: type[Transposed], monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(layer(8, 6), nn.ReLU(), layer(6, 8), nn.Linear(6, 3))
    with pytest.warns(UserWarning, match=r"84% of the weights stay dense.*: 0\.weight, 2\.weight; "):
        assert len(prune.find_masks(model, "unit", 0.5, prune_output=True)) == 2
    with pytest.raises(ValueError, match=r"0\.weight has no units that 'unit' could rank"):
        prune.find_masks(model, "unit", 0.5, only=("0.weight",))
    monkeypatch.setitem(prune.LAYERS, Transposed, 1)
    masks = prune.find_masks(model, "unit", 0.5)
    assert list(masks) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(masks["0.weight"], prune.unit_mask(model[0].weight, 0.5, dim=1))
    pruned = prune.prune_model(model, "unit", 0.5)
    assert not pruned[0](torch.randn(4, 6))[:, ~masks["0.bias"]].any()
    assert torch.equal(prune.find_masks(model, "weight", 0.3)["2.weight"], prune.weight_mask(model[2].weight, 0.3))
    monkeypatch.setitem(prune.METHODS, "taylor", lambda weight: (weight * weight.grad).abs().sum(1))
    model(torch.randn(5, 6)).square().sum().backward()
    worth = (model[0].weight * model[0].weight.grad).abs().sum(0)
    keep = prune.find_masks(model, "taylor", 0.5)["0.bias"]
    assert worth[keep].min() > worth[~keep].max()


def test_subclasses_follow_their_parents_and_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(4, 6), nn.Linear(6, 2))
    assert list(prune.find_masks(model, "unit", 0.5)) == ["0.weight", "0.bias"]
    monkeypatch.setitem(prune.LAYERS, Own, 1)
    assert prune.find_masks(model, "unit", 0.5, skip=())["0.weight"].all(0).count_nonzero() == 2


class Memory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.lstm = nn.LSTM(8, 12)
        self.mix = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)


def test_what_is_left_dense_is_said_and_can_be_named() -> None:
    model = Memory()
    with pytest.warns(UserWarning) as caught:
        prune.find_masks(model, "weight", 0.5)
    (warning,) = caught
    assert str(warning.message).startswith("88% of the weights stay dense")
    assert "embedding.weight, lstm.weight_ih_l0, lstm.weight_hh_l0; prune them by name with only=(…)" in str(
        warning.message
    )
    assert warning.filename == __file__
    assert list(prune.find_masks(model, "weight", 0.5, skip=("embedding", "lstm"))) == ["mix.weight"]
    choice = {"only": ("lstm.weight_*", "mix.weight")}
    masks = prune.find_masks(model, "weight", 0.5, **choice)
    assert list(masks) == ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "mix.weight"]
    for name, mask in masks.items():
        assert torch.equal(mask, prune.weight_mask(model.get_parameter(name), 0.5))
    pruned = prune.prune_model(model, "weight", 0.5, scope="global", **choice)
    assert prune.achieved_sparsity(pruned, **choice) == 0.5
    with pytest.raises(ValueError, match=r"lstm\.weight_ih_l0 has no units that 'unit' could rank: LAYERS lacks"):
        prune.find_masks(model, "unit", 0.5, **choice)
    with pytest.raises(ValueError, match=r"only: 'lstm\.bias\*' names nothing that could be pruned"):
        prune.find_masks(model, "weight", 0.5, only=("lstm.bias*",))
    attention = nn.MultiheadAttention(8, 2)
    assert list(prune.find_masks(attention, "weight", 0.5, only=("in_proj_weight",))) == ["in_proj_weight"]
    assert list(prune.find_masks(nn.LSTM(3, 4), "weight", 0.5, only=("*",))) == ["weight_ih_l0", "weight_hh_l0"]


@pytest.mark.parametrize("first", [False, True])
def test_a_list_of_weights_makes_no_difference(first: bool) -> None:
    plain, listing = mlp(6, 5, 4, 3), nn.ParameterList()
    model = nn.ModuleDict({"listing": listing, "net": plain} if first else {"net": plain, "listing": listing})
    for layer in (4, 2, 0):
        listing.extend(plain[layer].parameters())
    for method in ("weight", "unit", "random_weight"):
        expected = prune.find_masks(plain, method, 0.5, scope="global")
        masks = prune.find_masks(model, method, 0.5, scope="global")
        assert list(masks) == [f"net.{name}" for name in expected]
        assert all(torch.equal(masks[f"net.{name}"], expected[name]) for name in expected)
    listing.append(torch.randn(30, 30))
    with pytest.warns(UserWarning, match=r"94% .*: listing\.6;"):
        assert prune.find_masks(model, "weight", 0.5).keys() == {"net.0.weight", "net.2.weight"}
    assert prune.find_masks(model, "weight", 0.5, only=("listing.6",))["listing.6"].shape == (30, 30)


def test_a_weight_that_counts_outputs_in_two_ways_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 40, 3), nn.ConvTranspose2d(4, 3, 3), nn.Linear(3, 2))
    model[2].weight = model[0].weight
    assert list(prune.find_masks(model, "unit", 0.5)) == ["1.weight", "1.bias"]


# the output layer, which is a guess


class Net(nn.Module):
    """Layers in order of registration; what they compute doesn't matter."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def unet() -> nn.Module:
    def block(fan_in: int, fan_out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(fan_in, fan_out, 3), nn.BatchNorm2d(fan_out), nn.Conv2d(fan_out, fan_out, 3))

    down = {f"down{width}": block(width // 2 if width > 16 else 1, width) for width in (16, 32, 64, 128)}
    up = {f"up{width}": nn.ConvTranspose2d(2 * width, width, 2, stride=2) for width in (64, 32, 16)}
    return Net(
        **down, **up, **{f"join{width}": block(2 * width, width) for width in (64, 32, 16)}, out=nn.Conv2d(16, 2, 1)
    )


def lenet(classes: int = 10) -> nn.Module:
    return Net(
        conv1=nn.Conv2d(1, 10, 5), conv2=nn.Conv2d(10, 20, 5), fc1=nn.Linear(320, 50), fc2=nn.Linear(50, classes)
    )


def wide_and_deep() -> nn.Module:
    deep = Net(fc1=nn.Linear(40, 64), fc2=nn.Linear(64, 32))
    return Net(deep=deep, wide=nn.Linear(100, 32), join=nn.Linear(64, 32), out=nn.Linear(32, 1))


def distilled(classes: int) -> nn.Module:
    body = {"patches": nn.Conv2d(3, 48, 4, 4), "qkv": nn.Linear(48, 144), "proj": nn.Linear(48, 48)}
    return Net(
        **body, fc1=nn.Linear(48, 192), fc2=nn.Linear(192, 48), head=nn.Linear(48, classes), dist=nn.Linear(48, classes)
    )


def head_first(classes: int, flatten: int = 1) -> nn.Module:
    return Net(head=nn.Linear(64 * flatten, classes), conv1=nn.Conv2d(3, 32, 3), conv2=nn.Conv2d(32, 64, 3))


def zeroed(build: Callable[[], nn.Module]) -> nn.Module:
    """A model without the time that random weights take."""
    with torch.device("meta"):
        model = build()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


def doubts(model: nn.Module, **choice: object) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prune.find_masks(model, "weight", 0.5, **choice)
    return [str(warning.message) for warning in caught]


vision = torchvision.models


@pytest.mark.parametrize("classes", [1000, 3, 2])
@pytest.mark.parametrize(
    "name",
    [
        *("convnext_tiny", "densenet121", "efficientnet_b0", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small"),
        *("resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vit_b_16"),
    ],
)
def test_known_networks_raise_no_doubt(name: str, classes: int) -> None:
    if classes == 3 and name not in ("densenet121", "resnet18", "swin_t"):
        return  # two numbers of classes do
    found = doubts(zeroed(lambda: vision.get_model(name, weights=None, num_classes=classes)))
    assert ["in_proj_weight" in doubt for doubt in found] == ([True] if name == "vit_b_16" else [])


@pytest.mark.parametrize(
    "build",
    [
        lambda: mlp(100, 100, 100, 100),
        lambda: mlp(784, 128, 32, 128, 784),
        lambda: mlp(10, 10, 10, 10),
        lambda: mlp(784, 300, 100, 1),
        lenet,
        lambda: lenet(2),
        unet,
        wide_and_deep,
        Residual,
        NeuralNetwork,
        lambda: vision.googlenet(weights=None, aux_logits=False, init_weights=False),
        lambda: vision.googlenet(weights=None, aux_logits=False, init_weights=False, num_classes=2),
        lambda: vision.inception_v3(weights=None, aux_logits=False, init_weights=False, num_classes=3),
        lambda: vision.segmentation.fcn_resnet50(weights=None, weights_backbone=None),
        lambda: vision.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None),
    ],
)
def test_ordinary_networks_raise_no_doubt(build: Callable[[], nn.Module]) -> None:
    assert doubts(zeroed(build)) == []


def test_groups_of_something_else_do_not_matter() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.groups = nn.ModuleList([nn.Linear(9, 9), nn.Linear(9, 9)])
            self.scale = nn.Parameter(torch.ones(2, 3))
            self.head = nn.Linear(9, 2)

    assert list(prune.find_masks(Grouped(), "weight", 0.5)) == ["groups.0.weight", "groups.1.weight"]


def test_an_encoder_is_told_what_it_leaves_dense() -> None:
    (doubt,) = doubts(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 128), 2, enable_nested_tensor=False))
    assert doubt.startswith("25% of the weights stay dense") and "layers.1.self_attn.in_proj_weight" in doubt


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: vision.googlenet(weights=None, init_weights=False), "aux1.fc2, aux2.fc2"),
        (lambda: vision.googlenet(weights=None, init_weights=False, num_classes=10), "aux1.fc2, aux2.fc2"),
        (lambda: vision.inception_v3(weights=None, init_weights=False, num_classes=2), "AuxLogits.fc"),
        (lambda: vision.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True), "classifier.4"),
        (lambda: distilled(1000), "head"),
        (lambda: distilled(10), "head"),
        (lambda: distilled(2), "head"),
    ],
)
def test_a_second_head_is_noticed(build: Callable[[], nn.Module], named: str) -> None:
    model = zeroed(build)
    (doubt,) = doubts(model)
    assert f"no layer takes the outputs of {named}: if they're wanted, add them to skip" in doubt
    assert doubts(model, skip=named.split(", ")) == [] == doubts(model, prune_output=True)


@pytest.mark.parametrize("build", [lambda: head_first(10), lambda: head_first(1000), lambda: head_first(2, flatten=49)])
def test_a_head_that_was_registered_first_is_noticed(build: Callable[[], nn.Module]) -> None:
    model = zeroed(build)
    (doubt,) = doubts(model)
    assert doubt.startswith(
        "'conv2', registered last, is spared as the output layer, but no layer takes the outputs of"
    )
    assert "head: if they're wanted, add them to skip, in its stead with prune_output=True" in doubt
    assert list(prune.find_masks(model, "weight", 0.5, skip=("head",), prune_output=True)) == [
        "conv1.weight",
        "conv2.weight",
    ]


# names and wrappers


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_wrappers_add_nothing_to_names() -> None:
    model = nn.Sequential(mlp(6, 5, 4), nn.Linear(4, 3))
    expected = prune.find_masks(model, "unit", 0.5)
    wrapped = {
        "compiled": torch.compile(model),
        "parallel": nn.DataParallel(model),
        "both": nn.DataParallel(torch.compile(model)),
        "inside": nn.Sequential(torch.compile(model[0]), nn.DataParallel(model[1])),
    }
    for each in wrapped.values():
        masks = prune.find_masks(each, "unit", 0.5)
        assert list(masks) == list(expected) and all(torch.equal(masks[name], expected[name]) for name in masks)
        assert list(prune.find_masks(each, "unit", 0.5, skip=("0.0",))) == ["0.2.weight", "0.2.bias"]
        assert list(prune.find_masks(each, "weight", 0.5, only=("0.2.*",))) == ["0.2.weight"]
        pruned = prune.prune_model(each, "unit", 0.5)
        assert type(pruned) is type(each) and prune.achieved_sparsity(pruned) > 0.4 > prune.achieved_sparsity(each)
    prune.apply_masks(wrapped["both"], expected)
    assert prune.achieved_sparsity(model) > 0.4


def test_names_of_the_users_own_are_kept() -> None:
    model = nn.ModuleDict({"module": mlp(4, 3, 2)})
    assert list(prune.find_masks(model, "weight", 0.5)) == ["module.0.weight"]
    assert list(prune.find_masks(nn.Linear(3, 3), "weight", 0.5, prune_output=True)) == ["weight"]


@pytest.mark.parametrize("method", list(prune.METHODS))
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_default_device_and_type_do_not_matter(method: str, scope: str) -> None:
    model = mlp(30, 20, 10)

    def find() -> dict[str, Tensor]:
        (point,) = prune.sweep(model, method, [0.5], lambda pruned: 0.0, scope=scope)
        assert point.achieved == pytest.approx(0.5, abs=0.2)
        generator = torch.Generator("cpu").manual_seed(1)
        return prune.find_masks(model, method, 0.5, scope=scope, generator=generator)

    expected = find()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            masks = find()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


# exactness, at random


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    sizes = draw(st.lists(st.integers(1, 12), min_size=3, max_size=5))
    model = mlp(*sizes, bias=draw(st.booleans()))
    if draw(st.booleans()):
        model = nn.Sequential(nn.ConvTranspose1d(4, 6, 2, groups=2), nn.Conv2d(2, 3, 2), model)
    torch.manual_seed(draw(st.integers(0, 10**6)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
            if draw(st.booleans()):
                parameter.copy_(parameter.round())
    return model.to(draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])))


@few
@given(
    model=models(),
    method=st.sampled_from(list(prune.METHODS)),
    scope=st.sampled_from(["layer", "global"]),
    spare=st.booleans(),
    sparsity=st.one_of(st.floats(0, 1), st.sampled_from([0, 0.5, 1])),
    more=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_counts_supersets_and_an_untouched_model(
    model: nn.Module, method: str, scope: str, spare: bool, sparsity: float, more: float, seed: int
) -> None:
    before = state(model)

    def find(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        with warnings.catch_warnings(action="ignore"):
            masks = prune.find_masks(model, method, sparsity, scope=scope, prune_output=not spare, generator=generator)
        return {name: mask for name, mask in masks.items() if name.endswith("weight")}

    masks = find(model, sparsity)
    assert unchanged(model, before)
    layers = [layer for layer in model.modules() if isinstance(layer, tuple(prune.LAYERS))][: -1 if spare else None]
    assert [mask.shape for mask in masks.values()] == [layer.weight.shape for layer in layers]
    if "unit" in method:
        units = [
            layer.out_channels if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)) else len(layer.weight)
            for layer in layers
        ]
        sizes = [mask.numel() // unit for mask, unit in zip(masks.values(), units, strict=True)]
        gone = [zeros({"": mask}) // size for mask, size in zip(masks.values(), sizes, strict=True)]
    else:
        units = [mask.numel() for mask in masks.values()]
        gone = [zeros({"": mask}) for mask in masks.values()]
    if scope == "layer":
        assert gone == [round(sparsity * unit) for unit in units]
    else:
        assert sum(gone) == round(sparsity * sum(units))
    more = max(sparsity, more)
    further = find(model, more)
    pruned = copy.deepcopy(model)
    prune.apply_masks(pruned, masks)
    again = find(pruned, more)
    for name, mask in masks.items():
        assert not (further[name] & ~mask).any() and not (again[name] & ~mask).any()
        assert not pruned.get_parameter(name)[~mask].any()
        assert torch.equal(pruned.get_parameter(name)[mask], model.get_parameter(name)[mask])


# random methods


@pytest.mark.parametrize("method", ["random_weight", "random_unit"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_random_masks_follow_the_generator_or_the_seed(method: str, scope: str) -> None:
    model = mlp(30, 20, 20, 10)

    def find(seed: int | None) -> dict[str, Tensor]:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return prune.find_masks(model, method, 0.5, scope=scope, generator=generator)

    def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
        return all(torch.equal(first[name], second[name]) for name in first)

    assert same(find(1), find(1)) and not same(find(1), find(2))
    shared = torch.Generator().manual_seed(1)
    first, second = (prune.find_masks(model, method, 0.5, scope=scope, generator=shared) for _ in range(2))
    assert same(first, find(1)) and not same(first, second)
    torch.manual_seed(5)
    torch.rand(3)
    five = find(None)
    torch.manual_seed(6)
    assert not same(five, find(None))
    torch.manual_seed(5)
    assert same(five, find(None))
    if scope == "layer":
        assert not torch.equal(five["0.weight"].any(1), five["2.weight"].any(1)) or method == "random_weight"


@pytest.mark.parametrize("method", list(prune.METHODS))
def test_nothing_of_the_process_changes(method: str) -> None:
    model = mlp(30, 20, 10)
    before, filters = torch.get_rng_state(), list(warnings.filters)
    prune.prune_model(model, method, 0.5)
    prune.sweep(model, method, [0.5, 0.6], lambda pruned: 0.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before) and warnings.filters == filters


@pytest.mark.parametrize("method", ["random_weight", "random_unit"])
def test_random_masks_are_the_same_in_threads(method: str) -> None:
    model = mlp(300, 200, 100)

    def find(seed: int) -> Tensor:
        return prune.find_masks(model, method, 0.5, generator=torch.Generator().manual_seed(seed))["0.weight"]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(find, range(40)))
    assert all(torch.equal(mask, find(seed)) for seed, mask in enumerate(together))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("first", "second"), [("weight", "random_weight"), ("unit", "random_unit")])
def test_random_methods_prune_what_is_zero_first(first: str, second: str, scope: str) -> None:
    pruned = prune.prune_model(mlp(30, 20, 20, 10), first, 0.4)
    masks = prune.find_masks(pruned, second, 0.5, scope=scope)
    for name in ("0.weight", "2.weight"):
        assert not masks[name][pruned.get_parameter(name) == 0].any()


def test_random_masks_spread_evenly() -> None:
    kept = torch.zeros(20, 30)
    for seed in range(200):
        masks = prune.find_masks(mlp(30, 20, 10), "random_weight", 0.5, generator=torch.Generator().manual_seed(seed))
        kept += masks["0.weight"]
    assert kept.min() > 60 and kept.max() < 140


@pytest.mark.parametrize("given", [False, True])
def test_random_masks_do_not_follow_weights_of_the_same_seed(given: bool) -> None:
    """The weights were made of the first numbers of that seed, and so would the scores be."""
    torch.manual_seed(7)
    model = nn.Linear(1000, 500, bias=False)  # uniform in ±0.032, half a million of them
    generator = torch.Generator().manual_seed(7) if given else None
    mask = prune.find_masks(model, "random_weight", 0.5, generator=generator, prune_output=True)["weight"]
    assert abs(model.weight[mask].mean()) < 2e-4  # five standard errors; by those numbers it is 0.016


# a criterion of the user's own


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[Tensor], Tensor]]:
    monkeypatch.setattr(prune, "METHODS", dict(prune.METHODS))
    return prune.METHODS


def test_a_criterion_of_ones_own(methods: dict[str, Callable[[Tensor], Tensor]]) -> None:
    methods["signed"] = lambda weight: weight  # prunes the most negative
    methods["l1_unit"] = lambda weight: weight.abs().flatten(1).sum(1)
    methods["taylor"] = lambda weight: (weight * weight.grad).abs()
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Conv1d(6, 5, 2), nn.Conv1d(5, 4, 1))
    model(torch.randn(2, 4, 9)).square().sum().backward()
    for scope in ("layer", "global"):
        signed = prune.find_masks(model, "signed", 0.5, scope=scope)
        assert model[0].weight[signed["0.weight"]].min() >= model[0].weight[~signed["0.weight"]].max()
        taylor = prune.find_masks(model, "taylor", 0.5, scope=scope)
        for layer in (model[0], model[1]):
            worth, keep = (layer.weight * layer.weight.grad).abs(), taylor[f"{0 if layer is model[0] else 1}.weight"]
            assert worth[keep].min() >= worth[~keep].max()
    units = prune.find_masks(model, "l1_unit", 0.5)
    norms = model[1].weight.abs().flatten(1).sum(1)
    assert norms[units["1.bias"]].min() > norms[~units["1.bias"]].max()


def test_a_random_criterion_of_ones_own_gets_the_generator(methods: dict[str, Callable[..., Tensor]]) -> None:
    methods["random_row"] = lambda weight, generator: torch.rand(len(weight), generator=generator)
    masks = [
        prune.find_masks(mlp(30, 20, 10), "random_row", 0.5, generator=torch.Generator().manual_seed(3))["0.bias"]
        for _ in range(2)
    ]
    assert torch.equal(*masks) and masks[0].count_nonzero() == 10


@pytest.mark.parametrize("kept", ["stale", "other type", "sparse"])
@pytest.mark.parametrize("method", ["weight", "unit", "random_weight", "mine"])
def test_a_gradient_that_does_not_fit_stops_no_magnitudes(
    methods: dict[str, Callable[..., Tensor]], kept: str, method: str
) -> None:
    methods["mine"] = lambda weight: weight.abs()
    model = mlp(6, 5, 4)
    expected = prune.find_masks(model, method, 0.5)
    if kept == "stale":
        model[0].weight.grad = torch.ones(5, 6)
        model[0].weight.data = model[0].weight.data[:, :4].clone()
        expected = prune.find_masks(mlp_like(model), method, 0.5)
    elif kept == "other type":
        model[0].weight.grad = torch.ones(5, 6)
        model[0].weight.data = model[0].weight.data.double()
    else:
        model[0].weight.grad = torch.ones(5, 6).to_sparse()
    masks = prune.find_masks(model, method, 0.5)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


def mlp_like(model: nn.Sequential) -> nn.Sequential:
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.grad = None
    return other


def test_a_gradient_of_another_type_is_read_as_the_weights(methods: dict[str, Callable[..., Tensor]]) -> None:
    methods["taylor"] = lambda weight: (weight * weight.grad).abs()
    model = mlp(6, 5, 4)
    gradient = torch.randn(5, 6)
    model[0].weight.grad = gradient
    model[0].weight.data = model[0].weight.data.double()
    worth, keep = (model[0].weight * gradient).abs(), prune.find_masks(model, "taylor", 0.5)["0.weight"]
    assert worth[keep].min() > worth[~keep].max()


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda weight: weight[0], ValueError, r"scores of 0.weight must be .* \(5, 6\) or \(5,\), .* got \(6,\)"),
        (lambda weight: weight * float("nan"), ValueError, "scores of 0.weight must be .* not NaN"),
        (lambda weight: 3, ValueError, "scores of 0.weight must be floating-point, .* got int"),
        (
            lambda weight: weight.long(),
            ValueError,
            r"scores of 0.weight must be floating-point, .* got \(5, 6\) of torch.int64",
        ),
        (
            lambda weight: weight * weight.grad,
            ValueError,
            "method 'mine' fails for 0.weight, which has no gradient: Type",
        ),
        (lambda weight: weight @ weight, ValueError, "method 'mine' fails for 0.weight.*shapes cannot be multiplied"),
    ],
)
def test_a_bad_criterion(
    methods: dict[str, Callable[[Tensor], Tensor]], function: object, error: type[Exception], message: str
) -> None:
    methods["mine"] = function
    with pytest.raises(error, match=message):
        prune.find_masks(mlp(6, 5, 4), "mine", 0.5)


def test_infinite_scores_protect_weights(methods: dict[str, Callable[[Tensor], Tensor]]) -> None:
    methods["mine"] = lambda weight: (
        weight.abs().masked_fill(weight > 0, float("inf")).masked_fill(weight < -0.3, -torch.inf)
    )
    model = mlp(200, 100, 50)
    keep = prune.find_masks(model, "mine", 0.4)["0.weight"]
    assert keep[model[0].weight > 0].all()


# applying masks


def test_masks_come_from_torch_and_go_to_it() -> None:
    model = mlp(6, 5, 4)
    dense = copy.deepcopy(model)
    masks = prune.find_masks(model, "unit", 0.4)
    for name, mask in masks.items():
        layer, _, parameter = name.rpartition(".")
        peer.custom_from_mask(model.get_submodule(layer), parameter, mask)
    returned = {
        name.removesuffix("_mask"): mask.bool() for name, mask in model.named_buffers() if name.endswith("_mask")
    }
    assert returned.keys() == masks.keys() and all(torch.equal(returned[name], masks[name]) for name in masks)
    with pytest.raises(ValueError, match=r"0\.weight is computed from other parameters.*prune.remove"):
        prune.find_masks(model, "weight", 0.5)
    peer.remove(model[0], "weight")
    with pytest.raises(ValueError, match=r"0\.bias is computed from other parameters"):
        prune.find_masks(model, "unit", 0.5)
    peer.custom_from_mask(model[0], "weight", masks["0.weight"])
    with pytest.raises(ValueError, match=r"no parameter '0\.weight': did you mean .*0\.weight_orig"):
        prune.apply_masks(model, masks)
    prune.apply_masks(dense, returned)
    batch = torch.randn(3, 6)
    assert torch.equal(dense(batch), model(batch))
    for parameter in ("weight", "bias"):
        peer.remove(model[0], parameter)
    assert prune.achieved_sparsity(model) == 0.4 == prune.achieved_sparsity(prune.prune_model(model, "unit", 0.4))


def test_masks_go_to_a_file_and_pruned_models_stay_plain() -> None:
    model = mlp(6, 5, 4)
    masks = prune.find_masks(model, "unit", 0.4)
    file = io.BytesIO()
    torch.save(masks, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded.keys() == masks.keys() and all(torch.equal(loaded[name], masks[name]) for name in masks)
    for scope in ("layer", "global"):
        for mask in prune.find_masks(mlp(6, 5, 4, 3), "weight", 0.4, scope=scope).values():
            assert mask.untyped_storage().nbytes() == mask.numel()  # no mask takes others into its file
    pruned = prune.prune_model(model, "unit", 0.4)
    assert list(pruned.state_dict()) == list(model.state_dict())
    for module in pruned.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not list(module.buffers())
    batch = torch.randn(3, 6)
    other = mlp(6, 5, 4)
    other.load_state_dict(pruned.state_dict())
    for each in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned)), other):
        assert torch.equal(each(batch), pruned(batch)) and prune.achieved_sparsity(each) == 0.4


def test_masks_make_zeros_of_anything() -> None:
    model = nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[float("nan"), float("inf"), -1.0, 2.0]]))
    prune.apply_masks(model, {"weight": torch.tensor([[False, False, False, True]])})
    assert model.weight.tolist() == [[0.0, 0.0, 0.0, 2.0]] and not model.weight.signbit().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masks_apply_to_any_precision_and_layout(dtype: torch.dtype) -> None:
    layer = nn.Linear(1, 1, bias=False, dtype=dtype)
    layer.weight = nn.Parameter(torch.randn(6, 4, dtype=dtype).t())
    before, mask = layer.weight.detach().clone(), torch.rand(4, 6) < 0.5
    prune.apply_masks(layer, {"weight": mask})
    assert torch.equal(layer.weight, before.where(mask, 0)) and layer.weight.requires_grad


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ([("0.weight", torch.ones(5, 6, dtype=torch.bool))], TypeError, "masks must be a dict .* got list"),
        (
            {"9.weight": torch.ones(5, 6, dtype=torch.bool)},
            ValueError,
            r"no parameter '9\.weight': did you mean [02]\.weight",
        ),
        ({"0": torch.ones(5, 6, dtype=torch.bool)}, ValueError, "no parameter '0'"),
        (
            {"0.weight": torch.ones(6, 5, dtype=torch.bool)},
            ValueError,
            r"dense \(5, 6\) of torch.bool, .*, got \(6, 5\) of torch.bool",
        ),
        ({"0.weight": torch.ones(5, 6)}, ValueError, r"True = keep, got \(5, 6\) of torch.float32"),
        ({"0.weight": [[True] * 6] * 5}, ValueError, r"True = keep, got list"),
        ({"0.weight": torch.ones(5, 6, dtype=torch.bool, device="meta")}, ValueError, "must be a dense"),
        ({3: torch.ones(5, 6, dtype=torch.bool)}, ValueError, "no parameter 3"),
    ],
)
def test_bad_masks_change_nothing(masks: object, error: type[Exception], message: str) -> None:
    model = mlp(6, 5, 4)
    before = state(model)
    if isinstance(masks, dict):
        masks = {"2.weight": torch.zeros(4, 5, dtype=torch.bool), **masks}
    with pytest.raises(error, match=message):
        prune.apply_masks(model, masks)
    assert unchanged(model, before)


@pytest.mark.parametrize(
    "weight", [torch.ones(1, 1).expand(4, 5), torch.ones(5).expand(4, 5), torch.ones(8).as_strided((4, 5), (1, 1))]
)
def test_a_weight_that_shares_memory_with_itself_is_found_first(weight: Tensor) -> None:
    model = mlp(6, 5, 4)
    model[2].weight = nn.Parameter(weight)
    before = state(model)
    masks = {"0.weight": torch.zeros(5, 6, dtype=torch.bool), "2.weight": torch.zeros(4, 5, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"2\.weight shares memory with itself"):
        prune.apply_masks(model, masks)
    with pytest.raises(ValueError, match=r"2\.weight shares memory with itself"):
        prune.prune_model(model, "weight", 0.5, prune_output=True)
    assert unchanged(model, before)
    assert prune.weight_mask(weight, 0.5).count_nonzero() == 10


def test_masks_of_a_lazy_layer() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    mask = torch.zeros(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"1\.weight must be .*lazy"):
        prune.apply_masks(model, {"0.weight": mask, "1.weight": mask})
    assert model[0].weight.all()


@pytest.mark.parametrize("method", ["weight", "unit"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
        lambda parameters: torch.optim.Adam(parameters, lr=1e-2, weight_decay=1e-2),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-2),
    ],
    ids=["SGD", "Nesterov", "Adam", "AdamW"],
)
def test_masks_hold_through_training(optimizer: Callable[..., torch.optim.Optimizer], method: str) -> None:
    model = mlp(8, 16, 16, 4)
    inputs, targets = torch.randn(64, 8), torch.randint(4, (64,))
    step = optimizer(model.parameters())
    for _ in range(3):  # momentum that would move the weights on
        nn.functional.cross_entropy(model(inputs), targets).backward()
        step.step()
    masks = prune.find_masks(model, method, 0.5)
    prune.apply_masks(model, masks)
    before = state(model)
    for _ in range(50):
        step.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        step.step()
        prune.apply_masks(model, masks)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert not weight[~mask].any() and (weight != before[name])[mask].float().mean() > 0.95


# bad arguments, and models that cannot be pruned


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "mlp"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"model": NeuralNetwork}, TypeError, "model must be a torch.nn.Module, got type"),
        ({"model": nn.ReLU()}, ValueError, "no layer is in LAYERS, .*; only=.* could name nothing$"),
        ({"model": nn.Embedding(3, 3)}, ValueError, r"no layer is in LAYERS, .*; only=\(…\) could name weight$"),
        ({"model": nn.Sequential(nn.Linear(3, 3))}, ValueError, "every one is spared; '0', .*prune_output=True"),
        ({"skip": ("0", "2")}, ValueError, "every one is spared; '4', registered last"),
        ({"skip": ("*",), "prune_output": True}, ValueError, "every one is spared; only=.* could name nothing$"),
        ({"method": "l1"}, ValueError, "unknown method 'l1': expected one of weight, unit, random_weight, random_unit"),
        ({"sparsity": 50}, ValueError, r"did you mean 0\.5\?"),
        ({"scope": "model"}, ValueError, "unknown scope 'model': expected one of layer, global"),
        ({"skip": ("fc9",)}, ValueError, r"skip: 'fc9' names nothing .*: did you mean 4, 2, 0\?$"),
        ({"skip": ("1",)}, ValueError, r"skip: '1' names nothing"),
        ({"skip": ("0.*",)}, ValueError, r"skip: '0\.\*' names nothing .*: did you mean 0, 4, 2\?$"),
        ({"skip": "4"}, TypeError, r"such as \('4',\), got '4'"),
        ({"skip": 4}, TypeError, "skip must be a sequence of names"),
        ({"skip": None}, TypeError, "skip must be a sequence of names"),
        ({"only": "0.weight"}, TypeError, "only must be a sequence of names"),
        ({"only": ("0.wieght",)}, ValueError, r"only: '0\.wieght' names nothing .*: did you mean 0\.weight"),
        (
            {"only": ("0.bias",)},
            ValueError,
            r"only: '0\.bias' names nothing that could be pruned; '4', .*: did you mean 0\.weight",
        ),
        ({"only": ()}, ValueError, "every one is spared"),
        (
            {"only": ("0.weight", "4.weight")},
            ValueError,
            r"only: '4\.weight' names nothing that could be pruned; '4', .*last",
        ),
        (
            {"only": ("0.weight",), "skip": ("0",)},
            ValueError,
            r"only: '0\.weight' names nothing that could be pruned; '4'",
        ),
        ({"generator": 0}, TypeError, "generator must be a torch.Generator, got 0"),
    ],
)
@pytest.mark.parametrize("function", [prune.find_masks, prune.prune_model])
def test_bad_arguments(function: Callable[..., object], change: dict, error: type[Exception], message: str) -> None:
    arguments = {"model": mlp(6, 5, 4, 3), "method": "weight", "sparsity": 0.5} | change
    before = state(arguments["model"]) if isinstance(arguments["model"], nn.Module) else None
    with pytest.raises(error, match=message):
        function(**arguments)
    assert before is None or unchanged(arguments["model"], before)


def broken(weight: Tensor) -> nn.Module:
    model = mlp(3, 2, 2)
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), r"0\.weight must be .*lazy"),
        (nn.Sequential(nn.LazyConv2d(3, 3), nn.Linear(3, 2)), r"0\.weight must be .*lazy"),
        (nn.Sequential(nn.Linear(3, 3, device="meta"), nn.Linear(3, 2)), r"0\.weight must be .* with values .*, meta"),
        (
            nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64), nn.Linear(3, 2)),
            r"0\.weight must .* got .* torch.complex64",
        ),
        (broken(torch.ones(2, 3, dtype=torch.int8)), r"0\.weight must .* got .* torch.int8"),
        (broken(torch.ones(2, 3).to_sparse()), r"0\.weight must be a dense"),
        (broken(torch.ones(2, 3).to(torch.float8_e4m3fn)), r"0\.weight must .* got .* torch.float8_e4m3fn"),
        (broken(torch.ones(1, 3).expand(2, 3)), r"0\.weight shares memory with itself"),
        (broken(torch.tensor([[1.0, float("nan"), 0.0]] * 2)), r"0\.weight must be finite"),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2)),
            r"0\.weight is computed",
        ),
        (
            nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), nn.Linear(3, 2)),
            r"0\.weight is computed",
        ),
    ],
)
@pytest.mark.parametrize("method", ["weight", "unit"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_weights_that_cannot_be_ranked(model: nn.Module, message: str, method: str, scope: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune.find_masks(model, method, 0.5, scope=scope)
    spared = prune.find_masks(nn.Sequential(model[0], nn.Linear(4, 4), nn.Linear(4, 4)), method, 0.5, skip=("0",))
    assert "1.weight" in spared  # what is spared need not be prunable


@pytest.mark.parametrize("method", list(prune.METHODS))
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_weight_that_is_not_finite_is_named(method: str, scope: str) -> None:
    model = mlp(100, 90, 80, 10)
    with torch.no_grad():
        model[2].weight[3, 3] = float("inf")
    with pytest.raises(ValueError, match=r"^2\.weight must be finite"):
        prune.find_masks(model, method, 0.5, scope=scope)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_layers_have_empty_masks() -> None:
    model = mlp(4, 3, 0, 2)
    for scope in ("layer", "global"):
        for method in prune.METHODS:
            masks = prune.find_masks(model, method, 0.5, scope=scope, prune_output=True)
            assert masks["2.weight"].shape == (0, 3) and masks["4.weight"].shape == (2, 0)
    assert prune.achieved_sparsity(mlp(4, 0, 0)) == 0.0


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("method", list(prune.METHODS))
def test_a_layer_that_loses_everything_is_named(scope: str, method: str) -> None:
    with pytest.warns(UserWarning, match=r"leaves nothing of 0\.weight, 2\.weight at sparsity 1$"):
        masks = prune.find_masks(mlp(6, 5, 4, 3), method, 1.0, scope=scope)
    assert not any(mask.any() for mask in masks.values())


def test_a_layer_that_loses_everything_below_one_is_named() -> None:
    model = mlp(6, 5, 4, 3)
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    with pytest.warns(UserWarning, match=r"leaves nothing of 0\.weight at sparsity 0\.7$"):
        prune.find_masks(model, "weight", 0.7, scope="global")
    with pytest.warns(UserWarning, match=r"leaves nothing of 2\.weight at sparsity 0\.9$"):
        prune.find_masks(mlp(100, 50, 1, 3), "unit", 0.9)


def test_zero_prunes_nothing() -> None:
    model = mlp(6, 5, 4)
    for method in prune.METHODS:
        assert unchanged(prune.prune_model(model, method, 0), state(model))


# sweeps


@pytest.mark.parametrize("method", list(prune.METHODS))
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_sweep_prunes_the_same_dense_model_each_time(method: str, scope: str) -> None:
    model = mlp(12, 10, 8, 4)
    before, seen = state(model), []

    def score(pruned: nn.Module) -> float:
        assert pruned is not model
        seen.append(copy.deepcopy(pruned))
        with torch.no_grad():
            pruned[0].weight.fill_(7)  # what happens to a copy stays there
        return float(len(seen))

    points = prune.sweep(model, method, [0.5, 0, 0.25, 0.75], score, scope=scope)
    assert unchanged(model, before)
    assert [point.sparsity for point in points] == [0.5, 0, 0.25, 0.75]
    assert [point.score for point in points] == [1, 2, 3, 4] and points[0].retrained_score is None
    for point, pruned in zip(points, seen, strict=True):
        assert point.achieved == prune.achieved_sparsity(pruned)
        assert point.achieved == pytest.approx(point.sparsity, abs=0.15)
    dead = [seen[number][0].weight == 0 for number in (1, 2, 0, 3)]
    for fewer, more in pairwise(dead):
        assert not (fewer & ~more).any()


def test_a_sweep_follows_its_generator() -> None:
    model = mlp(12, 10, 8, 4)

    def run(seed: int) -> list[float]:
        generator = torch.Generator().manual_seed(seed)
        total = lambda pruned: pruned[0].weight.sum().item()  # noqa: E731
        return [point.score for point in prune.sweep(model, "random_weight", [0.3, 0.6], total, generator=generator)]

    assert run(1) == run(1) != run(2)
    generator, seen = torch.Generator().manual_seed(3), []
    state_before = generator.get_state()
    keep = lambda pruned: seen.append(pruned[0].weight != 0)  # noqa: E731
    prune.sweep(model, "random_weight", [0.3, 0.9, 0.6], keep, generator=generator)
    assert not (seen[1] & ~seen[2]).any() and not (seen[2] & ~seen[0]).any()
    assert torch.equal(generator.get_state(), state_before)


def test_a_sweep_retrains_copies_and_scores_them_again() -> None:
    model = mlp(6, 5, 4)

    def retrain(pruned: nn.Module, masks: dict[str, Tensor]) -> None:
        with torch.no_grad():
            pruned[0].weight.add_(1)
        prune.apply_masks(pruned, masks)

    points = prune.sweep(model, "weight", [0, 0.5], lambda pruned: pruned[0].weight.mean().item(), retrain=retrain)
    assert points[0].retrained_score == pytest.approx(points[0].score + 1)
    assert points[1].retrained_score == pytest.approx(points[1].score + 0.5)
    assert prune.sweep(model, "weight", iter([]), lambda pruned: 0.0) == []


class Modes(nn.Module):
    """A frozen BatchNorm in a model that is in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2)
        self.norm.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.first(inputs))))


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_copies_are_scored_in_eval_mode_and_retrained_in_training_mode(evaluating: bool, wrapped: bool) -> None:
    own = Modes()
    model = torch.compile(own) if wrapped else own
    if evaluating:
        model.eval()
    before, seen = modes(own), []

    def retrain(pruned: nn.Module, masks: dict[str, Tensor]) -> None:
        seen.append(modes(pruned)[-5:])
        assert set(masks) == {"first.weight"}

    def score(pruned: nn.Module) -> object:
        seen.append(modes(pruned)[-5:])
        pruned.train()  # what happens to a copy stays there
        return {"right": 3}

    (point,) = prune.sweep(model, "weight", [0.5], score, retrain=retrain)
    training = [True] * 5 if evaluating else [True, True, False, True, True]
    assert seen == [[False] * 5, training, [False] * 5] and modes(own) == before
    assert point.score == {"right": 3} == point.retrained_score


# recalibration


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(16, 4), torch.zeros(16)) for _ in range(count)]


@pytest.mark.parametrize("only_inputs", [False, True])
def test_recalibration_takes_the_statistics_of_all_batches(only_inputs: bool) -> None:
    model, data = Modes(), batches()
    before, kept = modes(model), {name: value.clone() for name, value in model.named_parameters()}
    model.norm.running_mean.fill_(100.0)
    momentum, state_before = model.norm.momentum, torch.get_rng_state()
    prune.recalibrate(model, (batch[0] if only_inputs else batch for batch in data))
    outputs = [model.first(inputs) for inputs, _ in data]
    torch.testing.assert_close(model.norm.running_mean, torch.stack([output.mean(0) for output in outputs]).mean(0))
    torch.testing.assert_close(model.norm.running_var, torch.stack([output.var(0) for output in outputs]).mean(0))
    assert modes(model) == before and model.norm.momentum == momentum
    assert torch.equal(torch.get_rng_state(), state_before)  # no dropout
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, kept[name]) and parameter.grad is None


def test_recalibration_is_all_or_nothing() -> None:
    model = Modes()
    before = state(model)
    with pytest.raises(ValueError, match="at least one batch"):
        prune.recalibrate(model, [])
    with pytest.raises(RuntimeError, match="shapes"):
        prune.recalibrate(model, [*batches(2), torch.randn(3, 3)])
    assert unchanged(model, before) and modes(model)[2] is False
    plain = mlp(4, 3, 2)
    before = state(plain)
    prune.recalibrate(plain, batches())
    assert unchanged(plain, before)
    prune.recalibrate(norm := nn.BatchNorm1d(4, affine=False), batches())  # without parameters
    assert norm.num_batches_tracked == 4


def test_recalibration_restores_what_pruning_cost() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 200), nn.BatchNorm1d(200), nn.ReLU(), nn.Linear(200, 2)).train()
    for inputs, _ in batches(50):
        model(inputs + 3)
    pruned = prune.prune_model(model.eval(), "weight", 0.5)
    inputs = torch.randn(500, 4) + 3

    def shift(network: nn.Module) -> float:
        return network[:2](inputs).mean(0).abs().mean().item()

    assert shift(pruned) > 10 * shift(model)
    prune.recalibrate(pruned, inputs.split(100))
    assert shift(pruned) < 0.01


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sparsities": 0.5}, TypeError, "not iterable"),
        ({"sparsities": "0.5"}, TypeError, "sparsity must be a number in .0, 1., got '0'"),
        ({"sparsities": [0.5, 80]}, ValueError, r"did you mean 0\.8"),
        ({"score": 1.0}, TypeError, "score and retrain must be functions, got 1.0 and None"),
        ({"retrain": 1.0}, TypeError, "must be functions"),
        ({"method": "l2"}, ValueError, "unknown method"),
        ({"skip": ("fc9",)}, ValueError, "fc9"),
        ({"generator": 0}, TypeError, "generator must be"),
        ({"scope": "model"}, ValueError, "unknown scope"),
        ({"model": None}, TypeError, "model must be"),
    ],
)
def test_bad_sweeps_score_nothing(change: dict, error: type[Exception], message: str) -> None:
    def score(pruned: nn.Module) -> float:
        raise AssertionError("scored too early")

    arguments = {"model": mlp(6, 5, 4), "method": "weight", "sparsities": [0.5], "score": score} | change
    with pytest.raises(error, match=message):
        prune.sweep(**arguments)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": []}, TypeError),
        ({"skip": "0"}, TypeError),
        ({"skip": ("x",)}, ValueError),
        ({"model": nn.ReLU()}, ValueError),
    ],
)
def test_bad_arguments_of_achieved_sparsity(change: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        prune.achieved_sparsity(**({"model": mlp(6, 5, 4)} | change))
