"""Masks by prune.py beside torch.nn.utils.prune: time, and the memory that global pruning takes."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.utils.prune as torch_prune
from timing import MEMORY, alternate, beside, make_parser, peak_memory, print_machine, print_table
from torch import Tensor, nn

import prune  # src/ is on the path since timing

SHAPES = ((200, 500), (1000, 784), (1024, 1024), (512, 512, 3, 3), (4096, 4096))


def main() -> None:
    """Print four tables."""
    quick = make_parser(__doc__).parse_args().quick
    shapes, seconds = (SHAPES[:1], 0.1) if quick else (SHAPES, 5.0)
    counts, width = ((4,), 128) if quick else ((1, 4, 16), 4096)
    print_machine()

    rows = []
    for shape in shapes:
        for sparsity in (0.5, 0.8, 0.95):
            here = partial(prune.weight_mask, sparsity=sparsity)
            there = partial(torch_prune.l1_unstructured, amount=sparsity)
            rows.append({"sparsity": sparsity, **layer_row(torch.randn(shape), here, there, seconds)})
    print_table("Weights of one layer: `weight_mask` beside `l1_unstructured`.", rows)

    rows = [zeros_row(torch.randn(shape), zeros, seconds) for shape in shapes for zeros in (0.5, 0.9, 0.99)]
    print_table("A layer pruned before, which has many ties: `weight_mask` at sparsity 0.8 beside a fresh one.", rows)

    here, there = partial(prune.unit_mask, sparsity=0.5), partial(torch_prune.ln_structured, amount=0.5, n=2, dim=0)
    weights = [torch.randn(shape).to(dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
    rows = [{"type": weight.dtype, **layer_row(weight, here, there, seconds)} for weight in weights]
    print_table("Units of one layer, sparsity 0.5: `unit_mask` beside `ln_structured(n=2, dim=0)`.", rows)

    fitting = [count for count in counts if 60 * count * width**2 < MEMORY]  # torch takes 52 bytes a weight
    rows = [global_row(count, width, seconds) for count in fitting]
    title = f"Layers of {width} x {width} together: global scope beside `global_unstructured`, sparsity 0.8"
    print_table(f"{title}; over: peak memory over weights and masks.", rows)


def layer_row(weight: Tensor, here: Callable, there: Callable, seconds: float) -> dict[str, object]:
    """A weight pruned by prune.py and by torch, which changes the layer: it is made for every call."""
    sides = {"prune.py": lambda model: here(model[0].weight), "torch": lambda model: there(model[0], "weight")}
    return {"weight": list(weight.shape), **beside(alternate(sides, lambda: model_of([weight]), seconds=seconds))}


def zeros_row(weight: Tensor, zeros: float, seconds: float) -> dict[str, object]:
    """Pruning a layer that is mostly zero."""
    pruned = weight * prune.weight_mask(weight, zeros)
    sides = {"fresh": lambda _: prune.weight_mask(weight, 0.8), "pruned": lambda _: prune.weight_mask(pruned, 0.8)}
    return {"zero": f"{zeros:.0%}", "weight": list(weight.shape), **beside(alternate(sides, seconds=seconds))}


def global_row(count: int, width: int, seconds: float) -> dict[str, object]:
    """Magnitude pruning of several layers as one."""
    weights = [torch.randn(width, width) for _ in range(count)]
    times = alternate({"prune.py": global_here, "torch": global_there}, lambda: model_of(weights), seconds=seconds)
    size = count * width**2
    row = {"weights": f"{size:,}", **beside(times)}
    weights.clear()  # the processes below need the room
    for name, side, mask_bytes in (("prune.py", global_here, size), ("torch", global_there, 4 * size)):  # bytes
        row[f"{name} over"] = f"{(peak_memory(ready, side, count, width) - mask_bytes) / 2**30:.2f} GiB"
    return {**row}


def ready(side: Callable[[nn.Sequential], object], count: int, width: int) -> Callable[[], object]:
    """The call whose memory is measured; what is loaded at the first use does not count."""
    side(model_of([torch.ones(8, 8)]))
    return partial(side, model_of([torch.randn(width, width) for _ in range(count)]))


def global_here(model: nn.Sequential) -> object:
    """All weights of a model, ranked by prune.py."""
    return prune.find_masks(model, "weight", 0.8, scope="global", prune_output=True)


def global_there(model: nn.Sequential) -> None:
    """All weights of a model, ranked by torch."""
    torch_prune.global_unstructured([(layer, "weight") for layer in model], torch_prune.L1Unstructured, amount=0.8)


def model_of(weights: list[Tensor]) -> nn.Sequential:
    """Linear layers around weights, which are not copied."""
    layers = [nn.Linear(1, 1, bias=False, device="meta") for _ in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = nn.Parameter(weight)
    return nn.Sequential(*layers)


if __name__ == "__main__":
    main()
