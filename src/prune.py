"""Prune any PyTorch model: find masks of what to remove, apply them, see what each sparsity costs.

This file needs nothing but torch and numpy: copy it beside any notebook. Pruned models stay plain modules, without hooks
or extra parameters. Masks fit ``torch.nn.utils.prune.custom_from_mask``, and a model pruned by ``torch.nn.utils.prune``
gives its masks back with

    {name.removesuffix("_mask"): mask.bool() for name, mask in model.named_buffers() if name.endswith("_mask")}

Prunable are the layers in `LAYERS`. Whatever else has weights (embeddings, normalization, attention's packed
projections) is left alone, and so is a layer whose weight is tied to such a one. A weight that layers share counts once.
"""

import contextlib
import copy
import functools
import itertools
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)

# Scores are ranked in blocks that fit into a CPU core's cache, or that keep a GPU busy.
CPU_BLOCK, GPU_BLOCK = 2**17, 2**24

# Integers of each size in bytes: a weight's bits times its mask are +0.0 even for NaN, ten times faster than masked_fill.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _root_mean_square(weight: Tensor) -> Tensor:
    """Each unit's L2 norm divided by sqrt(fan-in): (units, …) → (units,), in fp32 for half precision.

    Within a layer it ranks as the norm does. The norm of n weights of one scale grows with sqrt(n), so ranked across
    layers, raw norms would favor those with many inputs.

    Source: normalizing each layer's scores before ranking all of them: Molchanov et al., "Pruning Convolutional Neural
    Networks for Resource Efficient Inference" (2017).
    """
    weight = weight.unsqueeze(-1)  # (units, …, 1), so that a vector has a dimension to take the norm over
    fan_in = max(weight[:1].numel(), 1)
    blocks = weight.split(max(CPU_BLOCK // fan_in, 1)) if weight.element_size() < 4 else (weight,)
    norms = [
        torch.linalg.vector_norm(block.to(_widest([block])), dim=tuple(range(1, weight.dim()))) for block in blocks
    ]
    return torch.cat(norms) / math.sqrt(fan_in)


def _random_weight(weight: Tensor) -> Tensor:
    """Scores of weight's shape in (0, 1], but 0 for weights that are zero already."""
    return (1 - torch.rand(weight.shape, dtype=torch.float32, device=weight.device)).masked_fill_(weight == 0, 0)


def _random_unit(weight: Tensor) -> Tensor:
    """Scores of shape (units,) in (0, 1], but 0 for units that are zero already."""
    return _random_weight(weight.flatten(1).any(1))


# The one place to add a criterion: METHODS["mine"] = function. It's given each weight with its outputs in dim 0 (those of
# transposed convolutions, too) and returns scores, the lowest of which are pruned first: of the weight's shape for a
# weight method, of shape (units,) for a unit method. Only magnitudes are ranked without holding all scores in memory.
METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "weight": torch.abs,
    "unit": _root_mean_square,
    "random_weight": _random_weight,
    "random_unit": _random_unit,
}


class SweepPoint(NamedTuple):
    """One point of a sweep; sparsity is what was asked for, achieved the fraction of weights that are zero."""

    sparsity: float
    achieved: float
    score: float
    retrained_score: float | None = None


def weight_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Mask that prunes the weights of lowest magnitude.

    Args:
        weight: any shape, finite, real floating point.
        sparsity: fraction in [0, 1]: exactly ``round(sparsity * weight.numel())`` go, of equal ones the earlier first.

    Returns:
        Boolean tensor of weight's shape, True = keep.

    Raises:
        TypeError: weight isn't a tensor or sparsity not a number.
        ValueError: sparsity is out of range, or weight can't be ranked.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (2015).

    Example:
        >>> weight_mask(torch.tensor([[0.5, -0.1], [-2.0, 0.1]]), sparsity=0.5)
        tensor([[ True, False],
                [ True, False]])
    """
    return _select([_finite("weight", weight)], _checked_sparsity(sparsity), absolute=True)[0]


def unit_mask(weight: Tensor, sparsity: float, dim: int = 0) -> Tensor:
    """Mask that prunes the units of lowest L2 norm.

    Args:
        weight: one dimension or more, finite, real floating point.
        sparsity: fraction in [0, 1]: exactly ``round(sparsity * weight.shape[dim])`` go, of equal ones the earlier first.
        dim: the dimension that counts the units: 0 for a Linear's (out, in), which has them in rows.

    Returns:
        Boolean tensor of weight's shape, True = keep, the same throughout a unit.

    Raises:
        TypeError: weight isn't a tensor, sparsity not a number or dim not an integer.
        ValueError: sparsity or dim is out of range, or weight can't be ranked.

    Source: Li et al., "Pruning Filters for Efficient ConvNets" (2017), here with the L2 norm.

    Example:
        >>> unit_mask(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), sparsity=0.5)
        tensor([[ True,  True],
                [False, False]])
    """
    weight = _finite("weight", weight)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an integer, got {dim!r}")
    if not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"dim must be one of the weight's {weight.dim()} dimensions, got {dim}")
    units_first = weight.movedim(dim, 0)
    (keep,) = _select([_root_mean_square(units_first)], _checked_sparsity(sparsity))
    return _expanded(keep, units_first).movedim(0, dim).contiguous()


def find_masks(
    model: nn.Module,
    method: str,
    sparsity: float,
    *,
    scope: str = "layer",
    skip: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Masks that prune a model, which stays as it is.

    Args:
        model: any module; the wrappers of torch.compile and DataParallel are looked through.
        method: a name in `METHODS`.
        sparsity: fraction in [0, 1] of the weights or units, those included that are zero already. Exactly
            ``round(sparsity * n)`` go; a larger sparsity prunes a superset.
        scope: "layer" ranks within each layer, "global" across all of them.
        skip: names of the layers to spare; () spares none. None spares the last prunable one in order of registration,
            since without some of its units the model would lack outputs.
        generator: where methods that draw random numbers get them from; None: torch's global generators.

    Returns:
        Masks by parameter name ("fc1.weight"), True = keep. Unit methods mask biases, too ("fc1.bias"); a BatchNorm
        behind a pruned unit still emits its shift.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; the model has no prunable layer, or only one and `skip` is None; a
            weight can't be ranked (lazy, meta, sparse, integer, complex, not finite, computed from other parameters).

    Warns:
        UserWarning: a layer loses all its weights.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> masks = find_masks(model, "unit", sparsity=1 / 3)
        >>> {name: mask.count_nonzero().item() for name, mask in masks.items()}
        {'0.weight': 8, '0.bias': 2}
    """
    sparsity = _checked_sparsity(sparsity)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    if scope not in ("layer", "global"):
        raise ValueError(f"unknown scope {scope!r}: expected layer or global")
    weights = _weights(model, skip)
    for each in weights:
        _finite(each.name, each.tensor)
    absolute = METHODS[method] is torch.abs
    with _seeded(generator, weights):
        scores = (each.outputs_first if absolute else _scored(each, METHODS[method]) for each in weights)
        groups = [list(scores)] if scope == "global" else ([one] for one in scores)
        keeps = [keep for group in groups for keep in _select(group, sparsity, absolute)]
    empty = [each.name for each, keep in zip(weights, keeps, strict=True) if _is_empty(keep)]
    if empty:
        warnings.warn(f"pruning leaves nothing of {', '.join(empty)}", stacklevel=2)
    return {name: mask for each, keep in zip(weights, keeps, strict=True) for name, mask in each.masks(keep)}


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set what masks prune to zero, in place: all of it, or none after an error.

    Call it after every ``optimizer.step()`` to hold the pruned weights at zero.

    Args:
        model: any module; the wrappers of torch.compile and DataParallel are looked through.
        masks: boolean tensors by parameter name, True = keep, of the parameter's shape, on any device.

    Raises:
        TypeError: masks isn't a mapping of names to boolean tensors.
        ValueError: the model has no such parameter, or one of another shape.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> apply_masks(model, {"weight": torch.tensor([[True, False]])})
        >>> model.weight.count_nonzero().item()
        1
    """
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks must be a dict of boolean tensors by parameter name, got {type(masks).__name__}")
    parameters = {
        _joined(layer, name): parameter
        for layer, module in _modules(model)
        for name, parameter in module.named_parameters(recurse=False)
    }
    found = []
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name!r}; it has {', '.join(parameters) or 'none'}")
        parameter = _dense(name, parameters[name])
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"the mask of {name} must be a boolean tensor (True = keep), got {kind}")
        if mask.shape != parameter.shape or mask.is_meta or mask.layout is not torch.strided:
            raise ValueError(f"the mask of {name} must be a dense {tuple(parameter.shape)}, got {tuple(mask.shape)}")
        found.append((parameter.view(BITS[parameter.element_size()]), mask))
    for bits, mask in found:
        bits.mul_(mask.to(bits.device))


def prune_model(
    model: nn.Module,
    method: str,
    sparsity: float,
    *,
    scope: str = "layer",
    skip: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A pruned deep copy of a model. Arguments, errors and warnings are those of `find_masks`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> pruned = prune_model(model, "weight", sparsity=0.75)
        >>> achieved_sparsity(pruned), achieved_sparsity(model)
        (0.75, 0.0)
    """
    masks = find_masks(model, method, sparsity, scope=scope, skip=skip, generator=generator)
    pruned = copy.deepcopy(model)
    apply_masks(pruned, masks)
    return pruned


def achieved_sparsity(model: nn.Module, *, skip: Sequence[str] | None = None) -> float:
    """Fraction in [0, 1] of the weights that are zero, in the layers that aren't spared.

    Args:
        model: any module, pruned or not.
        skip: names of the layers to leave out, as in `find_masks`.

    Raises:
        TypeError, ValueError: as `find_masks`.

    Example:
        >>> achieved_sparsity(nn.Linear(4, 4), skip=())
        0.0
    """
    tensors = [weight.tensor for weight in _weights(model, skip)]
    total = sum(tensor.numel() for tensor in tensors)
    return 1 - sum(int(tensor.count_nonzero()) for tensor in tensors) / total if total else 0.0


def sweep(
    model: nn.Module,
    method: str,
    sparsities: Iterable[float],
    score: Callable[[nn.Module], float],
    *,
    scope: str = "layer",
    skip: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
    retrain: Callable[[nn.Module, dict[str, Tensor]], None] | None = None,
) -> list[SweepPoint]:
    """Prune and score copies of a model at several sparsities, each from the same dense model, which stays as it is.

    Args:
        model, method, scope, skip: as in `find_masks`.
        sparsities: fractions in [0, 1], in any order.
        score: what to ask of each pruned copy, such as its accuracy.
        generator: as in `find_masks`; all points share one draw, so that larger sparsities prune supersets.
        retrain: trains a copy in place, holding its masks with `apply_masks`; the copy is then scored again.

    Returns:
        A point for each sparsity, in the same order.

    Raises:
        TypeError, ValueError: as `find_masks`, before anything is scored.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [point.achieved for point in sweep(model, "weight", [0.25, 0.75], score=lambda pruned: 0.0)]
        [0.25, 0.75]
    """
    if isinstance(sparsities, str) or not isinstance(sparsities, Iterable):
        raise TypeError(f"sparsities must be several numbers in [0, 1], got {sparsities!r}")
    if not callable(score) or not (retrain is None or callable(retrain)):
        raise TypeError(f"score and retrain must be functions, got {score!r} and {retrain!r}")
    sparsities = [_checked_sparsity(sparsity) for sparsity in sparsities]
    seed = _drawn(generator)
    points = []
    for sparsity in sparsities:
        draw = torch.Generator().manual_seed(seed)
        masks = find_masks(model, method, sparsity, scope=scope, skip=skip, generator=draw)
        pruned = copy.deepcopy(model)
        apply_masks(pruned, masks)
        point = SweepPoint(sparsity, achieved_sparsity(pruned, skip=skip), score(pruned))
        if retrain is not None:
            retrain(pruned, masks)
            point = point._replace(retrained_score=score(pruned))
        points.append(point)
    return points


def _checked_sparsity(sparsity: float) -> float:
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise TypeError(f"sparsity must be a number in [0, 1], got {sparsity!r}")
    if not 0 <= sparsity <= 1:
        hint = f": did you mean {sparsity / 100:g}?" if 1 < sparsity <= 100 else ""
        raise ValueError(f"sparsity must be a fraction in [0, 1], got {sparsity:g}{hint}")
    return float(sparsity)


def _dense(name: str, tensor: Any) -> Tensor:
    """The tensor, detached, if it's one that can be pruned."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if nn.parameter.is_lazy(tensor):
        raise ValueError(f"{name} has no shape yet: run a batch through its lazy layer first")
    if tensor.is_meta:
        raise ValueError(f"{name} has no values: it is on the meta device")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} must be dense, got {tensor.layout}: convert it with to_dense()")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be real floating point, got {tensor.dtype}")
    return tensor.detach()


def _finite(name: str, weight: Any) -> Tensor:
    weight = _dense(name, weight)
    # A sum takes a tenth of isfinite's time. It may overflow for finite weights, too, so isfinite has the last word.
    if not weight.sum(dtype=_widest([weight])).isfinite() and not weight.isfinite().all():
        raise ValueError(f"{name} must be finite, but has NaN or infinite weights")
    return weight


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The smallest type from fp32 up that holds the values of all."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def _drawn(generator: torch.Generator | None) -> int:
    """A seed, drawn from torch's global generator if none is given."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


def _modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with the name that the user gave it: wrappers of torch.compile and DataParallel add none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers) or "_orig_mod" in model._modules:
        model = next(model.children())
    yield name, model
    for child, module in model._modules.items():
        if module is not None:
            yield from _modules(module, _joined(name, child))


@dataclass
class _Weight:
    """A prunable weight, with the layers that share it."""

    name: str
    tensor: Tensor
    groups: int  # of a transposed convolution, whose weight is (in, out / groups, …); otherwise 0
    layers: list[str] = field(default_factory=list)
    biases: dict[int, str] = field(default_factory=dict)  # by identity: a shared layer has several names

    def _swapped(self, tensor: Tensor) -> Tensor:
        """(in, out / groups, …) → (out, in / groups, …), and back."""
        return tensor.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1) if self.groups else tensor

    @property
    def outputs_first(self) -> Tensor:
        return self._swapped(self.tensor)

    def masks(self, keep: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Masks by parameter name from one of shape (units,), or of the weight's shape with its outputs first."""
        yield self.name, self._swapped(_expanded(keep, self.outputs_first)).contiguous()
        if keep.dim() == 1:
            yield from ((bias, keep) for bias in self.biases.values())


def _expanded(keep: Tensor, weight: Tensor) -> Tensor:
    """A mask of weight's shape from one of shape (units,)."""
    return keep[(..., *[None] * (weight.dim() - keep.dim()))].expand_as(weight)


def _weights(model: nn.Module, skip: Sequence[str] | None) -> list[_Weight]:
    """The weights to prune, in order of registration."""
    found: dict[int, _Weight] = {}
    elsewhere: set[int] = set()
    names = []
    for name, module in _modules(model):
        own = dict(module.named_parameters(recurse=False))
        if not isinstance(module, LAYERS):
            elsewhere.update(map(id, own.values()))
            continue
        names.append(name)
        tensor: Any = own.get("weight", module)  # the layer itself stands for a weight that is no parameter
        groups = module.groups if isinstance(module, TRANSPOSED) else 0
        weight = found.setdefault(id(tensor), _Weight(_joined(name, "weight"), tensor, groups))
        weight.layers.append(name)
        if "bias" in own:
            weight.biases.setdefault(id(own["bias"]), _joined(name, "bias"))
    prunable = [weight for key, weight in found.items() if key not in elsewhere]
    if not prunable:
        raise ValueError(f"the model has no prunable layer: none of {', '.join(kind.__name__ for kind in LAYERS)}")
    if skip is None and len(prunable) == 1 and names[-1] in prunable[0].layers:
        raise ValueError(f"the model's only prunable layer, {names[-1]!r}, is spared by default: pass skip=()")
    spared = {names[-1]} if skip is None else _checked_skip(skip, names)
    weights = [weight for weight in prunable if spared.isdisjoint(weight.layers)]
    for weight in weights:
        if isinstance(weight.tensor, nn.Module):
            cure = "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
            raise ValueError(f"{weight.name} is computed from other parameters: make it one itself, as {cure} do")
        weight.tensor = _dense(weight.name, weight.tensor)
    return weights


def _checked_skip(skip: Sequence[str], names: Sequence[str]) -> set[str]:
    if isinstance(skip, str) or not isinstance(skip, Iterable):
        raise TypeError(f"skip must be several names of layers, such as ({skip!r},), got {skip!r}")
    for name in skip:
        if name not in names:
            raise ValueError(f"skip: the model has no prunable layer {name!r}; it has {', '.join(names)}")
    return set(skip)


@contextlib.contextmanager
def _seeded(generator: torch.Generator | None, weights: Iterable[_Weight]) -> Iterator[None]:
    """If a generator is given, torch's global ones draw from a seed of it and are afterwards as they were."""
    if generator is None:
        yield
        return
    devices = sorted({weight.tensor.device.index for weight in weights if weight.tensor.is_cuda})
    with torch.random.fork_rng(devices):
        seed = _drawn(generator)
        for each in (torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)):
            each.manual_seed(seed)
        yield


def _scored(weight: _Weight, score: Callable[[Tensor], Tensor]) -> Tensor:
    tensor = weight.outputs_first
    scores = score(tensor)
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError(f"the scores of {weight.name} must be a floating-point tensor, got {scores!r:.80}")
    if scores.shape not in (tensor.shape, tensor.shape[:1]):
        shapes = f"{tuple(tensor.shape)} or {tuple(tensor.shape[:1])}"
        raise ValueError(f"the scores of {weight.name} must have shape {shapes}, got {tuple(scores.shape)}")
    if scores.isnan().any():
        raise ValueError(f"the scores of {weight.name} contain NaN")
    return scores.detach()


def _select(scores: Sequence[Tensor], sparsity: float, absolute: bool = False) -> list[Tensor]:
    """Masks that prune exactly round(sparsity * n) of n scores: the lowest, of equal ones the earlier first.

    With `absolute`, magnitudes of the scores are ranked, taken block by block.
    """
    total = sum(each.numel() for each in scores)
    count = round(sparsity * total)
    if count in (0, total):
        return [torch.full(each.shape, count == 0, device=each.device) for each in scores]
    blocks = functools.partial(_blocks, dtype=_widest(scores), absolute=absolute)
    value, ties = _threshold(scores, count, blocks)
    masks = []
    for each in scores:
        on_cpu = each.device.type == "cpu"
        # NumPy asks for huge pages, which makes a large new array several times cheaper to fill.
        mask: Any = np.empty(each.numel(), bool) if on_cpu else torch.empty_like(each, dtype=torch.bool).view(-1)
        start = 0
        for block in blocks(each):
            keep = mask[start : start + len(block)]
            keep[...] = block > value
            equal = block == value
            if (tied := _count(equal)) > ties:
                keep |= equal & (equal.cumsum(0) > ties)
            ties = max(ties - tied, 0)
            start += len(block)
        masks.append(torch.as_tensor(mask).view(each.shape))
    return masks


def _blocks(scores: Tensor, dtype: torch.dtype, absolute: bool) -> Iterator[Any]:
    """Scores in blocks: NumPy arrays on the CPU, where they are ranked faster, tensors elsewhere."""
    on_cpu = scores.device.type == "cpu"
    for block in scores.reshape(-1).split(CPU_BLOCK if on_cpu else GPU_BLOCK):
        block = block.to(dtype)
        block = block.numpy() if on_cpu else block
        yield abs(block) if absolute else block


def _count(flags: Any) -> int:
    return int(np.count_nonzero(flags) if isinstance(flags, np.ndarray) else flags.count_nonzero())


def _threshold(scores: Sequence[Tensor], count: int, blocks: Callable[[Tensor], Iterator[Any]]) -> tuple[float, int]:
    """The count-th lowest score, and how many of those equal to it are among the count lowest.

    A random sample gives a narrow range that all but surely holds it. One pass then counts what lies below the range
    and takes out what lies in it; should the sample have misled, the range is widened.

    Source: Floyd and Rivest, "Expected Time Bounds for Selection" (1975).
    """
    total = sum(each.numel() for each in scores)
    fraction = 1.0 if total <= 2**14 else total ** (-1 / 3)
    random = np.random.default_rng(0)
    sample = np.sort(
        np.concatenate([_at_hand(block) for each in scores for block in blocks(_drawn_from(each, fraction, random))])
    )
    rank = (count - 1) * len(sample) / total
    margin = 0.0 if fraction == 1 else 4 * math.sqrt(rank * (1 - count / total)) + 4  # 4 standard deviations
    while True:
        first, last = math.floor(rank - margin), math.ceil(rank + margin)
        low = float(sample[first]) if first >= 0 else -math.inf
        high = float(sample[last]) if last < len(sample) else math.inf
        below, at_low, between, at_high = _split(scores, low, high, blocks)
        rest = count - below
        if 0 < rest <= at_low + len(between) + at_high:
            break
        margin = 8 * (margin + 1)
    if rest <= at_low:
        return low, rest
    rest -= at_low
    if rest > len(between):
        return high, rest - len(between)
    value = float(np.partition(between, rest - 1)[rest - 1])
    return value, rest - _count(between < value)


def _drawn_from(scores: Tensor, fraction: float, random: np.random.Generator) -> Tensor:
    """About that fraction of the scores, drawn at random; for 1 all of them."""
    if fraction == 1:
        return scores
    picks = random.integers(scores.numel(), size=random.binomial(scores.numel(), fraction))
    return scores.reshape(-1)[torch.from_numpy(picks).to(scores.device)]


def _split(
    scores: Sequence[Tensor], low: float, high: float, blocks: Callable[[Tensor], Iterator[Any]]
) -> tuple[int, int, np.ndarray, int]:
    """How many scores are below low, how many equal it, those between it and high, and how many equal high."""
    below = at_low = within = 0
    between = []
    for block in itertools.chain.from_iterable(map(blocks, scores)):
        under = block < low
        inside = _at_hand(block[(block <= high) ^ under])
        below += _count(under)
        within += len(inside)
        at_low += _count(inside == low)
        between.append(inside[(inside > low) & (inside < high)])  # ties may be too many to hold
    found = np.concatenate(between)
    return below, at_low, found, within - at_low - len(found)


def _at_hand(block: Any) -> np.ndarray:
    return block if isinstance(block, np.ndarray) else block.cpu().numpy()


def _is_empty(keep: Tensor) -> bool:
    """Whether a mask keeps nothing, though there was something to keep."""
    return keep.numel() > 0 and not (keep.numpy() if keep.device.type == "cpu" else keep).any()
