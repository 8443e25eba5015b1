"""Each method beside a dense float64 reference that shares nothing with it."""

from dataclasses import replace

import pytest
import torch
from merging_cases import SHAPES, alike, dense, experts, stacked

from mole.adapters import Adapter, LoraWeights
from mole.merging import (
    ConcatConfig,
    DareConfig,
    IsoCConfig,
    KnotsConfig,
    LinearConfig,
    SlerpConfig,
    TaskArithmeticConfig,
    TiesConfig,
    TsvConfig,
    WudiConfig,
    merge,
)
from mole.merging.dare import thinned
from mole.merging.deltas import layers_of
from mole.merging.spaces import Grid, core_of

WEIGHTS = {"sums": 0.5, "words": -0.3, "dates": 1.7}
THREE = experts()
close = {"rtol": 0, "atol": 1e-11}


def merged(config, adapters=THREE, **options) -> dict:
    """ΔW of the result by path, nothing lost."""
    return dense(merge(adapters, config, **{"rank": "full", "dtype": "float64", **options}).adapter)


def assert_equal(config, reference, adapters=THREE, **options):
    """`reference` makes ΔW of all experts' [E, d_out, d_in] at a module."""
    found = merged(config, adapters, **options)
    assert list(found) == list(SHAPES)
    for path in SHAPES:
        torch.testing.assert_close(found[path], reference(stacked(adapters, path)), **close)


# ---- references
def weighted(weights):
    return lambda deltas: sum(w * delta for w, delta in zip(weights, deltas, strict=True))


def trim(delta, density):
    """The largest magnitudes, exactly as many as that share is."""
    kept = torch.zeros(delta.numel(), dtype=torch.bool)
    kept[delta.abs().flatten().argsort(descending=True, stable=True)[: int(density * delta.numel() + 1e-6)]] = True
    return delta * kept.view_as(delta)


def ties(deltas, weights=(1.0, 1.0, 1.0), density=0.2, sign="total", trims=True):
    values = torch.stack([w * (trim(d, density) if trims else d) for w, d in zip(weights, deltas, strict=True)])
    elected = (values if sign == "total" else values.sign()).sum(0).sign()
    majority = elected.sum().sign()
    elected = torch.where((elected == 0) & (values != 0).any(0), majority, elected)
    agrees = (values.sign() == elected) & (values != 0)
    return (values * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def polar(matrix):
    P, D, Qh = torch.linalg.svd(matrix, full_matrices=False)
    real = 1e-9 * D.max() < D
    return P[:, real] @ Qh[real]


def tsv(deltas, keep):
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    kept = [(U[:, :k], S[:k], Vh[:k].T) for (U, S, Vh), k in zip(parts, keep, strict=True)]
    U, S, V = (torch.cat(part, dim=-1) for part in zip(*kept, strict=True))
    return polar(U) @ S.diag() @ polar(V).T


def iso_c(deltas):
    U, S, Vh = torch.linalg.svd(deltas.sum(0), full_matrices=False)
    count = int((1e-6 * S[0] < S).sum())
    return S[:count].mean() * U[:, :count] @ Vh[:count]


def wudi(deltas):
    second = [d.T @ d / d.square().sum() for d in deltas if d.any()]
    first = [d @ s for d, s in zip([d for d in deltas if d.any()], second, strict=True)]
    return sum(first) @ torch.linalg.pinv(sum(second), rtol=1e-10)


def knots(deltas, inner):
    present = [delta for delta in deltas if delta.any()]
    U, S, Vh = torch.linalg.svd(torch.cat(present, dim=1), full_matrices=False)
    real = 1e-9 * S[0] < S
    parts = (S[real, None] * Vh[real]).split(deltas.shape[2], dim=1)
    return U[:, real] @ inner(torch.stack(parts))


# ---- the methods
def test_linear_is_the_mean_of_the_updates():
    assert_equal(LinearConfig(), lambda deltas: deltas.sum(0) / 3)


@pytest.mark.parametrize("config", [LinearConfig(weights=WEIGHTS), ConcatConfig(weights=WEIGHTS)], ids=lambda c: c.name)
def test_weights_are_those_of_the_names_and_may_be_negative(config):
    assert_equal(config, weighted(WEIGHTS.values()), rank="auto")


def test_mean_present_divides_by_the_weights_of_the_experts_that_adapt_the_module():
    found = merged(LinearConfig(missing="mean_present"))
    path = "model.layers.2.mlp.up_proj"
    torch.testing.assert_close(found[path], stacked(THREE, path).sum(0) / 2, **close)
    found = merged(ConcatConfig(missing="mean_present", weights=WEIGHTS), rank="auto")
    torch.testing.assert_close(found[path], weighted(WEIGHTS.values())(stacked(THREE, path)) * 1.9 / 2.2, **close)


def test_concatenation_keeps_every_rank_and_loses_nothing():
    result = merge(THREE, ConcatConfig(), dtype="float64")
    assert [layer.rank for layer in result.layers] == [9, 5, 9]
    assert result.error == 0
    with pytest.raises(ValueError, match="keeps every rank"):
        merge(THREE, ConcatConfig(), rank=3)


def test_linear_in_factors_is_the_product_of_the_sums():
    same = alike()
    found = merged(LinearConfig(space="factors", weights=WEIGHTS), same)
    for path in SHAPES:
        parts = [(WEIGHTS[n], a.modules[path]) for n, a in same.items()]
        B, A = sum(w * p.scale * p.B for w, p in parts), sum(w * p.A for w, p in parts)
        torch.testing.assert_close(found[path], B @ A, **close)


@pytest.mark.parametrize("config", [LinearConfig(space="factors"), TiesConfig(space="split_factors")])
def test_factors_of_unlike_ranks_are_refused_with_the_way_out(config):
    with pytest.raises(ValueError, match=r"q_proj: factors of unlike ranks.*dates: 3, sums: 2.*space=delta"):
        merge(THREE, config)


def test_task_arithmetic_is_the_scaled_sum():
    assert_equal(TaskArithmeticConfig(scale=0.4), lambda deltas: 0.4 * deltas.sum(0))
    assert_equal(TaskArithmeticConfig(scale=2.0, weights=WEIGHTS), lambda d: 2 * weighted(WEIGHTS.values())(d))


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
def test_ties_equals_the_dense_one(density, sign, weights):
    config = TiesConfig(density=density, sign=sign, weights=weights, scale=1.5)
    given = tuple((weights or dict.fromkeys(WEIGHTS, 1.0)).values())
    assert_equal(config, lambda deltas: 1.5 * ties(deltas, given, density, sign))


def test_ties_over_all_modules_of_an_expert_keeps_that_share_of_them_all():
    found = merged(TiesConfig(threshold="expert", density=0.15))
    cuts = []
    for adapter in THREE.values():
        sizes = torch.cat([delta.abs().flatten() for delta in dense(adapter).values()])
        cuts.append(sizes.sort(descending=True).values[int(0.15 * len(sizes)) - 1])
    for path in SHAPES:
        deltas = stacked(THREE, path)
        trimmed = torch.stack([d * (d.abs() >= cut) for d, cut in zip(deltas, cuts, strict=True)])
        torch.testing.assert_close(found[path], ties(trimmed, trims=False), **close)


@pytest.mark.parametrize("space", ["core", "knots", "delta", "factors"])
def test_ties_over_all_modules_keeps_the_share_in_every_space(space):
    result = merge(alike(), TiesConfig(threshold="expert", density=0.3, space=space), dtype="float64")
    assert all(layer.norm > 0 for layer in result.layers)


def test_where_signs_cancel_the_majority_of_the_module_decides():
    one = torch.tensor([[1.0, 2.0, 5.0], [3.0, 0.0, -1.0]], dtype=torch.float64)
    other = torch.tensor([[-1.0, 2.5, 4.0], [2.0, 0.0, -1.0]], dtype=torch.float64)
    adapters = {"a": whole("m", one), "b": whole("m", other)}
    found = dense(merge(adapters, TiesConfig(density=1.0), rank="full", dtype="float64").adapter)["m"]
    assert found.tolist() == [[1.0, 2.25, 4.5], [2.5, 0.0, -1.0]]
    opposite = {"a": whole("m", one), "b": whole("m", -one)}
    assert not dense(merge(opposite, TiesConfig(density=1.0), rank="full").adapter)["m"].any()


def whole(path, matrix):
    eye = torch.eye(matrix.shape[1], dtype=torch.float64)
    return Adapter("lora", {path: LoraWeights(A=eye, B=matrix, alpha=float(len(eye)))})


def test_the_disputed_share_is_that_of_entries_with_both_signs():
    result = merge(THREE, TiesConfig(density=0.5))
    for layer in result.layers:
        deltas = torch.stack([trim(d, 0.5) for d in stacked(THREE, layer.path)])
        share = ((deltas > 0).any(0) & (deltas < 0).any(0)).double().mean()
        assert layer.facts["disputed"] == pytest.approx(float(share))


@pytest.mark.parametrize("then", ["linear", "ties"])
def test_dare_merges_what_its_mask_leaves(then):
    found = merged(DareConfig(density=0.4, seed=3, then=then, weights=WEIGHTS, scale=0.7))
    for path in SHAPES:
        left = []
        for name, delta in zip(THREE, stacked(THREE, path), strict=True):
            left.append(thinned(grid_of(path, name, delta), 0.4, 3).entries[name](0, SHAPES[path][0]))
        given = tuple(WEIGHTS.values())
        reference = weighted(given)(left) if then == "linear" else ties(left, given, trims=False)
        torch.testing.assert_close(found[path], 0.7 * reference, **close)


def grid_of(path, name, delta):
    return Grid(path, tuple(delta.shape), {name: lambda start, stop: delta[start:stop]})


def test_dares_mean_over_seeds_is_the_update():
    total = sum(merged(DareConfig(density=0.5, seed=seed))[path_of_square] for seed in range(400)) / 400
    wanted = stacked(THREE, path_of_square).sum(0) / 3
    # An entry's standard deviation is that of a mean of 400 draws of τ·{0, 2}, added over experts.
    spread = (stacked(THREE, path_of_square) / 3).square().sum(0).sqrt() / 20
    assert ((total - wanted).abs() < 5 * spread).all()


path_of_square = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("per", ["layer", "model"])
def test_slerp_is_the_arc_between_two(t, per):
    two = {name: THREE[name] for name in ("sums", "dates")}
    found = merged(SlerpConfig(t=t, per=per), two)
    deltas = {path: stacked(two, path) for path in SHAPES}
    whole = torch.cat([d.flatten(1) for d in deltas.values()], dim=1)
    for path, (a, b) in deltas.items():
        one, other = whole if per == "model" else (a.flatten(), b.flatten())
        angle = torch.arccos(one @ other / one.norm() / other.norm())
        reference = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
        torch.testing.assert_close(found[path], reference, **close)


def test_slerp_between_nearly_parallel_updates_is_the_line():
    scaled = THREE["sums"].modules
    two = {
        "a": THREE["sums"],
        "b": replace(THREE["sums"], modules={p: replace(w, alpha=3 * w.alpha) for p, w in scaled.items()}),
    }
    found = merged(SlerpConfig(t=0.25), two)
    for path, delta in dense(THREE["sums"]).items():
        torch.testing.assert_close(found[path], 1.5 * delta, **close)


def test_slerp_takes_two_experts():
    with pytest.raises(ValueError, match=r"slerp merges 2 experts, got 3: name them with experts=\[…\]"):
        merge(THREE, SlerpConfig())


def test_knots_equals_the_dense_one():
    config = KnotsConfig(density=0.3)
    found = merged(config)
    for path in SHAPES:
        deltas = stacked(THREE, path)
        present = sum(1 for delta in deltas if delta.any())

        def inner(parts, present=present):
            return ties(parts, (1.0,) * present, 0.3)

        torch.testing.assert_close(found[path], knots(deltas, inner), **close)


def test_knots_then_linear_is_linear():
    assert_equal(KnotsConfig(then="linear"), lambda deltas: deltas.sum(0) / 3)
    with pytest.raises(ValueError, match="density: cannot act with then=linear"):
        KnotsConfig(then="linear", density=0.5)


@pytest.mark.parametrize("keep", ["auto", 2])
def test_tsv_equals_the_dense_one(keep):
    found = merged(TsvConfig(keep=keep, scale=1.2))
    for path in SHAPES:
        deltas = [delta for delta in stacked(THREE, path) if delta.any()]
        ranks = [torch.linalg.matrix_rank(delta) for delta in deltas]
        keeps = ranks if keep == "auto" else [min(2, rank) for rank in ranks]
        torch.testing.assert_close(found[path], 1.2 * tsv(torch.stack(deltas), keeps), **close)


def test_tsv_gives_each_expert_its_share_where_not_all_fit_side_by_side():
    big = experts({"sums": 6, "words": 7, "dates": 8}, absent=())
    found = merged(TsvConfig(), big)
    for path in SHAPES:
        torch.testing.assert_close(found[path], tsv(stacked(big, path), [4, 4, 4]), **close)


def test_iso_c_equals_the_dense_one_over_nonzero_singular_values():
    assert_equal(IsoCConfig(), iso_c)


def test_iso_c_does_not_move_with_noise_of_1e_12():
    noisy = {
        name: replace(
            adapter,
            modules={
                p: replace(
                    w, B=w.B + 1e-12 * torch.randn(w.B.shape, generator=torch.Generator().manual_seed(1)).double()
                )
                for p, w in adapter.modules.items()
            },
        )
        for name, adapter in THREE.items()
    }
    before, after = merged(IsoCConfig()), merged(IsoCConfig(), noisy)
    for path in SHAPES:
        assert (after[path] - before[path]).norm() < 1e-9 * before[path].norm()


def test_wudi_equals_the_dense_one():
    assert_equal(WudiConfig(), wudi)


def test_wudi_is_where_gradient_descent_ends():
    path = "model.layers.2.mlp.up_proj"
    deltas = [delta for delta in stacked(THREE, path) if delta.any()]
    second = [d.T @ d / d.square().sum() for d in deltas]
    step = 1.0 / float(torch.linalg.matrix_norm(sum(second), 2))
    tau = sum(deltas)
    for _ in range(4000):
        tau = tau - step * sum((tau - d) @ s for d, s in zip(deltas, second, strict=True))
    torch.testing.assert_close(merged(WudiConfig())[path], tau, rtol=0, atol=1e-8)


def test_wudi_disturbs_no_expert_whose_inputs_no_other_reads():
    found = merged(WudiConfig())
    for path in SHAPES:
        for delta in stacked(THREE, path):
            assert ((found[path] - delta) @ delta.T).norm() < 1e-9 * max(1.0, float(delta.norm()) ** 2)


def test_wudis_ridge_shrinks_and_its_adam_descends():
    assert_equal(WudiConfig(ridge=0.1), lambda d: ridge_of(d, 0.1))

    def loss(found, path):
        deltas = [d for d in stacked(THREE, path) if d.any()]
        return sum(((found[path] - d) @ d.T).square().sum() / d.square().sum() for d in deltas)

    start = merged(TaskArithmeticConfig())
    few, many = (merged(WudiConfig(solver="adam", lr=1e-2, iters=iters)) for iters in (20, 200))
    for path in SHAPES:
        assert loss(many, path) < loss(few, path) < loss(start, path)
    with pytest.raises(ValueError, match="iters: cannot act with solver=closed"):
        WudiConfig(iters=5)


def ridge_of(deltas, ridge):
    second = [d.T @ d / d.square().sum() for d in deltas if d.any()]
    first = [d @ s for d, s in zip([d for d in deltas if d.any()], second, strict=True)]
    return sum(first) @ torch.linalg.inv(sum(second) + ridge * torch.eye(deltas.shape[2], dtype=torch.float64))


@pytest.mark.parametrize("config", [LinearConfig(), TaskArithmeticConfig()], ids=lambda c: c.name)
def test_the_core_holds_the_updates_without_loss(config):
    for layer in layers_of(THREE):
        core = core_of(layer)
        assert core.U.shape[1] <= sum(layer.ranks)
        for name in layer.deltas:
            torch.testing.assert_close(core.U @ core.M[name] @ core.V.T, dense(THREE[name])[layer.path], **close)
