"""The network of the exercise: a bias-free multilayer perceptron."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn

SIZES = (784, 1000, 1000, 500, 200, 10)


class NeuralNetwork(nn.Module):
    """Linear layers fc1 … fcN without biases, a ReLU between them and none on the logits.

    Args:
        sizes: widths from the input to the logits: two or more whole numbers ≥ 1.

    Raises:
        TypeError: a width is no whole number.
        ValueError: fewer than two widths, or one below 1.

    Example:
        >>> sum(weight.numel() for weight in NeuralNetwork().parameters())
        2386000
    """

    def __init__(self, sizes: Sequence[int] = SIZES) -> None:
        super().__init__()
        if any(not isinstance(size, int) for size in sizes):
            raise TypeError(f"sizes must be whole numbers, got {type(sizes).__name__} {sizes!r:.80}")
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes must be two or more whole numbers >= 1, got {tuple(sizes)}")
        for number, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
            self.add_module(f"fc{number}", nn.Linear(fan_in, fan_out, bias=False))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths from the input to the logits, read off the layers."""
        layers = [layer for layer in self.children() if isinstance(layer, nn.Linear)]
        return (layers[0].in_features, *(layer.out_features for layer in layers))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            images: (B, …) floats, flattened to (B, sizes[0]).

        Returns:
            (B, sizes[-1]) logits. No ReLU after the last layer: a logit must be able to be negative.
        """
        *hidden, output = self.children()
        features = images.flatten(1)  # (B, 784)
        for layer in hidden:
            features = torch.relu(layer(features))  # (B, 1000), (B, 1000), (B, 500), (B, 200)
        return output(features)  # (B, 10)

    def chain(self) -> list[nn.Module]:
        """The modules whose composition `forward` is, in running order: what compress.py cuts and makes sparse."""
        *hidden, output = self.children()
        return [nn.Flatten(), *(module for layer in hidden for module in (layer, nn.ReLU())), output]

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Self:
        """A network whose sizes and type are read off the weights, e.g. ``from_state_dict(torch.load(path))``.

        Args:
            state: ``fc1.weight`` … ``fcN.weight``, each (out, in), each layer's in the out of the one before.

        Raises:
            TypeError: `state` is no dict.
            ValueError: other names, shapes that do not chain, weights not floating point or not finite.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a dict of weights by name, got {type(state).__name__}")
        names = [f"fc{number}.weight" for number in range(1, len(state) + 1)]
        if not state or set(state) != set(names):
            found = ", ".join(map(str, state))
            raise ValueError(f"not a NeuralNetwork: expected fc1.weight, fc2.weight, ..., got {found:.100}")
        weights = [state[name] for name in names]
        for name, weight in zip(names, weights, strict=True):
            _check(name, weight)
        for (before, weight), (after, following) in pairwise(zip(names, weights, strict=True)):
            if following.shape[1] != weight.shape[0]:
                raise ValueError(f"{after} takes {following.shape[1]} inputs, but {before} has {weight.shape[0]} units")
        model = cls((weights[0].shape[1], *(weight.shape[0] for weight in weights))).to(weights[0].dtype)
        model.load_state_dict(dict(state))
        return model


def _check(name: str, weight: Tensor) -> None:
    dense = isinstance(weight, Tensor) and weight.layout is torch.strided and not weight.is_meta
    if not dense or not weight.is_floating_point() or weight.dim() != 2:
        raise ValueError(f"{name} must be a floating-point matrix (out, in), and dense")
    if weight.untyped_storage().nbytes() < weight.nbytes:  # a few bytes in a file that would fill the memory
        raise ValueError(f"{name} repeats few values many times: expand() is not for files")
    if not weight.isfinite().all():
        raise ValueError(f"{name} has NaN or infinite weights")
