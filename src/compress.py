"""Make the zeros pay: smaller networks, sparse kernels, small files, and what they cost.

A mask makes nothing smaller or faster by itself. `shrink` removes pruned units, `to_sparse` skips pruned weights,
`save_compressed` stores neither. They take a `NeuralNetwork` or an `nn.Sequential` of Linear layers (with or without
bias), elementwise activations with f(0) = 0 such as ReLU, GELU or Tanh, Dropout and Flatten.
"""

import copy
import inspect
import io
import math
import pickle
import warnings
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from model import NeuralNetwork
from utils import atomic_write

if TYPE_CHECKING:
    from torch.utils.benchmark import Measurement

_ACTIVATIONS = (  # elementwise, with f(0) = 0: a unit that receives nothing sends nothing
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardswish, nn.Identity, nn.LeakyReLU, nn.Mish, nn.ReLU),
    *(nn.ReLU6, nn.SELU, nn.SiLU, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink),
)
_LAYERS = (nn.Linear, nn.Dropout, nn.Flatten, *_ACTIVATIONS)
_CLASSES: dict[str, Any] = {kind.__name__: kind for kind in (NeuralNetwork, nn.Sequential, *_LAYERS)}
_FORMAT = "compressed network, version 1"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an entry
_MKL = torch.backends.mkl.is_available()
_DENSITY = 1 / 3  # measured on batches of 32 and more: sparse wins below 0.3 to 0.45, with AVX2 and with AVX-512
_SUM_BATCH = 16  # from this batch size on, summing rows beats MKL's CSR product
_PARTS, _WIDTH = 4, 64  # 64 values of each of 1,000 features, 256 kB, stay in the cache of a core


def shrink(model: nn.Module) -> nn.Module:
    """A smaller network with the same logits, to rounding: every unit that cannot change them is removed.

    A unit goes when its outgoing weights are all zero, or its incoming ones: the constant that it then sends moves into
    the biases of the next layer (without biases, only units that send zero go; in training mode, dropout no longer
    reaches what has moved). So on until no more can go. A layer none of whose units matters keeps one, all zero.

    Args:
        model: a model as above; it is not changed.

    Returns:
        An ordinary dense model of the same class, dtype, device, mode and requires_grad. It has new parameters and no
        gradients: training it takes a new optimizer.

    Raises:
        ValueError: an unsupported module, layers that do not fit, or NaN or infinite weights.

    Example:
        >>> model = NeuralNetwork((784, 100, 10))
        >>> with torch.no_grad():
        ...     model.fc1.weight[:75] = 0
        >>> shrink(model).sizes
        (784, 25, 10)
    """
    _layers(model)
    for name, parameter in model.named_parameters():
        if not parameter.detach().abs().amax().isfinite():
            raise ValueError(f"{name} has NaN or infinite values: removing units could hide them")
    smaller = copy.deepcopy(model)
    layers = [layer for _, layer in _layers(smaller)]
    places = [place for place, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for place, after in pairwise(places):
            _drop_constant(layers[place], layers[place + 1 : after], layers[after])
        for place, after in reversed([*pairwise(places)]):  # once each way is enough: unread units feed no kept unit
            _keep(layers[place], layers[after], layers[after].weight.abs().amax(0) != 0)
    return smaller


def _drop_constant(layer: nn.Linear, between: list[nn.Module], following: nn.Linear) -> None:
    """Remove the units of `layer` that no input reaches, once what they send is in the biases of `following`."""
    sends = torch.zeros_like(layer.weight[:, 0]) if layer.bias is None else layer.bias.clone()  # (units,)
    for module in between:
        if isinstance(module, _ACTIVATIONS):
            sends = module(sends)
    constant = layer.weight.abs().amax(1) == 0  # (units,)
    if following.bias is None:
        constant &= sends == 0
    elif constant.any():
        following.bias.add_(following.weight @ torch.where(constant, sends, 0))
    _keep(layer, following, ~constant)


def _keep(layer: nn.Linear, following: nn.Linear, keep: Tensor) -> None:
    """Cut `layer`, and what `following` reads of it, to the units marked in `keep` (units,), in place."""
    if keep.all():
        return
    if not keep.any():  # initializers, exporters and kernels do not take empty layers well: one unit stays
        keep = torch.arange(len(keep), device=keep.device) == 0
        for parameter in (*layer.parameters(), following.weight):
            parameter.zero_()
    units = keep.nonzero().squeeze(1)
    for parameter in layer.parameters():
        parameter.data = parameter.index_select(0, units)
    following.weight.data = following.weight.index_select(1, units)
    layer.out_features = following.in_features = len(units)


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Names and layers of a supported model in the order in which they run."""
    if type(model) is NeuralNetwork:
        relu = ("", nn.ReLU(inplace=True))
        pairs = [("", nn.Flatten()), *(pair for linear in model.named_children() for pair in (linear, relu))][:-1]
    elif type(model) is nn.Sequential:
        modules = model.named_modules(remove_duplicate=False)
        pairs = [(name, module) for name, module in modules if type(module) is not nn.Sequential]
    else:
        raise ValueError(f"expected a NeuralNetwork or an nn.Sequential, got {type(model).__name__}")
    for name, layer in pairs:
        if type(layer) not in _LAYERS:
            supported = "Linear, Dropout, Flatten and elementwise activations with f(0) = 0"
            raise ValueError(f"{name} is a {type(layer).__name__}; supported are {supported}")
        for kind in ("weight", "bias") if isinstance(layer, nn.Linear) else ():
            if kind not in layer._parameters:
                raise ValueError(f"{name}.{kind} is computed; make it permanent (torch.nn.utils.prune.remove) first")
    shared = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    if shared:
        raise ValueError(f"{', '.join(sorted(shared))}: shared with an earlier layer")
    linears = [(name, layer) for name, layer in pairs if isinstance(layer, nn.Linear)]
    for (before, layer), (after, following) in pairwise(linears):
        if following.in_features != layer.out_features:
            raise ValueError(f"{after} takes {following.in_features} inputs, {before} has {layer.out_features} units")
    return pairs


class SparseLinear(nn.Module):
    """A Linear layer for inference that multiplies by its non-zero weights only; part of `SparseLayers`."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        with warnings.catch_warnings():  # once a process, torch calls CSR tensors a beta feature
            warnings.simplefilter("ignore", UserWarning)
            csr = layer.weight.detach().repeat(_PARTS, 1).to_sparse_csr()
            # int32, as MKL copies wider indices
            starts, columns, values = csr.crow_indices().int(), csr.col_indices().int(), csr.values()
            self.nonzero = len(values) // _PARTS
            first = starts[: self.out_features + 1], columns[: self.nonzero], values[: self.nonzero]
            self.weight = nn.Buffer(torch.sparse_csr_tensor(*first, layer.weight.shape, device=values.device))
        columns += self.in_features * torch.arange(_PARTS, device=columns.device).repeat_interleave(self.nonzero)
        self.starts, self.columns, self.values = nn.Buffer(starts), nn.Buffer(columns), nn.Buffer(values)
        self.bias = None if layer.bias is None else nn.Buffer(layer.bias.detach().repeat(_PARTS).unsqueeze(1))

    def forward(self, rows: Tensor) -> Tensor:
        """(parts x in_features, B / parts) to (parts x out_features, B / parts)."""
        height, width = rows.shape
        parts = height // self.in_features
        if width < _SUM_BATCH and parts == 1 and _MKL and rows.dtype in (torch.float32, torch.float64):
            product = (self.weight @ rows.squeeze(1)).view(self.out_features, width)
        else:  # a kernel made to sum weighted rows is several times faster than the CSR product
            starts, used = self.starts[: parts * self.out_features + 1], parts * self.nonzero
            columns, values = self.columns[:used], self.values[:used]
            product = nn.functional.embedding_bag(
                columns, rows, starts, mode="sum", per_sample_weights=values, include_last_offset=True
            )
        return product if self.bias is None else product.add_(self.bias[: len(product)])

    def extra_repr(self) -> str:
        """Sizes, for print."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.nonzero} non-zero"


class SparseLayers(nn.Sequential):
    """A sparse layer and all after it, in the layout that suits sparse weights: (parts x features, B / parts).

    Batches are transposed, so that each weight scales a contiguous row, and cut into parts, one below the other. The
    weights are repeated for every part, as the blocks of a block-diagonal matrix, so that one product takes all parts:
    each thread goes through one part after the other, and what it reads stays in the cache of its core.
    """

    def forward(self, features: Tensor) -> Tensor:
        """(…, in_features) to (…, out_features)."""
        first: Any = self[0]
        if features.shape[-1] != first.in_features:
            raise ValueError(f"expected {first.in_features} features, got {features.shape[-1]}")
        pieces = features.reshape(-1, first.in_features).split(_PARTS * _WIDTH)
        output = torch.cat([self._piece(piece) for piece in pieces])
        return output.view(*features.shape[:-1], output.shape[1])

    def _piece(self, batch: Tensor) -> Tensor:
        size, in_features = batch.shape
        parts = max(1, math.ceil(size / _WIDTH))
        if size % parts:
            batch = nn.functional.pad(batch, (0, 0, 0, -size % parts))
        rows = batch.view(parts, -1, in_features).transpose(1, 2).contiguous().flatten(0, 1)
        for layer in self:
            if isinstance(layer, nn.Linear):
                product = layer.weight @ rows.unflatten(0, (parts, -1))
                rows = (product if layer.bias is None else product.add_(layer.bias.unsqueeze(1))).flatten(0, 1)
            else:
                rows = layer(rows)
        return rows.unflatten(0, (parts, -1)).transpose(1, 2).flatten(0, 1)[:size]


def to_sparse(model: nn.Module) -> nn.Sequential:
    """A copy for inference that skips the zeros of every Linear layer that has enough of them.

    A layer stays dense when more than a third of its weights are non-zero: the dense product is faster then. This is
    for weight pruning; after unit pruning, `shrink` alone is faster. It is made for batches of 32 and more (a single
    image gains only where about nine weights in ten are zero), and takes 32 bytes a non-zero weight (in fp32): speed,
    not memory, is what it is for. On CUDA it is untested.

    Args:
        model: a model as above; it is not changed.

    Returns:
        A network in eval mode, without gradients, that takes (B, …) and gives the logits of `model` in eval mode, to
        float rounding. It can be pickled, but neither deep-copied (torch cannot copy CSR tensors) nor compressed: save
        `model`, and make it sparse after loading.

    Raises:
        ValueError: an unsupported module, or layers that do not fit.

    Example:
        >>> model = NeuralNetwork((784, 100, 10))
        >>> with torch.no_grad():
        ...     model.fc1.weight[:, 20:] = 0
        >>> to_sparse(model)[1][0]
        SparseLinear(in_features=784, out_features=100, 2000 non-zero)
    """
    network = nn.Sequential()
    for _, layer in _layers(model):
        sparse = isinstance(layer, nn.Linear) and layer.weight.count_nonzero() <= _DENSITY * layer.weight.numel()
        module = SparseLinear(layer) if sparse else copy.deepcopy(layer)
        if network and isinstance(network[-1], SparseLayers) and not isinstance(layer, nn.Flatten):
            network[-1].append(module)
        else:
            network.append(SparseLayers(module) if sparse else module)
    return network.requires_grad_(False).eval()


def save_compressed(model: nn.Module, path: str | Path, info: dict[str, Any] | None = None) -> None:
    """Save a model in as few bytes as its zeros allow, exactly: `load_compressed` gives every bit back.

    Each tensor is stored as the smallest of: all its values; a bit per entry and the non-zero values; the gaps between
    the non-zero entries, a byte each, and their values. To drop removed units too, save ``shrink(model)``.

    Args:
        model: a model as above, on any device.
        path: file to write, whole or not at all; its folder must exist.
        info: plain values (str, int, float, list, dict, …) to keep with it, such as {"accuracy": 0.98}.

    Raises:
        TypeError: `info` is no dict.
        ValueError: a model or `info` that cannot be stored.
        OSError: the file cannot be written.

    Source: S. Han, H. Mao, W. J. Dally, "Deep Compression", ICLR 2016, for the gaps.
    """
    if not isinstance(info, dict | None):
        raise TypeError(f"info must be a dict of plain values, got {type(info).__name__}")
    data = _compressed(model, info)
    with atomic_write(Path(path)) as temporary:
        temporary.write_bytes(data)


def stored_bytes(model: nn.Module) -> int:
    """Size in bytes of the file that ``save_compressed(model, path)`` writes.

    Raises:
        ValueError: a model that cannot be stored.

    Example:
        >>> model = NeuralNetwork((784, 100, 10))
        >>> dense = stored_bytes(model)
        >>> with torch.no_grad():
        ...     model.fc1.weight[:, 20:] = 0
        >>> stored_bytes(model) < dense / 10
        True
    """
    return len(_compressed(model))


def load_compressed(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load what `save_compressed` wrote. Nothing in the file is ever executed.

    Returns:
        The model, on the CPU, all of it in the mode that the whole was saved in, all parameters trainable; and its
        `info`, {} if it had none.

    Raises:
        ValueError: the file is cut short, damaged or not one of these.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        try:
            return _read(file)
        except Exception as error:  # what a damaged file makes of torch's reader has no common type
            raise ValueError(f"{path} is damaged or not from save_compressed: {_reason(error)}") from error


def _compressed(model: nn.Module, info: dict[str, Any] | None = None) -> memoryview:
    """The bytes of the file. In memory first: torch puts the name of a file into it, and they are read back here."""
    _layers(model)
    named = [("", model)] if isinstance(model, NeuralNetwork) else model.named_modules(remove_duplicate=False)
    modules = [(name, type(module).__name__, _arguments(module)) for name, module in named]
    content = dict(format=_FORMAT, modules=modules, training=model.training, info=info or {})
    buffer = io.BytesIO()
    try:
        content["tensors"] = {name: _pack(tensor) for name, tensor in model.state_dict().items()}
        torch.save(content, buffer)
        _read(buffer)
    except Exception as error:
        raise ValueError(f"cannot be stored as plain data: {_reason(error)}") from error
    return buffer.getbuffer()


def _arguments(module: nn.Module) -> dict[str, Any]:
    """The arguments that make such a module."""
    if isinstance(module, NeuralNetwork):
        return {"sizes": [int(size) for size in module.sizes]}
    names = inspect.signature(type(module)).parameters
    arguments = {name: value for name, value in vars(module).items() if name in names}
    return arguments | ({"bias": module.bias is not None} if isinstance(module, nn.Linear) else {})


def _read(file: IO[bytes]) -> tuple[nn.Module, dict[str, Any]]:
    """Model and info of a file, or any exception at all."""
    with zipfile.ZipFile(file) as archive:  # torch does not check the checksums that it writes
        if archive.testzip() is not None:
            raise ValueError("a checksum does not match")
    file.seek(0)
    content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError("another format")
    with torch.device("meta"):  # neither memory nor random numbers are spent on values that are replaced
        (_, kind, arguments), *inner = content["modules"]
        model = _CLASSES[kind](**arguments)
        for name, kind, arguments in inner:  # parents come first
            parent, _, own_name = name.rpartition(".")
            model.get_submodule(parent).add_module(own_name, _CLASSES[kind](**arguments))
    _layers(model)
    model.load_state_dict({name: _unpack(*packed) for name, packed in content["tensors"].items()}, assign=True)
    return model.train(content["training"]), content["info"]


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, pickle.UnpicklingError):
        return "holds objects that are not plain data (str, int, float, list, dict, …); they are never loaded"
    return " ".join(str(error).split()) or type(error).__name__


def _pack(tensor: Tensor) -> tuple[str, list[int], Tensor, Tensor]:
    """A tensor as (encoding, shape, index, values), in the smallest encoding. An entry is zero if no bit is set."""
    flat = tensor.detach().cpu().flatten()
    nonzero = (flat.view(_BITS[flat.element_size()]) != 0).numpy()
    positions = np.flatnonzero(nonzero)
    indices = {"bits": np.packbits(nonzero), "gaps": _gaps(positions)}
    encoding = min(indices, key=lambda name: indices[name].size)
    index = torch.from_numpy(indices[encoding])
    if len(index) + len(positions) * flat.element_size() >= flat.nbytes:
        return "dense", list(tensor.shape), index[:0].clone(), flat.clone()
    return encoding, list(tensor.shape), index, flat[torch.from_numpy(positions)]


def _gaps(positions: np.ndarray) -> np.ndarray:
    """Rising positions as bytes: each is the step from the one before, and 255 is a step without a position."""
    long_steps, rest = np.divmod(np.diff(positions, prepend=0), 255)
    gaps = np.full(len(positions) + long_steps.sum(), 255, np.uint8)
    gaps[np.cumsum(long_steps + 1) - 1] = rest
    return gaps


def _unpack(encoding: str, shape: list[int], index: Tensor, values: Tensor) -> Tensor:
    """The tensor that `_pack` packed."""
    if not values.is_floating_point():
        raise ValueError(f"holds {values.dtype} values where floating-point ones are due")
    if encoding == "dense":
        return values.reshape(shape)
    size, steps = math.prod(shape), index.numpy()
    if encoding == "bits":
        positions = np.flatnonzero(np.unpackbits(steps, count=size))
    else:
        positions = np.cumsum(steps, dtype=np.int64)[steps != 255]
    if len(positions) != len(values) or np.any(np.diff(positions, append=size) < 1):
        raise ValueError("holds impossible indices")
    flat = values.new_zeros(size)
    flat[torch.from_numpy(positions)] = values
    return flat.reshape(shape)


def latency(model: nn.Module, batch: Tensor, min_run_time: float = 0.5) -> "Measurement":
    """Time of ``model(batch)`` for inference, on torch's current number of threads, synchronized with CUDA.

    Args:
        model: any module, timed in the mode it is in.
        batch: (B, …) input, on the model's device.
        min_run_time: seconds to measure for, after a warm-up.

    Returns:
        ``.median`` and ``.iqr`` (interquartile range) in seconds a batch, ``.times``, ``.task_spec.num_threads``.

    Example:
        >>> latency(NeuralNetwork((784, 100, 10)), torch.rand(256, 784), min_run_time=0.01).median < 1
        True
    """
    from torch.utils.benchmark import Timer  # slow to import, and only measurements need it

    timer = Timer("model(batch)", globals={"model": model, "batch": batch}, num_threads=torch.get_num_threads())
    with torch.inference_mode():
        timer.timeit(3)  # the first calls allocate, and choose kernels
        return timer.blocked_autorange(min_run_time=min_run_time)
