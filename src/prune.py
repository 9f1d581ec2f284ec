"""Prune any PyTorch model: find masks of what to remove, apply them, and see what each sparsity costs.

This file needs nothing but torch and numpy: copy it beside any notebook. Pruned models stay plain modules, without any
hooks. Masks fit ``torch.nn.utils.prune.custom_from_mask``, and a model pruned by torch.nn.utils.prune has its own in

    {name.removesuffix("_mask"): mask.bool() for name, mask in model.named_buffers() if name.endswith("_mask")}

The layers in `LAYERS` can be pruned. Everything else with weights (embeddings, normalization, packed attention) is left
alone, and so are layers that share such a weight. A weight that several layers share counts once.
"""

import contextlib
import copy
import functools
import itertools
import math
import numbers
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # the integers that a weight's bytes are multiplied as
NUMPY = ("cpu",)  # devices where NumPy ranks faster than torch
BLOCK = {np: 2**18, torch: 2**24}  # scores that each ranks at a time: they fit into a cache, or keep a GPU busy
GRAIN = 2**15  # entries on which torch doesn't start threads and takes no new pages of memory
SAMPLED = 2**12  # as many scores are worth a sample that narrows down what needs to be ranked


def _norm(weight: Tensor) -> Tensor:
    """L2 norm of each unit: (units, …) → (units,), in fp32 for half precision."""
    if weight.dim() == 1:
        return weight.to(_widest(weight)).abs()
    dims = tuple(range(1, weight.dim()))
    if weight.element_size() >= 4 or weight.device.type != "cpu" or weight.numel() <= GRAIN:
        return torch.linalg.vector_norm(weight, dim=dims, dtype=_widest(weight))
    blocks = weight.split(max(GRAIN // weight[:1].numel(), 1))  # several times faster than dtype=torch.float32
    return torch.cat([torch.linalg.vector_norm(block.float(), dim=dims) for block in blocks])


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


# The one place to add a criterion: METHODS["mine"] = function. It gets a weight (with its .grad), outputs in dim 0 even
# for transposed convolutions. It returns scores, the lowest of which are pruned first: of weight's shape for a weight
# method, (units,) for a unit method. Magnitudes are taken block by block; other scores are held in memory.
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
    return _select([_Scores("weight", _dense("weight", weight), absolute=True)], _checked_sparsity(sparsity))[0]


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
    units_first = weight.transpose(0, dim)
    norm = _norm(units_first)
    _check_finite("weight", weight, norm.sum())
    (keep,) = _select([_Scores("weight", norm)], _checked_sparsity(sparsity))
    return _expanded(keep, units_first).transpose(0, dim).contiguous()


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
        scope: "layer" ranks within each layer, "global" across all of them.
        skip: names of layers to spare; () spares none. None spares the last prunable layer in order of registration:
            its units are the model's outputs.
        generator: source of the random methods' numbers; None: torch's global generators.

    Returns:
        Masks by parameter name, such as "fc1.weight", True = keep. Unit methods mask the biases, too ("fc1.bias"), but
        a BatchNorm behind a pruned unit still emits its shift.

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
        keeps = [keep for group in scores for keep in _select(group, sparsity)]
    masks: dict[str, Tensor] = {}
    empty = []
    for weight, keep in zip(weights, keeps, strict=True):
        masks.update(weight.masks(keep))
        # NumPy's any() stops at the first True
        if weight.tensor.numel() and not (keep.numpy() if keep.device.type in NUMPY else keep).any():
            empty.append(weight.name)
    if empty:
        warnings.warn(f"pruning leaves nothing of {', '.join(empty)}", stacklevel=2)
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
        score: what to ask of a pruned copy, such as its accuracy.
        generator: as in `find_masks`; all points share one draw, so that larger sparsities prune supersets.
        retrain: trains a copy in place, its masks held with `apply_masks`; the copy is then scored again.

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
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise TypeError(f"sparsity must be a number in [0, 1], got {sparsity!r}")
    sparsity = float(sparsity)
    if not 0 <= sparsity <= 1:
        hint = f": did you mean {sparsity / 100:g}?" if 1 < sparsity <= 100 else ""
        raise ValueError(f"sparsity must be a fraction in [0, 1], got {sparsity:g}{hint}")
    return sparsity


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


def _check_finite(name: str, weight: Tensor, sign: Any) -> None:
    """Raise if a weight is NaN or infinite; then so is the `sign`, though it may be so for large weights, too."""
    if not math.isfinite(sign) and not weight.isfinite().all():
        raise ValueError(f"{name} must be finite, but has NaN or infinite weights")


def _widest(*tensors: Tensor) -> torch.dtype:
    """The smallest type from fp32 up that holds the values of all."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


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
    return keep.view(*keep.shape, *[1] * (weight.dim() - keep.dim())).expand_as(weight)


def _weights(model: nn.Module, skip: Collection[str] | None) -> list[_Weight]:
    """The weights to prune, in order of registration."""
    layers: dict[str, Any] = {}
    others: set[int] = set()
    shared: dict[int, list[str]] = {}  # names of the layers that have a weight in common
    for name, module in _modules(model):
        if isinstance(module, LAYERS):
            layers[name] = module
            shared.setdefault(id(module._parameters.get("weight", module)), []).append(name)
        else:
            others.update(map(id, module._parameters.values()))
    prunable = [names for weight, names in shared.items() if weight not in others]
    spared = _spared(skip, list(layers), prunable)
    weights = []
    for names in prunable:
        if spared.isdisjoint(names):
            layer, name = layers[names[0]], f"{names[0]}.weight".lstrip(".")
            if "weight" not in layer._parameters:
                cure = "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
                raise ValueError(f"{name} is computed from other parameters: make it permanent with {cure}")
            tensor = _dense(name, layer.weight)
            tensor.grad = layer.weight.grad
            groups = layer.groups if isinstance(layer, TRANSPOSED) else 0
            biases: dict[int, str] = {}
            for each in names:
                if layers[each].bias is not None:
                    biases.setdefault(id(layers[each].bias), f"{each}.bias".lstrip("."))
            weights.append(_Weight(name, tensor, groups, list(biases.values())))
    return weights


def _spared(skip: Collection[str] | None, names: Sequence[str], prunable: Sequence[Sequence[str]]) -> set[str]:
    """Names of the layers to leave alone."""
    if not prunable:
        raise ValueError(f"the model has no prunable layer: none of {', '.join(kind.__name__ for kind in LAYERS)}")
    if skip is None:
        if len(prunable) == 1 and names[-1] in prunable[0]:
            raise ValueError(f"{names[-1]!r} is the model's only prunable layer and spared by default: pass skip=()")
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


class _Scores(NamedTuple):
    """What a weight, or its units, are ranked by."""

    name: str
    tensor: Tensor
    absolute: bool = False  # the tensor is the weight itself, and its magnitudes are the scores

    def array(self, dtype: torch.dtype, places: Tensor | None = None) -> np.ndarray:
        """The scores at these places, or all of them."""
        flat = self.tensor.reshape(-1)
        flat = flat if places is None else flat.index_select(0, places.to(flat.device))
        array = flat.to(dtype).cpu().numpy()
        return abs(array) if self.absolute else array

    def check(self, largest: Any) -> None:
        """Raise if the largest of some magnitudes shows that there are others than finite ones."""
        if self.absolute and not math.isfinite(largest):
            _check_finite(self.name, self.tensor, largest)

    def library(self) -> Any:
        """What ranks faster where the scores are."""
        return np if self.tensor.device.type in NUMPY else torch

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Any]]:
        """Each block's place and scores, the last first. Magnitudes are overwritten by those of the next block."""
        flat, library = self.tensor.reshape(-1), self.library()
        step = BLOCK[library]
        magnitudes: Any = torch.empty(min(step, len(flat)), dtype=dtype, device=flat.device)
        for start in reversed(range(0, len(flat), step)):
            where = slice(start, start + step)
            block: Any = flat[where].to(dtype)
            if library is np:
                block, magnitudes = block.numpy(), np.asarray(magnitudes)
            yield where, library.abs(block, out=magnitudes[: len(block)]) if self.absolute else block


def _scored(weight: _Weight, score: Callable[[Tensor], Tensor]) -> _Scores:
    tensor = weight.turned(weight.tensor)
    if score is torch.abs:
        return _Scores(weight.name, tensor, absolute=True)
    if weight.tensor.grad is not None:
        tensor.grad = weight.turned(weight.tensor.grad)
    _check_finite(weight.name, tensor, tensor.sum(dtype=_widest(tensor)))
    scores = score(tensor)
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError(f"the scores of {weight.name} must be a floating-point tensor, got {scores!r:.80}")
    if scores.shape not in (tensor.shape, tensor.shape[:1]):
        shapes = f"{tuple(tensor.shape)} or {tuple(tensor.shape[:1])}"
        raise ValueError(f"the scores of {weight.name} must have shape {shapes}, got {tuple(scores.shape)}")
    if scores.isnan().any():
        raise ValueError(f"the scores of {weight.name} contain NaN")
    return _Scores(weight.name, scores.detach())


def _select(scores: Sequence[_Scores], sparsity: float) -> list[Tensor]:
    """Masks that prune exactly round(sparsity * n) of n scores: the lowest, of equal ones the earlier first."""
    tensors = [each.tensor for each in scores]
    sizes = [tensor.numel() for tensor in tensors]
    count, dtype = round(sparsity * sum(sizes)), _widest(*tensors)
    if sum(sizes) < SAMPLED:
        arrays = [each.array(dtype) for each in scores]
        for each, array in zip(scores, arrays, strict=True):
            each.check(array.max(initial=0))
        flat = np.concatenate(arrays)
        keep = np.ones(len(flat), bool)
        keep[flat.argsort(kind="stable")[:count]] = False
        parts = [keep[end - size : end] for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]
        pairs = zip(parts, tensors, strict=True)
        return [torch.from_numpy(part).view(tensor.shape).to(tensor.device) for part, tensor in pairs]
    value, stay = _threshold(scores, count, dtype)
    masks = []
    for each, size in zip(scores[::-1], sizes[::-1], strict=True):
        library, device = each.library(), each.tensor.device
        # NumPy asks for huge pages, which makes a large new array several times cheaper to fill.
        mask = np.empty(size, bool) if library is np else torch.empty(size, dtype=torch.bool, device=device)
        for where, block in each.blocks(dtype):
            each.check(block.max())
            library.greater(block, value, out=mask[where])
            if stay:
                tied = library.argwhere(block == value)[-stay:, 0]
                mask[where][tied] = True
                stay -= len(tied)
        masks.append(torch.as_tensor(mask, device=device).view(each.tensor.shape))
    return masks[::-1]


def _threshold(scores: Sequence[_Scores], count: int, dtype: torch.dtype) -> tuple[float, int]:
    """The count-th lowest score, and how many scores that equal it are not among the count lowest.

    A random sample gives a range that should hold it. All scores are compared with the range, but only those within it
    are taken out and ranked.

    Source: Floyd and Rivest, "Expected Time Bounds for Selection" (1975).
    """
    if count == 0:
        return -math.inf, sum(each.tensor.numel() for each in scores)
    for deviations in (2.5, 10, math.inf):
        low, high = _range(scores, count, deviations, dtype)
        below, at_low, within, between = 0, 0, 0, []
        for each in scores:
            library = each.library()
            for _, block in each.blocks(dtype):
                under = block < low
                below += int(library.count_nonzero(under))
                inside = block[(block <= high) ^ under]
                inside = inside if library is np else inside.cpu().numpy()
                within += len(inside)
                at_low += int(np.count_nonzero(inside == low))
                between.append(inside[(inside > low) & (inside < high)])  # what equals the ends may be too much to hold
        if below < count <= below + within:
            break
    rank, found = count - below, np.concatenate(between)
    if rank <= at_low:
        return low, at_low - rank
    if rank > at_low + len(found):
        return high, within - rank
    value = np.partition(found, rank - at_low - 1)[rank - at_low - 1]
    return float(value), at_low + int(np.count_nonzero(found <= value)) - rank


def _range(scores: Sequence[_Scores], count: int, deviations: float, dtype: torch.dtype) -> tuple[float, float]:
    """Where the count-th lowest score lies: within so many standard deviations of its place in a random sample."""
    if deviations == math.inf:
        return -math.inf, math.inf
    sizes = [each.tensor.numel() for each in scores]
    total, random = sum(sizes), torch.Generator("cpu").manual_seed(0)
    parts = [np.array([-math.inf, math.inf], np.float32)]
    for each, size in zip(scores, sizes, strict=True):
        extra = torch.rand((), generator=random, device="cpu").item()  # gives small layers their due on average
        drawn = int(size * total ** (-1 / 3) + extra)
        parts.append(each.array(dtype, torch.randint(max(size, 1), (drawn,), generator=random, device="cpu")))
    sample = np.concatenate(parts)
    place = len(sample) * count / total
    margin = deviations * math.sqrt(place * (1 - count / total)) + deviations
    first, last = max(math.floor(place - margin), 0), min(math.ceil(place + margin), len(sample) - 1)
    sample.partition((first, last))
    return float(sample[first]), float(sample[last])
