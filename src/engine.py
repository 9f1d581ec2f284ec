"""Training and evaluation: one epoch at a time, over batches that are already on the model's device."""

import inspect
import itertools
import os
import random
import timeit
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune import find_masks
from system import torchrun_rank
from utils import l2

Batches = Iterable[tuple[Tensor, Tensor]]  # images (B, …) and class numbers (B,); B may differ from batch to batch
Masks = Mapping[str, Tensor]  # parameter name → mask, as prune.find_masks returns them
DIVERGED = 1000.0  # nats: the right class at e^-1000, on average over an epoch; no training comes back from there


@dataclass(eq=False)
class Engine:
    """Trains and evaluates a classifier; TypeError: no model; ValueError: a setting out of range.

    >>> model, batches = nn.Linear(2, 2), [(torch.eye(2), torch.tensor([0, 1]))]
    >>> engine = Engine(model, torch.optim.SGD(model.parameters(), lr=0.1))
    >>> [engine.train_epoch(batches) for epoch in range(100)][-1], engine.evaluate(batches)
    (1.0, 1.0)
    """

    model: nn.Module  # maps images (B, …) to logits (B, classes)
    optimizer: torch.optim.Optimizer | None = None  # over the model's parameters; needed for training alone
    _: KW_ONLY
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None  # stepped once a batch
    # Masks of each step, or None. A step goes through the pruned weights and moves the dense ones: at the end
    # `prune.apply_masks` prunes the model. `itertools.repeat(masks)` holds the same masks throughout.
    masks: Iterable[Masks | None] | None = None
    straight_through: bool = False  # pruned weights get a gradient as well, and may outgrow others (Guo et al. 2016)
    precision: torch.dtype = torch.float32  # of the training passes; bfloat16 is autocast: weights stay as they are
    label_smoothing: float = 0.0  # share of every target that is spread over all classes, in [0, 1], in training alone
    unit_lasso: float = 0.0  # strength λ ≥ 0 of the pull on the L2 norm of every hidden unit

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(self.model).__name__}")
        if not (0 <= self.label_smoothing <= 1 and self.unit_lasso >= 0):
            given = f"{self.label_smoothing} and {self.unit_lasso}"
            raise ValueError(f"label_smoothing must be in [0, 1] and unit_lasso >= 0, got {given}")
        self._masks = itertools.repeat(None) if self.masks is None else iter(self.masks)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of logits (B, classes) for classes (B,); IndexError, RuntimeError: as torch."""
        return nn.functional.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing)

    def train_epoch(self, batches: Batches) -> float:
        """Train on every batch; return the accuracy in [0, 1] over all images, each in its own training pass.

        Raises: FloatingPointError: it diverged. IndexError, RuntimeError: of the model or `loss`. ValueError: no
            optimizer, no batches, too few masks or another model's, or not one target an image.
        """
        if self.optimizer is None:
            raise ValueError("training needs an optimizer: Engine(model, optimizer)")
        self.model.train()
        hits, losses = [], []  # left on the device: reading one would make the CPU wait for every step
        for images, targets in batches:
            self.optimizer.zero_grad()
            with torch.autocast(images.device.type, self.precision, enabled=self.precision != torch.float32):
                logits = self._logits(images)  # (B, classes)
            hits.append(_hits(logits, targets))
            loss = self.loss(logits, targets)
            loss.backward()
            self.optimizer.step()
            if self.unit_lasso:
                self._pull(self.optimizer.param_groups[0]["lr"])
            if self.scheduler is not None:
                self.scheduler.step()
            losses.append(loss.detach())
        accuracy, mean_loss = _accuracy(hits), torch.stack(losses).mean().item()
        if not (mean_loss < DIVERGED and all(weight.isfinite().all() for weight in self.model.parameters())):
            raise FloatingPointError(f"diverged, with a mean loss of {mean_loss:.3g}: try a lower learning rate")
        return accuracy

    @torch.inference_mode()
    def evaluate(self, batches: Batches) -> float:
        """Accuracy in [0, 1] in the model's own precision, in eval mode; ValueError, RuntimeError: as `train_epoch`."""
        self.model.eval()
        return _accuracy([_hits(self.model(images), targets) for images, targets in batches])

    def _logits(self, images: Tensor) -> Tensor:
        """Logits (B, classes) through the weights that the next masks leave, with gradients for the dense ones."""
        try:
            masks = next(self._masks) or {}
        except StopIteration:
            raise ValueError("fewer masks than steps: itertools.repeat(masks) holds the same ones throughout") from None
        weights, pruned = dict(self.model.named_parameters()), dict[str, Tensor]()
        for name, mask in masks.items():
            weight = weights.get(name)
            if weight is None or getattr(mask, "dtype", None) is not torch.bool or mask.shape != weight.shape:
                raise ValueError(f"expected boolean masks of this model, which has no {name} of such a shape or type")
            kept = mask.to(weight)  # 1 or 0: with numbers the backward pass is faster
            # Straight through: the same values, but the gradient of the whole weight.
            pruned[name] = weight - weight.detach() * (1 - kept) if self.straight_through else weight * kept
        return torch.func.functional_call(self.model, pruned, (images,)) if pruned else self.model(images)

    @torch.no_grad()
    def _pull(self, learning_rate: float) -> None:
        """Proximal step of the group lasso: every hidden unit's norm shrinks by lr · λ, and no further than 0."""
        hidden = [weight for weight in self.model.parameters() if weight.dim() > 1][:-1]  # output units are classes
        for weight in (weight for weight in hidden if weight.requires_grad):
            norm = l2(weight).clamp_(min=torch.finfo(weight.dtype).tiny)  # (out,), none of them 0
            weight.transpose(0, -1).mul_((1 - learning_rate * self.unit_lasso / norm).clamp_(min=0))


def _hits(logits: Tensor, targets: Tensor) -> Tensor:
    if targets.shape != logits.shape[:1]:  # (B, 1) would be compared with every row, and count more than there is
        raise ValueError(f"expected {len(logits)} targets, one an image, got shape {tuple(targets.shape)}")
    return logits.detach().argmax(1) == targets  # (B,)


def _accuracy(hits: list[Tensor]) -> float:
    if not (samples := sum(map(len, hits))):
        raise ValueError("there are no batches")
    return int(torch.cat(hits).sum()) / samples


def random_masks(model: nn.Module, steps: int, seed: int, **choice: Any) -> Iterator[Masks | None]:
    """Masks of every step, half of them None, for a network that is to stand every k.

    What is left, 0.5 % of weights or 2.5 % of units at least, is drawn on a log scale; its depth grows until half-time.
    The other arguments are those of `prune.find_masks`.
    """
    draw = random.Random(seed)
    for step in range(steps):
        method, least = draw.choice((("weight", 0.005), ("unit", 0.025)))
        left = least ** (draw.random() * min(1.0, 2 * step / steps))
        yield find_masks(model, method, 1 - left, **choice) if draw.random() < 0.5 else None


def gradual_masks(model: nn.Module, method: str, sparsity: float, steps: int, **choice: Any) -> Iterator[Masks]:
    """Masks of every step, of the weights as they are then; the sparsity rises as a cubic for 70 % of the steps.

    Source: Zhu and Gupta, "To prune, or not to prune" (2017). The other arguments are those of `prune.find_masks`.
    """
    for step in range(steps):
        yield find_masks(model, method, sparsity * (1 - max(0.0, 1 - step / (0.7 * steps)) ** 3), **choice)


def pick_device(name: str) -> torch.device:
    """Choose the device for "auto", "cpu" or "cuda"; ValueError for "cuda" where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; --device cpu runs everywhere")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count())


def pick_precision(name: str, device: torch.device) -> str:
    """Choose "bf16" or "fp32" for the training passes; for "auto" bf16 where it multiplies clearly faster."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(1000, 1000, dtype=dtype, device="cpu")
        return min(timeit.repeat(lambda: matrix[:512] @ matrix, number=1, repeat=10))

    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Without the instructions a product takes a second. With them it may be slower, so it is tried. Ranks must agree.
    native = any(getattr(torch.cpu, probe, bool)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    tried = native and torchrun_rank() == (0, 1)
    return "bf16" if tried and 1.3 * seconds(torch.bfloat16) < seconds(torch.float32) else "fp32"


class Adam(torch.optim.Adam):
    """torch's Adam, bit for bit, but without importing torch's compiler: a second of three before the first batch."""

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))
