"""Prune any PyTorch model: find masks of what to remove, apply them, and see what each sparsity costs.

A mask is a boolean tensor of a weight's shape, True = keep; masks come in a dict by parameter name, fit for torch.save.
Pruned models stay plain modules. torch's ``custom_from_mask`` takes these masks, and torch's own are
``{name.removesuffix("_mask"): mask.bool() for name, mask in model.named_buffers() if name.endswith("_mask")}``.
This file needs just torch and numpy: copy it beside any notebook.
"""

import copy
import difflib
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

# What can be pruned: type → integers that its bytes are multiplied as
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
BLOCK = 2**17  # scores to compare at a time: they fit into the cache


def _unit_norm(weight: Tensor, relative: bool = False) -> Tensor:
    """L2 norm of each unit: (units, …) → (units,), in fp64; or relative to the layer's largest, for global scope."""
    rows = weight.unsqueeze(-1).flatten(1)  # (units, weights of one)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    blocks = rows.split(max(BLOCK // max(rows.shape[1], 1), 1))  # torch converts half precision
    norm = torch.cat([torch.linalg.vector_norm(block, dim=1, dtype=dtype) for block in blocks]).double()
    unsafe = (norm < 1e-12) | (norm > 1e18)  # squares may have vanished or overflowed
    if rows.numel() and unsafe.any():
        unsafe &= (rows.amax(1) > 0) | (rows.amin(1) < 0)  # zeros are safe
        norm[unsafe] = norm.new_tensor([math.hypot(*unit) for unit in rows[unsafe].tolist()])
    return norm / norm.max().clamp_min(torch.finfo(norm.dtype).tiny) if relative and len(norm) else norm


def _random_weight(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Scores in (0, 1] of weight's shape, but 0 where it is zero already."""
    scores = 1 - torch.rand(weight.shape, generator=generator, dtype=torch.float32, device=generator.device)
    return scores.to(weight.device).masked_fill_(weight == 0, 0)


# The one place to add a criterion, such as METHODS["taylor"] = lambda weight: (weight * weight.grad).abs()
# It gets a detached weight with its .grad, outputs in dim 0 whatever the layer, and returns scores, the lowest of which
# are pruned first: of weight's shape or (units,). If its name begins with "random", it also gets a torch.Generator.
METHODS: dict[str, Callable[..., Tensor]] = {
    "weight": torch.abs,
    "unit": lambda weight: _unit_norm(weight, relative=True),  # by raw norms, or over their mean, layers soon empty
    "random_weight": _random_weight,
    "random_unit": lambda weight, generator: _random_weight(weight.flatten(1).any(1), generator),
}

# The one place to add a class of layers, with the dimension of its `weight` that counts outputs: for it and subclasses,
# LAYERS[transformers.pytorch_utils.Conv1D] = 1. If it isn't 0, `groups` divide dim 0: (in, out / groups, …).
LAYERS: dict[type[nn.Module], int] = {
    **dict.fromkeys((nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d), 0),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1),
}


def weight_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Mask that prunes the weights of lowest magnitude: a boolean tensor of weight's shape, True = keep.

    Args:
        weight: any shape, finite, fp16 to fp64.
        sparsity: fraction in [0, 1]: exactly ``round(sparsity * weight.numel())`` go, of equal ones the earlier first.
    Raises: TypeError, ValueError: sparsity is no number in [0, 1], or weight can't be ranked.
    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (2015).

    >>> weight_mask(torch.tensor([0.5, -0.1, -2.0, 0.1]), sparsity=0.5)
    tensor([ True, False,  True, False])
    """
    return _select({"weight": _checked("weight", weight)}, _fraction(sparsity), magnitude=True)[0]


def unit_mask(weight: Tensor, sparsity: float, dim: int = 0) -> Tensor:
    """Mask that prunes the units of lowest L2 norm, as `weight_mask` prunes weights.

    Args:
        dim: the dimension of weight that counts units: 0 in a Linear's (out, in), where a row is a unit.
    Source: Li et al., "Pruning Filters for Efficient ConvNets" (2017), here with the L2 norm.

    >>> unit_mask(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), sparsity=0.5).tolist()
    [[True, True], [False, False]]
    """
    weight = _checked("weight", weight)
    if isinstance(dim, bool) or not isinstance(dim, int | np.integer) or not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"dim must be an integer, one of weight's {weight.dim()} dimensions, got {dim!r}")
    norm = _unit_norm(weight.transpose(0, dim))
    _checked("weight", weight, finite=not norm.isfinite().all())
    (keep,) = _select({"weight": norm}, _fraction(sparsity))
    return keep.expand_as(weight.transpose(dim, -1)).transpose(dim, -1).contiguous()


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
        model, method: any module, also wrapped by torch.compile or DataParallel; a name in `METHODS`.
        sparsity: fraction in [0, 1]: exactly ``round(sparsity * n)`` weights or units go; more prune a superset.
        scope: "layer" ranks within each layer, "global" across all: best for the weights of convolutional networks.
        skip: names or patterns of layers to spare as well: ``("conv1", "body.*")``.
        prune_output: prune the output layer, too. It is the prunable layer registered last; a warning tells of doubts.
        only: names or patterns of parameters to prune instead: ``("lstm.weight_*",)``. Units need a class in `LAYERS`.
        generator: source of the random methods' numbers. None: they follow ``torch.manual_seed``, the same each time.
    Returns: masks by parameter name, such as "fc1.weight", True = keep. Unit methods also mask biases, if not shared.
    Raises: TypeError, ValueError: a bad argument, nothing to prune, a method that fails, a weight that can't be ranked.
    Warns: UserWarning: a layer loses everything; another layer may be the output; much that `LAYERS` lacks stays dense.

    >>> masks = find_masks(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), "unit", sparsity=1 / 3)
    >>> {name: mask.count_nonzero().item() for name, mask in masks.items()}
    {'0.weight': 8, '0.bias': 2}
    """
    sparsity = _fraction(sparsity)
    for argument, value, known in (("method", method, METHODS), ("scope", scope, ("layer", "global"))):
        if value not in known:
            raise ValueError(f"unknown {argument} {value!r}: expected one of {', '.join(known)}")
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    generator = generator or torch.Generator("cpu").manual_seed(torch.initial_seed())  # of its own, for threads' sake
    # The numbers of that seed may be those of the weights: what is drawn from it seeds other ones.
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    generator = torch.Generator("cpu").manual_seed(seed)
    weights, doubts = _chosen(model, skip, prune_output, only)
    masks: dict[str, Tensor] = {}
    for group in [weights] if scope == "global" else [[weight] for weight in weights]:
        scores = {weight.names[0]: _scored(weight, method, generator) for weight in group}
        for weight, keep in zip(group, _select(scores, sparsity, METHODS[method] is torch.abs), strict=True):
            masks |= weight.masks(keep)
    names = [weight.names[0] for weight in weights if weight.parameter.numel()]
    if empty := [name for name in names if not masks[name].cpu().numpy().any()]:  # NumPy stops at the first
        doubts.append(f"pruning leaves nothing of {_listed(empty)} at sparsity {sparsity:g}")
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=2)
    return masks


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set what masks prune to zero, in place: all of it, or after an error nothing.

    ``optimizer.register_step_post_hook(lambda *_: apply_masks(model, masks))`` holds it at zero through training.

    Args:
        masks: boolean tensors by parameter name, True = keep, of the parameters' shapes, on any device.
    Raises: TypeError, ValueError: masks that aren't boolean tensors by name, or fit no parameter that can be pruned.

    >>> apply_masks(model := nn.Linear(2, 1, bias=False), {"weight": torch.tensor([[True, False]])})
    >>> model.weight.count_nonzero().item()
    1
    """
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks must be a dict of boolean tensors by parameter name, got {type(masks).__name__}")
    owned = ((f"{name}.{own}", value) for name, module in _modules(model) for own, value in module._parameters.items())
    parameters = {name.lstrip("."): value for name, value in owned if value is not None}
    pairs = []
    for name, mask in masks.items():
        if name not in parameters:
            near = _listed(difflib.get_close_matches(str(name), parameters, cutoff=0))
            raise ValueError(f"the model has no parameter {name!r}: did you mean {near}?")
        parameter = _checked(name, parameters[name], in_place=True)
        wanted = f"{tuple(parameter.shape)} of torch.bool"
        got = f"{tuple(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        if got != wanted or mask.is_meta or mask.layout is not torch.strided:
            raise ValueError(f"the mask of {name} must be a dense {wanted}, True = keep, got {got}")
        pairs.append((parameter.view(BITS[parameter.dtype]), mask.to(parameter.device)))
    for bits, mask in pairs:
        bits.mul_(mask)  # +0.0 even for NaN, in a tenth of the time of masked_fill_


def prune_model(model: nn.Module, method: str, sparsity: float, **options: Any) -> nn.Module:
    """A pruned deep copy of a model. Arguments, errors and warnings are those of `find_masks`.

    >>> model = prune_model(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), "weight", sparsity=0.75, scope="global")
    >>> achieved_sparsity(model)
    0.75
    """
    pruned = copy.deepcopy(model)
    apply_masks(pruned, find_masks(model, method, sparsity, **options))
    return pruned


def achieved_sparsity(
    model: nn.Module, *, skip: Collection[str] = (), prune_output: bool = False, only: Collection[str] | None = None
) -> float:
    """Fraction in [0, 1] of zeros among the weights that `find_masks` would prune, with its arguments and errors.

    >>> achieved_sparsity(nn.Linear(4, 4), prune_output=True)
    0.0
    """
    chosen, _ = _chosen(model, skip, prune_output, only)
    tensors = [_checked(weight.names[0], weight.parameter, in_place=True) for weight in chosen]
    total = sum(tensor.numel() for tensor in tensors)
    return (total - sum(int(tensor.count_nonzero()) for tensor in tensors)) / max(total, 1)


class SweepPoint(NamedTuple):
    """The sparsity asked for, the fraction of weights that became zero, what score returned, also after retraining."""

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
        model, method, scope, generator, and skip, prune_output, only as options: as in `find_masks`.
        sparsities: fractions in [0, 1], in any order; all use the same random numbers.
        score: gets a pruned copy in eval mode; what it returns, such as an accuracy, is passed through.
        retrain: gets the copy, in training mode but for frozen modules, and the masks; the copy is scored again.
    Returns: a point for each sparsity, in their order. Raises: as `find_masks`, before anything is scored.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> [point.achieved for point in sweep(model, "weight", [0.25, 0.75], score=lambda pruned: 0.0)]
    [0.25, 0.75]
    """
    if not (callable(score) and callable(retrain or score)):
        raise TypeError(f"score and retrain must be functions, got {score!r} and {retrain!r}")
    points = []
    for sparsity in [_fraction(sparsity) for sparsity in sparsities]:
        again = generator.clone_state() if isinstance(generator, torch.Generator) else generator
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
    """Take the statistics of BatchNorm layers again, in place, for pruning has changed what they should be.

    They become the average over all batches: inputs, or tuples that begin with them, such as (images, labels), moved to
    the model's device. Nothing else changes, and after an error (ValueError: there are no batches) not even they.

    >>> recalibrate(model := nn.BatchNorm1d(2), [torch.ones(8, 2)])
    >>> model.running_mean
    tensor([1., 1.])
    """
    trial, count = copy.deepcopy(model).eval(), 0
    pairs = zip(model.modules(), trial.modules(), strict=True)
    norms = [(own, norm) for own, norm in pairs if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    for _, norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True  # None: the average
    with torch.no_grad():
        for count, batch in enumerate(batches, start=1):  # noqa: B007
            inputs = batch[0] if isinstance(batch, tuple | list) else batch
            trial(inputs.to(next(chain(trial.parameters(), trial.buffers()), inputs).device))
    if not count:
        raise ValueError("recalibrate needs at least one batch")
    for own, norm in norms:
        own.load_state_dict(norm.state_dict())


# How layers are found: the weights of a model, which of them are pruned, and what may be wrong with the choice
@dataclass(eq=False)
class _Weight:
    """A parameter of the model, or a tensor in its stead that is computed from others."""

    parameter: Any
    module: nn.Module  # the first that uses it
    dim: int | None  # that counts outputs; None if LAYERS doesn't tell
    names: list[str] = field(default_factory=list)  # such as fc1.weight; several if it is shared
    users: dict[str, nn.Module] = field(default_factory=dict)  # all modules that use it, by name
    biases: list[str] = field(default_factory=list)  # names of their biases, but not of those that others use

    def turned(self, tensor: Tensor) -> Tensor:
        """From the weight's own layout to (out, in / groups, …), or back."""
        groups = getattr(self.module, "groups", 1)
        return tensor.unflatten(0, (groups, -1)).transpose(1, self.dim + 1).flatten(0, 1) if self.dim else tensor

    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        """Masks by parameter name, from one of the weight's shape or (units,)."""
        if keep.dim() > 1:
            return {self.names[0]: keep}
        weight = self.turned(self.parameter.detach())
        mask = keep.expand_as(weight.transpose(0, -1)).transpose(0, -1)
        return {self.names[0]: self.turned(mask).contiguous()} | dict.fromkeys(self.biases, keep)


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


def _matrices(model: nn.Module) -> list[_Weight]:
    """The weights of all layers in LAYERS and all other matrices, in order of registration."""
    found: dict[int, _Weight] = {}
    lists = (nn.ParameterList, nn.ParameterDict)  # they make no difference to what other modules use
    for name, module in sorted(_modules(model), key=lambda named: isinstance(named[1], lists)):
        layer_dim = next((LAYERS[parent] for parent in type(module).__mro__ if parent in LAYERS), None)
        own, computed = module._parameters, {}
        if layer_dim is not None:  # a weight or bias may be computed from other parameters
            computed = {key: getattr(module, key, None) for key in ("weight", "bias") if key not in own}
        for key, parameter in (own | computed).items():
            if parameter is not None and not (isinstance(module, lists) and id(parameter) in found):
                dim = layer_dim if key == "weight" or key in computed else None
                weight = found.setdefault(id(parameter), _Weight(parameter, module, dim))
                weight.dim = dim if weight.dim == dim else None
                weight.names.append(f"{name}.{key}".lstrip("."))
                weight.users[name] = module
    for weight in found.values():
        biases = [found.get(id(module._parameters.get("bias"))) for module in weight.users.values()]
        weight.biases = [bias.names[0] for bias in biases if bias and bias.users.keys() <= weight.users.keys()]
    return [weight for weight in found.values() if weight.dim is not None or weight.parameter.ndim > 1]


def _chosen(model: nn.Module, skip: Any, prune_output: bool, only: Any) -> tuple[list[_Weight], list[str]]:
    """The weights to prune, and what the user may not expect of this choice."""
    matrices = _matrices(model)
    output = [] if prune_output else [name for name, layer in _modules(model) if isinstance(layer, tuple(LAYERS))][-1:]
    skipped = _matched("skip", skip, {name for weight in matrices for name in weight.users})
    spared = tuple(f"{name}." for name in {*output, *skipped})
    free = [weight for weight in matrices if not any(f"{name}.".startswith(spared) for name in weight.users)]
    chosen = [weight for weight in free if weight.dim is not None]
    doubts = [*_doubts(output, free if only is None else chosen, matrices)]
    hint = f"; {output[0]!r}, registered last, is spared as the output unless prune_output=True" if output else ""
    if only is not None:
        named = _matched("only", only, {name for weight in free for name in weight.names}, hint)
        chosen = [weight for weight in free if named & {*weight.names}]
    if not chosen:
        others = _listed([weight.names[0] for weight in free]) or "nothing"
        raise ValueError(f"no layer is in LAYERS, or every one is spared{hint}; only=(…) could name {others}")
    return chosen, doubts


def _doubts(output: Sequence[str], free: Sequence[_Weight], matrices: Sequence[_Weight]) -> Iterator[str]:
    """What the user may not expect: much that stays dense, and an output layer that is probably not it, or not all."""
    matrices = [w for w in matrices if isinstance(w.parameter, nn.Parameter) and w.parameter.ndim > 1]  # 1: lazy
    dense = {w.names[0]: w.parameter.numel() for w in matrices if w.dim is None and w in free}
    share = sum(dense.values()) / max(1, sum(w.parameter.numel() for w in matrices))
    if share >= 0.1:
        text = f"{share:.0%} of the weights stay dense, as LAYERS lacks the classes of their modules"
        yield f"{text}: {_listed([*dense])}; prune them by name with only=(…), or spare the modules with skip=(…)"
    shapes = {w: w.turned(torch.empty(w.parameter.shape, device="meta")).shape for w in matrices}  # (out, in, …)
    inputs = {w: shapes[w][w.dim is not None : 2 if hasattr(w.module, "kernel_size") else None] for w in matrices}

    def taken(weight: _Weight, takers: Iterable[_Weight]) -> bool:
        """Whether they have as many inputs as it has outputs or, of a convolution, a multiple: flattened images."""
        n, images = max(shapes[weight][0], 1), hasattr(weight.module, "kernel_size")
        return any(size == n or (images and size % n == 0) for taker in takers for size in inputs[taker])

    layers = [w for w in matrices if w.dim is not None]
    ends = [w for w in layers if w in free and not taken(w, matrices)]
    for last in [w for w in layers if w.users.keys() & output]:  # one, if any
        rivals = [next(iter(w.users)) for w in ends if shapes[w][0] == shapes[last][0] or taken(last, [w])]
        if rivals:
            text = f"{output[0]!r}, registered last, is spared as the output layer, but no layer takes the outputs of"
            yield f"{text} {_listed(rivals)}: if they're wanted, add them to skip, in its stead with prune_output=True"


def _matched(argument: str, entries: Any, names: Collection[str], hint: str = "") -> set[str]:
    """The names that entries, which are names or patterns, match."""
    if isinstance(entries, str) or not isinstance(entries, Collection):
        raise TypeError(f"{argument} must be a sequence of names or patterns, such as ({entries!r},), got {entries!r}")
    matched: set[str] = set()
    for entry in entries:
        fits = {name for name in names if name == entry or fnmatchcase(name, str(entry))}
        if not fits:
            near = _listed(difflib.get_close_matches(str(entry), names, cutoff=0))
            raise ValueError(f"{argument}: {entry!r} names nothing that could be pruned{hint}: did you mean {near}?")
        matched |= fits
    return matched


def _listed(names: Sequence[str]) -> str:
    """At most five names, then a count."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# How scores are found and selected
def _fraction(sparsity: Any) -> float:
    """The sparsity as a float, if it is a fraction."""
    if isinstance(sparsity, bool) or not hasattr(sparsity, "__float__") or getattr(sparsity, "ndim", False):
        raise TypeError(f"sparsity must be a number in [0, 1], got {sparsity!r}")
    if not 0 <= float(sparsity) <= 1:
        hint = f": did you mean {float(sparsity) / 100:g}?" if 2 <= float(sparsity) <= 100 else ""
        raise ValueError(f"sparsity must be a fraction in [0, 1], got {float(sparsity):.10g}{hint}")
    return float(sparsity)


def _checked(name: str, tensor: Any, in_place: bool = False, finite: bool = False) -> Tensor:
    """The tensor, detached, if it can be ranked and, if so wanted, be changed in place or is finite."""
    if in_place and not isinstance(tensor, nn.Parameter):
        raise ValueError(f"{name} is computed from other parameters: use prune.remove or remove_parametrizations")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    empty = nn.parameter.is_lazy(tensor) or tensor.is_meta or hasattr(tensor, "__tensor_flatten__")
    if empty or tensor.layout is not torch.strided or tensor.dtype not in BITS:
        got = f"{type(tensor).__name__}, {tensor.dtype}, {tensor.layout}, {tensor.device}"
        raise ValueError(f"{name} must be a dense fp16 to fp64 tensor with values (lazy: run a batch), got {got}")
    if in_place and sum((size - 1) * tensor.stride(dim) for dim, size in enumerate(tensor.shape)) + 1 < tensor.numel():
        raise ValueError(f"{name} shares memory with itself, as an expanded tensor does: replace it by its clone()")
    if finite and not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, but has NaN or infinite weights")
    return tensor.detach()


def _scored(weight: _Weight, method: str, generator: torch.Generator) -> Tensor:
    """Scores of a weight, of its own shape or (units,). Magnitudes are left to be taken block by block."""
    score, name = METHODS[method], weight.names[0]
    tensor = _checked(name, weight.parameter, in_place=True, finite=score is not torch.abs)
    if score is torch.abs:
        return tensor
    gradient, turned = weight.parameter.grad, weight.turned(tensor)
    if gradient is not None and gradient.shape == tensor.shape and gradient.layout is torch.strided:
        turned.grad = weight.turned(gradient.to(tensor.device, tensor.dtype))
    try:
        scores = score(turned, generator) if method.startswith("random") else score(turned)
    except Exception as error:
        hint = "" if turned.grad is not None else ", which has no gradient"
        raise ValueError(f"method {method!r} fails for {name}{hint}: {type(error).__name__}: {error}") from error
    shapes = tuple(turned.shape), tuple(turned.shape[:1])
    fits = isinstance(scores, Tensor) and scores.is_floating_point() and scores.shape in shapes
    if not fits or scores.isnan().any():
        got = f"{tuple(scores.shape)} of {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
        wanted = f"floating-point, of shape {shapes[0]} or {shapes[1]}, and not NaN"
        raise ValueError(f"the scores of {name} must be {wanted}, got {got}")
    if scores.dim() == 1 and weight.dim is None:
        raise ValueError(f"{name} has no units that {method!r} could rank: LAYERS lacks the class of its module")
    return scores.detach() if scores.dim() == 1 else weight.turned(scores.detach())


def _select(ranked: Mapping[str, Tensor], sparsity: float, magnitude: bool = False) -> list[Tensor]:
    """Masks that prune exactly round(sparsity * n) of n scores: the lowest, of equal ones the earlier first.

    They rank by score, then by position, so that no two are equal. The last to prune most likely lies between two of a
    sample: all are compared with these, the few between are sorted. NumPy is several times faster here than torch.
    Source: Floyd and Rivest, "Expected Time Bounds for Selection" (1975).
    """
    dtype = torch.float64 if any(scores.dtype == torch.float64 for scores in ranked.values()) else torch.float32
    masks = [torch.empty(scores.shape, dtype=torch.bool, device="cpu") for scores in ranked.values()]
    total = sum(scores.numel() for scores in ranked.values())
    stay = total - round(sparsity * total)
    step = 6 * int(total ** (1 / 3) / 16) + 1  # 1 for few scores; out of step with rows of 2, 3, 4, 6, … scores
    blocks, samples, start = [], [], 0
    for (name, scores), mask in zip(ranked.items(), masks, strict=True):
        flat = scores.reshape(-1)
        samples.append(flat[-start % step :: step].to("cpu", dtype).numpy())
        for part, keep in zip(flat.split(BLOCK), mask.view(-1).split(BLOCK), strict=True):
            blocks.append((name, start, part, keep.numpy()))
            start += len(part)
    sample = np.abs(np.concatenate(samples)) if magnitude else np.concatenate(samples)
    ordered, share = np.sort(sample), stay / max(total, 1)
    gone = (1 - share) * len(sample)  # as many of the sample, more or less
    margin = 2.5 * math.sqrt(share * gone) + 1  # 2.5 standard deviations
    while True:
        low, high = (_bound(sample, ordered, math.ceil(gone + side) - 1, step) for side in (-margin, margin))
        kept, indices, between = 0, [], []
        for name, start, part, keep in blocks:
            values = part.to("cpu", dtype).numpy()
            if magnitude:
                values = np.abs(values)
                _checked(name, part, finite=not math.isfinite(values.max(initial=0)))
            kept += int(np.count_nonzero(_after(values, start, high, out=keep)))
            indices.append(np.flatnonzero(_after(values, start, low) ^ keep))
            between.append(values[indices[-1]])
        rest = np.concatenate(between)
        if kept <= stay <= kept + len(rest):
            break
        margin *= 4  # the sample misled
    after = _after(rest, 0, _bound(rest, np.sort(rest), kept + len(rest) - stay - 1))
    for (*_, keep), index in zip(blocks, indices, strict=True):
        keep[index], after = after[: len(index)], after[len(index) :]
    return [mask.to(scores.device) for mask, scores in zip(masks, ranked.values(), strict=True)]


def _bound(scores: np.ndarray, ordered: np.ndarray, rank: int, step: int = 1) -> tuple[float, int]:
    """The score of a rank and its position, if positions are a step apart; out of range, one before or after all."""
    if not 0 <= rank < len(scores) or np.isnan(ordered[rank]):
        return (-math.inf, -1) if rank < 0 else (math.inf, step * len(scores))
    equal = np.flatnonzero(scores == ordered[rank])
    return ordered[rank], step * int(equal[rank - np.searchsorted(ordered, ordered[rank])])


def _after(scores: np.ndarray, start: int, bound: tuple[float, int], out: np.ndarray | None = None) -> np.ndarray:
    """Whether each score, the first at position `start`, ranks after a bound: is greater, or equal and further on."""
    value, cut = bound[0], max(bound[1] + 1 - start, 0)
    out = np.empty(len(scores), bool) if out is None else out
    np.greater(scores[:cut], value, out=out[:cut])
    np.greater_equal(scores[cut:], value, out=out[cut:])
    return out
