"""Make zeros pay: smaller networks, sparse kernels, small files. Needs torch alone: copy it beside any notebook."""

import copy
import gzip
import io
import warnings
import zipfile
import zlib
from functools import partial
from itertools import dropwhile, pairwise, takewhile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

ELEMENTWISE = (nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold, nn.Dropout, nn.AlphaDropout)  # in eval mode  # fmt: skip
SPARSE_DENSITY = 1 / 3  # measured on batches of 32 and more: sparse wins below 0.3 to 0.45, with AVX2 and with AVX-512
UNPACKED = 2**30  # bytes that any file may unpack to
PARTS, WIDTH = 4, 64  # 64 values of each of 1,000 features, 256 kB, stay in the cache of a core
FEW = 16 if torch.backends.mkl.is_available() else 0  # images: for fewer MKL's CSR product beats the sum of rows

Values = dict[str, Any]  # by name
Weights = nn.Module | Values  # a model or its state_dict

with warnings.catch_warnings(action="ignore"):  # torch calls CSR tensors a beta feature, once a process
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), dtype=torch.float32, device="cpu")


def shrink(model: nn.Module) -> nn.Module:
    """Copy an MLP without the units that cannot change its logits in eval mode: a smaller model of the same class.

    A unit goes when its outgoing weights are all zero, or its incoming ones: the constant that it then sends moves into
    the biases of the next layer (without biases, only units that send zero go). One unit of every layer stays. An MLP
    is an nn.Sequential, or has a method ``chain()`` that returns its modules in running order: Linear, with elementwise
    layers, Flatten, BatchNorm1d and nested MLPs (but none with hooks) between; anything after the last Linear.
    Raises: ValueError, TypeError: others.

    >>> model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    >>> _ = nn.init.zeros_(model[0].weight[:75])
    >>> shrink(model)[0]
    Linear(in_features=784, out_features=25, bias=True)
    """
    smaller, links = copy.deepcopy((model, _links(model)))  # one copy of both: the links are those of `smaller`
    with torch.no_grad():
        for modules, following in links:
            zeros = torch.zeros(1, modules[0].in_features, dtype=torch.float64, device="cpu")  # which autocast spares
            sent = copy.deepcopy(modules).to("cpu", torch.float64).eval()(zeros)[0]  # (units,)
            constant = modules[0].weight.eq(0).all(1).cpu()  # (units,): no input reaches them
            if following.bias is None:
                constant &= sent.eq(0)
            else:
                moved = following.weight.cpu().double()[:, constant] @ sent[constant]  # (out,)
                following.bias.copy_(following.bias.cpu() + moved)
            following.weight[:, constant] = 0
        for modules, following in reversed(links):  # backwards, as units that are not read feed none that stay
            read = following.weight.ne(0).any(0)  # (units,)
            if not read.any():  # initializers, exporters and kernels do not take empty layers well: one unit stays
                read[:1] = True
                for parameter in (*modules[0].parameters(), following.weight):
                    parameter.zero_()
            for tensor in filter(Tensor.dim, (*modules.parameters(), *modules.buffers())):  # not BatchNorm's counter
                tensor.data = tensor[read]
            following.weight.data = following.weight[:, read]
            modules[0].out_features = following.in_features = int(read.sum())
            for norm in (module for module in modules if isinstance(module, nn.BatchNorm1d)):
                norm.num_features = following.in_features
    return smaller


def _links(model: nn.Module) -> list[tuple[Any, Any]]:
    """Each Linear layer of an MLP with what stands between it and the following one, and that one; or ValueError."""
    cure = "Torch-Pruning (pip install torch-pruning) cuts convolutional, residual and attention networks"
    cure += "; an MLP's class needs a chain(); torch.nn.utils.prune.remove makes computed weights permanent"
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    names = {module: name for name, module in model.named_modules()}
    chain = list(dropwhile(lambda module: not [*module.parameters()], _chain(model)))  # a Flatten may come first
    linear = [index for index, module in enumerate(chain) if isinstance(module, nn.Linear)]
    for module in chain[: max(linear, default=len(chain)) + 1]:
        if not _is_plain(module, {nn.Linear, nn.Flatten, nn.BatchNorm1d, *ELEMENTWISE}):
            raise ValueError(f"{names.get(module) or 'this'} is a {type(module).__name__}, which cannot be cut: {cure}")
    parameters = [parameter for module in chain for parameter in module.parameters()]
    if len(set(parameters)) < len(parameters):
        raise ValueError("layers share parameters: no unit of one can go without that of the other")
    if any(len(chain[start].weight) != chain[end].weight.shape[1] for start, end in pairwise(linear)):
        raise ValueError("a Linear layer takes another number of values than the one before it gives")
    if wrong := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
        raise ValueError(f"{wrong[0]} has NaN or infinite values: removing units could hide them")
    return [(nn.Sequential(*chain[start:end]), chain[end]) for start, end in pairwise(linear)]


def _chain(model: Any, nested: bool = False) -> list[Any]:
    """The modules of a model in running order, nested chains without hooks laid flat; the model alone if it is none."""
    own = callable(getattr(type(model), "chain", None))
    hooks = nested and (model._forward_hooks or model._forward_pre_hooks)
    if hooks or not (own or getattr(type(model), "forward", None) is nn.Sequential.forward):
        return [model]
    return [leaf for module in (model.chain() if own else model) for leaf in _chain(module, nested=True)]


def _is_plain(module: nn.Module, classes: set[type]) -> bool:
    """Whether a module is of one of these classes and nothing more: no subclass, hooks or computed weights."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return type(module) in classes and not hooks and vars(module).keys().isdisjoint({"weight", "bias"})


def to_sparse(model: nn.Module) -> nn.Module:
    """Copy a model for inference, so that it skips the zeros of every nn.Linear of which two thirds or more are zero.

    It pays for pruned weights (after unit pruning, `shrink` alone is faster) and batches of 32 and more, most in chains
    as `shrink` takes them. The copy is in eval mode, without gradients and, for finite inputs, exact to rounding; it is
    not for files. Subclasses of nn.Linear, layers with hooks and what nn.MultiheadAttention reads stay dense.
    Raises: ValueError: weights that torch.nn.utils.prune still computes.

    >>> to_sparse(nn.Linear(784, 100).apply(lambda layer: nn.init.zeros_(layer.weight[20:])))
    SparseLinear(in_features=784, out_features=100, bias=True)
    """
    copies: dict[int, Any] = {}  # by the id of the original, as deepcopy keeps them: it takes ours for its own
    for layer in filter(partial(_is_plain, classes={nn.Linear}), model.modules()):
        weight = layer.get_parameter("weight")
        if weight.is_floating_point() and weight.count_nonzero() <= SPARSE_DENSITY * weight.numel() > 0:
            copies[id(layer)] = SparseLinear(layer)
    try:
        model = copy.deepcopy(model, copies).requires_grad_(False).eval()
    except RuntimeError as error:  # torch copies no tensors that are computed from others
        raise ValueError("make computed weights permanent first (torch.nn.utils.prune.remove)") from error
    for module in model.modules():
        chain = [leaf.eval() for leaf in _chain(module)]
        if any(isinstance(leaf, SparseLinear) and leaf is not module for leaf in chain):
            vars(module)["forward"] = partial(_forward_chain, chain)
        elif isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer):
            vars(module).update(activation_relu_or_gelu=0, use_nested_tensor=False)  # torch's fused one reads weights
    return model


class SparseLinear(nn.Linear):
    """A Linear layer for inference that multiplies by its non-zero weights only; `to_sparse` makes it.

    Features lie in rows, features x images, so that a weight scales a contiguous row. 256 images are cut into parts of
    64, and W (out, in) is repeated for each, as blocks of a diagonal matrix: what a thread reads stays in the cache of
    its core. In a chain the next layer takes the parts as they are, 1.2 to 1.5 times as fast as turned in between.
    """

    def __init__(self, layer: Any) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = self.size = layer.weight.shape
        self.register_parameter("bias", copy.deepcopy(layer.bias))
        rows, columns = layer.weight.nonzero(as_tuple=True)  # (nonzero,), row by row
        starts = torch.searchsorted(rows, torch.arange(self.out_features, device=rows.device))  # (out,)
        part = torch.arange(PARTS, device=rows.device).unsqueeze(1)
        self.values = nn.Parameter(layer.weight.detach()[rows, columns].repeat(PARTS))  # (parts * nonzero,)
        self.columns = nn.Buffer((columns + self.in_features * part).int().flatten())  # (parts * nonzero,)
        self.starts = nn.Buffer((starts + len(rows) * part).int().flatten())  # (parts * out,)

    def csr(self) -> Tensor:
        """(out_features, in_features), made at every call: torch cannot copy such tensors."""
        starts, end = self.starts[: self.out_features + 1], len(self.values) // PARTS  # part 0 ends where 1 starts
        return torch.sparse_csr_tensor(starts, self.columns[:end], self.values[:end], self.size)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out_features, in_features), dense and made at every reading, for models that read it."""
        return self.csr().to_dense()

    def forward(self, input: Tensor, *following: Any) -> Tensor:
        """(…, in_features) through this layer and the sparse and elementwise ones that follow, to (…, out_features)."""
        images = input.reshape(input.shape[:-1].numel(), self.in_features).to(self.values.dtype)  # (B, in)
        if len(images) > PARTS * WIDTH:
            outputs = [self.forward(some, *following) for some in images.split(PARTS * WIDTH)]
            return torch.cat(outputs).unflatten(0, input.shape[:-1])
        parts = max(1, -(-len(images) // WIDTH))
        autocast = torch.is_autocast_enabled(input.device.type)  # which would multiply in a type that has no kernel
        few = len(images) < FEW and images.dtype in (torch.float32, torch.float64) and not autocast
        padding = 0 if few else -len(images) % (2 * parts)  # sums of rows of one value take twice as long as of two
        padded = nn.functional.pad(images, (0, 0, 0, padding)) if padding else images
        blocks = _turned(padded.unflatten(0, (parts, -1))).flatten(0, 1)  # (parts * in, width)
        for layer in (self, *following):
            if type(layer) is nn.ReLU:  # memory that is new costs more than the sums
                blocks.relu_()
            elif not isinstance(layer, SparseLinear):
                blocks = layer(blocks)
            elif few:  # by a vector the product is faster still
                blocks = (layer.csr() @ blocks.squeeze(1)).view(layer.out_features, -1)
            else:  # the kernel sums weighted rows, several times faster than a CSR product
                full = layer.columns, layer.starts, layer.values
                columns, starts, values = full if parts == PARTS else (t[: len(t) * parts // PARTS] for t in full)
                blocks = torch.embedding_bag(blocks, columns, starts, per_sample_weights=values, mode=0)[0]  # 0: sum
            if isinstance(layer, SparseLinear) and layer.bias is not None:
                blocks.view(parts, layer.out_features, -1).add_(layer.bias.unsqueeze(1))
        output = _turned(blocks.unflatten(0, (parts, -1))).flatten(0, 1) if parts > 1 else blocks.t()  # (B …, out)
        if autocast and output.dtype != torch.float64:
            output = output.to(torch.get_autocast_dtype(input.device.type))
        return output[: len(images)].reshape(*input.shape[:-1], output.shape[1])


def _turned(matrices: Tensor) -> Tensor:
    """Matrices (n, a, b) as (n, b, a): a channel shuffle, by SIMD, takes half the time of torch's other ways."""
    n, a, b = matrices.shape
    if matrices.mT.is_contiguous():  # so are those of one row or column
        return matrices.mT
    channels = matrices.contiguous().as_strided((n, a * b, 1, 1), (a * b, 1, a * b, a * b))
    return nn.functional.channel_shuffle(channels, a).reshape(n, b, a)


def _forward_chain(chain: list[Any], features: Tensor) -> Tensor:
    """The forward of a chain, (…) to (…): a sparse layer and the sparse and elementwise ones after it run as one."""
    joins = partial(_is_plain, classes={SparseLinear, *ELEMENTWISE})
    while chain:
        layer, *chain = chain
        following = list(takewhile(joins, chain)) if _is_plain(layer, {SparseLinear}) else []
        features, chain = layer(features, *following), chain[len(following) :]
    return features


def save_compressed(model_or_state_dict: Weights, path: str | Path | IO[bytes], info: Values | None = None) -> None:
    """Save weights in as few bytes as their zeros allow, every bit kept: gzip of torch.save.

    `path` may be a binary file object. `info` are plain values (str, int, float, list, dict, …) to keep with the
    weights. Raises: ValueError: what cannot be stored, before anything is written. OSError.
    """
    state = model_or_state_dict.state_dict() if isinstance(model_or_state_dict, nn.Module) else model_or_state_dict
    state, content = copy.copy(state), io.BytesIO()  # copied with the versions that torch keeps in an attribute
    try:
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensor = value.detach().cpu()  # without what else is in its memory:
                state[name] = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        torch.save({"state_dict": state, "info": {} if info is None else info}, content)
        _read(content.getvalue(), float("inf"))
    except Exception:
        raise ValueError("only dense tensors by name and plain values (str, int, list, …) can be stored") from None
    write = path.write if hasattr(path, "write") else Path(path).write_bytes
    write(gzip.compress(content.getbuffer(), 6, mtime=0))  # level 9 makes it 2 % smaller in eight times the time


def stored_bytes(model_or_state_dict: Weights) -> int:
    """Size in bytes of the file that ``save_compressed(model_or_state_dict, path)`` writes; ValueError as there."""
    save_compressed(model_or_state_dict, file := io.BytesIO())
    return file.tell()


def load_compressed(path: str | Path) -> tuple[Values, Values]:
    """Load the state_dict, on the CPU, and `info` from a file of `save_compressed` or a state_dict of torch.save.

    Checksums are verified, nothing in the file is executed, and it may unpack to 1 GiB or to 128 times its size: 99 %
    of zeros make 80, a hostile file 1,032. Raises: OSError; ValueError: it is damaged, foreign, or asks for more.
    """
    if Path(path).exists() and not Path(path).is_file():  # a FIFO would wait for a writer
        raise ValueError(f"{str(path)!r} is no regular file")
    content = Path(path).read_bytes()
    limit = max(UNPACKED, 128 * len(content))
    try:
        if not content.startswith(b"PK"):  # torch.save's own is not packed
            unpacker = zlib.decompressobj(wbits=31)  # gzip, with its checksum
            content = unpacker.decompress(content, limit + 1)
            if unpacker.unused_data or not unpacker.eof:
                raise ValueError("something follows the end, or there is none within the limit")
        return _read(content, limit)
    except Exception:  # of many types; torch's words advise to execute the file
        fault = f"{str(path)!r} is damaged, not from save_compressed, or asks for over {limit:,} bytes"
        raise ValueError(fault) from None


def _read(content: bytes, limit: float) -> tuple[Values, Values]:
    """State_dict and info of an unpacked file, or any exception."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:  # torch verifies neither sizes nor checksums, as read() does
        entries = archive.infolist()
        packed_again = sum(entry.file_size for entry in entries) > len(content)
        if packed_again or any(b"bytearray\n" in archive.read(entry) for entry in entries):
            raise ValueError("a few of its bytes ask for any amount of memory")
    loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    state, info = (loaded["state_dict"], {**loaded["info"]}) if "state_dict" in loaded else (loaded, {})
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    if not all(tensor.is_cpu for tensor in tensors) or sum(tensor.nbytes for tensor in tensors) > limit:
        raise ValueError('on "meta" they have no values, and strides of 0 make them too large')
    return state, info


def latency(model: nn.Module, batch: Tensor, min_run_time: float = 0.5) -> "torch.utils.benchmark.Measurement":
    """Time inference in the model's mode for so many seconds: ``.median``, ``.iqr`` (of quartiles), seconds a batch."""
    from torch.utils.benchmark import Timer  # slow to import, and only measurements need it

    timer = Timer("model(batch)", globals={"model": model, "batch": batch}, num_threads=torch.get_num_threads())
    with torch.inference_mode():
        timer.timeit(3)  # the first calls allocate, and choose kernels
        return timer.blocked_autorange(min_run_time=min_run_time)
