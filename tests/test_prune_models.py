"""Whole models: which weights are pruned, by what names, and that nothing else changes."""

import copy
import io
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
import torch.nn.utils.prune as peer
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prune
from model import NeuralNetwork

few = settings(max_examples=100, deadline=None)


def mlp(*sizes, bias=True):
    layers = [nn.Linear(fan_in, fan_out, bias=bias) for fan_in, fan_out in pairwise(sizes)]
    return nn.Sequential(*[each for layer in layers for each in (layer, nn.ReLU())][:-1])


def language():
    """Its head shares the embedding's weight, as in many language models."""
    layers = {"first": nn.Linear(6, 6), "second": nn.Linear(6, 6), "norm": nn.LayerNorm(6)}
    model = nn.ModuleDict({"embedding": nn.Embedding(12, 6), **layers, "head": nn.Linear(6, 12, bias=False)})
    model.head.weight = model.embedding.weight
    return model


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    return list(model.state_dict()) == list(before) and same(model.state_dict(), before)


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in second)


def zeros(masks):
    return sum(mask.numel() - int(mask.count_nonzero()) for mask in masks.values())


# what is pruned


CHOSEN = [
    ({}, "02"), ({"prune_output": True}, "024"), ({"skip": ("2",)}, "0"), ({"skip": ["4", "0"]}, "2"),
    ({"skip": {"0", "2"}, "prune_output": True}, "4"), ({"skip": ("[02]",), "prune_output": True}, "4"),
    ({"only": ("2.weight",)}, "2"), ({"only": ("*.weight",)}, "02"), ({"only": ("*",), "skip": ("0",)}, "2"),
    ({"only": ("*",), "prune_output": True}, "024"),
]  # fmt: skip


@pytest.mark.parametrize(("choice", "pruned"), CHOSEN)
@pytest.mark.parametrize("method", ["weight", "unit"])
def test_what_is_pruned_and_spared(choice, pruned, method):
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
def test_global_scope_matches_torch(method):
    model = mlp(40, 30, 20, 10)
    masks = prune.find_masks(model, method, 0.5, scope="global", prune_output=True)
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    if method == "weight":
        peer.global_unstructured([(layer, "weight") for layer in layers], peer.L1Unstructured, amount=0.5)
        for name in masks:
            assert torch.equal(masks[name], model.get_buffer(f"{name}_mask").bool())
    else:
        norms = [layer.weight.norm(dim=1) for layer in layers]
        scores = torch.cat([norm / norm.max() for norm in norms])
        keep = torch.cat([mask[:, 0] for name, mask in masks.items() if name.endswith("weight")])
        assert len(keep) - keep.count_nonzero() == 30 and scores[keep].min() > scores[~keep].max()


def test_global_scope_ranks_layers_of_different_precision_together():
    model = mlp(300, 200, 100, 50)
    for layer, dtype in ((model[0], torch.float32), (model[2], torch.float64), (model[4], torch.float16)):
        nn.init.constant_(layer.to(dtype).weight, 0.1)  # 0.1 is 0.1000000015 in fp32 and 0.09998 in fp16
    with pytest.warns(UserWarning, match=r"4\.weight"):
        masks = prune.find_masks(model, "weight", 20_000 / 85_000, scope="global", prune_output=True)
    assert [zeros({name: mask}) for name, mask in masks.items()] == [0, 15_000, 5_000]


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_global_scope_empties_no_layer_of_units_before_the_end(spread):
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


def test_unit_methods_prune_biases_and_weight_methods_do_not():
    model = mlp(6, 5, 4, 3)
    assert list(prune.find_masks(model, "weight", 0.5)) == ["0.weight", "2.weight"]
    masks = prune.find_masks(model, "unit", 0.5)
    assert list(masks) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(masks["0.bias"], masks["0.weight"].any(1))
    pruned = prune.prune_model(model, "unit", 0.5)
    dead = ~masks["0.bias"]
    assert not pruned[0].bias[dead].any() and not pruned[0](torch.randn(9, 6))[:, dead].any()
    assert torch.equal(pruned[0].bias[~dead], model[0].bias[~dead])


UNITS = [
    (nn.Linear(12, 8), (12,)), (nn.Bilinear(3, 4, 8), (3,)), (nn.Conv1d(4, 8, 3), (4, 9)),
    (nn.Conv2d(4, 8, 3, groups=2), (4, 9, 9)), (nn.Conv3d(2, 8, 2), (2, 5, 5, 5)),
    (nn.ConvTranspose1d(4, 8, 3), (4, 9)), (nn.ConvTranspose2d(4, 8, 3), (4, 9, 9)),
    (nn.ConvTranspose2d(6, 8, 3, groups=2), (6, 9, 9)), (nn.ConvTranspose3d(4, 8, 2, groups=4), (4, 5, 5, 5)),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "shape"), UNITS, ids=str)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_pruned_unit_of_any_layer_has_no_output(layer, shape, scope):
    masks = prune.find_masks(layer, "unit", 3 / 8, prune_output=True, scope=scope)
    assert masks["weight"].shape == layer.weight.shape and masks["weight"].is_contiguous()
    dead = ~masks["bias"]
    pruned = prune.prune_model(layer, "unit", 3 / 8, prune_output=True, scope=scope)
    batch = [torch.randn(2, *shape)] + ([torch.randn(2, 4)] if isinstance(layer, nn.Bilinear) else [])
    outputs, dense = pruned(*batch), layer(*batch)
    assert dead.count_nonzero() == 3 and not outputs[:, dead].any()
    torch.testing.assert_close(outputs[:, ~dead], dense[:, ~dead])
    assert prune.achieved_sparsity(pruned, prune_output=True) == 3 / 8


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_weights_of_transposed_convolutions_keep_their_layout(scope):
    layer = nn.ConvTranspose2d(6, 8, 3, groups=2)
    mask = prune.find_masks(layer, "weight", 0.5, prune_output=True, scope=scope)["weight"]
    assert layer.weight[mask].abs().min() >= layer.weight[~mask].abs().max()


# shared weights


@pytest.mark.parametrize("method", list(prune.METHODS))
def test_a_weight_tied_to_an_embedding_is_left_alone(method):
    def pruned(**choice):
        return {name.split(".")[0] for name in prune.find_masks(language(), method, 0.5, **choice)}

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


def test_shared_weights_count_once_and_have_the_first_name():
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
def test_a_shared_weight_is_spared_if_any_of_its_layers_is(choice):
    model = mlp(8, 8, 8, 8, 8)
    model[6].weight = model[2].weight
    assert list(prune.find_masks(model, "weight", 0.5, **choice)) == ["0.weight", "4.weight"]


@pytest.mark.parametrize("other", [2, 4])  # the spared output; a layer whose own units go
def test_a_bias_that_other_layers_share_is_left_alone(other):
    model = mlp(4, 4, 4, 4)
    model[other].bias = model[0].bias
    pruned = prune.prune_model(model, "unit", 0.5)
    assert torch.equal(pruned[0].bias, model[0].bias) and pruned[other].bias is pruned[0].bias
    assert prune.achieved_sparsity(pruned) == 0.5


def test_a_layer_used_twice_has_one_mask():
    layer = nn.Linear(5, 5)
    model = nn.ModuleDict({"first": layer, "again": layer, "head": nn.Linear(5, 2)})
    assert list(prune.find_masks(model, "unit", 0.4)) == ["first.weight", "first.bias"]
    masks = prune.find_masks(model, "unit", 0.5, skip=("again",), prune_output=True)
    assert list(masks) == ["head.weight", "head.bias"]


# which layers are prunable


class Transposed(nn.Module):
    """A linear layer with its weight the other way round, as the Conv1D of transformers has it."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, inputs):
        return torch.addmm(self.bias, inputs, self.weight)


def test_a_class_of_ones_own(monkeypatch):
    model = nn.Sequential(Transposed(8, 6), nn.ReLU(), Transposed(6, 8), nn.Linear(6, 3))
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


def test_subclasses_follow_their_parents_and_may_differ(monkeypatch):
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(4, 6), nn.Linear(6, 2))
    assert list(prune.find_masks(model, "unit", 0.5)) == ["0.weight", "0.bias"]
    monkeypatch.setitem(prune.LAYERS, Own, 1)
    assert prune.find_masks(model, "unit", 0.5, skip=())["0.weight"].all(0).count_nonzero() == 2


def test_what_is_left_dense_is_said_and_can_be_named():
    layers = nn.Embedding(50, 8), nn.LSTM(8, 12), nn.Linear(12, 12), nn.Linear(12, 3)
    model = nn.ModuleDict(dict(zip(("embedding", "lstm", "mix", "head"), layers, strict=True)))
    with pytest.warns(UserWarning) as caught:
        prune.find_masks(model, "weight", 0.5)
    (message,) = (str(warning.message) for warning in caught)
    assert message.startswith("88% of the weights stay dense") and caught[0].filename == __file__
    assert "embedding.weight, lstm.weight_ih_l0, lstm.weight_hh_l0; prune them by name with only=(…)" in message
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
def test_a_list_of_weights_makes_no_difference(first):
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


def test_a_weight_that_counts_outputs_in_two_ways_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 40, 3), nn.ConvTranspose2d(4, 3, 3), nn.Linear(3, 2))
    model[2].weight = model[0].weight
    assert list(prune.find_masks(model, "unit", 0.5)) == ["1.weight", "1.bias"]


# the output layer, which is a guess


def net(**layers):
    """Layers in order of registration; what they compute doesn't matter."""
    return nn.ModuleDict(layers)


def unet():
    def block(fan_in, fan_out):
        return nn.Sequential(nn.Conv2d(fan_in, fan_out, 3), nn.BatchNorm2d(fan_out), nn.Conv2d(fan_out, fan_out, 3))

    down = {f"down{width}": block(width // 2 if width > 16 else 1, width) for width in (16, 32, 64, 128)}
    up = {f"up{width}": nn.ConvTranspose2d(2 * width, width, 2, stride=2) for width in (64, 32, 16)}
    join = {f"join{width}": block(2 * width, width) for width in (64, 32, 16)}
    return net(**down, **up, **join, out=nn.Conv2d(16, 2, 1))


def lenet(classes=10):
    convolutions = {"conv1": nn.Conv2d(1, 10, 5), "conv2": nn.Conv2d(10, 20, 5)}
    return net(**convolutions, fc1=nn.Linear(320, 50), fc2=nn.Linear(50, classes))


def wide_and_deep():
    deep = net(fc1=nn.Linear(40, 64), fc2=nn.Linear(64, 32))
    return net(deep=deep, wide=nn.Linear(100, 32), join=nn.Linear(64, 32), out=nn.Linear(32, 1))


def distilled(classes):
    body = {"patches": nn.Conv2d(3, 48, 4, 4), "qkv": nn.Linear(48, 144), "proj": nn.Linear(48, 48)}
    heads = {"head": nn.Linear(48, classes), "dist": nn.Linear(48, classes)}
    return net(**body, fc1=nn.Linear(48, 192), fc2=nn.Linear(192, 48), **heads)


def head_first(classes, flatten=1):
    return net(head=nn.Linear(64 * flatten, classes), conv1=nn.Conv2d(3, 32, 3), conv2=nn.Conv2d(32, 64, 3))


def zeroed(build):
    """A model without the time that random weights take."""
    with torch.device("meta"):
        model = build()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


def doubts(model, **choice):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prune.find_masks(model, "weight", 0.5, **choice)
    return [str(warning.message) for warning in caught]


vision = torchvision.models


KNOWN = [
    *("convnext_tiny", "densenet121", "efficientnet_b0", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small"),
    *("resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vit_b_16"),
]


@pytest.mark.parametrize("classes", [1000, 3, 2])
@pytest.mark.parametrize("name", KNOWN)
def test_known_networks_raise_no_doubt(name, classes):
    if classes == 3 and name not in ("densenet121", "resnet18", "swin_t"):
        return  # two numbers of classes do
    found = doubts(zeroed(lambda: vision.get_model(name, weights=None, num_classes=classes)))
    assert ["in_proj_weight" in doubt for doubt in found] == ([True] if name == "vit_b_16" else [])


PLAIN = {"weights": None, "init_weights": False}
BARE = {"weights": None, "weights_backbone": None}
ORDINARY = [
    lambda: mlp(100, 100, 100, 100), lambda: mlp(784, 128, 32, 128, 784), lambda: mlp(10, 10, 10, 10),
    lambda: mlp(784, 300, 100, 1), lenet, lambda: lenet(2), unet, wide_and_deep, NeuralNetwork,
    lambda: vision.googlenet(aux_logits=False, **PLAIN),
    lambda: vision.googlenet(aux_logits=False, num_classes=2, **PLAIN),
    lambda: vision.inception_v3(aux_logits=False, num_classes=3, **PLAIN),
    lambda: vision.segmentation.fcn_resnet50(**BARE), lambda: vision.segmentation.lraspp_mobilenet_v3_large(**BARE),
]  # fmt: skip


@pytest.mark.parametrize("build", ORDINARY)
def test_ordinary_networks_raise_no_doubt(build):
    assert doubts(zeroed(build)) == []


def test_groups_of_something_else_do_not_matter():
    model = net(groups=nn.ModuleList([nn.Linear(9, 9), nn.Linear(9, 9)]), head=nn.Linear(9, 2))
    model.scale = nn.Parameter(torch.ones(2, 3))
    assert list(prune.find_masks(model, "weight", 0.5)) == ["groups.0.weight", "groups.1.weight"]


def test_an_encoder_is_told_what_it_leaves_dense():
    (doubt,) = doubts(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 128), 2, enable_nested_tensor=False))
    assert doubt.startswith("25% of the weights stay dense") and "layers.1.self_attn.in_proj_weight" in doubt


HEADS = [
    (lambda: vision.googlenet(**PLAIN), "aux1.fc2, aux2.fc2"),
    (lambda: vision.googlenet(num_classes=10, **PLAIN), "aux1.fc2, aux2.fc2"),
    (lambda: vision.inception_v3(num_classes=2, **PLAIN), "AuxLogits.fc"),
    (lambda: vision.segmentation.fcn_resnet50(aux_loss=True, **BARE), "classifier.4"),
    *((lambda classes=classes: distilled(classes), "head") for classes in (1000, 10, 2)),
]


@pytest.mark.parametrize(("build", "named"), HEADS)
def test_a_second_head_is_noticed(build, named):
    model = zeroed(build)
    (doubt,) = doubts(model)
    assert f"no layer takes the outputs of {named}: if they're wanted, add them to skip" in doubt
    assert doubts(model, skip=named.split(", ")) == [] == doubts(model, prune_output=True)


@pytest.mark.parametrize("head", [{"classes": 10}, {"classes": 1000}, {"classes": 2, "flatten": 49}])
def test_a_head_that_was_registered_first_is_noticed(head):
    model = zeroed(lambda: head_first(**head))
    (doubt,) = doubts(model)
    words = "'conv2', registered last, is spared as the output layer, but no layer takes the outputs of head: "
    assert doubt.startswith(f"{words}if they're wanted, add them to skip, in its stead with prune_output=True")
    masks = prune.find_masks(model, "weight", 0.5, skip=("head",), prune_output=True)
    assert list(masks) == ["conv1.weight", "conv2.weight"]


# names and wrappers


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_wrappers_add_nothing_to_names():
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


def test_names_of_the_users_own_are_kept():
    model = nn.ModuleDict({"module": mlp(4, 3, 2)})
    assert list(prune.find_masks(model, "weight", 0.5)) == ["module.0.weight"]
    assert list(prune.find_masks(nn.Linear(3, 3), "weight", 0.5, prune_output=True)) == ["weight"]


@pytest.mark.parametrize("method", list(prune.METHODS))
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_default_device_and_type_do_not_matter(method, scope):
    model = mlp(30, 20, 10)

    def find():
        (point,) = prune.sweep(model, method, [0.5], lambda pruned: 0.0, scope=scope)
        assert point.achieved == pytest.approx(0.5, abs=0.2)
        generator = torch.Generator("cpu").manual_seed(1)
        return prune.find_masks(model, method, 0.5, scope=scope, generator=generator)

    expected = find()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            assert same(find(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


# exactness, at random


@st.composite
def models(draw):
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
def test_counts_supersets_and_an_untouched_model(model, method, scope, spare, sparsity, more, seed):
    before = state(model)

    def find(model, sparsity):
        generator = torch.Generator().manual_seed(seed)
        with warnings.catch_warnings(action="ignore"):
            masks = prune.find_masks(model, method, sparsity, scope=scope, prune_output=not spare, generator=generator)
        return {name: mask for name, mask in masks.items() if name.endswith("weight")}

    masks = find(model, sparsity)
    assert unchanged(model, before)
    layers = [layer for layer in model.modules() if isinstance(layer, tuple(prune.LAYERS))][: -1 if spare else None]
    assert [mask.shape for mask in masks.values()] == [layer.weight.shape for layer in layers]
    units = [mask.numel() for mask in masks.values()]
    if "unit" in method:
        units = [getattr(layer, "out_channels", len(layer.weight)) for layer in layers]
    gone = [zeros({"": mask}) * unit // mask.numel() for mask, unit in zip(masks.values(), units, strict=True)]
    if scope == "layer":
        assert gone == [round(sparsity * unit) for unit in units]
    else:
        assert sum(gone) == round(sparsity * sum(units))
    more = max(sparsity, more)
    further, pruned = find(model, more), copy.deepcopy(model)
    prune.apply_masks(pruned, masks)
    again = find(pruned, more)
    for name, mask in masks.items():
        assert not (further[name] & ~mask).any() and not (again[name] & ~mask).any()
        assert not pruned.get_parameter(name)[~mask].any()
        assert torch.equal(pruned.get_parameter(name)[mask], model.get_parameter(name)[mask])


# random methods


@pytest.mark.parametrize("method", ["random_weight", "random_unit"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_random_masks_follow_the_generator_or_the_seed(method, scope):
    model = mlp(30, 20, 20, 10)

    def find(seed):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return prune.find_masks(model, method, 0.5, scope=scope, generator=generator)

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
def test_nothing_of_the_process_changes(method):
    model = mlp(30, 20, 10)
    before, filters = torch.get_rng_state(), list(warnings.filters)
    prune.prune_model(model, method, 0.5)
    prune.sweep(model, method, [0.5, 0.6], lambda pruned: 0.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before) and warnings.filters == filters


@pytest.mark.parametrize("method", ["random_weight", "random_unit"])
def test_random_masks_are_the_same_in_threads(method):
    model = mlp(300, 200, 100)

    def find(seed):
        return prune.find_masks(model, method, 0.5, generator=torch.Generator().manual_seed(seed))["0.weight"]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(find, range(40)))
    assert all(torch.equal(mask, find(seed)) for seed, mask in enumerate(together))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("first", "second"), [("weight", "random_weight"), ("unit", "random_unit")])
def test_random_methods_prune_what_is_zero_first(first, second, scope):
    pruned = prune.prune_model(mlp(30, 20, 20, 10), first, 0.4)
    masks = prune.find_masks(pruned, second, 0.5, scope=scope)
    for name in ("0.weight", "2.weight"):
        assert not masks[name][pruned.get_parameter(name) == 0].any()


def test_random_masks_spread_evenly():
    kept = torch.zeros(20, 30)
    for seed in range(200):
        masks = prune.find_masks(mlp(30, 20, 10), "random_weight", 0.5, generator=torch.Generator().manual_seed(seed))
        kept += masks["0.weight"]
    assert kept.min() > 60 and kept.max() < 140


@pytest.mark.parametrize("given", [False, True])
def test_random_masks_do_not_follow_weights_of_the_same_seed(given):
    """The weights were made of the first numbers of that seed, and so would the scores be."""
    torch.manual_seed(7)
    model = nn.Linear(1000, 500, bias=False)  # uniform in ±0.032, half a million of them
    generator = torch.Generator().manual_seed(7) if given else None
    mask = prune.find_masks(model, "random_weight", 0.5, generator=generator, prune_output=True)["weight"]
    assert abs(model.weight[mask].mean()) < 2e-4  # five standard errors; by those numbers it is 0.016


# a criterion of the user's own


@pytest.fixture
def methods(monkeypatch):
    monkeypatch.setattr(prune, "METHODS", dict(prune.METHODS))
    return prune.METHODS


def test_a_criterion_of_ones_own(methods):
    methods["signed"] = lambda weight: weight  # prunes the most negative
    methods["l1_unit"] = lambda weight: weight.abs().flatten(1).sum(1)
    methods["taylor"] = lambda weight: (weight * weight.grad).abs()
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Conv1d(6, 5, 2), nn.Conv1d(5, 4, 1))
    model(torch.randn(2, 4, 9)).square().sum().backward()
    for scope in ("layer", "global"):
        signed = prune.find_masks(model, "signed", 0.5, scope=scope)["0.weight"]
        assert model[0].weight[signed].min() >= model[0].weight[~signed].max()
        taylor = prune.find_masks(model, "taylor", 0.5, scope=scope)
        for number in (0, 1):
            worth = (model[number].weight * model[number].weight.grad).abs()
            keep = taylor[f"{number}.weight"]
            assert worth[keep].min() >= worth[~keep].max()
    keep, norms = prune.find_masks(model, "l1_unit", 0.5)["1.bias"], model[1].weight.abs().flatten(1).sum(1)
    assert norms[keep].min() > norms[~keep].max()


def test_a_random_criterion_of_ones_own_gets_the_generator(methods):
    methods["random_row"] = lambda weight, generator: torch.rand(len(weight), generator=generator)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    first, again = (prune.find_masks(mlp(30, 20, 10), "random_row", 0.5, generator=each) for each in generators)
    assert same(first, again) and first["0.bias"].count_nonzero() == 10


@pytest.mark.parametrize("kept", ["stale", "other type", "sparse"])
@pytest.mark.parametrize("method", ["weight", "unit", "random_weight", "mine"])
def test_a_gradient_that_does_not_fit_stops_no_magnitudes(methods, kept, method):
    methods["mine"] = lambda weight: weight.abs()
    model, gradient = mlp(6, 5, 4), torch.ones(5, 6)
    weight = model[0].weight
    if kept == "other type":
        weight.grad, weight.data = gradient, weight.data.double()
    elif kept == "stale":
        weight.grad, weight.data = gradient, weight.data[:, :4].clone()
    else:
        weight.grad = gradient.to_sparse()
    masks, weight.grad = prune.find_masks(model, method, 0.5), None
    assert same(masks, prune.find_masks(model, method, 0.5))


def test_a_gradient_of_another_type_is_read_as_the_weights(methods):
    methods["taylor"] = lambda weight: (weight * weight.grad).abs()
    model, gradient = mlp(6, 5, 4), torch.randn(5, 6)
    weight = model[0].weight
    weight.grad, weight.data = gradient, weight.data.double()
    worth, keep = (weight * gradient).abs(), prune.find_masks(model, "taylor", 0.5)["0.weight"]
    assert worth[keep].min() > worth[~keep].max()


FAILING = [
    (lambda weight: weight[0], r"scores of 0.weight must be .* \(5, 6\) or \(5,\), .* got \(6,\)"),
    (lambda weight: weight * float("nan"), "scores of 0.weight must be .* not NaN"),
    (lambda weight: 3, "scores of 0.weight must be floating-point, .* got int"),
    (lambda weight: weight.long(), r"scores of 0.weight must be floating-point, .* got \(5, 6\) of torch.int64"),
    (lambda weight: weight * weight.grad, "method 'mine' fails for 0.weight, which has no gradient: Type"),
    (lambda weight: weight @ weight, "method 'mine' fails for 0.weight.*shapes cannot be multiplied"),
]


@pytest.mark.parametrize(("function", "message"), FAILING)
def test_a_bad_criterion(methods, function, message):
    methods["mine"] = function
    with pytest.raises(ValueError, match=message):
        prune.find_masks(mlp(6, 5, 4), "mine", 0.5)


def test_infinite_scores_protect_weights(methods):
    methods["mine"] = lambda weight: weight.masked_fill(weight > 0, torch.inf).masked_fill(weight < -0.3, -torch.inf)
    model = mlp(200, 100, 50)
    assert prune.find_masks(model, "mine", 0.4)["0.weight"][model[0].weight > 0].all()


# applying masks


def test_masks_come_from_torch_and_go_to_it():
    model = mlp(6, 5, 4)
    dense = copy.deepcopy(model)
    masks = prune.find_masks(model, "unit", 0.4)
    for name, mask in masks.items():
        layer, _, parameter = name.rpartition(".")
        peer.custom_from_mask(model.get_submodule(layer), parameter, mask)
    returned = {name.removesuffix("_mask"): mask.bool() for name, mask in model.named_buffers()}
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


def test_masks_go_to_a_file_and_pruned_models_stay_plain():
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masks_make_zeros_of_anything_in_any_precision_and_layout(dtype):
    layer, mask = nn.Linear(1, 1, bias=False, dtype=dtype), torch.rand(4, 6) < 0.5
    values = torch.randn(6, 4, dtype=dtype).t()
    values[~mask] = torch.tensor([float("nan"), float("inf"), -1.0], dtype=dtype).repeat(24)[: int((~mask).sum())]
    layer.weight = nn.Parameter(values.clone())
    prune.apply_masks(layer, {"weight": mask})
    assert torch.equal(layer.weight, values.where(mask, 0)) and layer.weight.requires_grad
    assert not layer.weight[~mask].signbit().any()


ALL = torch.ones(5, 6, dtype=torch.bool)
NO_MASKS = [
    ([("0.weight", ALL)], TypeError, "masks must be a dict .* got list"),
    ({"9.weight": ALL}, ValueError, r"no parameter '9\.weight': did you mean [02]\.weight"),
    ({"0": ALL}, ValueError, "no parameter '0'"),
    ({3: ALL}, ValueError, "no parameter 3"),
    ({"0.weight": ALL.t()}, ValueError, r"dense \(5, 6\) of torch.bool, .*, got \(6, 5\) of torch.bool"),
    ({"0.weight": ALL.float()}, ValueError, r"True = keep, got \(5, 6\) of torch.float32"),
    ({"0.weight": [[True] * 6] * 5}, ValueError, r"True = keep, got list"),
    ({"0.weight": ALL.to("meta")}, ValueError, "must be a dense"),
    ({"lazy.weight": ALL}, ValueError, r"lazy\.weight must be .*lazy"),
]


@pytest.mark.parametrize(("masks", "error", "message"), NO_MASKS)
def test_bad_masks_change_nothing(masks, error, message):
    model = mlp(6, 5, 4)
    before = state(model)
    model.add_module("lazy", nn.LazyLinear(2))
    if isinstance(masks, dict):
        masks = {"2.weight": torch.zeros(4, 5, dtype=torch.bool), **masks}
    with pytest.raises(error, match=message):
        prune.apply_masks(model, masks)
    assert unchanged(model[:3], before)


SHARING = [torch.ones(1, 1).expand(4, 5), torch.ones(5).expand(4, 5), torch.ones(8).as_strided((4, 5), (1, 1))]


@pytest.mark.parametrize("weight", SHARING)
def test_a_weight_that_shares_memory_with_itself_is_found_first(weight):
    model = mlp(6, 5, 4)
    model[2].weight = nn.Parameter(weight)
    before, masks = state(model), {"0.weight": ~ALL, "2.weight": torch.zeros(4, 5, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"2\.weight shares memory with itself"):
        prune.apply_masks(model, masks)
    with pytest.raises(ValueError, match=r"2\.weight shares memory with itself"):
        prune.prune_model(model, "weight", 0.5, prune_output=True)
    assert unchanged(model, before)
    assert prune.weight_mask(weight, 0.5).count_nonzero() == 10


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "Nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, weight_decay=1e-2),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-2),
}


@pytest.mark.parametrize("method", ["weight", "unit"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masks_hold_through_training(optimizer, method):
    model = mlp(8, 16, 16, 4)
    inputs, targets = torch.randn(64, 8), torch.randint(4, (64,))
    step = OPTIMIZERS[optimizer](model.parameters())
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


NOTHING = "names nothing that could be pruned; '4',"
CHOICES = [
    ({"model": "mlp"}, TypeError, "model must be a torch.nn.Module, got str"),
    ({"model": NeuralNetwork}, TypeError, "model must be a torch.nn.Module, got type"),
    ({"model": nn.ReLU()}, ValueError, "no layer is in LAYERS, .*; only=.* could name nothing$"),
    ({"model": nn.Embedding(3, 3)}, ValueError, r"no layer is in LAYERS, .*; only=\(…\) could name weight$"),
    ({"model": nn.Sequential(nn.Linear(3, 3))}, ValueError, "every one is spared; '0', .*prune_output=True"),
    ({"skip": ("0", "2")}, ValueError, "every one is spared; '4', registered last"),
    ({"skip": ("*",), "prune_output": True}, ValueError, "every one is spared; only=.* could name nothing$"),
    ({"skip": ("fc9",)}, ValueError, r"skip: 'fc9' names nothing .*: did you mean 4, 2, 0\?$"),
    ({"skip": ("1",)}, ValueError, r"skip: '1' names nothing"),
    ({"skip": ("0.*",)}, ValueError, r"skip: '0\.\*' names nothing .*: did you mean 0, 4, 2\?$"),
    ({"skip": "4"}, TypeError, r"such as \('4',\), got '4'"),
    ({"skip": 4}, TypeError, "skip must be a sequence of names"),
    ({"skip": None}, TypeError, "skip must be a sequence of names"),
    ({"only": "0.weight"}, TypeError, "only must be a sequence of names"),
    ({"only": ("0.wieght",)}, ValueError, r"only: '0\.wieght' names nothing .*: did you mean 0\.weight"),
    ({"only": ("0.bias",)}, ValueError, rf"only: '0\.bias' {NOTHING} .*: did you mean 0\.weight"),
    ({"only": ()}, ValueError, "every one is spared"),
    ({"only": ("0.weight", "4.weight")}, ValueError, rf"only: '4\.weight' {NOTHING} .*last"),
    ({"only": ("0.weight",), "skip": ("0",)}, ValueError, rf"only: '0\.weight' {NOTHING}"),
]
OTHERS = [
    ({"method": "l1"}, ValueError, "unknown method 'l1': expected one of weight, unit, random_weight, random_unit"),
    ({"sparsity": 50}, ValueError, r"did you mean 0\.5\?"),
    ({"scope": "model"}, ValueError, "unknown scope 'model': expected one of layer, global"),
    ({"generator": 0}, TypeError, "generator must be a torch.Generator, got 0"),
]


def never(*_):
    raise AssertionError("scored too early")


@pytest.mark.parametrize("function", ["find_masks", "prune_model", "sweep", "achieved_sparsity"])
@pytest.mark.parametrize(("change", "error", "message"), [*CHOICES, *OTHERS])
def test_bad_arguments(function, change, error, message):
    arguments = {"model": mlp(6, 5, 4, 3), "method": "weight", "sparsity": 0.5} | change
    before = state(arguments["model"]) if isinstance(arguments["model"], nn.Module) else None
    if function == "achieved_sparsity":
        arguments = {name: value for name, value in arguments.items() if name not in ("method", "sparsity")}
        if {*change} & {"method", "sparsity", "scope", "generator"}:
            return  # it takes none of these
    elif function == "sweep":
        arguments |= {"sparsities": [arguments.pop("sparsity")], "score": never}
    with pytest.raises(error, match=message):
        getattr(prune, function)(**arguments)
    assert before is None or unchanged(arguments["model"], before)


NO_SWEEPS = [
    ({"sparsities": 0.5}, TypeError, "not iterable"),
    ({"sparsities": "0.5"}, TypeError, "sparsity must be a number in .0, 1., got '0'"),
    ({"sparsities": [0.5, 80]}, ValueError, r"did you mean 0\.8"),
    ({"score": 1.0}, TypeError, "score and retrain must be functions, got 1.0 and None"),
    ({"retrain": 1.0}, TypeError, "must be functions"),
]


@pytest.mark.parametrize(("change", "error", "message"), NO_SWEEPS)
def test_bad_sweeps_score_nothing(change, error, message):
    arguments = {"model": mlp(6, 5, 4), "method": "weight", "sparsities": [0.5], "score": never} | change
    with pytest.raises(error, match=message):
        prune.sweep(**arguments)


def broken(weight):
    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


UNRANKED = [
    (nn.LazyLinear(3), r"0\.weight must be .*lazy"),
    (nn.LazyConv2d(3, 3), r"0\.weight must be .*lazy"),
    (nn.Linear(3, 3, device="meta"), r"0\.weight must be .* with values .*, meta"),
    (nn.Linear(3, 3, dtype=torch.complex64), r"0\.weight must .* got .* torch.complex64"),
    (broken(torch.ones(2, 3, dtype=torch.int8)), r"0\.weight must .* got .* torch.int8"),
    (broken(torch.ones(2, 3).to_sparse()), r"0\.weight must be a dense"),
    (broken(torch.ones(2, 3).to(torch.float8_e4m3fn)), r"0\.weight must .* got .* torch.float8_e4m3fn"),
    (broken(torch.ones(1, 3).expand(2, 3)), r"0\.weight shares memory with itself"),
    (broken(torch.tensor([[1.0, float("nan"), 0.0]] * 2)), r"0\.weight must be finite"),
    (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), r"0\.weight is computed"),
    (nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), r"0\.weight is computed"),
]


@pytest.mark.parametrize(("layer", "message"), UNRANKED)
@pytest.mark.parametrize("method", ["weight", "unit"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_weights_that_cannot_be_ranked(layer, message, method, scope):
    model = nn.Sequential(layer, nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=message):
        prune.find_masks(model, method, 0.5, scope=scope)
    assert "1.weight" in prune.find_masks(model, method, 0.5, scope=scope, skip=("0",))  # need not be prunable


@pytest.mark.parametrize("method", list(prune.METHODS))
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_weight_that_is_not_finite_is_named(method, scope):
    model = mlp(100, 90, 80, 10)
    with torch.no_grad():
        model[2].weight[3, 3] = float("inf")
    with pytest.raises(ValueError, match=r"^2\.weight must be finite"):
        prune.find_masks(model, method, 0.5, scope=scope)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_layers_have_empty_masks():
    model = mlp(4, 3, 0, 2)
    for scope in ("layer", "global"):
        for method in prune.METHODS:
            masks = prune.find_masks(model, method, 0.5, scope=scope, prune_output=True)
            assert masks["2.weight"].shape == (0, 3) and masks["4.weight"].shape == (2, 0)
    assert prune.achieved_sparsity(mlp(4, 0, 0)) == 0.0


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("method", list(prune.METHODS))
def test_a_layer_that_loses_everything_is_named_and_zero_prunes_nothing(scope, method):
    with pytest.warns(UserWarning, match=r"leaves nothing of 0\.weight, 2\.weight at sparsity 1$"):
        masks = prune.find_masks(mlp(6, 5, 4, 3), method, 1.0, scope=scope)
    assert not any(mask.any() for mask in masks.values())
    model = mlp(6, 5, 4)
    assert unchanged(prune.prune_model(model, method, 0, scope=scope), state(model))


def test_a_layer_that_loses_everything_below_one_is_named():
    model = mlp(6, 5, 4, 3)
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    with pytest.warns(UserWarning, match=r"leaves nothing of 0\.weight at sparsity 0\.7$"):
        prune.find_masks(model, "weight", 0.7, scope="global")
    with pytest.warns(UserWarning, match=r"leaves nothing of 2\.weight at sparsity 0\.9$"):
        prune.find_masks(mlp(100, 50, 1, 3), "unit", 0.9)


# sweeps


@pytest.mark.parametrize("method", list(prune.METHODS))
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_sweep_prunes_the_same_dense_model_each_time(method, scope):
    model = mlp(12, 10, 8, 4)
    before, seen = state(model), []

    def score(pruned):
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


def test_a_sweep_follows_its_generator():
    model = mlp(12, 10, 8, 4)

    def run(generator):
        sparsities, kept = [0.3, 0.9, 0.6], lambda pruned: pruned[0].weight != 0
        return [point.score for point in prune.sweep(model, "random_weight", sparsities, kept, generator=generator)]

    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    first, last, middle = run(generator)
    assert not (last & ~middle).any() and not (middle & ~first).any()
    assert torch.equal(generator.get_state(), before) and torch.equal(run(generator)[0], first)
    assert not torch.equal(run(torch.Generator().manual_seed(2))[0], first)


def test_a_sweep_retrains_copies_and_scores_them_again():
    model = mlp(6, 5, 4)

    def retrain(pruned, masks):
        with torch.no_grad():
            pruned[0].weight.add_(1)
        prune.apply_masks(pruned, masks)

    points = prune.sweep(model, "weight", [0, 0.5], lambda pruned: pruned[0].weight.mean().item(), retrain=retrain)
    assert points[0].retrained_score == pytest.approx(points[0].score + 1)
    assert points[1].retrained_score == pytest.approx(points[1].score + 0.5)
    assert prune.sweep(model, "weight", iter([]), never) == []


class Modes(nn.Module):
    """A frozen BatchNorm in a model that is in training mode."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2)
        self.norm.eval()

    def forward(self, inputs):
        return self.head(self.drop(self.norm(self.first(inputs))))


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_copies_are_scored_in_eval_mode_and_retrained_in_training_mode(evaluating, wrapped):
    own = Modes()
    model = torch.compile(own) if wrapped else own
    if evaluating:
        model.eval()
    before, seen = modes(own), []

    def retrain(pruned, masks):
        seen.append(modes(pruned)[-5:])
        assert set(masks) == {"first.weight"}

    def score(pruned):
        seen.append(modes(pruned)[-5:])
        pruned.train()  # what happens to a copy stays there
        return {"right": 3}

    (point,) = prune.sweep(model, "weight", [0.5], score, retrain=retrain)
    training = [True] * 5 if evaluating else [True, True, False, True, True]
    assert seen == [[False] * 5, training, [False] * 5] and modes(own) == before
    assert point.score == {"right": 3} == point.retrained_score


# recalibration


def batches(count=4):
    return [(torch.randn(16, 4), torch.zeros(16)) for _ in range(count)]


@pytest.mark.parametrize("only_inputs", [False, True])
def test_recalibration_takes_the_statistics_of_all_batches(only_inputs):
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


def test_recalibration_is_all_or_nothing():
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
