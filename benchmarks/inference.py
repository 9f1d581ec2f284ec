"""Inference of pruned networks: shrunk and sparse beside dense, built from scratch, and as torch-pruning makes them."""

import copy
from collections.abc import Iterator
from functools import partial

import torch
import torch_pruning
from timing import ROOT, alternate, beside, make_parser, print_machine, print_table, spread
from torch import nn

import compress  # src/ is on the path since timing
import prune
from model import NeuralNetwork

MODEL = ROOT / "models" / "mnist_model.bin"


def main() -> None:
    """Print two tables."""
    seconds = 0 if make_parser(__doc__).parse_args().quick else 10
    torch.manual_seed(0)
    trained = MODEL.is_file()
    model = NeuralNetwork.from_state_dict(compress.load_compressed(MODEL)[0]) if trained else NeuralNetwork()
    networks = dict(pruned_networks(model.eval()))
    print_machine()
    with torch.inference_mode():
        title = f"The network of the exercise, {'trained' if trained else 'of random weights'}, on the CPU in fp32."
        print_table(title, network_rows(networks, seconds))
        title = "nn.TransformerEncoderLayer, its two Linear layers pruned to 95 %; 2 sequences of 128 tokens."
        print_table(title, block_rows(seconds))


def pruned_networks(model: NeuralNetwork) -> Iterator[tuple[str, nn.Module]]:
    """The networks to compare, by name. AssertionError if one does not compute what the pruned one does."""
    yield "dense", model
    for k in (50, 80):
        pruned = prune.prune_model(model, "unit", k / 100)
        small = compress.shrink(pruned)
        yield f"unit {k} %: shrunk", checked(small, pruned)
        yield f"unit {k} %: from scratch", NeuralNetwork([784, *map(len, small.parameters())]).eval()
        peer, norm = copy.deepcopy(model), torch_pruning.importance.MagnitudeImportance(p=2)
        settings = {"importance": norm, "pruning_ratio": k / 100, "ignored_layers": list(peer.children())[-1:]}
        torch_pruning.pruner.MagnitudePruner(peer, torch.rand(1, 784), **settings).step()
        yield f"unit {k} %: torch-pruning", peer
    for k in (80, 90, 95, 99):
        pruned = prune.prune_model(model, "weight", k / 100)
        yield f"weight {k} %: shrunk, sparse", checked(compress.to_sparse(compress.shrink(pruned)), pruned)


def checked(network: nn.Module, pruned: nn.Module) -> nn.Module:
    """The network, whose logits must be those of the pruned one, to rounding."""
    images = torch.rand(256, 784)
    torch.testing.assert_close(network(images), pruned(images), rtol=1e-4, atol=1e-5)
    return network


def network_rows(networks: dict[str, nn.Module], seconds: float) -> list[dict[str, str]]:
    """Latencies of the MLPs at two batch sizes."""
    times = {size: alternate(networks, partial(torch.rand, size, 784), seconds=seconds) for size in (256, 1)}
    rows = []
    for name, network in networks.items():
        weights = [layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)]
        row = {"network": name, "weights": f"{sum(int(weight.count_nonzero()) for weight in weights):,}"}
        for size, taken in times.items():
            row[f"batch {size}"] = spread(1e3 * taken[name], "ms")
            row[f"dense / this at {size}"] = spread(taken["dense"] / taken[name], "x")
        rows.append(row)
    return rows


def block_rows(seconds: float) -> list[dict[str, str]]:
    """Latencies of a transformer block and of its Linear layers alone."""
    block = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True).eval()
    sparse = compress.to_sparse(prune.prune_model(block, "weight", 0.95, only=("linear*.weight",), prune_output=True))
    rows = []
    for part, width in (("", 512), ("linear1", 512), ("linear2", 2048)):
        sides = {"sparse": sparse.get_submodule(part), "dense": block.get_submodule(part)}
        times = alternate(sides, partial(torch.randn, 2, 128, width), seconds=seconds)
        rows.append({"part": part or "whole", **beside(times)})
    return rows


if __name__ == "__main__":
    main()
