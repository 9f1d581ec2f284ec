import copy
import doctest
import os
import pickle
import resource
import struct
import zipfile
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import compress
from compress import latency, load_compressed, save_compressed, shrink, stored_bytes, to_sparse
from model import NeuralNetwork

ACTIVATIONS = [kind() for kind in compress._ACTIVATIONS]


def linears(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def widths(model):
    return [linears(model)[0].in_features, *(layer.out_features for layer in linears(model))]


def zero_smallest(model, sparsity, method="weight"):
    """A copy whose smallest weights or units are zero in every layer but the last; far from any code that is tested."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in linears(model)[:-1]:
            if method == "weight":
                layer.weight.view(-1)[
                    layer.weight.abs().view(-1).argsort()[: round(sparsity * layer.weight.numel())]
                ] = 0
            else:
                layer.weight[layer.weight.norm(dim=1).argsort()[: round(sparsity * len(layer.weight))]] = 0
    return model


@st.composite
def chains(draw, activations=ACTIVATIONS, whole_numbers=False):
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
        if draw(st.booleans()):
            modules.append(draw(st.sampled_from([nn.Dropout(0.5), nn.Flatten(), nn.Identity()])))
    return nn.Sequential(*modules).eval()


def batch_for(model, size=5):
    return torch.randn(size, widths(model)[0], dtype=torch.float64)


def assert_same_logits(model, other):
    batch = batch_for(model)
    with torch.no_grad():
        expected, logits = model(batch), other(batch)
    assert (logits - expected).abs().max() <= 1e-10 * expected.abs().max()


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
def test_a_shrunk_chain_has_the_same_logits(model):
    assert_same_logits(model, shrink(model))


@settings(deadline=None)
@given(model=chains(activations=[nn.ReLU(), nn.LeakyReLU(0.5), nn.ReLU(inplace=True)], whole_numbers=True))
def test_exactly_the_units_that_cannot_matter_go(model):
    expected = [max(1, kept) for kept in kept_units(model)]
    assert widths(shrink(model))[1:-1] == expected


@settings(deadline=None)
@given(model=chains())
def test_shrinking_again_changes_nothing(model):
    once = shrink(model)
    twice = shrink(once)
    assert widths(twice) == widths(once)
    for name, tensor in once.state_dict().items():
        assert torch.equal(twice.state_dict()[name], tensor)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=2, max_size=6), sparsity=st.sampled_from([0, 0.3, 0.9, 1]))
@pytest.mark.parametrize("method", ["weight", "unit"])
def test_a_shrunk_network_is_a_network_with_the_same_logits(method, sizes, sparsity):
    model = zero_smallest(NeuralNetwork(sizes).double(), sparsity, method)
    before = copy.deepcopy(model.state_dict())
    smaller = shrink(model)
    assert type(smaller) is NeuralNetwork
    assert smaller.sizes[0] == sizes[0] and smaller.sizes[-1] == sizes[-1]
    if method == "unit":
        most = [max(1, size - round(sparsity * size)) for size in sizes[1:-1]]
        assert all(kept <= limit for kept, limit in zip(smaller.sizes[1:-1], most, strict=True))
    assert_same_logits(model, smaller)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nothing_dead_gives_an_equal_copy_of_its_own():
    model = NeuralNetwork((20, 30, 10))
    copied = shrink(model)
    assert copied.sizes == model.sizes
    for name, tensor in copied.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
        assert tensor.data_ptr() != model.state_dict()[name].data_ptr()


def test_a_network_without_any_weight_keeps_one_unit_a_layer():
    model = NeuralNetwork((20, 30, 30, 10))
    nn.init.zeros_(model.fc2.weight)
    smaller = shrink(model)
    assert smaller.sizes == (20, 1, 1, 10)
    assert not smaller(torch.randn(4, 20)).any()


def test_a_constant_moves_into_the_next_bias_or_stays_without_one():
    def model(bias):
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2, bias=bias)).double().eval()
        with torch.no_grad():
            model[0].weight[1:3] = 0
            model[0].bias[2] = 0
        return model

    folded, kept = shrink(model(bias=True)), shrink(model(bias=False))
    assert widths(folded) == [3, 2, 2]
    assert widths(kept) == [3, 3, 2]
    for bias, smaller in ((True, folded), (False, kept)):
        torch.manual_seed(1)
        before = model(bias)
        assert widths(before) == [3, 4, 2]
        assert_same_logits(before, shrink(before))
        assert type(smaller) is nn.Sequential


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
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
    torch.testing.assert_close(
        smaller.eval()(torch.ones(2, 6, dtype=dtype)), model.eval()(torch.ones(2, 6, dtype=dtype))
    )


def test_a_shrunk_network_trains():
    smaller = shrink(zero_smallest(NeuralNetwork((20, 40, 30, 10)), 0.5, "unit"))
    optimizer = torch.optim.SGD(smaller.parameters(), lr=0.5)
    batch, labels = torch.randn(64, 20), torch.arange(64) % 10
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(smaller(batch), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert smaller.sizes == (20, 20, 15, 10)


def computed(layer, parameter):
    return nn.Sequential(torch.nn.utils.prune.l1_unstructured(layer, parameter, 0.5))


SHARED = nn.Linear(4, 4)
REFUSED = [
    (nn.Sequential(nn.Linear(3, 4), nn.Sigmoid()), "1 is a Sigmoid"),
    (nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4))), r"1\.1 is a BatchNorm1d"),
    (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(8, 2)), "2 takes 8 inputs, 0 has 4 units"),
    (nn.Sequential(SHARED, nn.ReLU(), SHARED), r"2\.bias, 2\.weight: shared with an earlier layer"),
    (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))), "0 is a ParametrizedLinear"),
    (computed(NeuralNetwork((3, 4, 2)).fc1, "weight"), r"0\.weight is computed"),
    (computed(nn.Linear(3, 4), "bias"), r"0\.bias is computed"),
    (nn.Linear(3, 4), "got Linear"),
    (None, "got NoneType"),
]


@pytest.mark.parametrize("function", [shrink, to_sparse, stored_bytes])
@pytest.mark.parametrize(("model", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_not_supported_is_named(function, model, message):
    with pytest.raises(ValueError, match=message):
        function(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_hidden(value):
    model = NeuralNetwork((5, 4, 3))
    with torch.no_grad():
        model.fc1.weight[0] = 0
        model.fc2.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"fc2\.weight has NaN or infinite"):
        shrink(model)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations_send_zero_for_zero(activation):
    assert not activation(torch.zeros(3)).any()


@pytest.mark.parametrize("function", [shrink, to_sparse])
def test_stacks_with_hardly_a_layer(function, tmp_path):
    for model in (nn.Sequential(), nn.Sequential(nn.ReLU()), nn.Sequential(nn.Linear(4, 3))):
        batch = torch.randn(5, 4)
        torch.testing.assert_close(function(model)(batch), model(batch))
        save_compressed(model, tmp_path / "model.bin")
        assert str(load_compressed(tmp_path / "model.bin")[0]) == str(model)


# to_sparse


@settings(deadline=None)
@given(model=chains(), batch_size=st.sampled_from([0, 1, 2, 15, 16, 130, 300]))
def test_sparse_layers_give_the_same_logits(model, batch_size):
    batch = batch_for(model, batch_size)
    with torch.no_grad():
        torch.testing.assert_close(to_sparse(model)(batch), model(batch))


@pytest.mark.parametrize("mkl", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0.6, 0.7, 0.95, 1])
def test_sparse_networks_of_every_dtype(monkeypatch, mkl, dtype, sparsity):
    monkeypatch.setattr(compress, "_MKL", mkl and torch.backends.mkl.is_available())
    model = zero_smallest(NeuralNetwork((30, 50, 40, 10)).to(dtype), sparsity)
    sparse = to_sparse(model)
    layouts = [layer.weight.layout for layer in sparse.modules() if hasattr(layer, "weight")]
    assert layouts == [torch.strided if sparsity < 2 / 3 else torch.sparse_csr] * 2 + [torch.strided]
    for batch_size in (1, 7, 64, 65, 600):
        images = torch.randn(batch_size, 5, 6, dtype=dtype)
        with torch.no_grad():
            logits, expected = sparse(images), model(images)
        assert logits.dtype == dtype and logits.shape == (batch_size, 10)
        torch.testing.assert_close(logits.double(), expected.double(), rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_sparse_networks_are_for_inference():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
    nn.init.zeros_(model[0].weight[2:])
    sparse = to_sparse(model)
    assert not any(module.training for module in sparse.modules())
    assert not any(tensor.requires_grad for tensor in [*sparse.parameters(), *sparse.buffers(), sparse(torch.ones(6))])
    assert all(module.training for module in model.modules())
    batch = torch.randn(2, 6)
    logits = sparse(batch)
    nn.init.zeros_(model[3].weight)
    assert torch.equal(sparse(batch), logits) and logits.any()
    with pytest.raises(ValueError, match="expected 6 features, got 12"):
        sparse(torch.randn(2, 12))
    with pytest.raises(ValueError, match="0 is a SparseLayers"):
        save_compressed(sparse, "never.bin")


def test_sparse_layers_work_on_the_last_of_more_dimensions():
    model = zero_smallest(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double(), 0.8)
    batch = torch.randn(7, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(to_sparse(model)(batch), model(batch))


# save_compressed, load_compressed, stored_bytes


def bits(tensor):
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist())


@settings(deadline=None)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    shape=st.lists(st.integers(1, 60), min_size=1, max_size=2),
    density=st.sampled_from([0, 0.001, 0.03, 0.2, 0.6, 1]),
    seed=st.integers(0, 2**32),
)
def test_every_bit_of_a_tensor_comes_back(dtype, shape, density, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.zeros(shape, dtype=dtype)
    raw = tensor.view(torch.uint8)  # any pattern: -0.0, denormal numbers, infinities, NaN with payload
    raw.copy_(
        torch.randint(0, 256, raw.shape, generator=generator) * (torch.rand(raw.shape, generator=generator) < density)
    )
    encoding, stored_shape, index, values = compress._pack(tensor)
    assert index.nbytes + values.nbytes <= tensor.nbytes
    unpacked = compress._unpack(encoding, stored_shape, index, values)
    assert unpacked.dtype == dtype and unpacked.shape == tensor.shape and bits(unpacked) == bits(tensor)


@settings(deadline=None)
@given(st.lists(st.sampled_from([1, 2, 100, 253, 254, 255, 256, 509, 510, 511, 765, 5000]), min_size=1, max_size=20))
def test_gaps_of_every_length_come_back(steps):
    positions = np.cumsum(steps) - 1
    tensor = torch.zeros(int(positions[-1]) + 400)
    tensor[torch.from_numpy(positions)] = torch.arange(1.0, len(steps) + 1)
    index = torch.from_numpy(compress._gaps(positions))
    unpacked = compress._unpack("gaps", [len(tensor)], index, tensor[torch.from_numpy(positions)])
    assert torch.equal(unpacked, tensor)


def test_the_smallest_encoding_is_chosen():
    chosen = {}
    for sparsity in (0, 0.02, 0.05, 0.5, 0.85, 0.9, 0.99, 1):
        tensor = torch.ones(10_000)
        tensor[torch.randperm(10_000)[: round(sparsity * 10_000)]] = 0
        chosen[sparsity] = compress._pack(tensor)[0]
    assert list(chosen.values()) == ["dense", "dense", "bits", "bits", "bits", "gaps", "gaps", "gaps"]


@settings(deadline=None, max_examples=30)
@given(model=chains())
def test_saved_chains_come_back_bit_for_bit(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("compress") / "model.bin"
    save_compressed(model, path)
    loaded, info = load_compressed(path)
    assert str(loaded) == str(model) and info == {}
    assert {name: bits(tensor) for name, tensor in loaded.state_dict().items()} == {
        name: bits(tensor) for name, tensor in model.state_dict().items()
    }
    batch = batch_for(model)
    assert torch.equal(loaded(batch), model(batch))


def test_a_network_comes_back_with_its_info_and_leaves_random_numbers_alone(tmp_path):
    model = zero_smallest(NeuralNetwork((784, 100, 50, 10)), 0.9).eval()
    info = {"accuracy": 0.98, "k": 90, "sizes": [784, 100], "range": (0, None), "scope": "layer", "nan": True}
    path = tmp_path / "ein Modell für 90 %.bin"
    save_compressed(model, str(path), info)
    save_compressed(model, tmp_path / "b.bin")
    state = torch.get_rng_state()
    loaded, loaded_info = load_compressed(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded_info == info and type(loaded) is NeuralNetwork and loaded.sizes == model.sizes
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    assert all(bits(a) == bits(b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert (tmp_path / "b.bin").stat().st_size == stored_bytes(model)
    torch.load(path, weights_only=True)
    shrink(loaded).train()(torch.randn(3, 784)).sum().backward()


def test_nested_stacks_and_all_arguments_come_back(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("start", nn.Flatten(1, 2))
    model.add_module("body", nn.Sequential(nn.Linear(6, 5, bias=False), *ACTIVATIONS, nn.Dropout(0.25, inplace=True)))
    odd = [nn.LeakyReLU(0.3), nn.ELU(0.7, inplace=True), nn.CELU(1.5), nn.GELU("tanh"), nn.Softshrink(0.1)]
    model.add_module("end", nn.Sequential(*odd, nn.Hardshrink(0.2), nn.Linear(5, 2)))
    model.eval()
    save_compressed(model, tmp_path / "model.bin")
    loaded, _ = load_compressed(tmp_path / "model.bin")
    assert str(loaded) == str(model)
    batch = torch.randn(4, 2, 3)
    assert torch.equal(loaded(batch), model(batch))


def test_tensors_that_share_memory_are_stored_alone():
    model, storage = NeuralNetwork((20, 30, 10)), torch.randn(10_000)
    model.fc1.weight.data = storage[:600].view(30, 20)
    model.fc2.weight.data = storage[600:900].view(30, 10).t()
    assert stored_bytes(model) < 900 * 4 + 3000


@pytest.mark.parametrize(
    ("method", "sparsity", "bound"),
    [("weight", 0.9, 0.14), ("weight", 0.99, 0.025), ("unit", 0.5, 0.34), ("unit", 0.9, 0.041)],
)
def test_files_are_as_small_as_promised(tmp_path, method, sparsity, bound):
    model = NeuralNetwork()
    torch.save(model.state_dict(), tmp_path / "dense.bin")
    dense = (tmp_path / "dense.bin").stat().st_size
    assert stored_bytes(model) <= 1.001 * dense
    assert stored_bytes(shrink(zero_smallest(model, sparsity, method))) <= bound * dense


class Intruder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.bin"
    save_compressed(zero_smallest(NeuralNetwork((20, 30, 10)), 0.9), path)
    return path


def assert_refused(path, match=None):
    with pytest.raises(ValueError, match=match) as caught:
        load_compressed(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is damaged or not from save_compressed: ") and "\n" not in message


def test_a_file_cut_short_or_damaged_is_refused(saved):
    data = saved.read_bytes()
    for length in range(0, len(data), 101):
        saved.write_bytes(data[:length])
        assert_refused(saved)
    values = data.index(bits(load_compressed_from(saved, data).fc2.weight))
    saved.write_bytes(data[:values] + bytes([data[values] ^ 1]) + data[values + 1 :])
    assert_refused(saved, "checksum")


def load_compressed_from(path, data):
    path.write_bytes(data)
    return load_compressed(path)[0]


def test_a_file_that_would_run_code_does_not(tmp_path):
    content = {"format": compress._FORMAT, "info": Intruder(tmp_path / "made")}
    torch.save(content, tmp_path / "zip.bin")
    (tmp_path / "pickle.bin").write_bytes(pickle.dumps(content))
    assert_refused(tmp_path / "zip.bin", "not plain data")
    assert_refused(tmp_path / "pickle.bin", "not a zip file")
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "zip.bin", weights_only=False)  # it would have
    assert (tmp_path / "made").exists()


def test_other_files_are_refused(tmp_path):
    torch.save(NeuralNetwork((3, 2)).state_dict(), tmp_path / "state.bin")
    torch.save([1, 2], tmp_path / "list.bin")
    (tmp_path / "text.bin").write_text("accuracy,k\n")
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as archive:
        archive.writestr("a.txt", "a")
    for name in ("state", "list", "text", "other"):
        assert_refused(tmp_path / f"{name}.bin")
    with pytest.raises(FileNotFoundError):
        load_compressed(tmp_path / "nowhere.bin")


def changed(name, place, value):
    def change(content):
        packed = list(content["tensors"][name])
        packed[place] = value
        content["tensors"][name] = tuple(packed)

    return change


IMPOSSIBLE = [
    (changed("fc1.weight", 3, torch.ones(3)), "impossible indices"),
    (changed("fc1.weight", 2, torch.full((75,), 200, dtype=torch.uint8)), "impossible indices"),
    (changed("fc1.weight", 2, torch.zeros(60, dtype=torch.uint8)), "impossible indices"),
    (changed("fc1.weight", 1, [2, 3]), "impossible indices"),
    (changed("fc2.weight", 1, [30, 10]), "size mismatch"),
    (changed("fc2.weight", 3, torch.ones(300, dtype=torch.int64)), "int64 values where floating-point"),
    (lambda content: content["tensors"].pop("fc2.weight"), "Missing key"),
    (lambda content: content.update(modules=[("", "NeuralNetwork", {"sizes": [20, 31, 10]})]), "size mismatch"),
    (lambda content: content.update(modules=[("", "Unheard", {})]), "Unheard"),
    (lambda content: content.update(modules=[]), "unpack"),
    (lambda content: content.update(format="compressed network, version 2"), "another format"),
]


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE)
def test_contents_that_cannot_be_are_refused(saved, change, message):
    content = torch.load(saved, weights_only=True)
    change(content)
    torch.save(content, saved)
    assert_refused(saved, message)


def test_what_cannot_be_stored_leaves_the_old_file(saved):
    before = saved.read_bytes()
    model, extra = NeuralNetwork((3, 4, 2)), NeuralNetwork((3, 4, 2))
    extra.register_buffer("mean", torch.zeros(3))
    for bad_model, bad_info in ((extra, None), (model, {"a": Intruder(saved)}), (model, {"a": lambda: 0})):
        with pytest.raises(ValueError):
            save_compressed(bad_model, saved, bad_info)
    with pytest.raises(TypeError, match="info must be a dict"):
        save_compressed(model, saved, "abc")
    with pytest.raises(TypeError):
        save_compressed(model, saved, 5)
    assert saved.read_bytes() == before and [path.name for path in saved.parent.iterdir()] == ["model.bin"]


def test_a_full_disk_leaves_the_old_file(saved):
    before, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # stands in for a full disk
    try:
        with pytest.raises(OSError):
            save_compressed(NeuralNetwork((20, 30, 10)), saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before and [path.name for path in saved.parent.iterdir()] == ["model.bin"]


def test_nan_with_a_payload_and_minus_zero_come_back_from_a_file(tmp_path):
    model = NeuralNetwork((3, 4, 2))
    with torch.no_grad():
        model.fc1.weight.zero_()
        model.fc1.weight[0, 0] = -0.0
        model.fc1.weight.view(torch.int32)[0, 1] = struct.unpack("<i", struct.pack("<I", 0x7FC12345))[0]
    save_compressed(model, tmp_path / "model.bin")
    loaded, _ = load_compressed(tmp_path / "model.bin")
    assert bits(loaded.fc1.weight) == bits(model.fc1.weight)
    assert torch.signbit(loaded.fc1.weight[0, 0]) and loaded.fc1.weight[0, 1].isnan()


# latency, doctests


def test_another_default_device_changes_nothing(tmp_path):
    model = zero_smallest(NeuralNetwork((30, 20, 10)), 0.95)
    save_compressed(model, tmp_path / "model.bin")
    images = torch.rand(5, 30)
    with torch.device("meta"):
        loaded, _ = load_compressed(tmp_path / "model.bin")
        logits = to_sparse(model)(images)
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())
    torch.testing.assert_close(logits, model(images).detach())


@pytest.mark.parametrize("weight", [torch.ones(2, 3, device="meta"), torch.ones(2, 3, dtype=torch.complex128)])
def test_weights_without_values_that_can_be_stored(weight):
    model = NeuralNetwork((3, 2))
    model.fc1.weight = nn.Parameter(weight)
    with pytest.raises(ValueError, match="cannot be stored"):
        stored_bytes(model)


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


@pytest.mark.filterwarnings("default")
def test_the_examples_hold():
    results = doctest.testmod(compress)
    assert results.attempted >= 10 and results.failed == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda():
    model = zero_smallest(NeuralNetwork((784, 100, 50, 10)), 0.9).cuda()
    batch = torch.randn(64, 784, device="cuda")
    with torch.no_grad():
        for other in (shrink(model), to_sparse(model)):
            torch.testing.assert_close(other(batch), model(batch))
