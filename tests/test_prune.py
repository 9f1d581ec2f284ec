"""Masks of single tensors, against a stable sort and against torch.nn.utils.prune."""

import numpy as np
import pytest
import torch
import torch.nn.utils.prune as peer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import prune

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
many = settings(max_examples=300, deadline=None)


def stable(scores, sparsity):
    """What every mask must equal: a stable sort puts the earlier of equal scores first."""
    keep = torch.ones(scores.numel(), dtype=torch.bool)
    keep[scores.double().flatten().argsort(stable=True)[: round(sparsity * scores.numel())]] = False
    return keep.view(scores.shape)


@st.composite
def tensors(draw, most=7):
    """Finite weights of any dtype: spread out, tied, mostly zero, all alike; contiguous or not; few or thousands."""
    shape = draw(st.lists(st.integers(1, most), min_size=1, max_size=4))
    if draw(st.integers(0, 4)) == 0:  # enough for a sample to be drawn
        shape = [draw(st.integers(50, 150)), draw(st.integers(60, 250))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    spread = draw(st.sampled_from(["even", "tied", "sparse", "alike", "sorted", "tiny", "huge"]))
    if spread == "tied":
        weight = weight.round()
    elif spread == "sparse":
        weight = weight * (torch.rand(shape, generator=generator) < draw(st.sampled_from([0.5, 0.1, 0.01])))
    elif spread == "alike":
        weight = torch.full_like(weight, -0.5)
    elif spread == "sorted":
        weight = weight.flatten().sort().values.view(shape)
    elif spread in ("tiny", "huge"):
        weight = weight * (1e-7 if spread == "tiny" else 1e4)
    weight = weight.to(draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    if layout == "transposed":
        weight = weight.transpose(0, -1)
    elif layout == "strided":
        weight = weight.repeat_interleave(2, dim=0)[::2]
    return weight


sparsities = st.one_of(st.floats(0, 1), st.sampled_from([0, 1, 0.5, 0.25, 0.9]))


# against torch


@pytest.mark.parametrize("size", [1, 2, 5, 1000, 2**14 - 1, 2**17, 300_000, 1_000_003])
@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.5, 0.8, 0.975, 1.0])
def test_weights_match_torch(size, sparsity):
    weight = torch.randn(size)
    layer = nn.Linear(1, 1)
    layer.weight = nn.Parameter(weight.clone())
    peer.l1_unstructured(layer, "weight", amount=sparsity)
    mask = prune.weight_mask(weight, sparsity)
    assert mask.dtype is torch.bool and mask.shape == weight.shape
    torch.testing.assert_close(mask, layer.weight_mask.bool())


@pytest.mark.parametrize("shape", [(1, 1), (10, 3), (64, 100), (20, 3, 5, 5), (1000, 784)])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.75, 1.0])
def test_units_match_torch(shape, sparsity):
    layer = nn.Linear(1, 1)
    layer.weight = nn.Parameter(torch.randn(shape))
    expected = peer.ln_structured(layer, "weight", amount=sparsity, n=2, dim=0).weight_mask.bool()
    torch.testing.assert_close(prune.unit_mask(layer.weight_orig, sparsity), expected)


@pytest.mark.parametrize("dim", [0, 1, 3, -1, -4, np.int64(2)])
def test_units_along_any_dimension_match_torch(dim):
    layer = nn.Conv2d(6, 8, (5, 7))
    expected = peer.ln_structured(layer, "weight", amount=0.4, n=2, dim=int(dim)).weight_mask.bool()
    torch.testing.assert_close(prune.unit_mask(layer.weight_orig, 0.4, dim=dim), expected)


# against a stable sort


@settings(many, max_examples=600)
@given(weight=tensors(), sparsity=sparsities)
def test_weight_mask_is_what_a_stable_sort_prunes(weight, sparsity):
    before = weight.clone()
    mask = prune.weight_mask(weight, sparsity)
    assert torch.equal(mask, stable(weight.abs(), sparsity))
    assert torch.equal(weight, before) and mask.is_contiguous()


MISLEADING = {
    "alike": lambda: torch.full((400_000,), 0.25),
    "zeros": lambda: torch.zeros(400_000),
    "tied": lambda: torch.randn(400_000).round(),
    "sparse": lambda: torch.randn(600_000) * (torch.rand(600_000) < 0.1),
    "bf16": lambda: torch.randn(400_000).to(torch.bfloat16),
    "two": lambda: torch.cat([torch.zeros(300_000), torch.ones(300_000)]),
    "sorted": lambda: torch.arange(400_000.0).sin().sort().values,
    "scales": lambda: torch.randn(2, 200_000).mul_(torch.tensor([[1e-6], [1.0]])),
    "periodic": lambda: torch.arange(400_000) % 31 / 31 + torch.rand(400_000) / 100,
    "low sample": lambda: 1 + torch.rand(400_000).index_fill(0, torch.arange(0, 400_000, 25), -1),
    "high sample": lambda: 1 + torch.rand(400_000).index_fill(0, torch.arange(0, 400_000, 25), 1),
}


@pytest.mark.parametrize("kind", MISLEADING)
@pytest.mark.parametrize("sparsity", [1e-5, 0.05, 0.5, 0.9, 0.90001, 0.99999])
def test_ties_and_misleading_samples_cost_no_precision(kind, sparsity):
    weight = MISLEADING[kind]()
    assert torch.equal(prune.weight_mask(weight, sparsity), stable(weight.abs(), sparsity))


@pytest.mark.parametrize("step", range(1, 75, 2))
def test_no_spacing_of_small_weights_misleads(step):
    weight = 1 + torch.rand(200_000)
    weight[::step] = 0.5
    assert torch.equal(prune.weight_mask(weight, 0.3), stable(weight, 0.3))


@settings(many)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30),
    sparsity=sparsities,
)
def test_any_finite_floats(values, sparsity):
    weight = torch.tensor(values)
    assert torch.equal(prune.weight_mask(weight, sparsity), stable(weight.abs(), sparsity))


@settings(many)
@given(data=st.data(), weight=tensors(), sparsity=sparsities)
def test_unit_mask_keeps_the_units_of_highest_norm(data, weight, sparsity):
    dim = data.draw(st.integers(-weight.dim(), weight.dim() - 1))
    mask = prune.unit_mask(weight, sparsity, dim=dim)
    assert mask.shape == weight.shape and mask.is_contiguous()
    units = mask.movedim(dim, 0).flatten(1) if weight.dim() > 1 else mask[:, None]
    keep = units.any(1)
    assert torch.equal(units.all(1), keep)
    assert len(keep) - keep.count_nonzero() == round(sparsity * len(keep))
    norms = weight.double().movedim(dim, 0).reshape(len(keep), -1).square().sum(1).sqrt()
    if keep.any() and not keep.all():
        assert norms[keep].min() >= norms[~keep].max() * (1 - 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(500, 300), (40, 5, 900), (2, 50_000)])
def test_norms_of_half_precision_are_not_rounded_into_ties(dtype, shape):
    weight = torch.randn(shape, dtype=dtype)
    norms = weight.double().flatten(1).norm(dim=1)
    assert torch.equal(prune.unit_mask(weight, 0.5).flatten(1)[:, 0], stable(norms, 0.5))


# other properties


@settings(many)
@given(weight=tensors(), fewer=sparsities, more=sparsities, units=st.booleans())
def test_larger_sparsity_prunes_a_superset(weight, fewer, more, units):
    fewer, more = sorted((fewer, more))
    mask = prune.unit_mask if units else prune.weight_mask
    small, large = mask(weight, fewer), mask(weight, more)
    assert not (large & ~small).any()
    # again from the pruned weight, with ties among the zeros
    again = mask(weight * small, more)
    assert not (again & ~small).any() and again.count_nonzero() == large.count_nonzero()


@pytest.mark.parametrize("units", [False, True])
def test_masks_move_with_the_weights(units):
    weight, order = torch.randn(300, 50), torch.randperm(300)
    mask = prune.unit_mask if units else prune.weight_mask
    assert torch.equal(mask(weight[order], 0.7), mask(weight, 0.7)[order])
    assert torch.equal(mask(-8 * weight, 0.7), mask(weight, 0.7))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_follow_the_weight(dtype, device):
    weight = torch.randn(300, 2000, dtype=dtype, device=device)[:, ::2]
    for mask in (prune.weight_mask(weight, 0.7), prune.unit_mask(weight, 0.7)):
        assert mask.device == weight.device and mask.shape == weight.shape and mask.dtype is torch.bool
    assert torch.equal(prune.weight_mask(weight, 0.7).cpu(), stable(weight.abs().cpu(), 0.7))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (3, 0, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("sparsity", [0, 0.5, 1])
def test_nothing_to_prune(shape, dtype, sparsity):
    weight = torch.empty(shape, dtype=dtype)
    assert prune.weight_mask(weight, sparsity).shape == prune.unit_mask(weight, sparsity).shape == weight.shape


def test_a_scalar_is_a_weight():
    assert prune.weight_mask(torch.tensor(1.0), 0).item() and not prune.weight_mask(torch.tensor(1.0), 1).item()


# extreme numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-25, 1.0, 1e20, 2.0**75, 1e35])
def test_unit_norms_neither_overflow_nor_underflow(dtype, scale):
    weight = torch.randn(40, 30, dtype=torch.float64).mul_(torch.linspace(1, 2, 40)[torch.randperm(40)].unsqueeze(1))
    scaled = (weight * scale).to(dtype)
    norms = scaled.double().div(scale).norm(dim=1)
    assert torch.equal(prune.unit_mask(scaled, 0.5)[:, 0], stable(norms, 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_units_of_any_scale_rank_together(dtype):
    scales = [1.0, 1e200, 0.0, 1e-200, 1e-250] if dtype == torch.float64 else [1.0, 1e25, 0.0, 1e-25, 1e-30]
    weight = torch.ones(5, 7, dtype=dtype) * torch.tensor(scales, dtype=dtype).unsqueeze(1)
    order = [[k for k in range(5) if not prune.unit_mask(weight, gone / 5)[k].any()] for gone in range(6)]
    assert order == [[], [2], [2, 4], [2, 3, 4], [0, 2, 3, 4], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_whose_sum_overflows_are_finite(dtype):
    weight = torch.full((4, 4), torch.finfo(dtype).max, dtype=dtype)
    assert torch.equal(prune.weight_mask(weight, 0.5), stable(weight, 0.5))
    assert torch.equal(prune.unit_mask(weight, 0.5)[:, 0], torch.tensor([False, False, True, True]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sparsity", [0, 0.5, 1])
@pytest.mark.parametrize(("size", "share"), [(100, 0.01), (300_000, 1e-5), (20_000, 0.3), (20_000, 1.0)])
def test_a_bad_weight_among_many_and_many_bad_ones(bad, sparsity, size, share):
    weight = torch.randn(size)
    weight[: round(size * share)] = bad
    weight = weight[torch.randperm(size)]
    for function in (prune.weight_mask, prune.unit_mask):
        with pytest.raises(ValueError, match="NaN or infinite weights"):
            function(weight, sparsity)


# bad arguments


@pytest.mark.parametrize("half", [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5)])
def test_sparsity_may_be_any_real_number(half):
    weight = torch.randn(10)
    assert torch.equal(prune.weight_mask(weight, half), stable(weight.abs(), 0.5))
    assert prune.weight_mask(weight, np.int64(0)).all() and not prune.weight_mask(weight, 1).any()


NO_SPARSITIES = [
    (80, ValueError, r"got 80: did you mean 0\.8\?"), (np.int64(80), ValueError, r"got 80: did you mean 0\.8\?"),
    (1.0000001, ValueError, r"got 1\.0000001$"), (1.5, ValueError, r"\[0, 1\], got 1.5"),
    (-0.1, ValueError, r"\[0, 1\], got -0.1"), (float("nan"), ValueError, "got nan"),
    (float("inf"), ValueError, "got inf$"), (torch.tensor(1.5), ValueError, r"\[0, 1\], got 1.5"),
    ("0.5", TypeError, "got '0.5'"), (True, TypeError, "got True"), (None, TypeError, "got None"),
    (torch.tensor([0.5]), TypeError, "got tensor"), (0.5j, TypeError, "got 0.5j"),
]  # fmt: skip


@pytest.mark.parametrize(("sparsity", "error", "message"), NO_SPARSITIES)
@pytest.mark.parametrize("function", [prune.weight_mask, prune.unit_mask])
def test_bad_sparsity(function, sparsity, error, message):
    with pytest.raises(error, match=message):
        function(torch.ones(3, 3), sparsity)


NO_WEIGHTS = [
    ([[1.0]], TypeError, "must be a tensor, got list"),
    (np.ones((2, 2)), TypeError, "must be a tensor, got ndarray"),
    (torch.ones(2, 2, dtype=torch.int64), ValueError, "got Tensor, torch.int64"),
    (torch.ones(2, 2, dtype=torch.bool), ValueError, "got .* torch.bool"),
    (torch.ones(2, 2, dtype=torch.complex64), ValueError, "got .* torch.complex64"),
    (torch.ones(2, 2).to(torch.float8_e5m2), ValueError, "got .* torch.float8_e5m2"),
    (torch.ones(2, 2).to_sparse(), ValueError, r"must be a dense .*, torch.sparse_coo"),
    (TwoTensor(torch.ones(2, 2), torch.ones(2, 2)), ValueError, "must be a dense .* got TwoTensor"),
    (torch.ones(2, 2, device="meta"), ValueError, "with values .* meta$"),
    (nn.LazyLinear(3).weight, ValueError, "with values .lazy"),
    (torch.tensor([[1.0, float("nan")]]), ValueError, "must be finite"),
    (torch.tensor([[-float("inf"), float("inf")]], dtype=torch.float16), ValueError, "must be finite"),
]


@pytest.mark.parametrize(("weight", "error", "message"), NO_WEIGHTS)
@pytest.mark.parametrize("function", [prune.weight_mask, prune.unit_mask])
def test_bad_weight(function, weight, error, message):
    with pytest.raises(error, match=f"weight.*{message}"):
        function(weight, 0.5)


NO_DIMS = [
    (2, "2 dimensions, got 2"),
    (-3, "2 dimensions, got -3"),
    (0.0, "an integer, .* got 0.0"),
    (True, "got True"),
]


@pytest.mark.parametrize(("dim", "message"), NO_DIMS)
def test_bad_dim(dim, message):
    with pytest.raises(ValueError, match=f"dim must be .*{message}"):
        prune.unit_mask(torch.ones(2, 2), 0.5, dim=dim)
    with pytest.raises(ValueError, match="0 dimensions, got 0"):
        prune.unit_mask(torch.tensor(1.0), 0.5)
