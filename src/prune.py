"""Prune any PyTorch model: which weights or units to remove (masks), removing them, and what each sparsity costs.

This file needs nothing but torch and numpy, so it can be copied beside any notebook. Pruned models stay plain modules:
no hooks, no extra parameters. A mask is boolean, True = keep, and fits ``torch.nn.utils.prune.custom_from_mask``; a
model pruned by ``torch.nn.utils.prune`` gives its masks back with

    {name.removesuffix("_mask"): mask.bool() for name, mask in model.named_buffers() if name.endswith("_mask")}

Prunable layers are those of `LAYERS`. Embeddings, normalization layers and everything else that has weights are left
alone, and so is a layer whose weight is tied to one of theirs. A weight shared by several layers counts once.
"""

import copy
import functools
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

# Selection walks over scores in blocks that stay in a CPU core's cache, and are few enough for a GPU.
CPU_BLOCK, GPU_BLOCK = 2**17, 2**26

# Multiplying a weight's bit pattern by its mask gives +0.0 for anything, NaN too, at a tenth of masked_fill_'s time.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Score = Callable[[Tensor], Tensor]


def _root_mean_square(weight: Tensor) -> Tensor:
    """Root mean square of each unit's weights: the unit's L2 norm divided by sqrt(fan-in).

    Within a layer it ranks as the L2 norm does. Across layers it doesn't favour those with many inputs: the norm of n
    weights of one scale grows with sqrt(n).

    Args:
        weight: (units, …) of any floating-point dtype.

    Returns:
        (units,) scores, in fp32 for half-precision weights.

    Source: scales of layers must be normalized before they are ranked together: Molchanov et al., "Pruning
    Convolutional Neural Networks for Resource Efficient Inference" (2017), section 2.2; the L2 norm of units: He et
    al., "Soft Filter Pruning" (2018).
    """
    weight = weight.unsqueeze(-1)  # (units, …, 1): a vector's units have a dimension to be summed over, too
    fan_in = max(weight[:1].numel(), 1)
    norm = functools.partial(torch.linalg.vector_norm, dim=tuple(range(1, weight.dim())))
    if weight.element_size() >= 4:
        return norm(weight) / math.sqrt(fan_in)
    blocks = weight.split(max(CPU_BLOCK // fan_in, 1))  # half precision would round norms into ties
    return torch.cat([norm(block.float()) for block in blocks]) / math.sqrt(fan_in)


def _random_weight(weight: Tensor) -> Tensor:
    """Random scores in (0, 1] of weight's shape; weights that are zero already get 0 and so go first."""
    draws = torch.rand(weight.shape, dtype=torch.float32, device=weight.device)
    return (1 - draws).masked_fill_(weight == 0, 0)


def _random_unit(weight: Tensor) -> Tensor:
    """Random scores in (0, 1] of shape (units,); units that are all zero already get 0 and so go first."""
    draws = torch.rand(len(weight), dtype=torch.float32, device=weight.device)
    return (1 - draws).masked_fill_(~weight.flatten(1).any(1), 0)


# The one place to add a criterion: ``METHODS["mine"] = function``. It gets a weight whose dim 0 is its outputs (also for
# transposed convolutions) and returns what the lowest of is pruned first: scores of the weight's shape for a weight
# method, (units,) for a unit method, never NaN. It may be called more than once on a weight, seeded alike each time.
METHODS: dict[str, Score] = {
    "weight": torch.abs,
    "unit": _root_mean_square,
    "random_weight": _random_weight,
    "random_unit": _random_unit,
}


class SweepPoint(NamedTuple):
    """One point of a sweep: what was asked for, what was reached, and what the model then scored."""

    sparsity: float  # in [0, 1], of weights or of units as the method has it
    achieved: float  # zeros / weights in [0, 1]
    score: float
    retrained_score: float | None = None


def weight_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Mask that prunes the weights of smallest magnitude.

    Args:
        weight: any shape, floating point, finite.
        sparsity: fraction in [0, 1] to prune: exactly ``round(sparsity * weight.numel())`` weights, of equal ones
            the earlier first.

    Returns:
        Boolean mask of weight's shape on its device, True = keep.

    Raises:
        TypeError: weight is no tensor, sparsity no number.
        ValueError: sparsity is outside [0, 1], or weight can't be ranked (NaN, infinite, integer, complex, …).

    Source: magnitude pruning, Han et al., "Learning both Weights and Connections" (2015).

    Example:
        >>> weight_mask(torch.tensor([[0.5, -0.1], [-2.0, 0.1]]), sparsity=0.5)
        tensor([[ True, False],
                [ True, False]])
    """
    sparsity = _checked_sparsity(sparsity)
    weight = _checked_weight("weight", weight)
    return _select([_Scores(weight, torch.abs)], sparsity)[0]


def unit_mask(weight: Tensor, sparsity: float, dim: int = 0) -> Tensor:
    """Mask that prunes the units of smallest L2 norm.

    Args:
        weight: one dimension or more, floating point, finite.
        sparsity: fraction in [0, 1] to prune: exactly ``round(sparsity * weight.shape[dim])`` units, of equal ones
            the earlier first.
        dim: the dimension that counts units: 0 for the (out, in) weight of a Linear.

    Returns:
        Boolean mask of weight's shape on its device, True = keep; constant within a unit.

    Raises:
        TypeError: weight is no tensor, sparsity no number, dim no whole number.
        ValueError: sparsity is outside [0, 1], dim isn't one of weight's, or weight can't be ranked.

    Source: Li et al., "Pruning Filters for Efficient ConvNets" (2017), with the L2 norm.

    Example:
        >>> unit_mask(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), sparsity=0.5)
        tensor([[ True,  True],
                [False, False]])
    """
    sparsity = _checked_sparsity(sparsity)
    weight = _checked_weight("weight", weight)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be a whole number, got {dim!r}")
    if not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"dim must be in [{-weight.dim()}, {weight.dim()}), got {dim}")
    units_first = weight.movedim(dim, 0)
    keep = _select([_Scores(units_first, _root_mean_square)], sparsity)[0]
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
    """Masks that prune a model; the model itself stays as it is.

    Args:
        model: any module; wrappers of torch.compile and DataParallel are looked through.
        method: a name in `METHODS`.
        sparsity: fraction in [0, 1] of the weights (or units) to prune, those that are zero already included. Exactly
            ``round(sparsity * n)`` go, and a larger sparsity prunes a superset.
        scope: "layer" ranks within each layer, "global" across all of them.
        skip: names of layers to spare. None spares the last prunable layer in order of registration, as its units are
            the model's outputs; () spares none.
        generator: seeds methods that draw random numbers, on whatever device; None takes one number from torch's
            global generator instead.

    Returns:
        Masks by parameter name, such as "fc1.weight", True = keep, without the wrappers' prefixes. A unit method masks
        biases, too ("fc1.bias"). A BatchNorm behind a pruned unit still emits its shift.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, a model without prunable layers or with one alone and no `skip`, or a
            weight that can't be ranked (lazy, meta, sparse, integer, complex, NaN, reparametrized).

    Warns:
        UserWarning: a layer loses everything.

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
    for weight in weights:
        _check_finite(weight.name, weight.tensor)
    seed = _drawn(generator)
    together = scope == "global"
    scores = [
        _Scores(weight.units_first(), METHODS[method], seed + number, keep=not together, name=weight.name)
        for number, weight in enumerate(weights)
    ]
    groups = [scores] if together else [[each] for each in scores]
    keeps = [keep for group in groups for keep in _select(group, sparsity)]
    _warn_of_empty(weights, keeps)
    masks = {}
    for weight, keep in zip(weights, keeps, strict=True):
        masks |= weight.masks(keep)
    return masks


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set what the masks prune to zero, in place: all of them, or after an error none.

    Pruned weights stay zero in training if it's called after every ``optimizer.step()``.

    Args:
        model: the model that the masks were made for, or one of the same layout.
        masks: boolean masks (True = keep) by parameter name, on any device, each of its parameter's shape.

    Raises:
        TypeError: masks is no mapping of names to boolean tensors.
        ValueError: a name that the model doesn't have, or a mask of another shape.

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
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name!r}: it has {', '.join(parameters) or 'none'}")
        _check_mask(name, mask, parameters[name])
    for name, mask in masks.items():
        bits = parameters[name].detach().view(BITS[parameters[name].element_size()])
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
    """A pruned deep copy of a model: `find_masks`, then `apply_masks` on the copy.

    Args, Raises, Warns: as `find_masks`.

    Returns:
        A model of the same class and layout, with zeros where it was pruned.

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
    """Fraction of zeros among the weights of the layers that aren't spared.

    Args:
        model: any module, pruned or not.
        skip: names of layers to leave out, as in `find_masks`.

    Returns:
        zeros / weights in [0, 1]; 0 if there are no weights.

    Raises:
        TypeError, ValueError: as `find_masks`.

    Example:
        >>> achieved_sparsity(prune_model(nn.Linear(10, 10), "unit", 0.3, skip=()), skip=())
        0.3
    """
    weights = [weight.tensor for weight in _weights(model, skip)]
    total = sum(weight.numel() for weight in weights)
    kept = sum(int(weight.count_nonzero()) for weight in weights)
    return (total - kept) / total if total else 0.0


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
    """Score pruned copies of a model, each pruned from the same dense one, which stays as it is.

    Args:
        model, method, scope, skip: as in `find_masks`.
        sparsities: fractions in [0, 1], in any order.
        score: what to ask of each copy, such as its accuracy.
        generator: as in `find_masks`; every point uses the same draw, so that the masks of larger sparsities contain
            those of smaller ones.
        retrain: trains a pruned copy in place, holding the masks it is given; then the copy is scored again.

    Returns:
        One point a sparsity, in their order.

    Raises:
        TypeError, ValueError: as `find_masks`, before anything is scored.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> points = sweep(model, "weight", [0, 0.5, 0.75], score=lambda pruned: achieved_sparsity(pruned))
        >>> [point.score for point in points]
        [0.0, 0.5, 0.75]
    """
    if isinstance(sparsities, numbers.Real | str) or not isinstance(sparsities, Iterable):
        raise TypeError(f"sparsities must be a list of fractions in [0, 1], got {sparsities!r}")
    checked = [_checked_sparsity(sparsity) for sparsity in sparsities]
    for name, function in (("score", score), ("retrain", retrain)):
        if not (callable(function) or (name == "retrain" and function is None)):
            raise TypeError(f"{name} must be a function, got {function!r}")
    seed = _drawn(generator)
    points = []
    for sparsity in checked:
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
    sparsity = float(sparsity)
    if not 0 <= sparsity <= 1:
        hint = f": did you mean {sparsity / 100:g}?" if 1 < sparsity <= 100 else ""
        raise ValueError(f"sparsity must be a fraction in [0, 1], got {sparsity:g}{hint}")
    return sparsity


def _check_values(name: str, tensor: object) -> None:
    """Raise unless it's a dense tensor that has values."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        raise ValueError(f"{name} has no shape yet: run a batch through the lazy layer first")
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} must be dense, got {tensor.layout}: to_dense() makes it so")


def _check_weight(name: str, weight: object) -> None:
    _check_values(name, weight)
    if not weight.is_floating_point():
        raise ValueError(f"{name} must be real floating point, got {weight.dtype}")


def _check_finite(name: str, weight: Tensor) -> None:
    # A sum takes a tenth of isfinite's time; if large weights make it infinite, isfinite has the last word.
    if not weight.sum(dtype=_common_dtype([weight])).isfinite() and not weight.isfinite().all():
        raise ValueError(f"{name} has NaN or infinite weights")


def _check_mask(name: str, mask: object, parameter: Tensor) -> None:
    _check_weight(name, parameter)
    _check_values(f"the mask of {name}", mask)
    if mask.dtype is not torch.bool:
        raise TypeError(f"the mask of {name} must be boolean (True = keep), got {mask.dtype}: convert with bool()")
    if mask.shape != parameter.shape:
        raise ValueError(f"the mask of {name} must have shape {tuple(parameter.shape)}, got {tuple(mask.shape)}")


def _drawn(generator: torch.Generator | None) -> int:
    """A seed from the generator, or else from torch's global one."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


def _modules(model: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    """All modules with the names that the user gave them: the wrappers of torch.compile and DataParallel add none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers) or "_orig_mod" in model._modules:
        model = next(model.children())
    children = ((_joined(name, child), module) for child, module in model._modules.items() if module is not None)
    return [(name, model), *(found for child, module in children for found in _modules(module, child))]


@dataclass
class _Weight:
    """A prunable weight and the layers that share it."""

    name: str
    tensor: Tensor
    groups: int  # of a transposed convolution, whose weight is (in, out / groups, …); else 0
    layers: list[str] = field(default_factory=list)
    biases: dict[int, str] = field(default_factory=dict)  # by identity, as a layer may have several names

    def swapped(self, tensor: Tensor) -> Tensor:
        """From the weight's own layout to outputs first, and back again."""
        if not self.groups:
            return tensor
        return tensor.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)  # (out, in / groups, …)

    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        """Masks by parameter name, from one of the weight's shape with outputs first, or of shape (units,)."""
        outputs_first = self.swapped(self.tensor)
        masks = {self.name: self.swapped(_expanded(keep, outputs_first)).contiguous()}
        if keep.dim() == 1:
            masks |= dict.fromkeys(self.biases.values(), keep)
        return masks


def _expanded(keep: Tensor, weight: Tensor) -> Tensor:
    """A mask of weight's shape from one of shape (units,)."""
    return keep if keep.shape == weight.shape else keep[(..., *[None] * (weight.dim() - 1))].expand_as(weight)


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
        tensor = own.get("weight", module)  # the module stands for a weight that torch computes from others
        groups = module.groups if isinstance(module, TRANSPOSED) else 0
        weight = found.setdefault(id(tensor), _Weight(_joined(name, "weight"), tensor, groups))
        weight.layers.append(name)
        if "bias" in own:
            weight.biases.setdefault(id(own["bias"]), _joined(name, "bias"))
    prunable = [weight for key, weight in found.items() if key not in elsewhere]
    spared = _spared(skip, names, prunable)
    weights = [weight for weight in prunable if spared.isdisjoint(weight.layers)]
    for weight in weights:
        if isinstance(weight.tensor, nn.Module):
            raise ValueError(
                f"{weight.name} is computed from other parameters: make it one of its own first, for instance with "
                "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
            )
        _check_weight(weight.name, weight.tensor)
        weight.tensor = weight.tensor.detach()
    return weights


def _spared(skip: Sequence[str] | None, names: list[str], prunable: list[_Weight]) -> set[str]:
    if not prunable:
        kinds = ", ".join(kind.__name__ for kind in LAYERS)
        raise ValueError(f"the model has no prunable layer: none of {kinds}")
    if skip is None:
        if len(prunable) == 1 and names[-1] in prunable[0].layers:
            raise ValueError(f"the model has one prunable layer, {names[-1]!r}: pass skip=() to prune it")
        return {names[-1]}
    if isinstance(skip, str) or not isinstance(skip, Iterable):
        raise TypeError(f"skip must be a sequence of layer names, such as ({skip!r},), got {skip!r}")
    for name in skip:
        if name not in names:
            raise ValueError(f"skip: the model has no prunable layer {name!r}: it has {', '.join(names)}")
    return set(skip)


def _common_dtype(tensors: Iterable[Any]) -> torch.dtype:
    """The smallest type from fp32 up that holds all of them exactly."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def _seeded(score: Score, weight: Tensor, seed: int) -> Tensor:
    """Scores drawn from torch's generators as `seed` sets them; the generators are left as they were."""
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        torch.default_generator.manual_seed(seed)
        if weight.is_cuda:
            torch.cuda.default_generators[weight.device.index].manual_seed(seed)
        return score(weight)


class _Scores:
    """The scores of one weight, handed out in blocks: NumPy arrays on the CPU, where they are faster, else tensors.

    Magnitudes are taken block by block. Other scores of a weight's shape are made anew at each use unless they are
    to be kept: a global ranking holds one layer's at a time.
    """

    def __init__(self, weight: Tensor, score: Score, seed: int = 0, keep: bool = True, name: str = "weight") -> None:
        self.absolute = score is torch.abs
        self.make = functools.partial(_seeded, score, weight, seed)
        made = weight if self.absolute else self.make()
        if not isinstance(made, Tensor) or not made.is_floating_point():
            raise TypeError(f"the scores of {name} must be a floating-point tensor, got {made!r:.80}")
        if made.shape not in (weight.shape, weight.shape[:1]):
            shapes = f"{tuple(weight.shape)} or {tuple(weight.shape[:1])}"
            raise ValueError(f"the scores of {name} must have shape {shapes}, got {tuple(made.shape)}")
        if not self.absolute and made.isnan().any():
            raise ValueError(f"the scores of {name} contain NaN")
        self.shape, self.dtype, self.device = made.shape, made.dtype, made.device
        self.kept = made if keep or self.absolute or made.dim() == 1 else None

    def flat(self) -> Tensor:
        return (self.make() if self.kept is None else self.kept).detach().reshape(-1)

    def blocks(self, dtype: torch.dtype) -> Iterator[Any]:
        on_cpu = self.device.type == "cpu"
        for block in self.flat().split(CPU_BLOCK if on_cpu else GPU_BLOCK):
            block = block.to(dtype)
            block = block.numpy() if on_cpu else block
            yield abs(block) if self.absolute else block

    def sample(self, fraction: float, dtype: torch.dtype, random: np.random.Generator) -> np.ndarray:
        """About that fraction of the scores, drawn with replacement; all of them for 1."""
        flat = self.flat()
        if fraction < 1:
            drawn = random.integers(len(flat), size=random.binomial(len(flat), fraction))
            flat = flat[torch.from_numpy(drawn).to(self.device)]
        sample = flat.to(dtype).cpu().numpy()
        return abs(sample) if self.absolute else sample

    def mask(self, value: float, ties: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """Keep what scores above value, and what equals it but for the first ties; returns how many ties are left."""
        on_cpu = self.device.type == "cpu"
        size = self.shape.numel()
        # NumPy asks for huge pages, which makes a big new array much cheaper to fill.
        keep: Any = np.empty(size, bool) if on_cpu else torch.empty(size, dtype=torch.bool, device=self.device)
        library: Any = np if on_cpu else torch
        start = 0
        for block in self.blocks(dtype):
            part = keep[start : start + len(block)]
            part[...] = block > value
            equal = block == value
            tied = int(library.count_nonzero(equal))
            if tied > ties:
                part |= equal & (library.cumsum(equal, 0) > ties)
            ties = max(ties - tied, 0)
            start += len(block)
        return torch.as_tensor(keep).view(self.shape), ties


def _select(scores: Sequence[_Scores], sparsity: float) -> list[Tensor]:
    """Masks that prune exactly round(sparsity * n) of the n scores, the lowest, the earlier first where they are equal."""
    total = sum(each.shape.numel() for each in scores)
    count = round(sparsity * total)
    if count in (0, total):
        return [torch.full(each.shape, count == 0, device=each.device) for each in scores]
    dtype = _common_dtype(scores)
    value, ties = _threshold(scores, count, dtype)
    masks = []
    for each in scores:
        mask, ties = each.mask(value, ties, dtype)
        masks.append(mask)
    return masks


def _threshold(scores: Sequence[_Scores], count: int, dtype: torch.dtype) -> tuple[float, int]:
    """The count-th lowest score, and how many of those that equal it are among the count lowest.

    A random sample gives a narrow range that all but surely holds it; one pass counts what is below the range and takes
    out what is in it. If the sample misled, the range is widened.

    Source: Floyd and Rivest, "Expected time bounds for selection" (1975).
    """
    total = sum(each.shape.numel() for each in scores)
    fraction = 1.0 if total <= 2**14 else total ** (-1 / 3)
    random = np.random.default_rng(0)
    sample = np.sort(np.concatenate([each.sample(fraction, dtype, random) for each in scores]))
    rank = (count - 1) * len(sample) / total
    margin = 0 if fraction == 1 else 4 * math.sqrt(rank * (1 - count / total)) + 4  # 4 standard deviations
    while True:
        first, last = math.floor(rank - margin), math.ceil(rank + margin)
        low = float(sample[first]) if first >= 0 else -math.inf
        high = float(sample[last]) if last < len(sample) else math.inf
        below, at_low, between, at_high = _split(scores, low, high, dtype)
        rest = count - below
        if 0 < rest <= at_low + len(between) + at_high:
            break
        margin = 8 * (margin + 1)
    if rest <= at_low:
        return low, rest
    rest -= at_low
    if rest > len(between):
        return high, rest - len(between)
    value = np.partition(between, rest - 1)[rest - 1]
    return float(value), rest - np.count_nonzero(between < value)


def _split(scores: Sequence[_Scores], low: float, high: float, dtype: torch.dtype) -> tuple[int, int, np.ndarray, int]:
    """How many scores are below low, how many equal it, those between it and high, and how many equal high."""
    below = at_low = within = 0
    between = []
    for each in scores:
        for block in each.blocks(dtype):
            under = block < low
            below += np.count_nonzero(under) if isinstance(under, np.ndarray) else int(under.count_nonzero())
            inside = np.asarray(torch.as_tensor(block[(block <= high) ^ under]).cpu())
            within += len(inside)
            at_low += np.count_nonzero(inside == low)
            between.append(inside[(inside > low) & (inside < high)])  # ties may be too many to hold
    found = np.concatenate(between)
    return below, at_low, found, within - at_low - len(found)


def _warn_of_empty(weights: Sequence[_Weight], keeps: Sequence[Tensor]) -> None:
    empty = [
        ", ".join(weight.layers)
        for weight, keep in zip(weights, keeps, strict=True)
        if keep.numel() and not (keep.numpy() if keep.device.type == "cpu" else keep).any()
    ]
    if empty:
        warnings.warn(f"pruning leaves nothing of {', '.join(empty)}", stacklevel=3)
