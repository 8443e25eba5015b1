"""Likeness of experts from their factors, beside whole updates."""

import pytest
import torch

from mole.adapters import Adapter, LoraWeights
from mole.experts.similarity import cosines, distances, gram, interference, parameter_embedding, svd_embedding

SHAPES = {"layers.0.q_proj": (7, 7), "layers.1.up_proj": (9, 7), "embed": (7, 20)}
close = {"rtol": 0, "atol": 1e-11}


def lora(shape, rank, seed, **more):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
    B = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    return LoraWeights(A=A, B=B, alpha=1.0 + seed, **more)


def experts(count=5, ranks=(1, 2, 3, 4, 5), whole=False):
    """Ranks and scales differ; each third expert lacks a module, unless `whole`."""
    made = {}
    for e in range(count):
        paths = [path for n, path in enumerate(SHAPES) if whole or e % 3 != 2 or n]
        modules = {
            p: lora(SHAPES[p], ranks[e % len(ranks)], 10 * e + n, rslora=e == 1, embedding=p == "embed")
            for n, p in enumerate(paths)
        }
        made[f"e{e}"] = Adapter("lora", modules)
    return made


def rows(adapters):
    """Every whole update as one row, [E, D]."""
    made = []
    for adapter in adapters.values():
        parts = []
        for path, shape in SHAPES.items():
            w = adapter.modules.get(path)
            parts.append(torch.zeros(shape, dtype=torch.float64) if w is None else w.scale * w.B @ w.A)
        made.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(made)


def test_inner_products_cosines_and_distances_are_those_of_the_updates():
    adapters = experts()
    G, X = gram(adapters), rows(adapters)
    torch.testing.assert_close(G, X @ X.T, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(
        cosines(G), torch.nn.functional.normalize(X) @ torch.nn.functional.normalize(X).T, **close
    )
    torch.testing.assert_close(distances(G), torch.cdist(X, X), rtol=1e-6, atol=1e-5)


def test_an_update_of_zero_is_like_nothing():
    adapters = experts(2)
    zero = {
        p: LoraWeights(A=w.A, B=0 * w.B, alpha=1.0, embedding=w.embedding) for p, w in adapters["e0"].modules.items()
    }
    assert cosines(gram({**adapters, "none": Adapter("lora", zero)}))[2].tolist() == [0, 0, 0]


def test_rotating_the_factors_changes_nothing():
    adapters = experts()
    M = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = {
        p: LoraWeights(A=M @ w.A, B=w.B @ torch.linalg.inv(M), alpha=w.alpha, embedding=w.embedding)
        for p, w in adapters["e2"].modules.items()
    }
    torch.testing.assert_close(gram({**adapters, "e2": Adapter("lora", turned)}), gram(adapters), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("components", [2, 64])
def test_the_embedding_is_that_of_the_svd_of_whole_updates(components):
    adapters = experts()
    U, S, _ = torch.linalg.svd(rows(adapters), full_matrices=False)
    wanted = torch.nn.functional.normalize(U[:, :components] * S[:components], dim=1)
    found = svd_embedding(gram(adapters), components)
    assert found.shape == (5, min(5, components))
    torch.testing.assert_close(found @ found.T, wanted @ wanted.T, rtol=0, atol=1e-7)
    assert found.norm(dim=1).tolist() == pytest.approx([1.0] * 5)


def test_parameters_are_embedded_in_sorted_order_without_their_smallest_entries():
    adapters = experts(3, ranks=(2,), whole=True)
    flat = [torch.cat([a.tensors()[key].flatten() for key in sorted(a.tensors())]) for a in adapters.values()]
    X = torch.stack([row * (row.abs() > row.abs().quantile(0.5)) for row in flat])
    U, S, _ = torch.linalg.svd(X, full_matrices=False)
    wanted = torch.nn.functional.normalize(U * S, dim=1)
    found = parameter_embedding(adapters, sparsity=0.5)
    torch.testing.assert_close(found @ found.T, wanted @ wanted.T, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="expert 'e1' has other tensors than the first"):
        parameter_embedding(experts())
    with pytest.raises(ValueError, match="sparsity=1"):
        parameter_embedding(adapters, sparsity=1)


def test_interference_tells_shared_inputs_and_shared_signs():
    one = lora((6, 8), 2, 0)
    same_inputs = LoraWeights(A=one.A, B=-one.B, alpha=1.0)
    basis = torch.linalg.svd(one.A)[2]
    other_inputs = LoraWeights(A=basis[2:4], B=one.B, alpha=1.0)
    found = interference(
        {n: Adapter("lora", {"m": w}) for n, w in zip("abc", (one, same_inputs, other_inputs), strict=True)}
    )
    assert [(row.first, row.second) for row in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [row.overlap for row in found] == pytest.approx([1.0, 0.0, 0.0])
    assert found[0].cosine == pytest.approx(-1)
    assert found[0].sign_agreement == 0
    deltas = [w.B @ w.A for w in (one, other_inputs)]
    assert found[1].sign_agreement == pytest.approx(float((deltas[0].sign() == deltas[1].sign()).double().mean()))


def test_experts_that_share_no_module_interfere_nowhere():
    found = interference({n: Adapter("lora", {n: lora((6, 8), 2, 0)}) for n in "ab"})
    assert found[0].cosine == 0
    assert found[0].overlap != found[0].overlap


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        (lora((5, 7), 2, 0), r"m: the experts were made for unlike modules \(\[\(5, 7\), \(6, 8\)\]\)"),
        (
            LoraWeights(A=torch.randn(4, 2, 3, 3), B=torch.randn(6, 2, 1, 1), alpha=1.0),
            "expert 'b' at m: a convolution with",
        ),
    ],
)
def test_unlike_modules_and_what_is_no_product_are_refused(weights, told):
    with pytest.raises(ValueError, match=told):
        gram({"a": Adapter("lora", {"m": lora((6, 8), 2, 0)}), "b": Adapter("lora", {"m": weights})})
