import copy
import itertools

import pytest
import torch
from torch import nn

import prune
from engine import Adam, Engine, pick_device, pick_precision, random_masks
from model import NeuralNetwork


def some_batches(*lengths: int, width: int = 8, classes: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(length, width), torch.randint(classes, (length,))) for length in lengths]


def hits(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    return sum(int((model(images).argmax(1) == targets).sum()) for images, targets in batches)


def test_accuracy_counts_samples_so_that_a_ragged_last_batch_does_not_skew_it():
    batches = some_batches(100, 100, 1)
    model = NeuralNetwork((8, 5, 3))
    # The lone sample is made right, the others as they fall: a mean of batch accuracies would be far off.
    batches[-1] = (batches[-1][0], model(batches[-1][0]).argmax(1))
    assert Engine(model).evaluate(batches) == hits(model, batches) / 201


def test_training_accuracy_is_over_all_samples_of_the_epoch():
    batches = some_batches(60, 60, 7)
    model = NeuralNetwork((8, 5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # the weights stay, so that the count can be repeated
    assert Engine(model, optimizer).train_epoch(batches) == hits(model, batches) / 127


def test_an_epoch_is_what_a_plain_loop_does():
    batches = some_batches(16, 16, 5)
    model = NeuralNetwork((8, 5, 3))
    twin = copy.deepcopy(model)
    Engine(model, torch.optim.Adam(model.parameters(), lr=0.01)).train_epoch(batches)
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.01)
    for images, targets in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(images), targets).backward()
        optimizer.step()
    for weight, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight, expected)


def test_adam_is_torchs():
    batches = some_batches(16, 16, 5)
    models = [NeuralNetwork((8, 5, 3))]
    models.append(copy.deepcopy(models[0]))
    for kind, model in zip((Adam, torch.optim.Adam), models, strict=True):
        optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
        for _ in range(3):
            Engine(model, optimizer).train_epoch(batches)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_the_schedule_steps_once_a_batch():
    model = NeuralNetwork((8, 5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    Engine(model, optimizer, scheduler=schedule).train_epoch(some_batches(4, 4, 2))
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_evaluation_turns_dropout_off_and_training_on():
    model = nn.Sequential(nn.Linear(8, 50), nn.Dropout(0.9), nn.Linear(50, 3))
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=0.0))
    batches = some_batches(200)
    assert engine.evaluate(batches) == engine.evaluate(batches)
    assert not model.training
    engine.train_epoch(batches)
    assert model.training


def test_bf16_passes_leave_the_weights_and_the_evaluation_in_fp32():
    seen = []
    model = NeuralNetwork((8, 5, 3))
    model.fc1.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), precision=torch.bfloat16)
    engine.train_epoch(some_batches(8))
    engine.evaluate(some_batches(8))
    assert seen == [torch.bfloat16, torch.float32]
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


# ── steps through pruned weights ──


def pruned_by(model: nn.Module, masks: dict[str, torch.Tensor]) -> nn.Module:
    pruned = copy.deepcopy(model)
    prune.apply_masks(pruned, masks)
    return pruned


@pytest.mark.parametrize("straight_through", [True, False])
def test_a_step_goes_through_the_pruned_weights_and_moves_the_dense_ones(straight_through):
    """By hand: the gradient of the pruned network, taken by plain SGD from the dense weights."""
    model = NeuralNetwork((8, 20, 10, 3)).double()
    masks = prune.find_masks(model, "weight", 0.5)
    ((images, targets),) = batches = [(torch.randn(16, 8).double(), torch.randint(3, (16,)))]
    twin = pruned_by(model, masks)
    nn.functional.cross_entropy(twin(images), targets).backward()
    expected = {}
    for (name, dense), pruned in zip(model.named_parameters(), twin.parameters(), strict=True):
        gradient = pruned.grad
        if name in masks and not straight_through:
            gradient = gradient * masks[name]
        expected[name] = dense.detach() - 0.1 * gradient
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accuracy = Engine(model, optimizer, masks=[masks], straight_through=straight_through).train_epoch(batches)
    assert accuracy == hits(twin, batches) / 16
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, expected[name])


def test_each_step_takes_its_own_masks_and_none_is_a_dense_step():
    model = NeuralNetwork((8, 20, 10, 3))
    masks = [prune.find_masks(model, "unit", 0.5), None, prune.find_masks(model, "weight", 0.9)]
    batches = some_batches(20, 20, 7)
    networks = [model if mask is None else pruned_by(model, mask) for mask in masks]
    expected = sum(hits(network, [batch]) for network, batch in zip(networks, batches, strict=True)) / 47
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert Engine(model, optimizer, masks=masks).train_epoch(batches) == expected
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


HELD = [
    lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9),
    lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1),
]


@pytest.mark.parametrize("method", ["weight", "unit"])
@pytest.mark.parametrize("make", HELD)
def test_held_masks_train_what_is_left_as_a_loop_that_prunes_after_every_step_does(method, make):
    model = NeuralNetwork((8, 20, 10, 3)).double()
    masks = prune.find_masks(model, method, 0.5)
    twin = pruned_by(model, masks)
    batches = [(images.double(), targets) for images, targets in some_batches(*[8] * 50)]
    Engine(model, make(model.parameters()), masks=itertools.repeat(masks)).train_epoch(batches)
    prune.apply_masks(model, masks)
    optimizer = make(twin.parameters())
    optimizer.register_step_post_hook(lambda *_: prune.apply_masks(twin, masks))
    Engine(twin, optimizer).train_epoch(batches)
    for weight, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight, expected)


@pytest.mark.filterwarnings("ignore:pruning leaves nothing")
def test_random_masks_are_of_what_may_be_pruned():
    model = NeuralNetwork((8, 20, 10, 3))
    seen = {name for masks in random_masks(model, 20, seed=0, skip=("fc1",), prune_output=True) for name in masks or {}}
    assert seen == {"fc2.weight", "fc3.weight"}


def test_the_dense_weights_come_back_when_a_pass_fails():
    model = NeuralNetwork((8, 5, 3))
    before = copy.deepcopy(model.state_dict())
    masks = [prune.find_masks(model, "weight", 0.5)]
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), masks=masks)
    with pytest.raises(IndexError):
        engine.train_epoch([(torch.randn(2, 8), torch.tensor([0, 7]))])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("learning_rate", [0.1, 0.0])  # the second as at the start of a warm-up
def test_unit_lasso_is_the_proximal_step_on_every_hidden_unit(learning_rate):
    model = NeuralNetwork((8, 5, 3)).double()
    with torch.no_grad():
        model.fc1.weight[0] *= 1e-6  # shorter than the step: must end at zero, not beyond
        model.fc1.weight[1] = 0  # already there: must not become NaN
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    black = [(torch.zeros(4, 8).double(), torch.zeros(4).long())]  # its gradient is zero: what is left is the pull
    Engine(model, optimizer, unit_lasso=0.5).train_epoch(black)
    for row, old in zip(model.fc1.weight, before["fc1.weight"], strict=True):
        norm = max(float(old.norm()) - learning_rate * 0.5, 0)
        torch.testing.assert_close(row, old * (norm / float(old.norm()) if norm else 0))
    assert torch.equal(model.fc2.weight, before["fc2.weight"])


def test_unit_lasso_pulls_whole_filters_and_leaves_frozen_layers():
    frozen = nn.Conv2d(1, 3, 3, bias=False).requires_grad_(False)
    model = nn.Sequential(frozen, nn.Conv2d(3, 3, 3, bias=False), nn.Flatten(), nn.Linear(12, 2))
    before = copy.deepcopy(model.state_dict())
    black = [(torch.zeros(4, 1, 6, 6), torch.zeros(4).long())]
    Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), unit_lasso=0.5).train_epoch(black)
    for unit, old in zip(model[1].weight, before["1.weight"], strict=True):
        torch.testing.assert_close(unit, old * (1 - 0.05 / float(old.norm())))
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in ("0.weight", "3.weight"))


def test_masks_that_do_not_fit_are_told():
    model = NeuralNetwork((8, 5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = prune.find_masks(model, "weight", 0.5)
    with pytest.raises(ValueError, match="fewer masks than steps"):
        Engine(model, optimizer, masks=[masks]).train_epoch(some_batches(8, 8))
    fits = masks["fc1.weight"]
    for name, mask in (("fc9.weight", fits), *(("fc1.weight", bad) for bad in (fits[:1], fits.float(), None))):
        with pytest.raises(ValueError, match=f"no {name} of such a shape"):
            Engine(model, optimizer, masks=[{name: mask}]).train_epoch(some_batches(8))


def test_recurrent_layers_are_trained_through_their_pruned_weights_too():
    class Recurrent(nn.LSTM):
        def forward(self, images):
            return super().forward(images)[0][:, -1]

    model = Recurrent(4, 3, batch_first=True)
    masks = {name: torch.rand_like(weight) > 0.5 for name, weight in model.named_parameters()}
    batches = [(torch.randn(6, 5, 4), torch.randint(3, (6,)))]
    twin = pruned_by(model, masks)
    nn.functional.cross_entropy(twin(batches[0][0]), batches[0][1]).backward()
    expected = [
        dense.detach() - pruned.grad * masks[name]
        for (name, dense), pruned in zip(model.named_parameters(), twin.parameters(), strict=True)
    ]
    Engine(model, torch.optim.SGD(model.parameters(), lr=1.0), masks=[masks]).train_epoch(batches)
    torch.testing.assert_close(list(model.parameters()), expected)


def test_divergence_is_told():
    model = NeuralNetwork((8, 5, 3))
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=1e30))
    with pytest.raises(FloatingPointError, match="learning rate"):
        engine.train_epoch(some_batches(8, 8, 8))


def test_what_is_missing_or_does_not_fit_is_named():
    model = NeuralNetwork((8, 5, 3))
    trained = Engine(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for run in (trained.evaluate, trained.train_epoch):
        with pytest.raises(ValueError, match="no batches"):
            run([])
        with pytest.raises(ValueError, match=r"expected 4 targets, one an image, got shape \(4, 1\)"):
            run([(torch.rand(4, 8), torch.zeros(4, 1).long())])
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        Engine(model, label_smoothing=1.1)
    with pytest.raises(ValueError, match=r"got 0\.0 and -1"):
        Engine(model, unit_lasso=-1)
    with pytest.raises(ValueError, match="needs an optimizer"):
        Engine(model).train_epoch(some_batches(8))


def test_devices_and_precisions(monkeypatch):
    cpu = torch.device("cpu")
    assert pick_device("cpu") == cpu
    assert pick_precision("fp32", cpu) == "fp32"
    assert pick_precision("bf16", cpu) == "bf16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == cpu
    with pytest.raises(ValueError, match="--device cuda"):
        pick_device("cuda")


def test_auto_is_bf16_where_it_is_clearly_faster(monkeypatch):
    """The instructions alone do not tell: there are processors that have them and are slower with them."""
    cpu = torch.device("cpu")
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: True, raising=False)
    for ratio, expected in ((0.5, "fp32"), (1.2, "fp32"), (1.5, "bf16")):
        times = [[1.0], [ratio]]  # of a product in bf16, then in fp32
        monkeypatch.setattr("timeit.repeat", lambda *_, times=times, **__: times.pop(0))
        assert pick_precision("auto", cpu) == expected
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: False, raising=False)
    assert pick_precision("auto", cpu) == "fp32"  # emulated: not even tried, for it may take seconds
    for native in (True, False):  # a GPU that emulates it trains in fp32
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert pick_precision("auto", torch.device("cuda")) == ("bf16" if native else "fp32")
