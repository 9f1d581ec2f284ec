"""Make the zeros pay: smaller networks, sparse kernels, small files, and what they cost.

A mask makes nothing smaller or faster by itself. `shrink` removes pruned units, `to_sparse` skips pruned weights,
`save_compressed` stores neither. They take a `NeuralNetwork` or an `nn.Sequential` of Linear layers (with or without
bias), elementwise activations with f(0) = 0, Dropout and Flatten.
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
# Measured for the layers of NeuralNetwork in fp32 on 2 cores with AVX-512.
_DENSITY = 1 / 3  # CSR wins below about 0.3 at every batch size, and below 0.45 at 256
_SUM_BATCH = 16  # from this batch size on, summing rows beats MKL's CSR product
_PIECE = 256  # a batch of 10,000 in one piece takes 4 times as long


def shrink(model: nn.Module) -> nn.Module:
    """A smaller network with the same outputs: every unit that cannot change them is removed.

    A unit goes when its incoming weights are all zero: what it sends is constant, and moves into the biases of the next
    layer (where that has none, the unit goes only if it sends zero). It also goes when its outgoing weights are all
    zero. So on until no more can go. Inputs and logits stay; a layer none of whose units matters keeps one, all zero.
    Logits are equal to rounding in eval mode; in training mode, a constant that has moved is not subject to dropout.

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
        linears = list(model.named_children())
        relu = ("", nn.ReLU(inplace=True))
        pairs = [("", nn.Flatten()), *(pair for linear in linears for pair in (linear, relu))][:-1]
    elif type(model) is nn.Sequential:
        modules = model.named_modules(remove_duplicate=False)
        pairs = [(name, module) for name, module in modules if type(module) is not nn.Sequential]
    else:
        raise ValueError(f"expected a NeuralNetwork or an nn.Sequential, got {type(model).__name__}")
    for name, layer in pairs:
        if type(layer) not in _LAYERS:
            supported = "Linear, Dropout, Flatten and elementwise activations with f(0) = 0"
            raise ValueError(f"{name} is a {type(layer).__name__}; supported are {supported}")
        if isinstance(layer, nn.Linear) and not isinstance(layer.weight, nn.Parameter):
            raise ValueError(f"{name}.weight is computed; make it permanent (torch.nn.utils.prune.remove) first")
    linears = [(name, layer) for name, layer in pairs if isinstance(layer, nn.Linear)]
    shared = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    if shared:
        raise ValueError(f"{', '.join(sorted(shared))}: shared with an earlier layer")
    for (before, layer), (after, following) in pairwise(linears):
        if following.in_features != layer.out_features:
            raise ValueError(f"{after} takes {following.in_features} inputs, {before} has {layer.out_features} units")
    return pairs


class SparseLinear(nn.Module):
    """A Linear layer for inference that multiplies by its non-zero weights only (CSR), where that is faster."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().clone()
        if weight.count_nonzero() <= _DENSITY * weight.numel():
            with warnings.catch_warnings():  # once a process, torch calls CSR tensors a beta feature
                warnings.simplefilter("ignore", UserWarning)
                csr = weight.to_sparse_csr()
                indices = csr.crow_indices().int(), csr.col_indices().int()  # MKL copies wider ones at every call
                weight = torch.sparse_csr_tensor(*indices, csr.values(), csr.shape)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, features: Tensor) -> Tensor:
        """(…, in_features) to (…, out_features)."""
        out_features, in_features = self.weight.shape
        if features.shape[-1] != in_features:
            raise ValueError(f"expected {in_features} features, got {features.shape[-1]}")
        # Transposed, so that each weight scales one contiguous row. The result is a view of a transposed matrix; since
        # elementwise layers keep the order in memory, the next layer finds it ready.
        rows = features.reshape(-1, in_features).t().contiguous()  # (in, B)
        csr_product = rows.shape[1] < _SUM_BATCH and _MKL and rows.dtype in (torch.float32, torch.float64)
        if csr_product or self.weight.layout is torch.strided:
            product = (self.weight @ rows.squeeze(1)).view(out_features, -1)  # (out, B)
        else:  # a kernel made to sum weighted rows is several times faster than the CSR product
            columns, starts, values = self.weight.col_indices(), self.weight.crow_indices(), self.weight.values()
            product = nn.functional.embedding_bag(
                columns, rows, starts, mode="sum", per_sample_weights=values, include_last_offset=True
            )
        if self.bias is not None:
            product += self.bias.unsqueeze(1)
        return product.t().reshape(*features.shape[:-1], out_features)

    def extra_repr(self) -> str:
        """Sizes and layout, for print."""
        out_features, in_features = self.weight.shape
        layout = "dense" if self.weight.layout is torch.strided else f"{len(self.weight.values())} non-zero"
        return f"in_features={in_features}, out_features={out_features}, {layout}"


class SparseNetwork(nn.Sequential):
    """Layers with every Linear a SparseLinear, for inference."""

    def forward(self, features: Tensor) -> Tensor:
        """Logits of a batch (B, …), which goes through in pieces that stay in the cache of a CPU."""
        if features.is_cuda:
            return super().forward(features)
        return torch.cat([super(SparseNetwork, self).forward(piece) for piece in features.split(_PIECE)])


def to_sparse(model: nn.Module) -> SparseNetwork:
    """A copy for inference that skips the zeros: Linear layers with few enough non-zero weights hold them as CSR.

    A layer stays dense when more than a third of its weights are non-zero: the dense product is faster then. This is
    for weight pruning; after unit pruning, `shrink` alone is faster. It gains most on batches of 32 and more. On CUDA
    it is untested.

    Args:
        model: a model as above; it is not changed.

    Returns:
        A network in eval mode that takes (B, …) and gives the logits of `model` in eval mode, to float rounding.

    Raises:
        ValueError: an unsupported module, or layers that do not fit.

    Example:
        >>> model = NeuralNetwork((784, 100, 10))
        >>> with torch.no_grad():
        ...     model.fc1.weight[:, 20:] = 0
        >>> to_sparse(model)[1]
        SparseLinear(in_features=784, out_features=100, 2000 non-zero)
    """
    layers = [layer for _, layer in _layers(model)]
    sparse = [SparseLinear(layer) if isinstance(layer, nn.Linear) else copy.deepcopy(layer) for layer in layers]
    return SparseNetwork(*sparse).eval()


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
        The model, on the CPU, in the mode it was saved in; and its `info`, {} if it had none. Values are as they were
        saved, NaN included.

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
    if isinstance(model, NeuralNetwork):
        modules: list[Any] = [("", "NeuralNetwork", {"sizes": [int(size) for size in model.sizes]})]
    else:
        named = model.named_modules(remove_duplicate=False)
        modules = [(name, type(module).__name__, _arguments(module)) for name, module in named]
    tensors = {name: _pack(tensor) for name, tensor in model.state_dict().items()}
    content = dict(format=_FORMAT, modules=modules, tensors=tensors, training=model.training, info=info or {})
    buffer = io.BytesIO()
    try:
        torch.save(content, buffer)
        _read(buffer)
    except Exception as error:
        raise ValueError(f"cannot be stored as plain data: {_reason(error)}") from error
    return buffer.getbuffer()


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


def _arguments(module: nn.Module) -> dict[str, Any]:
    """The arguments that make such a module."""
    names = inspect.signature(type(module)).parameters
    arguments = {name: value for name, value in vars(module).items() if name in names}
    return arguments | ({"bias": module.bias is not None} if isinstance(module, nn.Linear) else {})


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
    flat = torch.zeros(size, dtype=values.dtype)
    flat[torch.from_numpy(positions)] = values
    return flat.reshape(shape)


def latency(model: nn.Module, batch: Tensor, min_run_time: float = 0.5) -> "Measurement":
    """Time of ``model(batch)`` for inference, in the mode the model is in, on torch's current number of threads.

    Args:
        model: any module.
        batch: (B, …) input, on the model's device.
        min_run_time: seconds to measure for, after a warm-up.

    Returns:
        A `Measurement`: ``.median`` and ``.iqr`` (spread: interquartile range) in seconds a batch, ``.times``, and
        ``.task_spec.num_threads``. CUDA is synchronized around each time.

    Example:
        >>> latency(NeuralNetwork((784, 100, 10)), torch.rand(256, 784), min_run_time=0.01).median < 1
        True
    """
    from torch.utils.benchmark import Timer  # slow to import, and only measurements need it

    timer = Timer("model(batch)", globals={"model": model, "batch": batch}, num_threads=torch.get_num_threads())
    with torch.inference_mode():
        timer.timeit(3)  # the first calls allocate, and choose kernels
        return timer.blocked_autorange(min_run_time=min_run_time)
