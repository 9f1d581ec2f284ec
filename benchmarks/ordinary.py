"""The job as a careful user would write it with torch and torchvision: the peer of `python src/train.py` in job.py.

DataLoader with ToTensor, fp32, fused Adam, torch.nn.utils.prune, large evaluation batches, the GPU where there is one.
The same network, recipe, epochs and 26 points; nothing of src/ is used.
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

SIZES = (784, 1000, 1000, 500, 200, 10)
K_PERCENT = (0, 25, 50, 60, 70, 75, 80, 85, 90, 92.5, 95, 97.5, 99)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Train, prune 26 ways, plot."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--plot", required=True, help="PNG to write")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--k", type=float, nargs="+", default=K_PERCENT, help="shares to prune, in %%")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images = [datasets.MNIST("inputs", train, transform=transforms.ToTensor()) for train in (True, False)]
    workers = {"num_workers": arguments.workers, "persistent_workers": arguments.workers > 0}
    train_loader = DataLoader(images[0], batch_size=512, shuffle=True, pin_memory=DEVICE == "cuda", **workers)
    test_loader = DataLoader(images[1], batch_size=2000, pin_memory=DEVICE == "cuda", **workers)
    layers = [layer for sizes in pairwise(SIZES) for layer in (nn.Linear(*sizes, bias=False), nn.ReLU())]
    model = nn.Sequential(nn.Flatten(), *layers[:-1]).to(DEVICE)
    train(model, train_loader, test_loader, arguments.epochs)
    for method in ("weight", "unit"):
        accuracy = [evaluate(prune_copy(model, method, k / 100), test_loader) for k in arguments.k]
        print(method, " ".join(f"{value:.2%}" for value in accuracy))
        plt.plot(arguments.k, accuracy, marker="o", label=method)
    plt.legend()
    plt.savefig(arguments.plot)


def train(model: nn.Module, loader: DataLoader, test_loader: DataLoader, epochs: int) -> None:
    """Adam on a one-cycle schedule."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, weight_decay=2e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=epochs * len(loader))
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)
    for epoch in range(epochs):
        model.train()
        correct = torch.tensor(0, device=DEVICE)
        for images, labels in loader:
            images, labels = images.to(DEVICE, non_blocking=True), labels.to(DEVICE, non_blocking=True)
            optimizer.zero_grad()
            logits = model(images)
            loss_function(logits, labels).backward()
            optimizer.step()
            schedule.step()
            correct += (logits.argmax(1) == labels).sum()
        training = int(correct) / len(loader.dataset)  # type: ignore[arg-type]
        print(f"epoch {epoch + 1}: training {training:.2%}, testing {evaluate(model, test_loader):.2%}", flush=True)


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader) -> float:
    """Accuracy in [0, 1]."""
    model.eval()
    correct = torch.tensor(0, device=DEVICE)
    for images, labels in loader:
        correct += (model(images.to(DEVICE, non_blocking=True)).argmax(1) == labels.to(DEVICE)).sum()
    return int(correct) / len(loader.dataset)  # type: ignore[arg-type]


def prune_copy(model: nn.Module, method: str, amount: float) -> nn.Module:
    """A copy with every layer but the last pruned by torch's own functions."""
    pruned = copy.deepcopy(model)
    for layer in [module for module in pruned.children() if isinstance(module, nn.Linear)][:-1]:
        if method == "weight":
            prune.l1_unstructured(layer, "weight", amount)
        else:
            prune.ln_structured(layer, "weight", amount, n=2, dim=0)
        prune.remove(layer, "weight")
    return pruned


if __name__ == "__main__":
    main()
