"""Training and evaluation: one epoch at a time, over batches that are already on the model's device."""

import inspect
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LRScheduler

from prune import apply_masks
from utils import l2

Batches = Iterable[tuple[Tensor, Tensor]]
DIVERGED = 1000.0  # nats: the right class at e^-1000, on average over an epoch; no training comes back from there


class Adam(torch.optim.Adam):
    """torch's Adam, less what guards it against torch.compile: that imports the compiler, which takes over a second."""

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class Engine:
    """Trains and evaluates a classifier.

    Args:
        model: maps images (B, …) to logits (B, classes).
        optimizer: over the model's parameters; needed for training alone.
        scheduler: stepped once a batch.
        masks: parameter name → mask, as `prune.find_masks` returns them: pruned weights are zero from the start of
            training on, and put back to zero after every step, whatever momentum and weight decay do to them.
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
        masks: Mapping[str, Tensor] | None = None,
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
        self.masks = masks
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
            ValueError: no optimizer, no batches, or targets that are not one a logit row.
            IndexError, RuntimeError: as `loss`, or as the model on images that it cannot take.
        """
        if self.optimizer is None:
            raise ValueError("training needs an optimizer: Engine(model, optimizer)")
        self.model.train()
        self._hold()
        counts = []  # left on the device: reading one would make the CPU wait for every step
        losses = []
        samples = 0
        for images, targets in batches:
            with torch.autocast(images.device.type, self.precision, enabled=self.precision != torch.float32):
                logits = self._classify(images, targets)  # (B, classes)
            loss = self.loss(logits, targets)
            self.optimizer.zero_grad()
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
        self._hold()

    def _hold(self) -> None:
        if self.masks is not None:
            apply_masks(self.model, self.masks)

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
