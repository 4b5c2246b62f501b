import copy

import pytest
import torch
from torch.nn import functional

from sparlow.errors import InputError
from sparlow.model.artefact.bitmask import pack
from sparlow.model.artefact.layers import SparseLowRankLinear, install

OUT, IN = 6, 10


def parts(rank=3, dtype=torch.float32, *, bias=True):
    """S with half of its entries zero, U, V and a bias."""
    generator = torch.Generator().manual_seed(0)
    S, U, V = (torch.randn(shape, generator=generator) for shape in ((OUT, IN), (OUT, rank), (rank, IN)))
    S[:, ::2] = 0
    b = torch.randn(OUT, generator=generator) if bias else None
    return [t if t is None else t.to(dtype) for t in (S, U, V, b)]


def inputs(dtype=torch.float32):
    return torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_computes_the_dense_composition(dtype, rank, bias):
    S, U, V, b = parts(rank, dtype, bias=bias)
    layer = SparseLowRankLinear(S, U, V, b)
    y = layer(inputs(dtype))
    assert y.dtype == dtype
    W = S.double() + U.double() @ V.double()
    expected = functional.linear(inputs(dtype).double(), W, None if b is None else b.double())
    torch.testing.assert_close(y.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("tokens", "dtype", "grad", "autocast", "products"),
    [
        (64, torch.float32, False, False, 1),  # the sum S + U V pays for itself
        (2, torch.float32, False, False, 3),
        (64, torch.float32, True, False, 3),
        (64, torch.bfloat16, False, False, 3),  # the sum would be rounded
        (64, torch.float32, False, True, 3),
    ],
)
def test_many_tokens_take_one_product(tokens, dtype, grad, autocast, products, monkeypatch):
    layer = SparseLowRankLinear(*(torch.randn(shape).to(dtype) for shape in ((12, 16), (12, 3), (3, 16))))
    x, calls, linear = torch.randn(tokens, 16).to(dtype), [], functional.linear
    monkeypatch.setattr(functional, "linear", lambda *given: calls.append(given) or linear(*given))
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert len(calls) == products
    expected = x.double() @ (layer.S.double() + layer.U.double() @ layer.V.double()).T
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-4 if y.dtype == torch.float32 else 0.5)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("through", ["forward", "weight"])
def test_gradients_are_the_dense_ones_on_the_support_and_zero_elsewhere(rank, through):
    S, U, V, b = parts(rank, torch.float64)
    layer = SparseLowRankLinear(S, U, V, b)
    x = inputs(torch.float64)
    y = layer(x) if through == "forward" else functional.linear(x, layer.weight, layer.bias)
    y.square().sum().backward()
    dense = [t.requires_grad_() for t in (S, U, V, b)]
    functional.linear(x, S + U @ V, b).square().sum().backward()
    assert torch.equal(layer.S.grad == 0, S == 0)
    torch.testing.assert_close(layer.S.grad, S.grad * (S != 0))
    for mine, theirs in zip((layer.U, layer.V, layer.bias), dense[1:], strict=True):
        torch.testing.assert_close(torch.zeros_like(theirs) if mine.grad is None else mine.grad, theirs.grad)


def test_an_infinite_gradient_does_not_touch_pruned_entries():
    layer = SparseLowRankLinear(*parts())
    (layer(inputs()).sum() * torch.inf).backward()
    assert layer.S.grad[layer.S == 0].eq(0).all()


def optimizers():
    return {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    }


@pytest.mark.parametrize("name", optimizers())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copied", ["not", "deepcopy", "state_dict"])
def test_training_keeps_the_support(name, dtype, copied):
    layer = SparseLowRankLinear(*parts(dtype=dtype))
    if copied == "deepcopy":
        layer = copy.deepcopy(layer)
    elif copied == "state_dict":
        fresh = SparseLowRankLinear(*[None if t is None else torch.ones_like(t) for t in parts(dtype=dtype)])
        fresh.load_state_dict(layer.state_dict())
        layer = fresh
    before = layer.sparse_weight().clone()
    optimizer = optimizers()[name](layer.parameters())
    for _ in range(4):
        optimizer.zero_grad()
        layer(inputs(dtype)).square().mean().backward()
        optimizer.step()
    pruned = layer.S[before == 0]
    assert pruned.eq(0).all()
    assert not pruned.signbit().any()
    assert layer.S[before != 0].ne(before[before != 0]).float().mean() > 0.5


def test_a_deep_copy_shares_nothing():
    layer = SparseLowRankLinear(*parts())
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert not any(torch.equal(p, q) for p, q in zip(layer.parameters(), twin.parameters(), strict=True))


def test_owns_its_tensors_and_has_no_negative_zeros():
    S, U, V, b = parts()
    S[0, 0] = -0.0
    layer = SparseLowRankLinear(S, U, V, b)
    assert not layer.S[0, 0].signbit()
    kept = [p.detach().clone() for p in layer.parameters()]
    for t in (S, U, V, b):
        t.add_(1)
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), kept, strict=True))


def test_parts_add_up_to_the_weight():
    layer = SparseLowRankLinear(*parts())
    sum_of_parts, eps = layer.sparse_weight() + layer.low_rank_weight(), torch.finfo(torch.float32).eps
    # the weight is one addmm, which may round S + U V once where the sum of the parts rounds twice: units in the last
    # place of the largest term, as the terms may cancel
    largest = max(part.abs().max().item() for part in (layer.sparse_weight(), layer.low_rank_weight()))
    torch.testing.assert_close(sum_of_parts, layer.weight.detach(), rtol=0, atol=4 * eps * largest)
    no_rank = SparseLowRankLinear(*parts(rank=0))
    assert torch.equal(no_rank.low_rank_weight(), torch.zeros(OUT, IN))
    assert torch.equal(no_rank.weight.detach(), no_rank.sparse_weight())
    assert not layer.sparse_weight().requires_grad
    assert not layer.low_rank_weight().requires_grad


def test_takes_its_packed_form_from_a_state_dict():
    S, U, V, b = parts()
    values, mask = pack(S)
    layer = SparseLowRankLinear(torch.ones_like(S), U, V, b)
    state = {"weight": values, "mask": mask, "U": U, "V": V, "bias": b}
    layer.load_state_dict(state)
    assert torch.equal(layer.S, S)
    assert state.keys() == {"weight", "mask", "U", "V", "bias"}  # the caller's stays as it was
    with pytest.raises(InputError, match="values"):
        layer.load_state_dict(state | {"weight": values[1:]})


@pytest.mark.parametrize(
    ("part", "shape"), [(0, (OUT, IN + 1)), (0, (OUT, IN, 1)), (1, (OUT, 2)), (2, (3, IN - 1)), (3, (1,))]
)
def test_refuses_parts_that_do_not_fit(part, shape):
    tensors = parts()
    tensors[part] = torch.zeros(shape)
    with pytest.raises(InputError, match=r"shape|fit"):
        SparseLowRankLinear(*tensors)


def test_only_a_linear_layer_is_replaced():
    root = torch.nn.Sequential(torch.nn.Linear(IN, OUT), torch.nn.ReLU())
    install(root, "0", 2)
    assert (root[0].in_features, root[0].out_features, root[0].rank) == (IN, OUT, 2)
    assert root[0].S.is_meta
    for name in ("1", "2", ""):
        with pytest.raises(InputError, match="no linear layer"):
            install(root, name, 2)
