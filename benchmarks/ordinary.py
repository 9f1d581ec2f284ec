"""The same job as a careful user would write it with what torch and torchvision offer: the peer of `run.py train`.

DataLoader with ToTensor, fp32, fused Adam, torch.nn.utils.prune, large evaluation batches, and the number of loader
workers that is fastest on this machine (`--workers`; run.py tries several). The same network, recipe, epochs and 26
points as `python src/train.py`. Nothing of src/ is used.
"""

import argparse
import copy
from itertools import pairwise

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

K_PERCENT = (0, 25, 50, 60, 70, 75, 80, 85, 90, 92.5, 95, 97.5, 99)


def make_model() -> nn.Sequential:
    """784-1000-1000-500-200-10 without biases."""
    sizes = (784, 1000, 1000, 500, 200, 10)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader) -> float:
    """Accuracy in [0, 1]."""
    model.eval()
    correct = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in loader)
    return correct / len(loader.dataset)  # type: ignore[arg-type]


def train(model: nn.Module, loader: DataLoader, test: DataLoader, epochs: int) -> None:
    """Adam on a one-cycle schedule."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, weight_decay=2e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=epochs * len(loader))
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)
    for epoch in range(epochs):
        model.train()
        correct = torch.tensor(0)
        for images, labels in loader:
            optimizer.zero_grad()
            logits = model(images)
            loss_function(logits, labels).backward()
            optimizer.step()
            schedule.step()
            correct += (logits.argmax(1) == labels).sum()
        training = int(correct) / len(loader.dataset)  # type: ignore[arg-type]
        print(f"epoch {epoch + 1}: training {training:.2%}, testing {evaluate(model, test):.2%}", flush=True)


def prune_copy(model: nn.Sequential, method: str, amount: float) -> nn.Module:
    """A copy with every layer but the last pruned by torch's own functions."""
    pruned = copy.deepcopy(model)
    for layer in [module for module in pruned if isinstance(module, nn.Linear)][:-1]:
        if method == "weight":
            prune.l1_unstructured(layer, "weight", amount)
        else:
            prune.ln_structured(layer, "weight", amount, n=2, dim=0)
        prune.remove(layer, "weight")
    return pruned


def main() -> None:
    """Train, prune 26 ways, plot."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", required=True, help="folder that holds MNIST/")
    parser.add_argument("--plot", required=True, help="PNG to write")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images = [datasets.MNIST(arguments.inputs, train, transform=transforms.ToTensor()) for train in (True, False)]
    workers = {"num_workers": arguments.workers, "persistent_workers": arguments.workers > 0}
    loader = DataLoader(images[0], batch_size=512, shuffle=True, **workers)
    test = DataLoader(images[1], batch_size=2000, **workers)
    model = make_model()
    train(model, loader, test, arguments.epochs)
    for method in ("weight", "unit"):
        accuracy = [100 * evaluate(prune_copy(model, method, k / 100), test) for k in K_PERCENT]
        print(method, " ".join(f"{value:.2f}" for value in accuracy), flush=True)
        plt.plot(K_PERCENT, accuracy, marker="o", label=method)
    plt.legend()
    plt.savefig(arguments.plot)


if __name__ == "__main__":
    main()
