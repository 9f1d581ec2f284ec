"""Prune any PyTorch model: find masks of what to remove, apply them, and see what each sparsity costs.

This file needs nothing but torch and numpy: copy it beside any notebook. Pruned models stay plain modules, without any
hooks. Masks fit ``torch.nn.utils.prune.custom_from_mask``, and this gives those of a model pruned by torch itself:

    {name.removesuffix("_mask"): mask.bool() for name, mask in model.named_buffers() if name.endswith("_mask")}

The layers in `LAYERS` can be pruned. Everything else with weights (embeddings, recurrent layers, normalization, packed
attention) is left alone and not counted, and so are layers that share such a weight; `weight_mask` and `apply_masks`
prune any of them by name. A weight that several layers share counts once.
"""

import contextlib
import copy
import math
import numbers
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    *("METHODS", "SweepPoint", "achieved_sparsity", "apply_masks", "find_masks", "prune_model", "sweep"),
    *("unit_mask", "weight_mask"),
]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # the integers that a weight's bytes are multiplied as
NUMPY = True  # rank with it on the CPU, where it is faster; tests turn it off to take the path of GPUs there
BLOCK, GPU_BLOCK = 2**19, 2**24  # scores to compare at a time: they fit into the cache, or keep a GPU busy
FEW, GPU_FEW = 2**20, 2**12  # scores to rank all at once, on the CPU


def _norm(weight: Tensor) -> Tensor:
    """L2 norm of each unit: (units, …) → (units,), in fp32 for half precision."""
    if weight.dim() == 1:
        weight = weight.unsqueeze(1)
    how = {"dim": tuple(range(1, weight.dim())), "dtype": torch.promote_types(weight.dtype, torch.float32)}
    if weight.element_size() >= 4 or weight.numel() <= 2 * BLOCK or not weight.is_cpu:
        return torch.linalg.vector_norm(weight, **how)
    # torch converts half precision as a whole before it takes norms
    parts = weight.split(max(2 * BLOCK // weight[0].numel(), 1))
    return torch.cat([torch.linalg.vector_norm(part, **how) for part in parts])


def _relative_norm(weight: Tensor) -> Tensor:
    """L2 norm of each unit, relative to the mean of its layer: (units, …) → (units,).

    Within a layer it ranks as the norm does. Across layers, norms differ by scale and fan-in more than by what units
    matter, and would empty some layers before touching others.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning" (2023), section 3.3.
    """
    norm = _norm(weight).double()  # so that dividing doesn't make different norms equal
    return norm / norm.mean().clamp_min(torch.finfo(norm.dtype).tiny)


def _random_weight(weight: Tensor) -> Tensor:
    """Scores in (0, 1] of weight's shape, but 0 for weights that are zero already."""
    return (1 - torch.rand(weight.shape, dtype=torch.float32, device=weight.device)).masked_fill_(weight == 0, 0)


def _random_unit(weight: Tensor) -> Tensor:
    """Scores in (0, 1] of shape (units,), but 0 for units that are zero already."""
    return _random_weight(weight.flatten(1).any(1))


# The one place to add a criterion: METHODS["mine"] = function. It gets a weight of the model's own (with its .grad) to
# read, outputs in dim 0 even for transposed convolutions. It returns scores, the lowest of which are pruned first: of
# weight's shape for a weight method, (units,) for a unit method. Magnitudes are taken block by block; other scores are
# held in memory.
METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "weight": torch.abs,
    "unit": _relative_norm,
    "random_weight": _random_weight,
    "random_unit": _random_unit,
}


class SweepPoint(NamedTuple):
    """One point of a sweep: the sparsity asked for, the fraction of weights that became zero, and the scores."""

    sparsity: float
    achieved: float
    score: float
    retrained_score: float | None = None


def weight_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Mask that prunes the weights of lowest magnitude.

    Args:
        weight: any shape, finite, fp16 to fp64.
        sparsity: fraction in [0, 1]: exactly ``round(sparsity * weight.numel())`` go, of equal ones the earlier first.

    Returns:
        Boolean tensor of weight's shape, True = keep.

    Raises:
        TypeError, ValueError: sparsity is no number in [0, 1], or weight can't be ranked.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (2015).

    Example:
        >>> weight_mask(torch.tensor([[0.5, -0.1], [-2.0, 0.1]]), sparsity=0.5)
        tensor([[ True, False],
                [ True, False]])
    """
    return _select([_Scores("weight", _dense("weight", weight))], _checked_sparsity(sparsity))[0]


def unit_mask(weight: Tensor, sparsity: float, dim: int = 0) -> Tensor:
    """Mask that prunes the units of lowest L2 norm.

    Args:
        weight: one dimension or more, finite, fp16 to fp64.
        sparsity: fraction in [0, 1]: exactly ``round(sparsity * units)`` go, of equal ones the earlier first.
        dim: the dimension that counts units: 0 in a Linear's (out, in), where a row is a unit.

    Returns:
        Boolean tensor of weight's shape, True = keep, the same throughout a unit.

    Raises:
        TypeError, ValueError: sparsity is no number in [0, 1], dim no dimension, or weight can't be ranked.

    Source: Li et al., "Pruning Filters for Efficient ConvNets" (2017), here with the L2 norm.

    Example:
        >>> unit_mask(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), sparsity=0.5)
        tensor([[ True,  True],
                [False, False]])
    """
    weight = _dense("weight", weight)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an integer, got {dim!r}")
    if not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"dim must be one of weight's {weight.dim()} dimensions, got {dim}")
    (keep,) = _select([_Scores("weight", weight, _norm(weight.transpose(0, dim)))], _checked_sparsity(sparsity))
    shape = [1] * weight.dim()
    shape[dim] = -1
    return keep.view(shape).expand_as(weight).contiguous()


def find_masks(
    model: nn.Module,
    method: str,
    sparsity: float,
    *,
    scope: str = "layer",
    skip: Collection[str] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Masks that prune a model, which stays as it is.

    Args:
        model: any module, also wrapped by torch.compile or DataParallel.
        method: a name in `METHODS`.
        sparsity: fraction in [0, 1] of the weights or units, counting those that are zero already. Exactly
            ``round(sparsity * n)`` go; a larger sparsity prunes a superset.
        scope: "layer" ranks within each layer, "global" across all of them ("unit": by norms relative to the mean of
            the layer).
        skip: names of the layers to spare, no others; () spares none. None spares the last prunable layer in order of
            registration, since its units should be the model's outputs: if another layer's are, name that one.
        generator: source of the random methods' numbers; None: torch's global generators.

    Returns:
        Masks by parameter name, such as "fc1.weight", True = keep. Unit methods mask the biases, too ("fc1.bias"), but
        not those that other layers share; and a BatchNorm behind a pruned unit still emits its shift.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range; no prunable layer, or a single one and no `skip`; a weight that can't be
            ranked (lazy, meta, sparse, integer, complex, not finite, computed from other parameters).

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
    with _seeded(generator, weights):
        groups = [weights] if scope == "global" else [[weight] for weight in weights]
        scores = ([_scored(weight, METHODS[method]) for weight in group] for group in groups)
        keeps = [keep for group in scores if group for keep in _select(group, sparsity)]
    masks = dict(pair for weight, keep in zip(weights, keeps, strict=True) for pair in weight.masks(keep))
    empty = [each.name for each in weights if each.tensor.numel() and not _native(masks[each.name]).any()]
    if empty:
        warnings.warn(f"pruning leaves nothing of {', '.join(empty)} at sparsity {sparsity:g}", stacklevel=2)
    return masks


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set what masks prune to zero, in place: all of it, or after an error nothing.

    Called after each ``optimizer.step()``, it holds pruned weights at zero through training.

    Args:
        model: any module, also wrapped by torch.compile or DataParallel.
        masks: boolean tensors by parameter name, True = keep, of the parameters' shapes, on any device.

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
    layers = {name: layer._parameters for name, layer in _modules(model)}
    parameters = {f"{layer}.{name}".lstrip("."): each for layer, own in layers.items() for name, each in own.items()}
    pairs = []
    for name, mask in masks.items():
        if parameters.get(name) is None:
            raise ValueError(f"the model has no parameter {name!r}; it has {', '.join(parameters) or 'none'}")
        parameter = _dense(name, parameters[name])
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"the mask of {name} must be a boolean tensor (True = keep), got {got}")
        if mask.shape != parameter.shape or mask.is_meta or mask.layout is not torch.strided:
            raise ValueError(f"the mask of {name} must be a dense {tuple(parameter.shape)}, got {tuple(mask.shape)}")
        pairs.append((parameter.view(BITS[parameter.element_size()]), mask))
    for bits, mask in pairs:
        bits.mul_(mask.to(bits.device))  # +0.0 even for NaN, in a tenth of the time of masked_fill_


def prune_model(
    model: nn.Module,
    method: str,
    sparsity: float,
    *,
    scope: str = "layer",
    skip: Collection[str] | None = None,
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


def achieved_sparsity(model: nn.Module, *, skip: Collection[str] | None = None) -> float:
    """Fraction in [0, 1] of zeros among the weights of the layers that aren't spared (0 if there are no weights).

    Args:
        model: any module, pruned or not.
        skip: names of layers to leave out, as in `find_masks`.

    Raises:
        TypeError, ValueError: as `find_masks`.

    Example:
        >>> achieved_sparsity(nn.Linear(4, 4), skip=())
        0.0
    """
    weights = [weight.tensor for weight in _weights(model, skip)]
    total = sum(weight.numel() for weight in weights)
    return (total - sum(int(weight.count_nonzero()) for weight in weights)) / max(total, 1)


def sweep(
    model: nn.Module,
    method: str,
    sparsities: Iterable[float],
    score: Callable[[nn.Module], float],
    *,
    scope: str = "layer",
    skip: Collection[str] | None = None,
    generator: torch.Generator | None = None,
    retrain: Callable[[nn.Module, dict[str, Tensor]], None] | None = None,
) -> list[SweepPoint]:
    """Prune and score copies of a model, each made from the same dense one, which stays as it is.

    Args:
        model, method, scope, skip: as in `find_masks`.
        sparsities: fractions in [0, 1], in any order.
        score: what to ask of a pruned copy, such as its accuracy. The copy is in the model's mode: training or not.
        generator: as in `find_masks`; one seed is drawn for all points, whatever the method, so that larger
            sparsities prune supersets.
        retrain: trains a copy in place, its masks held with `apply_masks`, or takes its BatchNorm's statistics anew;
            the copy is then scored again.

    Returns:
        A point for each sparsity, in their order.

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
    points = []
    checked = [_checked_sparsity(sparsity) for sparsity in sparsities]
    seed = _drawn(generator)
    for sparsity in checked:
        draw = torch.Generator("cpu").manual_seed(seed)
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
    if isinstance(sparsity, Tensor | np.ndarray) and sparsity.ndim == 0:
        sparsity = sparsity.item()
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise TypeError(f"sparsity must be a number in [0, 1], got {sparsity!r}")
    if not 0 <= sparsity <= 1:
        hint = f": did you mean {float(sparsity) / 100:g}?" if 2 <= sparsity <= 100 else ""
        raise ValueError(f"sparsity must be a fraction in [0, 1], got {sparsity}{hint}")
    return float(sparsity)


def _dense(name: str, tensor: Any) -> Tensor:
    """The tensor, detached, if it is one that can be pruned."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if nn.parameter.is_lazy(tensor):
        raise ValueError(f"{name} has no shape yet: run a batch through its lazy layer first")
    if tensor.is_meta:
        raise ValueError(f"{name} has no values: it is on the meta device")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} must be dense, got {tensor.layout}: convert it with to_dense()")
    if not tensor.is_floating_point() or tensor.element_size() not in BITS:
        raise ValueError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")
    return tensor.detach()


def _drawn(generator: torch.Generator | None) -> int:
    """A seed, drawn from torch's global generator if none is given."""
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    return int(torch.randint(2**62, (), generator=generator, device=generator.device if generator else "cpu"))


def _modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with the name that the user gave it: the wrappers of torch.compile and DataParallel add none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or "_orig_mod" in model._modules:
        model = next(model.children())
    yield name, model
    for child, module in model._modules.items():
        if module is not None:
            yield from _modules(module, f"{name}.{child}".lstrip("."))


class _Weight(NamedTuple):
    """A weight to prune."""

    name: str
    tensor: Tensor
    groups: int  # of a transposed convolution, whose weight is (in, out / groups, …); 0 for other layers
    biases: list[str]  # more than one if layers share the weight

    def turned(self, tensor: Tensor) -> Tensor:
        """From the layer's layout to outputs first, or back: (in, out / groups, …) ↔ (out, in / groups, …)."""
        return tensor.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1) if self.groups else tensor

    def masks(self, keep: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Masks by parameter name, from one with outputs first: of the weight's shape, or (units,)."""
        yield self.name, self.turned(_expanded(keep, self.turned(self.tensor))).contiguous()
        yield from ((bias, keep) for bias in self.biases if keep.dim() == 1)


def _expanded(keep: Tensor, weight: Tensor) -> Tensor:
    """A mask of weight's shape from one that may be (units,)."""
    return keep.view(keep.shape + (1,) * (weight.dim() - keep.dim())).expand_as(weight)


def _weights(model: nn.Module, skip: Collection[str] | None) -> list[_Weight]:
    """The weights to prune, in order of registration."""
    layers: dict[str, Any] = {}
    others: set[int] = set()
    shared: dict[int, list[str]] = {}  # names of the layers that have a weight in common
    owners: dict[int, set[str]] = {}  # the same of biases
    for name, module in _modules(model):
        if isinstance(module, LAYERS):
            layers[name] = module
            shared.setdefault(id(module._parameters.get("weight", module)), []).append(name)
            owners.setdefault(id(module._parameters.get("bias", module)), set()).add(name)
        else:
            others.update(map(id, module._parameters.values()))
    prunable = [names for weight, names in shared.items() if weight not in others]
    spared = _spared(skip, list(layers), prunable)
    weights = []
    for names in prunable:
        if spared.isdisjoint(names):
            layer, name = layers[names[0]], f"{names[0]}.weight".lstrip(".")
            for kind in ("weight", "bias"):
                if kind not in layer._parameters:
                    computed = f"{names[0]}.{kind}".lstrip(".")
                    cure = "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
                    raise ValueError(f"{computed} is computed from other parameters: make it permanent with {cure}")
            tensor = _dense(name, layer.weight)
            tensor.grad = layer.weight.grad
            groups = layer.groups if isinstance(layer, TRANSPOSED) else 0
            biases: dict[int, str] = {}
            for each in names:
                bias = layers[each].bias
                if bias is not None and id(bias) not in others and owners[id(bias)] <= set(names):
                    biases.setdefault(id(bias), f"{each}.bias".lstrip("."))
            weights.append(_Weight(name, tensor, groups, list(biases.values())))
    return weights


def _spared(skip: Collection[str] | None, names: Sequence[str], prunable: Sequence[Sequence[str]]) -> set[str]:
    """Names of the layers to leave alone."""
    if not prunable:
        raise ValueError(f"the model has no prunable layer: none of {', '.join(kind.__name__ for kind in LAYERS)}")
    if skip is None:
        if len(prunable) == 1 and names[-1] in prunable[0]:
            cure = "pass skip=() to prune it; other weights, such as an LSTM's, take weight_mask and apply_masks"
            raise ValueError(f"{names[-1]!r} is the model's only prunable layer and spared by default: {cure}")
        return {names[-1]}
    if isinstance(skip, str) or not isinstance(skip, Collection):
        raise TypeError(f"skip must be a sequence of layer names, such as ({skip!r},), got {skip!r}")
    for name in skip:
        if name not in names:
            raise ValueError(f"skip: the model has no prunable layer {name!r}; it has {', '.join(names)}")
    return set(skip)


@contextlib.contextmanager
def _seeded(generator: torch.Generator | None, weights: Iterable[_Weight]) -> Iterator[None]:
    """If a generator is given, torch's global ones draw from a seed of it, and are then put back as they were."""
    devices = sorted({weight.tensor.device.index for weight in weights if weight.tensor.is_cuda})
    seed = None if generator is None else _drawn(generator)
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            for each in (torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)):
                each.manual_seed(seed)
        yield


@dataclass
class _Scores:
    """What a weight, or its units, are ranked by. Places count through all scores that are ranked together."""

    name: str
    weight: Tensor
    scores: Tensor | None = None  # None: the weight's magnitudes
    start: int = 0  # place of the first score
    dtype: torch.dtype = torch.float32  # to compare in

    @property
    def tensor(self) -> Tensor:
        """The scores, but for their signs if they are magnitudes."""
        return self.weight if self.scores is None else self.scores

    def ranked(self, part: Tensor, out: Tensor | None = None) -> Any:
        """Scores of a part of the tensor: on the CPU an array, perhaps `out`, for NumPy is faster; else a tensor."""
        scores = part if part.dtype == self.dtype else part.to(self.dtype)
        if self.scores is None:
            scores = torch.abs(scores, out=_empty(scores.shape, scores.dtype, scores.device) if out is None else out)
        return _native(scores)

    def array(self, part: Tensor) -> np.ndarray:
        """The same as an array everywhere."""
        return _array(self.ranked(part))

    def check(self, witness: Any) -> None:
        """Raise an error if a number that NaN and infinity outlast, such as a sum, shows one that can't be ranked."""
        if not math.isfinite(witness):
            if not self.weight.isfinite().all():
                raise ValueError(f"{self.name} must be finite, but has NaN or infinite weights")
            if self.tensor.isnan().any():
                raise ValueError(f"the scores of {self.name} contain NaN")


def _scored(weight: _Weight, score: Callable[[Tensor], Tensor]) -> _Scores:
    tensor = weight.turned(weight.tensor)
    scored = _Scores(weight.name, tensor)
    if score is torch.abs:
        return scored
    if weight.tensor.grad is not None:
        tensor.grad = weight.turned(weight.tensor.grad)
    scored.check(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)))
    scores = score(tensor)
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"the scores of {weight.name} must be a floating-point tensor, got {got}")
    if scores.shape not in (tensor.shape, tensor.shape[:1]):
        shapes = f"{tuple(tensor.shape)} or {tuple(tensor.shape[:1])}"
        raise ValueError(f"the scores of {weight.name} must have shape {shapes}, got {tuple(scores.shape)}")
    scored.scores = scores.detach()
    return scored


def _select(scores: Sequence[_Scores], sparsity: float) -> list[Tensor]:
    """Masks that prune exactly round(sparsity * n) of n scores: the lowest, of equal ones the earlier first.

    A score is ranked together with its place, so that no two are equal. The last one to prune most likely lies between
    two bounds that a sample gives. All are compared with the bounds, but only those between them are ranked.

    Source: Floyd and Rivest, "Expected Time Bounds for Selection" (1975).
    """
    total, dtype = 0, torch.float32
    for each in scores:
        each.start, total = total, total + each.tensor.numel()
        dtype = torch.promote_types(dtype, each.tensor.dtype)
    for each in scores:
        each.dtype = dtype
    count = round(sparsity * total)
    if total == 0:
        return [torch.ones_like(each.tensor, dtype=torch.bool) for each in scores]
    if total <= (FEW if NUMPY and all(each.tensor.is_cpu for each in scores) else GPU_FEW):
        return _partitioned(scores, count)
    step = 30 * math.ceil(total ** (1 / 3) / 100) + 1  # out of step with rows whose length has factors 2, 3 or 5
    sample = np.concatenate([each.array(each.tensor.reshape(-1)[-each.start % step :: step]) for each in scores])
    for each in scores:
        each.check(sample.max())  # NaN would be no bound
    expected = len(sample) * count / total  # rank in the sample of the last one to prune
    margin = 2.5 * (math.sqrt(expected * (1 - count / total)) + 1)  # so many standard deviations of it
    while True:
        low, high = (_at_rank(sample, step, math.ceil(expected + side)) for side in (-margin, margin))
        masks, kept, found, indices = zip(*(_compared(each, low, high) for each in scores), strict=True)
        between = np.concatenate(found)
        excess = count - (total - sum(kept) - len(between))  # how many of those between to prune
        if 0 <= excess <= len(between):
            break
        margin *= 4
    keep = np.empty(len(between), bool)
    _behind(between, _at_rank(between, 1, excess - 1), 0, keep)
    parts = np.split(keep, np.cumsum([len(part) for part in found])[:-1])
    for mask, index, part in zip(masks, indices, parts, strict=True):
        mask.view(-1).index_copy_(0, torch.from_numpy(index).to(mask.device), torch.from_numpy(part).to(mask.device))
    return list(masks)


def _partitioned(scores: Sequence[_Scores], count: int) -> list[Tensor]:
    """What `_select` returns, at less expense if there are few scores."""
    flat = _flat(scores)
    magnitudes, rank = scores[0].scores is None, max(count - 1, 0)
    ordered = flat if magnitudes else flat.copy()
    # Magnitudes rank the same as integers, which are partitioned sooner. NaN is behind all others.
    (ordered.view(f"i{flat.itemsize}") if magnitudes else ordered).partition(rank)
    last, largest = ordered[rank], ordered[rank:].max()
    for each in scores:
        each.check(largest)
    if magnitudes:  # to take them once more, into the same memory, takes less time than to have copied them
        del flat, ordered
        flat = _flat(scores)
    keep = flat > last
    if spare := len(flat) - np.count_nonzero(keep) - count:  # of those that equal the last one to prune
        keep[np.flatnonzero(flat == last)[-spare:]] = True
    parts = [keep[each.start :][: each.tensor.numel()].reshape(each.tensor.shape) for each in scores]
    return [torch.from_numpy(part).to(each.tensor.device) for part, each in zip(parts, scores, strict=True)]


def _flat(scores: Sequence[_Scores]) -> np.ndarray:
    """All scores in one array."""
    arrays = [each.array(each.tensor.reshape(-1)) for each in scores]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _at_rank(scores: np.ndarray, step: int, rank: int) -> tuple[float, int]:
    """The score at a rank and its place, if places are `step` apart; a bound before or behind all outside of ranks."""
    if rank < 0:
        return -math.inf, -1
    if rank >= len(scores):
        return math.inf, sys.maxsize
    value = np.partition(scores, rank)[rank]
    equal = np.flatnonzero(scores == value)
    return float(value), step * int(equal[rank - np.count_nonzero(scores < value)])


def _behind(scores: Any, bound: tuple[float, int], start: int, out: Any) -> None:
    """Which scores are behind a bound, their places counted from start."""
    value, place = bound
    cut, library = min(max(place + 1 - start, 0), len(scores)), _library(scores)
    library.greater(scores[:cut], value, out=out[:cut])
    library.greater_equal(scores[cut:], value, out=out[cut:])


def _compared(
    scores: _Scores, low: tuple[float, int], high: tuple[float, int]
) -> tuple[Tensor, int, np.ndarray, np.ndarray]:
    """A mask of what is behind both bounds, how much it is, and the scores and indices of what is between them."""
    tensor = scores.tensor
    mask = _empty(tensor.shape, torch.bool, tensor.device)
    kept, largest, between, places = 0, [0.0], [np.empty(0, np.float32)], [np.empty(0, int)]
    flat, parts, step = tensor.reshape(-1), _native(mask.view(-1)), BLOCK if tensor.is_cpu else GPU_BLOCK
    scratch = torch.empty(min(step, tensor.numel()), dtype=scores.dtype, device=tensor.device)
    for first in range(0, tensor.numel(), step):
        keep = parts[first : first + step]
        block = scores.ranked(flat[first : first + step], scratch[: len(keep)])
        largest.append(float(block.max()))
        library = _library(block)
        inside = library.empty_like(keep)
        _behind(block, high, scores.start + first, keep)
        _behind(block, low, scores.start + first, inside)
        kept += int(library.count_nonzero(keep))
        inside ^= keep
        where = library.where(inside)[0]
        between.append(_array(block[where]))
        places.append(_array(where) + first)
    scores.check(sum(largest))  # once for all blocks
    return mask, kept, np.concatenate(between), np.concatenate(places)


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor. NumPy asks for huge pages, which makes a large one cheaper to fill."""
    if device.type == "cpu":
        return torch.from_numpy(np.empty(shape, str(dtype).removeprefix("torch.")))
    return torch.empty(shape, dtype=dtype, device=device)


def _native(tensor: Tensor) -> Any:
    return tensor.numpy() if NUMPY and tensor.is_cpu else tensor


def _library(native: Any) -> Any:
    return np if isinstance(native, np.ndarray) else torch


def _array(native: Any) -> np.ndarray:
    return native if isinstance(native, np.ndarray) else native.cpu().numpy()
