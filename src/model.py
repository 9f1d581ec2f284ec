"""The network of the exercise: a bias-free multilayer perceptron."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn

SIZES = (784, 1000, 1000, 500, 200, 10)


class NeuralNetwork(nn.Module):
    """Linear layers fc1 … fcN without biases, a ReLU between them and none on the logits.

    `sizes` are the widths from the input to the logits: two or more whole numbers ≥ 1, else ValueError.

    >>> sum(weight.numel() for weight in NeuralNetwork().parameters())
    2386000
    """

    def __init__(self, sizes: Sequence[int] = SIZES) -> None:
        super().__init__()
        if len(sizes) < 2 or not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise ValueError(f"sizes must be two or more whole numbers >= 1, got {sizes!r:.80}")
        for number, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
            self.add_module(f"fc{number}", nn.Linear(fan_in, fan_out, bias=False))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths from the input to the logits, read off the layers."""
        layers = [layer for layer in self.children() if isinstance(layer, nn.Linear)]
        return (layers[0].in_features, *(layer.out_features for layer in layers))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, sizes[-1]) of images (B, …), flattened to (B, sizes[0]). No ReLU there: they may be negative."""
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
        """A network whose sizes and type are those of the weights ``fc1.weight`` … ``fcN.weight``, each (out, in).

        Raises: TypeError: `state` is no dict. ValueError: its names, shapes, types or values are not of such a network.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a dict of weights by name, got {type(state).__name__}")
        names = [f"fc{number}.weight" for number in range(1, len(state) + 1)]
        if not names or {*state} != {*names}:
            raise ValueError(f"not a NeuralNetwork: expected fc1.weight, fc2.weight, ..., got {[*state]!s:.100}")
        for name, weight in state.items():
            dense = isinstance(weight, Tensor) and weight.layout is torch.strided and not weight.is_meta
            if not dense or weight.dim() != 2 or not weight.is_floating_point():
                raise ValueError(f"{name} must be a dense floating-point matrix (out, in)")
            if not weight.double().isfinite().all():  # float8 has no test of its own
                raise ValueError(f"{name} has NaN or infinite weights")
        shapes = [tuple(state[name].shape) for name in names]  # (out, in)
        if any(below[0] != above[1] for below, above in pairwise(shapes)):
            raise ValueError(f"its layers do not fit together: (out, in) {shapes}")
        model = cls((shapes[0][1], *(out for out, _ in shapes))).to(state[names[0]].dtype)
        model.load_state_dict(state)
        return model
