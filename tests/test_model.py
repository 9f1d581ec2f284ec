import pytest
import torch
from torch import nn

from model import NeuralNetwork


def test_it_is_the_network_of_the_exercise():
    model = NeuralNetwork()
    shapes = [(1000, 784), (1000, 1000), (500, 1000), (200, 500), (10, 200)]  # (out, in), without biases
    named = {f"fc{number}.weight": shape for number, shape in enumerate(shapes, start=1)}
    assert {name: tuple(weight.shape) for name, weight in model.named_parameters()} == named
    assert sum(weight.numel() for weight in model.parameters()) == 2_386_000
    assert model.sizes == (784, 1000, 1000, 500, 200, 10)


def test_it_computes_relu_between_layers_and_none_on_the_logits():
    model = NeuralNetwork((4, 6, 5, 3)).double()
    images = torch.randn(7, 2, 2).double()
    with torch.no_grad():
        features = images.reshape(7, 4).numpy()
        for layer in (model.fc1, model.fc2):
            features = (features @ layer.weight.numpy().T).clip(min=0)
        expected = features @ model.fc3.weight.numpy().T
        logits = model(images)
    assert (expected < 0).any()
    torch.testing.assert_close(logits, torch.from_numpy(expected))


def test_the_chain_is_what_forward_computes_and_shares_its_layers():
    model = NeuralNetwork((4, 6, 5, 3))
    images = torch.randn(7, 2, 2)
    assert torch.equal(nn.Sequential(*model.chain())(images), model(images))
    assert [module for module in model.chain() if isinstance(module, nn.Linear)] == list(model.children())


def test_sizes_are_read_off_a_state_dict(tmp_path):
    model = NeuralNetwork((784, 3, 2, 10))
    torch.save(model.state_dict(), tmp_path / "model.bin")
    loaded = NeuralNetwork.from_state_dict(torch.load(tmp_path / "model.bin", weights_only=True))
    assert loaded.sizes == model.sizes
    images = torch.rand(5, 784)
    assert torch.equal(loaded(images), model(images))


def test_a_state_dict_keeps_its_type():
    model = NeuralNetwork((3, 2)).double()
    model.fc1.weight.data.fill_(1e300)
    assert torch.equal(NeuralNetwork.from_state_dict(model.state_dict()).fc1.weight, model.fc1.weight)


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0), (3, -1, 2), (3.0, 2), "32"])
def test_bad_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="two or more whole numbers >= 1"):
        NeuralNetwork(sizes)


WEIGHT = torch.ones(2, 3)
REFUSED = [
    ({}, "expected fc1.weight"),
    (nn.Linear(2, 2).state_dict(), "expected fc1.weight"),
    ({"fc1.weight": WEIGHT.long()}, "fc1.weight must be a dense floating-point matrix"),
    ({"fc1.weight": WEIGHT.to_sparse()}, "fc1.weight must be a dense floating-point matrix"),
    ({"fc1.weight": WEIGHT.to("meta")}, "fc1.weight must be a dense floating-point matrix"),
    ({"fc1.weight": torch.ones(2)}, "fc1.weight must be a dense floating-point matrix"),
    ({"fc1.weight": WEIGHT * torch.nan}, "fc1.weight has NaN"),
    ({"fc1.weight": WEIGHT, "fc2.weight": WEIGHT}, r"not fit together.*\[\(2, 3\), \(2, 3\)\]"),
]


@pytest.mark.parametrize(("state", "message"), REFUSED)
def test_other_state_dicts_are_refused(state, message):
    with pytest.raises(ValueError, match=message):
        NeuralNetwork.from_state_dict(state)
