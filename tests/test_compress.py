import copy
import gzip
import io
import os
import pickle
import tracemalloc
import warnings
import zipfile
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import convnext, densenet, swin_transformer, vision_transformer

import compress
from compress import SparseLinear, latency, load_compressed, save_compressed, shrink, stored_bytes, to_sparse
from model import NeuralNetwork

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = [kind() if kind is not nn.Threshold else kind(0.1, 0.5) for kind in compress.ELEMENTWISE]


def linears(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def widths(model):
    return [linears(model)[0].in_features, *(layer.out_features for layer in linears(model))]


def zero_smallest(model, sparsity, method="weight"):
    """A copy whose smallest weights or units are zero in every layer but the last; far from any code that is tested."""
    model = copy.deepcopy(model)
    for layer in linears(model)[:-1]:
        weight = layer.weight.detach()
        rows = weight.view(-1, 1) if method == "weight" else weight  # or units
        rows[rows.norm(dim=1).argsort()[: round(sparsity * len(rows))]] = 0
    return model


def zero_at_random(model, sparsity=0.9):
    """Zero random weights of every Linear, in place."""
    with torch.no_grad():
        for layer in linears(model):
            layer.weight.masked_fill_(torch.rand_like(layer.weight) < sparsity, 0)
    return model


@st.composite
def chains(draw, activations=ACTIVATIONS, whole_numbers=False, norms=True):
    """An fp64 nn.Sequential of random widths with random zeros, biases or not, and some layers dead."""
    sizes = draw(st.lists(st.integers(1, 50), min_size=2, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def values(*shape):
        if whole_numbers:
            return torch.randint(-2, 3, shape, generator=generator).double()
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    modules = []
    for fan_in, fan_out in pairwise(sizes):
        layer = nn.Linear(fan_in, fan_out, bias=draw(st.booleans()), dtype=torch.float64)
        with torch.no_grad():
            density = draw(st.sampled_from([0, 0.02, 0.1, 0.5, 1]))
            layer.weight.copy_(values(fan_out, fan_in) * (torch.rand(fan_out, fan_in, generator=generator) < density))
            for dim, size in enumerate((fan_out, fan_in)):
                alive = torch.rand(size, generator=generator) < draw(st.sampled_from([0.3, 1]))
                layer.weight *= alive.unsqueeze(1 - dim)
            if layer.bias is not None:
                layer.bias.copy_(values(fan_out) * draw(st.sampled_from([0, 1])))
        modules += [layer, copy.deepcopy(draw(st.sampled_from(activations)))]
        if norms and draw(st.booleans()):
            norm = nn.BatchNorm1d(fan_out, affine=draw(st.booleans()), dtype=torch.float64)
            for tensor in norm.state_dict().values():
                tensor.copy_(values(fan_out).abs() + 0.1 if tensor.dim() else 7)
            modules.append(norm)
        if draw(st.booleans()):
            modules.append(draw(st.sampled_from([nn.Dropout(0.5), nn.Flatten(), nn.Identity()])))
    return nn.Sequential(*modules).eval()


def assert_same_logits(model, other, size=5):
    batch = torch.randn(size, widths(model)[0], dtype=linears(model)[0].weight.dtype)
    before = batch.clone()
    with torch.no_grad():
        torch.testing.assert_close(other(batch), model(batch))
    assert torch.equal(batch, before)


def states_equal(state, other):
    return state.keys() == other.keys() and all(bits(tensor) == bits(other[name]) for name, tensor in state.items())


def bits(tensor):
    return tensor.dtype, tensor.shape, bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist())


# shrink


def kept_units(model):
    """How many units of every hidden layer matter, one at a time until nothing changes: slow, hard to get wrong."""
    layers = linears(model)
    modules = list(model)
    weights = [layer.weight.detach().clone() for layer in layers]
    biases = [None if layer.bias is None else layer.bias.detach().clone() for layer in layers]
    alive = [set(range(len(weight))) for weight in weights[:-1]]

    def sends(place, unit):
        value = torch.zeros(1, dtype=torch.float64) if biases[place] is None else biases[place][unit : unit + 1].clone()
        for module in modules[modules.index(layers[place]) + 1 : modules.index(layers[place + 1])]:
            value = module(value) if not isinstance(module, nn.Flatten) else value
        return value.item()

    def removable(place, unit):
        readers = alive[place + 1] if place + 1 < len(alive) else range(len(weights[-1]))
        if not any(weights[place + 1][reader, unit] for reader in readers):
            return True
        sources = alive[place - 1] if place else range(weights[0].shape[1])
        if any(weights[place][unit, source] for source in sources):
            return False
        if biases[place + 1] is None:
            return sends(place, unit) == 0
        biases[place + 1] += weights[place + 1][:, unit] * sends(place, unit)
        return True

    changed = True
    while changed:
        changed = False
        for place, units in enumerate(alive):
            for unit in sorted(units):
                if removable(place, unit):
                    units.remove(unit)
                    changed = True
    return [len(units) for units in alive]


@settings(deadline=None)
@given(model=chains())
def test_a_shrunk_chain_has_the_same_logits_and_cannot_shrink_again(model):
    once = shrink(model)
    assert_same_logits(model, once)
    assert states_equal(once.state_dict(), shrink(once).state_dict())


@settings(deadline=None)
@given(model=chains(activations=[nn.ReLU(), nn.LeakyReLU(0.5), nn.ReLU(inplace=True)], whole_numbers=True, norms=False))
def test_exactly_the_units_that_cannot_matter_go(model):
    assert widths(shrink(model))[1:-1] == [max(1, kept) for kept in kept_units(model)]


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(1, 50), min_size=2, max_size=6), sparsity=st.sampled_from([0, 0.3, 0.9, 1]))
@pytest.mark.parametrize("method", ["weight", "unit"])
def test_a_shrunk_network_is_a_network_with_the_same_logits(method, sizes, sparsity):
    model = zero_smallest(NeuralNetwork(sizes).double(), sparsity, method)
    before = copy.deepcopy(model.state_dict())
    smaller = shrink(model)
    assert type(smaller) is NeuralNetwork
    assert (smaller.sizes[0], smaller.sizes[-1]) == (sizes[0], sizes[-1])
    if method == "unit":
        most = [max(1, size - round(sparsity * size)) for size in sizes[1:-1]]
        assert all(kept <= limit for kept, limit in zip(smaller.sizes[1:-1], most, strict=True))
    assert_same_logits(model, smaller)
    assert states_equal(before, model.state_dict())


def test_nothing_dead_gives_an_equal_copy_and_a_network_without_any_weight_keeps_one_unit_a_layer():
    model = NeuralNetwork((20, 30, 30, 10))
    copied = shrink(model)
    assert states_equal(copied.state_dict(), model.state_dict())
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(copied.parameters(), model.parameters(), strict=True))
    nn.init.zeros_(model.fc2.weight)
    smaller = shrink(model)
    assert smaller.sizes == (20, 1, 1, 10) and not smaller(torch.randn(4, 20)).any()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("sizes", [(0, 4, 2), (3, 0, 2), (3, 4, 0, 2), (3, 4, 0)])
@pytest.mark.parametrize("function", [shrink, to_sparse])
def test_layers_of_no_width(function, sizes):
    layers = [module for sizes in pairwise(sizes) for module in (nn.Linear(*sizes), nn.ReLU())]
    assert_same_logits(nn.Sequential(*layers), function(nn.Sequential(*layers)))


def test_a_constant_moves_into_the_next_bias_or_stays_without_one():
    def model(bias):
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2, bias=bias)).double().eval()
        with torch.no_grad():
            model[0].weight[1:3] = 0
            model[0].bias[2] = 0
        return model

    for bias, kept in ((True, 2), (False, 3)):
        before = model(bias)
        assert widths(shrink(before)) == [3, kept, 2] and widths(before) == [3, 4, 2]
        assert_same_logits(before, shrink(before))


def test_constants_are_exact_under_autocast():
    model = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 5), nn.LogSoftmax(1))
    nn.init.zeros_(model[0].weight[5:])
    outside = shrink(model)
    with torch.autocast("cpu", torch.bfloat16):
        inside = shrink(model)
    assert widths(inside) == [20, 5, 5] and states_equal(inside.state_dict(), outside.state_dict())
    assert_same_logits(model, inside)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtype_mode_and_requires_grad_stay_and_gradients_do_not(dtype):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)).to(dtype)
    nn.init.zeros_(model[0].weight[:5])
    model[3].weight.requires_grad_(False)
    model[2].eval()
    model(torch.randn(4, 6, dtype=dtype)).sum().backward()
    smaller = shrink(model)
    assert widths(smaller) == [6, 3, 3]
    assert [parameter.dtype for parameter in smaller.parameters()] == [dtype] * 4
    assert [parameter.requires_grad for parameter in smaller.parameters()] == [True, True, False, True]
    assert all(parameter.grad is None for parameter in smaller.parameters())
    assert all(parameter.grad is not None for parameter in model[0].parameters())
    assert [module.training for module in smaller] == [True, True, False, True]
    assert_same_logits(model.eval(), smaller.eval())


class Perceptron(nn.Sequential):
    """A subclass that only fills itself."""

    def __init__(self):
        body = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.BatchNorm1d(8), nn.ReLU()), nn.Sequential())
        super().__init__(nn.Flatten(), body, nn.Linear(8, 7), nn.Sigmoid(), nn.Linear(7, 4))


class OwnForward(nn.Module):
    """A class of one's own that tells its chain."""

    def __init__(self):
        super().__init__()
        self.last, self.first = nn.Linear(8, 4), nn.Linear(6, 8)  # not in running order

    def chain(self):
        return [nn.Flatten(), self.first, nn.GELU(), self.last, nn.Softmax(-1)]

    def forward(self, batch):
        return self.last(nn.functional.gelu(self.first(batch.flatten(1)))).softmax(-1)


class Residual(nn.Sequential):
    """A subclass that is no chain."""

    def forward(self, batch):
        return batch + super().forward(batch)


TAILS = [
    nn.LogSoftmax(1), nn.LayerNorm(4), nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3)),
    Residual(nn.Linear(4, 4)),
]  # fmt: skip


@pytest.mark.parametrize("model", [Perceptron(), OwnForward(), *(nn.Sequential(OwnForward(), tail) for tail in TAILS)])
def test_chains_of_many_kinds_shrink_and_become_sparse(model):
    before = str(model)
    for layer in linears(model):
        if layer.out_features > 4:  # the last and a tail's stay
            nn.init.zeros_(layer.weight[1:])
    smaller, sparse, batch = shrink(model.eval()), to_sparse(model), torch.randn(5, 2, 3)
    assert str(model) == before and type(smaller) is type(sparse) is type(model)
    assert sum(map(torch.numel, smaller.parameters())) < sum(map(torch.numel, model.parameters()))
    assert any(isinstance(layer, SparseLinear) for layer in sparse.modules())
    with torch.no_grad():
        torch.testing.assert_close(smaller(batch), model(batch))
        torch.testing.assert_close(sparse(batch), model(batch))


def computed(layer, parameter):
    return nn.Sequential(torch.nn.utils.prune.l1_unstructured(layer, parameter, 0.5))


def hooked(layer):
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return nn.Sequential(layer)


SHARED, NORM = nn.Linear(4, 4), nn.BatchNorm1d(4)
REFUSED = [
    (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), "1 is a LayerNorm, .* Torch-Pruning"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(4, 2)), "0 is a Conv2d, .* Torch-Pruning"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), "0 is a Conv2d, .* Torch-Pruning"),
    (nn.Sequential(nn.Linear(4, 4), Residual(SHARED), nn.Linear(4, 2)), "1 is a Residual, .* Torch-Pruning"),
    (nn.TransformerEncoderLayer(4, 2, 4), "this is a TransformerEncoderLayer, .* Torch-Pruning"),
    (torchvision.models.resnet18(), "this is a ResNet, .* Torch-Pruning"),
    (nn.Sequential(hooked(nn.ReLU())[0], nn.Linear(3, 4), hooked(nn.ReLU()), nn.Linear(4, 2)), "2.0 is a ReLU"),
    (nn.Sequential(nn.Linear(3, 4), hooked(nn.Sequential(nn.ReLU()))[0], nn.Linear(4, 2)), "1 is a Sequential"),
    (nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(12, 2)), "takes another number of values"),
    (nn.Sequential(SHARED, nn.ReLU(), SHARED), "share parameters"),
    (nn.Sequential(nn.Linear(4, 4), NORM, nn.Linear(4, 4), NORM, nn.Linear(4, 4)), "share parameters"),
    (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))), "0 is a ParametrizedLinear.*permanent"),
    (computed(NeuralNetwork((3, 4, 2)).fc1, "weight"), r"0 is a Linear, .* permanent"),
    (computed(nn.Linear(3, 4), "bias"), r"0 is a Linear, .* permanent"),
    (hooked(nn.Linear(3, 4)), r"0 is a Linear, .* permanent"),
]


@pytest.mark.parametrize(("model", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_cut_is_named_in_one_line(model, message):
    with pytest.raises(ValueError, match=message) as caught:
        shrink(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_hidden(value):
    model = NeuralNetwork((5, 4, 3))
    with torch.no_grad():
        model.fc1.weight[0] = 0
        model.fc2.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"fc2\.weight has NaN or infinite"):
        shrink(model)


# to_sparse


@settings(deadline=None)
@given(model=chains(), batch_size=st.sampled_from([0, 1, 2, 15, 16, 130, 300]))
def test_sparse_layers_give_the_same_logits(model, batch_size):
    assert_same_logits(model, to_sparse(model), batch_size)


@pytest.mark.parametrize("mkl", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sparsity", [0.6, 0.7, 0.95, 1])
def test_sparse_networks_of_every_dtype(monkeypatch, mkl, dtype, sparsity):
    if not mkl:
        monkeypatch.setattr(compress, "FEW", 0)
    model = zero_smallest(NeuralNetwork((30, 50, 40, 10)).to(dtype), sparsity)
    sparse = to_sparse(model)
    assert type(sparse) is NeuralNetwork and sparse.sizes == model.sizes
    assert [isinstance(layer, SparseLinear) for layer in sparse.children()] == [sparsity > 2 / 3] * 2 + [False]
    for batch_size in (1, 7, 64, 65, 600):
        images = torch.randn(batch_size, 5, 6, dtype=dtype)
        with torch.no_grad():
            logits, expected = sparse(images), model(images)
        assert logits.dtype == dtype and logits.shape == (batch_size, 10)
        torch.testing.assert_close(logits.double(), expected.double(), rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (0, 6), (7, 5, 6), (2, 0, 6), (2, 3, 4, 6), (300, 2, 6)])
def test_any_number_of_leading_dimensions(shape, bias):
    model = zero_at_random(nn.Sequential(nn.Linear(6, 8, bias), nn.ReLU(), nn.Linear(8, 3, bias))).double()
    batch = torch.randn(*shape, dtype=torch.float64)
    for turned in (batch, batch.transpose(0, -1).contiguous().transpose(0, -1)):
        torch.testing.assert_close(to_sparse(model)(turned), model(batch).detach())
        torch.testing.assert_close(to_sparse(model[0])(turned), model[0](batch).detach())


def test_sparse_networks_are_for_inference_and_stand_alone():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
    nn.init.zeros_(model[0].weight[2:])
    sparse = to_sparse(model)
    assert not any(module.training for module in sparse.modules())
    assert all(module.training for module in model.modules())
    assert not any(tensor.requires_grad for tensor in [*sparse.parameters(), sparse(torch.ones(6))])
    batch = torch.randn(2, 6)
    logits = sparse(batch)
    for copied in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)), to_sparse(sparse)):
        assert torch.equal(copied(batch), logits)
    nn.init.zeros_(model[3].weight)
    nn.init.zeros_(model[0].weight)
    assert torch.equal(sparse(batch), logits) and logits.any()
    for shape in ((2, 12), (2, 5), (3,)):
        with pytest.raises(RuntimeError):  # of the same type as the dense one's
            sparse(torch.randn(shape))


@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_a_chain_pass_blocks_on_and_their_input_stays_what_it_is(monkeypatch, bias):
    shapes, gelu = [], nn.GELU.forward
    stack = [nn.Linear(60, 50, bias), nn.GELU(), nn.Linear(50, 40, bias), nn.GELU(), nn.Linear(40, 5, bias)]
    monkeypatch.setattr(nn.GELU, "forward", lambda self, input: (shapes.append(input.shape), gelu(self, input))[1])
    to_sparse(zero_at_random(nn.Sequential(*stack)))(torch.randn(256, 60))
    assert shapes == [(4 * 50, 64), (4 * 40, 64)]
    for size in (1, 64, 70):  # the first layer must not write into what it is given
        model = zero_at_random(nn.Sequential(nn.ReLU(), nn.Linear(60, 50, bias), nn.ReLU(), nn.Linear(50, 40, bias)))
        assert_same_logits(model, to_sparse(model), size)


def test_hooks_of_nested_chains_run():
    inner = zero_at_random(nn.Sequential(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 40)))
    model, batch = zero_at_random(nn.Sequential(inner, nn.ReLU(), nn.Linear(40, 10))), torch.randn(70, 60)
    inner.register_forward_hook(lambda module, args, output: 2 * output)
    with torch.no_grad():
        torch.testing.assert_close(to_sparse(model)(batch), model(batch))


def test_hooks_on_layers_of_a_chain_see_what_they_would_see_in_the_dense_one():
    model, batch = zero_at_random(NeuralNetwork((60, 50, 40, 10))), torch.randn(70, 60)
    stack = nn.Sequential(*model.chain())
    seen = []
    for network in (to_sparse(stack), stack):
        for module in network:
            module.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
        network(batch)
    for sparse, dense in zip(seen[:6], seen[6:], strict=True):
        torch.testing.assert_close(sparse, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 40])
def test_sparse_networks_under_autocast(size, dtype):
    model = zero_at_random(nn.Sequential(nn.Linear(60, 50), nn.GELU(), nn.Linear(50, 40), nn.LayerNorm(40))).to(dtype)
    batch = torch.randn(size, 60, dtype=dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, expected = to_sparse(model)(batch), model(batch)
        assert to_sparse(model)[0](batch).dtype == model[0](batch).dtype
    error = 0.03 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(logits, expected.to(logits.dtype), rtol=0, atol=error)


class Tied(nn.Module):
    """A language model that decodes by its embedding, runs one layer twice, indexes a chain and reads a weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.decoder = nn.Embedding(20, 12), nn.Linear(12, 12), nn.Linear(12, 20)
        self.again, self.parts = self.body, nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        features = self.again(self.body(self.embedding(tokens)).relu())
        features = self.parts[2](self.parts[0](features).tanh())
        return self.decoder(nn.functional.linear(features, self.body.weight, self.body.bias))


def test_shared_and_tied_layers_and_layers_that_are_read():
    model, tokens = zero_at_random(Tied()), torch.arange(15).view(5, 3)
    sparse = to_sparse(model)
    assert sparse.body is sparse.again and isinstance(sparse.decoder, SparseLinear)
    for name in ("body", "embedding"):
        assert torch.equal(getattr(sparse, name).weight, getattr(model, name).weight)
    torch.testing.assert_close(sparse(tokens), model(tokens).detach())


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformers_become_sparse(monkeypatch, batch_first):
    used, kernel = [], torch.embedding_bag
    monkeypatch.setattr(
        torch, "embedding_bag", lambda *args, **options: (used.append(args), kernel(*args, **options))[1]
    )
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first)
    model = zero_at_random(nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)).eval()
    sparse, batch = to_sparse(model), torch.randn(6, 6, 32)
    assert sum(isinstance(layer, SparseLinear) for layer in sparse.modules()) == 4
    padding = torch.arange(6).expand(6, 6) > 3
    with torch.no_grad():
        torch.testing.assert_close(sparse(batch), model(batch))
        assert len(used) == 4  # which torch's fused encoder would go around
        with warnings.catch_warnings(action="ignore"):  # nested tensors are a prototype, says torch
            expected = model(batch, src_key_padding_mask=padding)
        masked = sparse(batch, src_key_padding_mask=padding)
    filled = ~padding if batch_first else ~padding.t()
    torch.testing.assert_close(masked[filled], expected[filled])


def test_what_cannot_be_replaced_stays_dense():
    class Doubled(nn.Linear):
        def forward(self, batch):
            return 2 * super().forward(batch)

    hooking = hooked(nn.Linear(6, 6))[0]
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    attention = nn.TransformerDecoderLayer(6, 2, 6)
    model = nn.ModuleList([Doubled(6, 6), hooking, normed, attention.self_attn, nn.Linear(6, 6, dtype=torch.complex64)])
    with torch.no_grad():
        for layer in (model[0], hooking, attention.self_attn.out_proj, model[4]):
            layer.weight[1:] = 0
    assert not any(isinstance(layer, SparseLinear) for layer in to_sparse(model).modules())
    pruned = torch.nn.utils.prune.l1_unstructured(nn.Linear(6, 6), "weight", 0.9)
    with pytest.raises(ValueError, match="permanent"):
        to_sparse(nn.Sequential(pruned))


def models():
    """Ten small models of torchvision and plain PyTorch."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.PReLU(), nn.Linear(8, 3))
    vit = vision_transformer.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5)
    swin = swin_transformer.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=5)
    dense = densenet.DenseNet(4, (2, 2), 8, num_classes=5)
    convnet = convnext.ConvNeXt([convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)], num_classes=5)
    mobile = torchvision.models.MobileNetV2(num_classes=5, inverted_residual_setting=[[1, 8, 1, 1], [6, 8, 2, 2]])
    mnas = torchvision.models.MNASNet(0.1, num_classes=5)  # it refuses a state_dict without its version
    transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    return [mlp, vit, swin, dense, convnet, mobile, mnas, transformer, nn.LSTM(4, 5, 2), Tied()]


# save_compressed, load_compressed, stored_bytes


@pytest.mark.parametrize("model", models(), ids=lambda model: type(model).__name__)
def test_models_of_every_kind_and_dtype_come_back(tmp_path, model):
    zero_at_random(model)
    for dtype in FLOATS:
        model.to(dtype)
        save_compressed(model, tmp_path / "model.bin", {"dtype": str(dtype)})
        state, info = load_compressed(tmp_path / "model.bin")
        assert info == {"dtype": str(dtype)} and states_equal(state, model.state_dict())
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        copied.load_state_dict(state)
        assert states_equal(copied.state_dict(), model.state_dict())


@pytest.mark.parametrize("model", models()[1:4], ids=lambda model: type(model).__name__)
def test_vision_models_become_sparse(model):
    assert any(isinstance(layer, SparseLinear) for layer in to_sparse(zero_at_random(model)).modules())
    batch = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(to_sparse(model)(batch), model.eval()(batch))


@settings(deadline=None)
@given(
    dtype=st.sampled_from([*FLOATS, torch.int8, torch.int64, torch.complex64, torch.float8_e4m3fn, torch.uint16]),
    shape=st.lists(st.integers(0, 20), max_size=2),
    density=st.sampled_from([0, 0.001, 0.03, 0.2, 1]),
    seed=st.integers(0, 2**32),
)
def test_every_bit_of_a_tensor_comes_back(tmp_path_factory, dtype, shape, density, seed):
    generator, path = torch.Generator().manual_seed(seed), tmp_path_factory.getbasetemp() / "tensor.bin"
    tensor = torch.zeros([*shape, 3, 2], dtype=dtype)
    raw = tensor.view(torch.uint8)  # any pattern: -0.0, denormal numbers, infinities, NaN with payload
    drawn = torch.randint(0, 256, raw.shape, generator=generator)
    raw.copy_(drawn * (torch.rand(raw.shape, generator=generator) < density))
    save_compressed({"tensor": tensor, "turned": tensor.mT}, path)
    state, info = load_compressed(path)
    assert info == {} and states_equal(state, {"tensor": tensor, "turned": tensor.mT})


def test_files_are_the_same_at_every_time_and_leave_random_numbers_alone(tmp_path):
    model = zero_smallest(NeuralNetwork((784, 100, 50, 10)), 0.9)
    info = {"accuracy": 0.98, "k": 90, "sizes": [784, 100], "range": (0, None), "scope": "layer", "nan": True}
    save_compressed(model.state_dict(), tmp_path / "a.bin", info)
    state = torch.get_rng_state()
    save_compressed(model, str(tmp_path / "ein Modell für 90 %.bin"), info)
    _, loaded_info = load_compressed(str(tmp_path / "a.bin"))
    assert loaded_info == info and torch.equal(torch.get_rng_state(), state)
    data = (tmp_path / "a.bin").read_bytes()
    assert data == (tmp_path / "ein Modell für 90 %.bin").read_bytes() and data[4:8] == bytes(4)  # no time of day
    save_compressed(model, tmp_path / "b.bin")
    assert (tmp_path / "b.bin").stat().st_size == stored_bytes(model) == stored_bytes(model.state_dict())


def test_tensors_are_stored_once_and_without_what_else_is_in_their_memory():
    values = torch.randn(300, 200)  # more than gzip looks back
    alone = stored_bytes({"a": values})
    assert stored_bytes({"a": values, "b": values}) < alone + 500  # as tied weights are
    assert stored_bytes({"a": torch.cat([values, torch.randn(300, 200)])[:300]}) == alone


@pytest.mark.parametrize(
    ("method", "sparsity", "bound"),
    [("weight", 0.9, 0.135), ("weight", 0.99, 0.017), ("unit", 0.5, 0.325), ("unit", 0.9, 0.04)],
)
def test_files_are_as_small_as_promised(method, sparsity, bound):
    model, dense = NeuralNetwork(), io.BytesIO()  # a trained one's are smaller: its zeros are less evenly spread
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.03)
    torch.save(model.state_dict(), dense)
    assert stored_bytes(shrink(zero_smallest(model, sparsity, method))) <= bound * dense.tell()


class Intruder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Length:
    def __reduce__(self):
        return bytearray, (10**9,)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.bin"
    save_compressed(zero_smallest(NeuralNetwork((20, 30, 10)), 0.9), path)
    return path


def assert_refused(path, match="is damaged, not from save_compressed, or asks for over"):
    with pytest.raises(ValueError, match=match) as caught:
        load_compressed(path)
    message = str(caught.value)
    assert message.startswith(repr(str(path))) and message.isprintable() and "weights_only" not in message
    assert caught.value.__cause__ is None and (caught.value.__context__ is None or caught.value.__suppress_context__)


def test_a_file_cut_short_damaged_or_longer_is_refused(saved):
    data = saved.read_bytes()
    for length in range(0, len(data), 101):
        saved.write_bytes(data[:length])
        assert_refused(saved)
    for place in range(10, len(data), 101):
        saved.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert_refused(saved)
    for more in (b"\0", data):
        saved.write_bytes(data + more)
        assert_refused(saved)


def write_packed(path, content, **options):
    """What is no save_compressed's, in a whole gzip file."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    path.write_bytes(gzip.compress(buffer.getvalue()))


def test_a_file_that_would_run_code_does_not(tmp_path):
    content = {"state_dict": {}, "info": {"a": Intruder(tmp_path / "made")}}
    write_packed(tmp_path / "zip.bin", content)
    write_packed(tmp_path / "old.bin", content, _use_new_zipfile_serialization=False)
    (tmp_path / "pickle.bin").write_bytes(gzip.compress(pickle.dumps(content)))
    for name in ("zip", "old", "pickle"):
        assert_refused(tmp_path / f"{name}.bin")
    assert not (tmp_path / "made").exists()
    torch.load(io.BytesIO(gzip.decompress((tmp_path / "zip.bin").read_bytes())), weights_only=False)  # it would have
    assert (tmp_path / "made").exists()


def test_a_state_dict_as_torch_saves_it_is_read_too_and_damage_is_found(tmp_path):
    path, model = tmp_path / "plain.bin", NeuralNetwork((30, 20, 2))
    torch.save(model.state_dict(), path)
    state, info = load_compressed(path)
    assert info == {} and all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())
    images_last = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    torch.save(images_last.state_dict(), tmp_path / "other.bin")
    assert states_equal(load_compressed(tmp_path / "other.bin")[0], images_last.state_dict())
    data = bytearray(path.read_bytes())
    data[data.index(model.fc1.weight.detach().numpy().tobytes()) + 5] ^= 1  # torch itself checks no checksum
    path.write_bytes(data)
    assert_refused(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.bin"
    for data in (b"accuracy,k\n", b"\0" * 100_000, gzip.compress(b""), gzip.compress(b"\0" * 10_000), b"\x1b[31mred"):
        path.write_bytes(data)
        assert_refused(path)
    tensor = torch.ones(3)
    states = [{"a": tensor.to("meta")}, {"a": tensor.to_sparse()}, tensor]
    contents = [{"state_dict": state, "info": {}} for state in states]
    for content in ([1, 2], {"state_dict": {"a": tensor}, "info": []}, *contents):
        write_packed(path, content)
        assert_refused(path)
    torch.save([1, 2], path)
    assert_refused(path)
    with pytest.raises(FileNotFoundError):
        load_compressed(tmp_path / "nowhere.bin")
    red = tmp_path / "\x1b[31mrot für\n.bin"
    red.write_bytes(data)
    with pytest.raises(ValueError, match=r"\\x1b\[31mrot für\\n.bin' is damaged") as caught:
        load_compressed(red)
    assert str(caught.value).isprintable()


def test_files_that_ask_for_more_memory_than_they_have_are_refused(monkeypatch, tmp_path):
    path = tmp_path / "bomb.bin"
    packer = zlib.compressobj(wbits=31)
    path.write_bytes(b"".join(packer.compress(bytes(10**7)) for _ in range(10)) + packer.flush())  # 0.1 MB, of 0.1 GB
    tracemalloc.start()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(compress, "UNPACKED", 10**7)
            assert_refused(path)
        assert tracemalloc.get_traced_memory()[1] < 5 * 10**7
        tracemalloc.clear_traces()
        for value in (torch.ones(1).expand(10**9), torch.ones(2).as_strided((10**9,), (0,))):
            write_packed(path, {"state_dict": {"a": value}, "info": {}})
            assert_refused(path)
        write_packed(path, {"state_dict": {}, "info": {"a": Length()}})
        assert_refused(path)
        content, packed_again = io.BytesIO(), io.BytesIO()
        torch.save({"state_dict": {"a": torch.zeros(10**6)}, "info": {"a": "a" * 10**7}}, content)
        content.seek(0)
        with zipfile.ZipFile(content) as archive, zipfile.ZipFile(packed_again, "w", zipfile.ZIP_DEFLATED) as other:
            for entry in archive.infolist():
                other.writestr(entry.filename, archive.read(entry))
        path.write_bytes(gzip.compress(packed_again.getvalue()))
        del content, packed_again
        tracemalloc.clear_traces()
        tracemalloc.reset_peak()
        assert_refused(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * 10**6
    finally:
        tracemalloc.stop()
    tensor = torch.zeros(10**6)
    path.unlink()
    write_packed(path, {"state_dict": {str(name): tensor for name in range(300)}, "info": {}})
    assert_refused(path)  # of one memory, but whoever copies them needs 1.2 GB


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match=f"{path}.* is no regular file"):
            load_compressed(path)


def test_what_cannot_be_stored_leaves_the_old_file(saved):
    before, model = saved.read_bytes(), NeuralNetwork((3, 4, 2))
    states = {"a": torch.ones(3).to_sparse()}, {"a": Length()}, [1], None
    for bad in (nn.Linear(3, 4, device="meta"), nn.LazyLinear(4), *states):
        with pytest.raises(ValueError, match="can be stored"):
            save_compressed(bad, saved)
    for info in ({"a": Intruder(saved)}, {"a": lambda: 0}, "abc"):
        with pytest.raises(ValueError, match="can be stored"):
            save_compressed(model, saved, info)
    assert saved.read_bytes() == before


def test_a_binary_file_object_gets_the_same_bytes(saved):
    content, model = io.BytesIO(b"what a file held before"), NeuralNetwork((3, 2))
    content.seek(0, io.SEEK_END)
    save_compressed(model, content, {"k": 1})
    save_compressed(model, saved, {"k": 1})
    assert content.getvalue() == b"what a file held before" + saved.read_bytes()


def test_what_cannot_be_written_is_an_error_that_names_the_file(saved):
    for nowhere in (saved.parent / "nowhere" / "a.bin", saved / "a.bin", saved.parent):
        with pytest.raises(OSError, match=str(nowhere)):
            save_compressed(NeuralNetwork((3, 2)), nowhere)


# latency, surroundings


def test_another_default_device_changes_nothing(tmp_path):
    model = zero_smallest(nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10)), 0.95)
    images = torch.rand(5, 30)
    with torch.device("meta"):
        save_compressed(model, tmp_path / "model.bin")
        state, _ = load_compressed(tmp_path / "model.bin")
        others = shrink(model), to_sparse(model)
    assert states_equal(state, model.state_dict())
    for other in others:
        torch.testing.assert_close(other(images), model(images))


def test_nothing_process_wide_changes(saved):
    filters, umask = list(warnings.filters), os.umask(0o077)
    os.umask(umask)
    with warnings.catch_warnings(record=True) as caught:
        to_sparse(zero_at_random(NeuralNetwork((30, 20, 10))))(torch.rand(1, 30))
        load_compressed(saved)
    assert not caught and warnings.filters == filters and os.umask(umask) == umask


def test_latency_states_its_threads_and_leaves_the_model():
    model, threads = nn.Sequential(nn.Linear(4, 3), nn.Dropout()), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        measurement = latency(model, torch.randn(8, 4), min_run_time=0.001)
        assert measurement.task_spec.num_threads == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert measurement.median > 0 and measurement.iqr >= 0
    assert model.training and torch.is_grad_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda(tmp_path):
    model = zero_smallest(NeuralNetwork((784, 100, 50, 10)), 0.9).cuda()
    batch = torch.randn(64, 784, device="cuda")
    with torch.no_grad():
        for other in (shrink(model), to_sparse(model)):
            torch.testing.assert_close(other(batch), model(batch))
    save_compressed(model, tmp_path / "model.bin")
    assert states_equal(load_compressed(tmp_path / "model.bin")[0], model.cpu().state_dict())


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="needs a file that cannot be read from its start")
def test_a_disk_that_fails_is_not_told_as_a_damaged_file():
    with pytest.raises(OSError, match="Input/output error"):
        load_compressed("/proc/self/mem")
