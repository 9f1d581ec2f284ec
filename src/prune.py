"""Prune any PyTorch model: find masks of what to remove, apply them, and see what each sparsity costs.

A mask is a boolean tensor of a weight's own shape, True = keep. Masks come in a plain dict by parameter name, such as
{"fc1.weight": ...}, fit for torch.save. Finding masks changes nothing; applying them makes zeros, and pruned models stay
plain modules without hooks. ``torch.nn.utils.prune.custom_from_mask`` takes these masks; this gives torch's own:

    {name.removesuffix("_mask"): mask.bool() for name, mask in model.named_buffers() if name.endswith("_mask")}

This file needs nothing but torch and numpy: copy it beside any notebook.
"""

import copy
import difflib
import functools
import itertools
import math
import numbers
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # the integers that a weight's bytes are multiplied as
BLOCK, GPU_BLOCK = 2**17, 2**24  # scores to compare at a time: they fit into the cache, or keep a GPU busy


def _unit_norm(weight: Tensor) -> Tensor:
    """L2 norm of each unit: (units, …) → (units,), in fp64."""
    rows = weight.reshape(len(weight), -1) if weight.numel() else weight.new_zeros(len(weight), 1)
    norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32)).double()
    if (unsafe := ~((norm > 1e-12) & (norm < 1e18))).any():  # squares may have vanished or overflowed
        largest = torch.linalg.vector_norm(rows, math.inf, dim=1).double()
        unsafe &= largest > 0
        norm[unsafe] = (rows[unsafe].double() / largest[unsafe].unsqueeze(1)).norm(dim=1) * largest[unsafe]
    return norm


def _relative_norm(weight: Tensor) -> Tensor:
    """L2 norm of each unit, relative to the mean of its layer: (units, …) → (units,).

    Within a layer it ranks as the norm does. Across layers, norms differ by scale and fan-in more than by what units
    matter. Source: Fang et al., "DepGraph: Towards Any Structural Pruning" (2023), section 3.3.
    """
    norm = _unit_norm(weight)
    return norm / norm.mean().clamp_min(torch.finfo(norm.dtype).tiny)


def _random_weight(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Scores in (0, 1] of weight's shape, but 0 for weights that are zero already."""
    scores = 1 - torch.rand(weight.shape, generator=generator, dtype=torch.float32, device=generator.device)
    return scores.to(weight.device).masked_fill_(weight == 0, 0)


def _random_unit(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Scores in (0, 1] of shape (units,), but 0 for units that are zero already."""
    return _random_weight(weight.flatten(1).any(1), generator)


# The one place to add a criterion, such as
#     def taylor(weight): return (weight * weight.grad).abs()
#     METHODS["taylor"] = taylor
# It gets a detached weight with its .grad, outputs in dim 0 whatever the layer, and returns scores, the lowest of which
# are pruned first: of weight's shape for a weight method, (units,) for a unit method. Only the two random ones get a
# generator. Magnitudes (torch.abs) are taken block by block; other scores are held in memory.
METHODS: dict[str, Callable[..., Tensor]] = {
    "weight": torch.abs,
    "unit": _relative_norm,
    "random_weight": _random_weight,
    "random_unit": _random_unit,
}

# The one place to add a class of layers, with the dimension of its `weight` that counts outputs, such as
#     LAYERS[transformers.pytorch_utils.Conv1D] = 1
# Subclasses follow their parents. Where it isn't 0, a layer's `groups` divide dim 0: (in, out / groups, …).
LAYERS: dict[type[nn.Module], int] = {
    **dict.fromkeys((nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d), 0),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1),
}


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
    return _select([_Scores("weight", _rankable("weight", weight), magnitude=True)], _fraction(sparsity))[0]


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
    weight = _rankable("weight", weight)
    if not isinstance(dim, numbers.Integral) or isinstance(dim, bool):
        raise TypeError(f"dim must be an integer, got {dim!r}")
    if not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"dim must be one of weight's {weight.dim()} dimensions, got {dim}")
    units = weight.transpose(0, int(dim))
    norm = _unit_norm(units)
    _check_finite("weight", weight, norm)
    (keep,) = _select([_Scores("weight", norm)], _fraction(sparsity))
    return keep.view(-1, *[1] * (weight.dim() - 1)).expand_as(units).transpose(0, int(dim)).contiguous()


def find_masks(
    model: nn.Module,
    method: str,
    sparsity: float,
    *,
    scope: str = "layer",
    skip: Collection[str] = (),
    prune_output: bool = False,
    only: Collection[str] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Masks that prune a model, which stays as it is: the weights of all layers in `LAYERS` but the output layer.

    A weight that layers share counts once; one that another module uses, too, such as an embedding, is left alone.

    Args:
        model: any module, also wrapped by torch.compile or DataParallel.
        method: a name in `METHODS`.
        sparsity: fraction in [0, 1] of the weights or units, counting those that are zero already. Exactly
            ``round(sparsity * n)`` go; a larger sparsity prunes a superset.
        scope: "layer" ranks within each layer. "global" ranks across all, which suits the weights of convolutional
            networks; units by norms relative to the mean of their layer, the best one of each layer behind all others.
        skip: names or patterns of layers to spare as well: ``("conv1", "body.*")``.
        prune_output: prune the output layer, too: the prunable layer that was registered last, unless a warning comes.
        only: names or patterns of parameters to prune instead, vectors apart: ``("lstm.weight_*",)``. What is spared
            stays so. Unit methods take weights of the layers in `LAYERS` alone.
        generator: source of the random methods' numbers. None: they follow ``torch.manual_seed``, the same each time.

    Returns:
        Masks by parameter name, such as "fc1.weight", True = keep. Unit methods mask the biases, too ("fc1.bias"), but
        not those that other layers share; and a BatchNorm behind a pruned unit still emits its shift.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range; nothing to prune; a method that fails; a weight that can't be ranked
            (lazy, meta, sparse, integer, quantized, distributed, expanded, not finite, computed from others …).

    Warns:
        UserWarning: a layer loses everything; the spared layer is probably not the output, or not all of it; a tenth or
            more of the model's matrices stays dense because `LAYERS` lacks their classes.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> masks = find_masks(model, "unit", sparsity=1 / 3)
        >>> {name: mask.count_nonzero().item() for name, mask in masks.items()}
        {'0.weight': 8, '0.bias': 2}
    """
    sparsity, generator = _fraction(sparsity), _local(generator)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    if scope not in ("layer", "global"):
        raise ValueError(f"unknown scope {scope!r}: expected layer or global")
    weights, doubts = _chosen(model, skip, prune_output, only)
    masks: dict[str, Tensor] = {}
    for group in [weights] if scope == "global" else [[weight] for weight in weights]:
        scores = [_scored(weight, method, generator) for weight in group]
        if scope == "global":
            _protect_best_units(scores)
        for weight, keep in zip(group, _select(scores, sparsity), strict=True):
            masks |= weight.masks(keep)
    empty = [weight.names[0] for weight in weights if weight.parameter.numel() and not masks[weight.names[0]].any()]
    for doubt in [*doubts, f"pruning leaves nothing of {_listed(empty)} at sparsity {sparsity:g}" if empty else ""]:
        if doubt:
            warnings.warn(doubt, stacklevel=2)
    return masks


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set what masks prune to zero, in place: all of it, or after an error nothing.

    Called after each ``optimizer.step()``, it holds pruned weights at zero through training; so does one
    ``optimizer.register_step_post_hook(lambda *_: apply_masks(model, masks))``.

    Args:
        model: any module, also wrapped by torch.compile or DataParallel.
        masks: boolean tensors by parameter name, True = keep, of the parameters' shapes, on any device.

    Raises:
        TypeError: masks isn't a mapping of names to boolean tensors.
        ValueError: the model has no such parameter, or one of another shape, or it can't be pruned.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> apply_masks(model, {"weight": torch.tensor([[True, False]])})
        >>> model.weight.count_nonzero().item()
        1
    """
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks must be a dict of boolean tensors by parameter name, got {type(masks).__name__}")
    owned = ((layer, name, own) for layer, module in _modules(model) for name, own in module._parameters.items())
    parameters = {_joined(layer, name): own for layer, name, own in owned if own is not None}
    pairs = []
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name!r}{_near(name, parameters)}")
        parameter = _prunable(name, parameters[name])
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"the mask of {name} must be a boolean tensor (True = keep), got {got}")
        if mask.shape != parameter.shape or mask.is_meta or mask.layout is not torch.strided:
            raise ValueError(f"the mask of {name} must be a dense {tuple(parameter.shape)}, got {tuple(mask.shape)}")
        pairs.append((parameter.view(BITS[parameter.element_size()]), mask.to(parameter.device)))
    for bits, mask in pairs:
        bits.mul_(mask)  # +0.0 even for NaN, in a tenth of the time of masked_fill_


def prune_model(model: nn.Module, method: str, sparsity: float, **options: Any) -> nn.Module:
    """A pruned deep copy of a model. Arguments, errors and warnings are those of `find_masks`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> pruned = prune_model(model, "weight", sparsity=0.75, scope="global")
        >>> achieved_sparsity(pruned), achieved_sparsity(model)
        (0.75, 0.0)
    """
    masks = find_masks(model, method, sparsity, **options)
    pruned = copy.deepcopy(model)
    apply_masks(pruned, masks)
    return pruned


def achieved_sparsity(
    model: nn.Module, *, skip: Collection[str] = (), prune_output: bool = False, only: Collection[str] | None = None
) -> float:
    """Fraction in [0, 1] of zeros among the weights that `find_masks` would prune (0 if they are none).

    Args, Raises: as `find_masks`.

    Example:
        >>> achieved_sparsity(nn.Linear(4, 4), prune_output=True)
        0.0
    """
    tensors = [weight.tensor() for weight in _chosen(model, skip, prune_output, only)[0]]
    total = sum(tensor.numel() for tensor in tensors)
    return (total - sum(int(tensor.count_nonzero()) for tensor in tensors)) / max(total, 1)


class SweepPoint(NamedTuple):
    """One point of a sweep: the sparsity asked for, the fraction of weights that became zero, what score returned."""

    sparsity: float
    achieved: float
    score: Any
    retrained_score: Any = None


def sweep(
    model: nn.Module,
    method: str,
    sparsities: Iterable[float],
    score: Callable[[nn.Module], Any],
    *,
    scope: str = "layer",
    generator: torch.Generator | None = None,
    retrain: Callable[[nn.Module, dict[str, Tensor]], object] | None = None,
    **options: Any,
) -> list[SweepPoint]:
    """Prune and score copies of a model, each made from the same dense one, which stays as it is.

    Args:
        model, method, scope, and skip, prune_output, only as options: as in `find_masks`.
        sparsities: fractions in [0, 1], in any order.
        score: gets a pruned copy in eval mode; what it returns, such as an accuracy, is passed through.
        generator: as in `find_masks`; the same numbers for all points, so that larger sparsities prune supersets.
        retrain: gets the copy in training mode (modules that are frozen in a model in training mode stay so) and the
            masks. It trains the copy in place, its masks held, or recalibrates it; the copy is then scored again.

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
    fractions, points, local = [_fraction(sparsity) for sparsity in sparsities], [], _local(generator)
    seed = int(torch.randint(2**62, (), generator=local, device=local.device))
    for sparsity in fractions:
        again = torch.Generator(local.device).manual_seed(seed)
        masks = find_masks(model, method, sparsity, scope=scope, generator=again, **options)
        pruned = copy.deepcopy(model).eval()
        apply_masks(pruned, masks)
        point = SweepPoint(sparsity, achieved_sparsity(pruned, **options), score(pruned))
        if retrain is not None:
            for module, own in zip(pruned.train().modules(), model.modules(), strict=True):
                module.training = own.training or not model.training
            retrain(pruned, masks)
            point = point._replace(retrained_score=score(pruned.eval()))
        points.append(point)
    return points


def recalibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Take the statistics of a model's BatchNorm layers again, in place: pruning has changed what they should be.

    They become the average over all batches. Nothing else changes, and after an error not even they.

    Args:
        model: any module, best in the mode in which it will be used.
        batches: inputs, or tuples that begin with them, such as (images, labels); moved to the model's device.

    Raises:
        ValueError: there are no batches.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> recalibrate(model, [(torch.ones(8, 2), torch.zeros(8))])
        >>> torch.allclose(model[1].running_mean, model[0](torch.ones(2)))
        True
    """
    trial = copy.deepcopy(model).eval()
    pairs: list[Any] = [
        (own, norm)
        for own, norm in zip(model.modules(), trial.modules(), strict=True)
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats
    ]
    for _, norm in pairs:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True  # None: the average
    count = 0
    with torch.no_grad():
        for count, batch in enumerate(batches, start=1):  # noqa: B007
            inputs = batch[0] if isinstance(batch, tuple | list) else batch
            trial(inputs.to(next(trial.parameters()).device))
    if not count:
        raise ValueError("recalibrate needs at least one batch")
    for own, norm in pairs:
        own.load_state_dict(norm.state_dict())


# How layers are found


@dataclass(eq=False)
class _Weight:
    """A matrix of the model, or more dimensions, and the modules that use it."""

    parameter: Any  # None if it is computed from other parameters
    dim: int | None  # that counts outputs; None if LAYERS doesn't tell
    groups: int
    names: list[str] = field(default_factory=list)  # such as fc1.weight; several if it is shared
    layers: dict[str, Any] = field(default_factory=dict)
    biases: dict[int, str] = field(default_factory=dict)  # names of those that its units have besides

    def tensor(self) -> Tensor:
        """The parameter, detached, if it is one that can be pruned."""
        for layer, module in self.layers.items() if self.dim is not None else ():
            for own in ("weight", "bias"):
                if own not in module._parameters and hasattr(module, own):
                    cure = "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
                    computed = f"{_joined(layer, own)} is computed from other parameters"
                    raise ValueError(f"{computed}: make it permanent with {cure}")
        return _prunable(self.names[0], self.parameter)

    def turned(self, tensor: Tensor, back: bool = False) -> Tensor:
        """From the weight's own layout to (out, in / groups, …), or back."""
        if not self.dim:
            return tensor
        ends = (1, self.dim + 1) if back else (self.dim + 1, 1)
        return tensor.unflatten(0, (self.groups, -1)).movedim(*ends).flatten(0, 1)

    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        """Masks by parameter name, from one of the weight's shape or (units,)."""
        if keep.dim() > 1:
            return {self.names[0]: keep}
        weight = self.turned(self.parameter.detach())
        mask = self.turned(keep.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight), back=True).contiguous()
        return {self.names[0]: mask} | dict.fromkeys(self.biases.values(), keep)

    @property
    def outputs(self) -> int:
        return 0 if self.dim is None else self.parameter.shape[self.dim] * (self.groups if self.dim else 1)

    @property
    def inputs(self) -> list[int]:
        """The numbers of inputs that it may take."""
        sizes = [size for dim, size in enumerate(self.parameter.shape) if dim != self.dim]
        return [size * (self.groups if self.dim == 0 else 1) for size in (sizes[:1] if self.is_convolution else sizes)]

    @property
    def is_convolution(self) -> bool:
        return all(hasattr(module, "kernel_size") for module in self.layers.values())

    def feeds(self, other: "_Weight") -> bool:
        """Whether the other may take its outputs, perhaps a few such side by side, or flattened images."""
        most = math.inf if self.is_convolution else 8
        return any(self.outputs and size % self.outputs == 0 and size <= most * self.outputs for size in other.inputs)


def _modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with the name that the user gave it: the wrappers of torch.compile and DataParallel add none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or "_orig_mod" in model._modules:
        model = next(model.children())
    yield name, model
    for child, module in model._modules.items():
        if module is not None:
            yield from _modules(module, _joined(name, child))


def _joined(layer: str, name: str) -> str:
    return f"{layer}.{name}".lstrip(".")


def _matrices(model: nn.Module) -> list[_Weight]:
    """The weights of all layers in LAYERS, and all other matrices, in order of registration."""
    found: dict[int, _Weight] = {}
    users: dict[int, set[str]] = {}
    lists = (nn.ParameterList, nn.ParameterDict)  # make no difference to parameters that other modules use
    for layer, module in sorted(_modules(model), key=lambda named: isinstance(named[1], lists)):
        layer_dim = next((LAYERS[parent] for parent in type(module).__mro__ if parent in LAYERS), None)
        for own, parameter in (({} if layer_dim is None else {"weight": None}) | module._parameters).items():
            if isinstance(module, lists) and id(parameter) in users:
                continue
            users.setdefault(id(parameter), set()).add(layer)
            dim = layer_dim if own == "weight" else None
            if dim is not None or (_is_sized(parameter) and parameter.dim() > 1):
                new = _Weight(parameter, dim, getattr(module, "groups", 1))
                weight = found.setdefault(id(module if parameter is None else parameter), new)
                weight.names.append(_joined(layer, own))
                weight.layers[layer] = module
                weight.dim = dim if weight.dim == dim else None
    for weight in found.values():
        for layer, module in weight.layers.items():
            bias = module._parameters.get("bias")
            if bias is not None and users[id(bias)] <= weight.layers.keys():
                weight.biases.setdefault(id(bias), _joined(layer, "bias"))
    return list(found.values())


def _is_sized(parameter: Any) -> bool:
    return parameter is not None and not nn.parameter.is_lazy(parameter)


def _chosen(
    model: nn.Module, skip: Collection[str], prune_output: bool, only: Collection[str] | None
) -> tuple[list[_Weight], list[str]]:
    """The weights to prune, and what the user may not expect of this choice."""
    matrices = _matrices(model)
    known = {layer for weight in matrices if weight.dim is not None for layer in weight.layers}
    output = [] if prune_output else [layer for layer, _ in _modules(model) if layer in known][-1:]
    skipped = _matched("skip", skip, [layer for weight in matrices for layer in weight.layers])
    spared = tuple(f"{layer}." for layer in [*output, *itertools.chain(*skipped)])
    free = [weight for weight in matrices if not any(f"{layer}.".startswith(spared) for layer in weight.layers)]
    hint = f"; {output[0]!r}, registered last, is spared as the output unless prune_output=True" if output else ""
    chosen = [weight for weight in free if weight.dim is not None]
    if only is not None:
        named = _matched("only", only, [name for weight in matrices for name in weight.names])
        chosen = [weight for weight in free if not set(weight.names).isdisjoint(itertools.chain(*named))]
        for found in named:
            if not any(name in found for weight in chosen for name in weight.names):
                raise ValueError(f"only: {_listed(found)} can't be pruned and spared at once{hint}")
    if not chosen:
        classes = _listed([layer.__name__ for layer in LAYERS])
        raise ValueError(f"every prunable layer is spared{hint}" if known else f"no prunable layer: none of {classes}")
    return chosen, [*_doubts(output, free, matrices, only is None)]


def _doubts(
    output: Sequence[str], free: Sequence[_Weight], matrices: Sequence[_Weight], by_class: bool
) -> Iterator[str]:
    """What the user may not expect of the layers that are pruned and spared."""
    sized = [weight for weight in matrices if _is_sized(weight.parameter)]
    dense = [weight for weight in sized if weight in free and weight.dim is None]
    share = sum(weight.parameter.numel() for weight in dense) / max(
        sum(weight.parameter.numel() for weight in sized), 1
    )
    if by_class and share >= 0.1:
        names = _listed([weight.names[0] for weight in dense])
        yield f"{share:.0%} of the weights stay dense, as LAYERS lacks their modules' classes: {names}. Prune them with only=(…), or name the modules in skip"
    for spared in [weight for weight in sized if not weight.layers.keys().isdisjoint(output)]:
        ends = {
            next(iter(weight.layers)): weight
            for weight in sized
            if weight in free and weight.dim is not None and not any(map(weight.feeds, sized))
        }
        text = f"{output[0]!r}, registered last, is spared as the output layer, but"
        takers = [
            weight for weight in sized if weight is not spared and weight.dim is not None and spared.feeds(weight)
        ]
        twins = [layer for layer, weight in ends.items() if weight.outputs == spared.outputs]
        heads = [
            layer
            for layer, weight in ends.items()
            if takers and (spared.outputs > weight.outputs or spared.outputs in weight.inputs)
        ]
        if twins:
            yield f"{text} {_listed(twins)} has as many outputs, which no layer takes: if they are outputs, too, name them in skip"
        elif heads:
            yield f"{text} {takers[0].names[0]} takes its outputs, while no layer takes those of {_listed(heads)}: if that's the output, name it in skip and pass prune_output=True"


def _matched(argument: str, entries: Any, names: Sequence[str]) -> list[list[str]]:
    """For each entry, a name or pattern, the names that it matches."""
    if isinstance(entries, str) or not isinstance(entries, Collection):
        raise TypeError(f"{argument} must be a sequence of names or patterns, such as ({entries!r},), got {entries!r}")
    matched = [[name for name in names if name == entry or fnmatchcase(name, str(entry))] for entry in entries]
    for entry, found in zip(entries, matched, strict=True):
        if not found:
            raise ValueError(f"{argument}: {entry!r} names nothing that could be pruned{_near(entry, names)}")
    return matched


def _near(name: object, names: Iterable[str]) -> str:
    """The end of a message: the names that may have been meant."""
    near = difflib.get_close_matches(str(name), dict.fromkeys(names), n=3)
    return f": did you mean {' or '.join(map(repr, near))}?" if near else f"; there is {_listed([*names]) or 'none'}"


def _listed(names: Sequence[str]) -> str:
    """At most five names, then a count."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# How scores are found and selected


def _fraction(sparsity: Any) -> float:
    """The sparsity as a float, if it is a fraction."""
    if isinstance(sparsity, Tensor | np.ndarray) and sparsity.ndim == 0:
        sparsity = sparsity.item()
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise TypeError(f"sparsity must be a number in [0, 1], got {sparsity!r}")
    number = float(sparsity)
    if not 0 <= number <= 1:
        hint = f": did you mean {number / 100:g}?" if 2 <= number <= 100 else ""
        raise ValueError(f"sparsity must be a fraction in [0, 1], got {sparsity}{hint}")
    return number


def _local(generator: torch.Generator | None) -> torch.Generator:
    """The generator, or a new one, for torch's global ones belong to the caller and to other threads."""
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    return generator or torch.Generator("cpu").manual_seed(torch.initial_seed())


def _rankable(name: str, tensor: Any) -> Tensor:
    """The tensor, detached, if it is one that can be ranked."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    for wrong, text in (
        (nn.parameter.is_lazy(tensor), "has no shape yet: run a batch through its lazy layer first"),
        (tensor.is_meta, "has no values: it is on the meta device"),
        (not plain, f"must be a plain tensor, neither distributed nor quantized, got {type(tensor).__name__}"),
        (tensor.layout is not torch.strided, f"must be dense, got {tensor.layout}: convert it with to_dense()"),
        (not tensor.is_floating_point(), f"must be fp16, bf16, fp32 or fp64, got {tensor.dtype}"),
        (tensor.element_size() not in BITS, f"must be fp16, bf16, fp32 or fp64, got {tensor.dtype}"),
    ):
        if wrong:
            raise ValueError(f"{name} {text}")
    return tensor.detach()


def _prunable(name: str, tensor: Any) -> Tensor:
    """The tensor, detached, if it is one that can be ranked and changed in place."""
    tensor, reach = _rankable(name, tensor), 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach and tensor.numel():
            raise ValueError(f"{name} shares memory with itself, as an expanded tensor does: replace it by its clone()")
        reach += stride * (size - 1)
    return tensor


def _check_finite(name: str, weight: Tensor, witness: Tensor) -> None:
    """An error if weights aren't finite, which their norms or their sum would show."""
    if not witness.isfinite().all() and not weight.isfinite().all():
        raise ValueError(f"{name} must be finite, but has NaN or infinite weights")


def _scored(weight: _Weight, method: str, generator: torch.Generator) -> "_Scores":
    """A weight with its scores, of the weight's own shape or (units,)."""
    score, name, tensor = METHODS[method], weight.names[0], weight.tensor()
    if score is torch.abs:
        return _Scores(name, tensor, magnitude=True)
    _check_finite(name, tensor, tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)))
    gradient, tensor = weight.parameter.grad, weight.turned(tensor)
    if gradient is not None and gradient.shape == weight.parameter.shape and gradient.layout is torch.strided:
        tensor.grad = weight.turned(gradient.to(tensor.device, tensor.dtype))
    try:
        scores = score(tensor, generator) if score in (_random_weight, _random_unit) else score(tensor)
    except Exception as error:
        hint = "" if tensor.grad is not None else " (it has no gradient)"
        raise ValueError(f"method {method!r} fails for {name}{hint}: {type(error).__name__}: {error}") from error
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"the scores of {name} must be a floating-point tensor, got {got}")
    if scores.shape not in (tensor.shape, tensor.shape[:1]):
        shapes = f"{tuple(tensor.shape)} or {tuple(tensor.shape[:1])}"
        raise ValueError(f"the scores of {name} must have shape {shapes}, got {tuple(scores.shape)}")
    if scores.dim() == 1 and weight.dim is None:
        raise ValueError(f"{name} has no units that {method!r} could rank: LAYERS lacks the class of its module")
    return _Scores(name, scores.detach() if scores.dim() == 1 else weight.turned(scores.detach(), back=True))


def _protect_best_units(layers: Sequence["_Scores"]) -> None:
    """Rank the best unit of each layer behind all others, lest a layer of small norms cuts the network in two."""
    for layer in layers:
        if layer.tensor.dim() == 1 and len(layer.tensor):
            layer.tensor = layer.tensor.index_fill(0, layer.tensor.argmax(), math.inf)


class _Bound(NamedTuple):
    """A score and its position."""

    value: float
    position: int


@dataclass(eq=False)
class _Scores:
    """What a weight, or its units, are ranked by. Positions count through all that are ranked together."""

    name: str
    tensor: Tensor
    magnitude: bool = False  # ranked by absolute values
    start: int = 0  # position of the first score
    dtype: torch.dtype = torch.float32  # to compare in

    def ranked(self, part: Tensor, out: Any = None) -> Any:
        """Scores of a part of the tensor."""
        scores = _array(part.to(self.dtype))
        return (np if part.is_cpu else torch).abs(scores, out=out) if self.magnitude else scores

    def sample(self, step: int) -> np.ndarray:
        """The scores at positions that are multiples of a step."""
        return self.check(_numpy(self.ranked(self.tensor.reshape(-1)[-self.start % step :: step])))

    def check(self, scores: Any) -> Any:
        """The same scores, if their largest, which would be NaN or infinite, shows none that can't be ranked."""
        largest = float(scores.max()) if len(scores) else 0.0
        if math.isnan(largest) or (self.magnitude and math.isinf(largest)):
            raise ValueError(
                f"{self.name} must be finite, but has NaN or infinite weights"
                if self.magnitude
                else f"the scores of {self.name} contain NaN"
            )
        return scores

    def compare(self, low: _Bound, high: _Bound) -> tuple[Tensor, int, np.ndarray, np.ndarray]:
        """A flat mask of what ranks after both bounds, its count, and indices and scores of what is between them."""
        flat, on_cpu = self.tensor.reshape(-1), self.tensor.is_cpu
        library: Any = np if on_cpu else torch
        size = min(BLOCK if on_cpu else GPU_BLOCK, len(flat))
        mask = torch.empty(len(flat), dtype=torch.bool, device=flat.device)
        scratch, buffer, keep = (
            _array(each) for each in (flat.new_empty(size, dtype=self.dtype), mask.new_empty(size), mask)
        )
        kept, indices, between = 0, [np.empty(0, int)], [np.empty(0, np.float32)]
        for first in range(0, len(flat), max(size, 1)):
            block = self.check(self.ranked(flat[first : first + size], scratch[: len(flat) - first]))
            after_high, inside = keep[first : first + size], buffer[: len(block)]
            _compare(block, high, self.start + first, after_high)
            _compare(block, low, self.start + first, inside)
            inside ^= after_high
            kept += int(library.count_nonzero(after_high))
            index = library.where(inside)[0]
            indices.append(_numpy(index) + first)
            between.append(_numpy(block[index]))
        return mask, kept, np.concatenate(indices), np.concatenate(between)


def _select(scores: Sequence[_Scores], sparsity: float) -> list[Tensor]:
    """Masks that prune exactly round(sparsity * n) of n scores: the lowest, of equal ones the earlier first.

    A score ranks together with its position, so that no two are equal. The last one to prune most likely lies between
    two bounds that a sample gives: all are compared with these, and only the few between them are sorted.

    Source: Floyd and Rivest, "Expected Time Bounds for Selection" (1975).
    """
    total = 0
    for part in scores:
        part.start, total = total, total + part.tensor.numel()
        part.dtype = functools.reduce(torch.promote_types, [other.tensor.dtype for other in scores], torch.float32)
    count = round(sparsity * total)
    step = 6 * int(total ** (1 / 3) / 20) + 1  # 1 for few scores; out of step with rows of 2, 3, 4, 6, … scores
    sample = np.concatenate([part.sample(step) for part in scores])
    ordered, rank = np.sort(sample), len(sample) * count / max(total, 1)
    margin = 2 * math.sqrt(rank * (1 - rank / max(len(sample), 1)) * (1 - len(sample) / max(total, 1))) + (
        step > 1
    )  # standard deviations
    while True:
        low, high = (_bound(sample, ordered, math.ceil(rank + side) - 1, step) for side in (-margin, margin))
        masks, kept, indices, between = zip(*(part.compare(low, high) for part in scores), strict=True)
        ranked = np.concatenate(between)
        excess = count - (total - sum(kept) - len(ranked))  # how many of those between to prune
        if 0 <= excess <= len(ranked):
            break
        margin = 4 * margin + 1  # the sample misled
    keep = np.empty(len(ranked), bool)
    _compare(ranked, _bound(ranked, np.sort(ranked), excess - 1), 0, keep)
    for mask, index in zip(masks, indices, strict=True):
        now, keep = keep[: len(index)], keep[len(index) :]
        mask.index_fill_(0, torch.from_numpy(index[now]).to(mask.device), True)
    return [mask.view(part.tensor.shape) for mask, part in zip(masks, scores, strict=True)]


def _bound(scores: np.ndarray, ordered: np.ndarray, rank: int, step: int = 1) -> _Bound:
    """The score of a rank, where positions are a step apart; for ranks out of range, one before or after all others."""
    if not 0 <= rank < len(scores):
        return _Bound(-math.inf, -1) if rank < 0 else _Bound(math.inf, sys.maxsize)
    value = ordered[rank]
    equal = np.flatnonzero(scores == value)
    return _Bound(float(value), step * int(equal[rank - np.searchsorted(ordered, value)]))


def _compare(scores: Any, bound: _Bound, start: int, out: Any) -> None:
    """Which scores rank after a bound; the first of them has the position `start`."""
    library: Any = np if isinstance(scores, np.ndarray) else torch
    cut = min(max(bound.position + 1 - start, 0), len(scores))
    library.greater(scores[:cut], bound.value, out=out[:cut])
    library.greater_equal(scores[cut:], bound.value, out=out[cut:])


def _array(tensor: Tensor) -> Any:
    """On the CPU an array of the same memory, for NumPy compares several times faster than torch."""
    return tensor.numpy() if tensor.is_cpu else tensor


def _numpy(scores: Any) -> np.ndarray:
    return scores if isinstance(scores, np.ndarray) else scores.cpu().numpy()
