"""Training and evaluation: one epoch at a time, over batches that are already on the model's device."""

import contextlib
import inspect
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LRScheduler

from prune import apply_masks, find_masks
from utils import l2

Batches = Iterable[tuple[Tensor, Tensor]]
Masks = Mapping[str, Tensor]  # parameter name → mask, as prune.find_masks returns them
DIVERGED = 1000.0  # nats: the right class at e^-1000, on average over an epoch; no training comes back from there


class Engine:
    """Trains and evaluates a classifier.

    Args:
        model: maps images (B, …) to logits (B, classes).
        optimizer: over the model's parameters; needed for training alone.
        scheduler: stepped once a batch.
        masks: the masks of each step, or None for a step through the dense weights. A step goes through the pruned
            weights and moves the dense ones, so the model stays dense: `prune.apply_masks` prunes it at the end.
            `itertools.repeat(masks)` holds the same masks throughout.
        straight_through: pruned weights take part in such a step, with the gradient at zero, and may outgrow others
            (Guo et al., "Dynamic Network Surgery", 2016). Otherwise they get no gradient.
        precision: of the training passes; torch.bfloat16 runs them under autocast. Weights stay as they are.
        label_smoothing: share of every target that is spread over all classes, in [0, 1], in training alone.
        unit_lasso: strength λ ≥ 0 of the pull on the L2 norm of every hidden unit.

    Raises:
        TypeError: `model` is no module, or `precision` no torch.dtype.
        ValueError: `label_smoothing` or `unit_lasso` is out of range.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> engine = Engine(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> for epoch in range(100):
        ...     accuracy = engine.train_epoch(batches)
        >>> engine.evaluate(batches)
        1.0
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        scheduler: LRScheduler | None = None,
        masks: Iterable[Masks | None] | None = None,
        straight_through: bool = False,
        precision: torch.dtype = torch.float32,
        label_smoothing: float = 0.0,
        unit_lasso: float = 0.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(precision, torch.dtype):
            raise TypeError(f"precision must be a torch.dtype, such as torch.bfloat16, got {precision!r}")
        if not (0 <= label_smoothing <= 1 and unit_lasso >= 0):
            given = f"{label_smoothing} and {unit_lasso}"
            raise ValueError(f"label_smoothing must be in [0, 1] and unit_lasso >= 0, got {given}")
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.masks = None if masks is None else iter(masks)
        self.straight_through = straight_through
        self.precision = precision
        self.label_smoothing = label_smoothing
        self.unit_lasso = unit_lasso
        weights = [weight for weight in model.parameters() if weight.dim() > 1]
        # The units of the output layer are the classes, and frozen layers stay as they are.
        self.hidden_weights = [weight for weight in weights[:-1] if weight.requires_grad]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats, with the engine's label smoothing.

        Args:
            logits: (B, classes), any float type; computed in float32.
            targets: (B,) class numbers.

        Raises:
            IndexError: a class number that the logits do not have.
            RuntimeError: shapes or types that do not fit.
        """
        return functional.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing)

    def train_epoch(self, batches: Batches) -> float:
        """One pass over the batches.

        Args:
            batches: pairs of images (B, …) and class numbers (B,); B may differ from batch to batch.

        Returns:
            Accuracy in [0, 1] over all samples, each as it was classified in its own training pass.

        Raises:
            FloatingPointError: the mean loss exceeds `DIVERGED`, or it or a weight became NaN or infinite.
            ValueError: no optimizer, no batches, targets that are not one a logit row, or masks that end too soon or
                are another model's.
            IndexError, RuntimeError: as `loss`, or as the model on images that it cannot take.
        """
        if self.optimizer is None:
            raise ValueError("training needs an optimizer: Engine(model, optimizer)")
        self.model.train()
        counts = []  # left on the device: reading one would make the CPU wait for every step
        losses = []
        samples = 0
        for images, targets in batches:
            self.optimizer.zero_grad()
            with self._pruned(self._next_masks()):
                with torch.autocast(images.device.type, self.precision, enabled=self.precision != torch.float32):
                    logits = self._classify(images, targets)  # (B, classes)
                loss = self.loss(logits, targets)
                loss.backward()
            self._step(self.optimizer)
            samples += len(targets)
            counts.append((logits.detach().argmax(1) == targets).sum())
            losses.append(loss.detach())
        if samples == 0:
            raise ValueError("there are no batches to train on")
        mean_loss = torch.stack(losses).mean().item()
        if not (mean_loss < DIVERGED and all(weight.isfinite().all() for weight in self.model.parameters())):
            raise FloatingPointError(f"diverged, with a mean loss of {mean_loss:.3g}: the learning rate is too high")
        return int(torch.stack(counts).sum()) / samples

    def _classify(self, images: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(images)  # (B, classes)
        if targets.shape != logits.shape[:1]:  # (B, 1) would be compared with every row, and count more than there is
            raise ValueError(f"expected {len(logits)} targets, one an image, got shape {tuple(targets.shape)}")
        return logits

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        if self.unit_lasso:
            self._pull(optimizer.param_groups[0]["lr"])
        if self.scheduler is not None:
            self.scheduler.step()

    def _next_masks(self) -> Masks | None:
        if self.masks is None:
            return None
        for masks in self.masks:
            return masks
        raise ValueError("there are fewer masks than steps: itertools.repeat(masks) holds the same ones throughout")

    @contextlib.contextmanager
    def _pruned(self, masks: Masks | None) -> Iterator[None]:
        """Prune the weights for the time of a pass; the dense ones come back for the step."""
        if masks is None:
            yield
            return
        parameters = dict(self.model.named_parameters())
        if unknown := masks.keys() - parameters.keys():
            raise ValueError(f"the model has no parameter {', '.join(sorted(unknown))}, which the masks name")
        dense = {parameters[name]: parameters[name].data for name in masks}
        for parameter, weight in dense.items():
            parameter.data = weight.clone()  # 3 ms of a step of 50, and nothing has to be copied back
        try:
            apply_masks(self.model, masks)
            yield
        finally:
            for parameter, weight in dense.items():
                parameter.data = weight
        if not self.straight_through:
            for name, mask in masks.items():
                if (gradient := parameters[name].grad) is not None:  # none where a layer is frozen
                    gradient.mul_(mask)

    @torch.no_grad()
    def _pull(self, learning_rate: float) -> None:
        """Proximal step of the group lasso: every hidden unit's norm shrinks by lr · λ, and no further than 0."""
        for weight in self.hidden_weights:
            norm = l2(weight).clamp_(min=torch.finfo(weight.dtype).tiny)  # (out,), none of them 0
            scale = (1 - learning_rate * self.unit_lasso / norm).clamp_(min=0)
            weight.mul_(scale.view(-1, *[1] * (weight.dim() - 1)))

    @torch.inference_mode()
    def evaluate(self, batches: Batches) -> float:
        """Accuracy in [0, 1] over all samples, computed in the model's own precision. It leaves the model in eval mode.

        Args:
            batches: pairs of images (B, …) and class numbers (B,); B may differ from batch to batch.

        Raises:
            ValueError: no batches, or targets that are not one a logit row.
            RuntimeError: the model cannot take the images.
        """
        self.model.eval()
        counts = []
        samples = 0
        for images, targets in batches:
            counts.append((self._classify(images, targets).argmax(1) == targets).sum())
            samples += len(targets)
        if samples == 0:
            raise ValueError("there are no batches to evaluate")
        return int(torch.stack(counts).sum()) / samples


# ── masks to train through ──


def random_masks(model: nn.Module, steps: int, seed: int) -> Iterator[Masks | None]:
    """Masks of every step for a network that is to stand every k: half of the steps go through a pruned one.

    Half of these are pruned by weights, to 99.5 % at most, half by units, to 97.5 %. What is left is drawn on a
    logarithmic scale, whose depth grows from nothing to all of it in the first half of the steps.
    """
    draw = random.Random(seed)
    for step in range(steps):
        method, least = draw.choice((("weight", 0.005), ("unit", 0.025)))
        left = least ** (draw.random() * min(1.0, 2 * step / steps))
        yield find_masks(model, method, 1 - left) if draw.random() < 0.5 else None


def gradual_masks(model: nn.Module, method: str, sparsity: float, steps: int, **choice: Any) -> Iterator[Masks]:
    """Masks of every step, found anew from the weights that the steps have moved; the sparsity rises as a cubic.

    Args:
        model, method, sparsity, choice: as `prune.find_masks` takes them; the sparsity is that of the end.
        steps: in all; after 70 % of them the sparsity is the final one.

    Source: Zhu and Gupta, "To prune, or not to prune" (2017); pruned weights may come back, as in Guo et al. (2016).
    """
    for step in range(steps):
        rest = max(0.0, 1 - step / (0.7 * steps))
        yield find_masks(model, method, sparsity * (1 - rest**3), **choice)


# ── what saves a second at the start ──


class Adam(torch.optim.Adam):
    """torch's Adam, bit for bit, without what guards it against torch.compile.

    Those guards import the compiler at the first optimizer, which takes over a second of the three from the start of a
    run to its first batch.
    """

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))
