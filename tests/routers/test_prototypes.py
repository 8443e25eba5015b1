"""Routers by prototypes against dense algebra: Arrow, spectral, general knowledge subtraction, PHATGOOSE's scores."""

import math

import pytest
import torch

from mole.adapters import LoraWeights
from mole.routers import (
    ArrowConfig,
    ArrowRouter,
    AverageActivationConfig,
    AverageActivationRouter,
    MixtureShape,
    PhatgooseConfig,
    PhatgooseRouter,
    SpectralConfig,
    SpectralRouter,
)
from mole.routers.low_rank import Change, change_of, lora_of, right_singular, row_space, truncated
from mole.routing import Frame

D_IN, D_OUT = 12, 9


def lora(seed, rank=4, d_in=D_IN, d_out=D_OUT, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, d_in, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(d_out, rank, generator=generator, dtype=torch.float64).to(dtype)
    return LoraWeights(A=a, B=b, alpha=options.pop("alpha", 3.0), **options)


def dense(weights):
    return weights.scale * weights.B.double() @ weights.A.double()


def shape(names, sites=("site",)):
    return MixtureShape(tuple(names), tuple((name,) for name in names), sites=sites, hidden_size=D_IN)


def router(cls, config, experts, *, sites=None, dtype=torch.float64):
    """Over `experts`: name → weights, or one mapping for each of `sites`."""
    per_site = [experts] if sites is None else experts
    names = list(dict.fromkeys(name for here in per_site for name in here))
    made = cls(config, shape(names, sites or ("site",)), input_dim=D_IN, sites=sites or ("site",)).to(dtype)
    made.take_experts([{names.index(name): weights for name, weights in here.items()} for here in per_site])
    return made


def tokens(seed=0, count=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, D_IN, generator=generator, dtype=torch.float64)


def softmax_of_best(scores, k):
    """Dense weights [.., E] of the naive form: softmax over the k largest."""
    found = torch.zeros_like(scores)
    for place in torch.cartesian_prod(*[torch.arange(n) for n in scores.shape[:-1]]).tolist():
        row = scores[tuple(place)]
        best = sorted(range(len(row)), key=lambda e: (-float(row[e]), e))[:k]
        total = sum(math.exp(float(row[e])) for e in best)
        for e in best:
            found[(*place, e)] = math.exp(float(row[e])) / total
    return found


# ---- low-rank algebra
@pytest.mark.parametrize("rank", [1, 2, 4, 9, 12, 16])
@pytest.mark.parametrize("ratio", [0.1, 0.93, 0.999])
def test_right_singular_vectors_are_those_of_the_dense_change(rank, ratio):
    sigma = ratio ** torch.arange(min(rank, D_OUT), dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(D_OUT, len(sigma), dtype=torch.float64)).Q
    p = torch.linalg.qr(torch.randn(D_IN, len(sigma), dtype=torch.float64)).Q
    mixing = torch.randn(len(sigma), rank, dtype=torch.float64)
    change = Change(q * sigma @ mixing, torch.linalg.pinv(mixing) @ p.T)
    found, V = right_singular(change)
    want = torch.linalg.svd(change.B @ change.A)
    torch.testing.assert_close(found[: len(sigma)], want.S[: len(sigma)], rtol=1e-9, atol=1e-12)
    assert 1 - abs(float(V[0] @ want.Vh[0])) < 1e-10


def test_the_row_space_has_the_norms_of_the_dense_change():
    change = change_of(lora(1, rank=5))
    x = tokens()
    torch.testing.assert_close(
        (x @ row_space(change).T).norm(dim=-1), (x @ (change.B @ change.A).T).norm(dim=-1), rtol=1e-12, atol=1e-12
    )


def test_truncation_is_that_of_the_dense_svd_and_its_error_is_reported():
    change = change_of(lora(2, rank=6))
    U, S, V = torch.linalg.svd(change.B @ change.A, full_matrices=False)
    near, error = truncated(change, 2)
    torch.testing.assert_close(near.B @ near.A, U[:, :2] * S[:2] @ V[:2], rtol=1e-10, atol=1e-10)
    assert error == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-10)
    again = lora_of(near)
    torch.testing.assert_close(dense(again), near.B @ near.A, rtol=1e-12, atol=1e-12)


# ---- Arrow
def test_arrow_scores_by_the_top_singular_vector_of_each_dense_change():
    experts = {"a": lora(1, rank=1), "b": lora(2, rank=4, alpha=9.0), "c": lora(3, rank=16, rslora=True)}
    x = tokens()
    made = router(ArrowRouter, ArrowConfig(top_k=2, temperature=0.7), experts)
    scores = torch.stack([(x @ torch.linalg.svd(dense(w)).Vh[0]).abs() for w in experts.values()], -1)
    routing = made(x, Frame())
    torch.testing.assert_close(routing.dense(3), softmax_of_best(scores / 0.7, 2), rtol=1e-6, atol=1e-7)
    assert routing.weights.shape[-1] == 2


def test_arrow_by_cosine_does_not_depend_on_the_size_of_the_input():
    made = router(ArrowRouter, ArrowConfig(score="abs_cosine"), {"a": lora(1), "b": lora(2)})
    x = tokens()
    first, second = made(x, Frame()), made(5.0 * x, Frame())
    torch.testing.assert_close(first.weights, second.weights)
    assert not torch.allclose(first.weights, first.weights.flip(-1))


def test_arrow_does_not_depend_on_how_the_factors_are_rotated():
    one, mixing = lora(1), torch.randn(4, 4, dtype=torch.float64) + 4 * torch.eye(4, dtype=torch.float64)
    turned = LoraWeights(A=mixing @ one.A, B=one.B @ torch.linalg.inv(mixing), alpha=one.alpha)
    x, other = tokens(), lora(2)
    for cls, config in ((ArrowRouter, ArrowConfig()), (SpectralRouter, SpectralConfig())):
        first = router(cls, config, {"a": one, "b": other})(x, Frame())
        second = router(cls, config, {"a": turned, "b": other})(x, Frame())
        torch.testing.assert_close(first.weights, second.weights, rtol=1e-6, atol=1e-6)


def test_scaling_by_sigma_scales_the_prototype():
    experts = {"a": lora(1), "b": lora(2)}
    plain = router(ArrowRouter, ArrowConfig(), experts)
    scaled = router(ArrowRouter, ArrowConfig(scale_by_sigma=True), experts)
    want = [torch.linalg.svdvals(dense(w))[:2] for w in experts.values()]
    torch.testing.assert_close(scaled.prototypes, plain.prototypes * torch.stack(want)[:, :1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scaled.flatness, torch.stack([s[1] / s[0] for s in want]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tie", ["stack", "sum"])
def test_modules_of_a_group_share_the_vector_of_their_changes_together(tie):
    sites = ("q", "k")
    experts = [{"a": lora(1), "b": lora(2)}, {"a": lora(3), "b": lora(4)}]
    config = ArrowConfig(scope="group", group_by="x", tie=tie)
    made = router(ArrowRouter, config, experts, sites=sites)
    for index, name in enumerate("ab"):
        parts = [dense(here[name]) for here in experts]
        together = torch.cat(parts) if tie == "stack" else parts[0] + parts[1]
        v = torch.linalg.svd(together).Vh[0]
        assert abs(float(made.prototypes[index] @ v)) == pytest.approx(1.0, abs=1e-6)


def test_a_group_of_modules_with_other_inputs_is_refused():
    experts = [{"a": lora(1)}, {"a": lora(2, d_in=D_IN + 1)}]
    with pytest.raises(ValueError, match="router.group_by"):
        router(ArrowRouter, ArrowConfig(scope="group", group_by="x"), experts, sites=("q", "down"))


def test_experts_that_a_module_lacks_are_never_chosen_and_empty_slots_have_no_weight():
    names = ("a", "b", "c")
    for cls, config in ((ArrowRouter, ArrowConfig(top_k=2)), (SpectralRouter, SpectralConfig(top_k=2))):
        made = cls(config, shape(names), input_dim=D_IN).double()
        made.take_experts([{1: lora(1)}])
        routing = made(tokens(), Frame())
        assert set(routing.expert_ids.unique().tolist()) == {-1, 1}
        assert (routing.weights[routing.expert_ids == -1] == 0).all()
        torch.testing.assert_close(routing.dense(3)[..., 1], torch.ones(2, 7, dtype=routing.weights.dtype))


def test_an_expert_without_effect_scores_nothing_and_breaks_nothing():
    silent = LoraWeights(A=lora(1).A, B=torch.zeros(D_OUT, 4, dtype=torch.float64), alpha=1.0)
    made = router(SpectralRouter, SpectralConfig(top_k=None), {"a": silent, "b": lora(2)})
    x = tokens().requires_grad_()
    made(x, Frame()).weights[..., 0].sum().backward()
    assert x.grad.isfinite().all()
    arrow = router(ArrowRouter, ArrowConfig(top_k=None), {"a": silent, "b": lora(2)})
    assert (arrow.prototypes[0] == 0).all()


def test_a_token_of_zeros_has_a_finite_gradient():
    made = router(SpectralRouter, SpectralConfig(), {"a": lora(1), "b": lora(2)})
    x = torch.zeros(1, 2, D_IN, dtype=torch.float64, requires_grad=True)
    made(x, Frame()).weights.square().sum().backward()
    assert x.grad.isfinite().all()


def test_ties_go_to_the_lower_index():
    same = lora(1)
    made = router(ArrowRouter, ArrowConfig(top_k=1), {"a": same, "b": same, "c": same})
    assert (made(tokens(), Frame()).expert_ids == 0).all()


def test_unnormalised_weights_are_those_of_the_softmax_over_all():
    experts = {"a": lora(1), "b": lora(2), "c": lora(3)}
    x = tokens()
    full = router(ArrowRouter, ArrowConfig(top_k=None), experts)(x, Frame()).weights
    kept = router(ArrowRouter, ArrowConfig(top_k=2, norm_topk=False), experts)(x, Frame())
    torch.testing.assert_close(kept.weights, full.gather(-1, kept.expert_ids))


def test_an_expert_of_another_kind_is_refused_by_name():
    class Scale:
        pass

    with pytest.raises(ValueError, match="'odd' has Scale at site"):
        router(ArrowRouter, ArrowConfig(), {"fine": lora(1), "odd": Scale()})


# ---- spectral
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_spectral_scores_are_norms_of_the_dense_product(rank):
    experts = {"a": lora(1, rank=rank), "b": lora(2, rank=3, alpha=7.0), "c": lora(3, rank=2, rslora=True)}
    made, x = router(SpectralRouter, SpectralConfig(top_k=2), experts), tokens()
    want = torch.stack([(x @ dense(w).T).norm(dim=-1) for w in experts.values()], -1)
    torch.testing.assert_close(made.norms(x), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made(x, Frame()).dense(3), softmax_of_best(want, 2), rtol=1e-4, atol=1e-5)


def test_spectral_of_a_group_takes_all_its_modules_together():
    experts = [{"a": lora(1), "b": lora(2)}, {"a": lora(3, d_out=4), "b": lora(4, d_out=4)}]
    made = router(SpectralRouter, SpectralConfig(scope="group", group_by="x"), experts, sites=("q", "k"))
    x = tokens()
    want = torch.stack([(x @ torch.cat([dense(here[n]) for here in experts]).T).norm(dim=-1) for n in "ab"], -1)
    torch.testing.assert_close(made.norms(x), want, rtol=1e-5, atol=1e-6)


def test_a_prefilter_for_all_experts_changes_nothing():
    experts = {"a": lora(1), "b": lora(2), "c": lora(3)}
    x = tokens()
    first = router(SpectralRouter, SpectralConfig(top_k=2), experts)(x, Frame())
    second = router(SpectralRouter, SpectralConfig(top_k=2, prefilter=3), experts)(x, Frame())
    assert torch.equal(first.weights, second.weights)


def test_a_prefilter_leaves_the_experts_that_arrow_prefers():
    experts = {name: lora(seed) for seed, name in enumerate("abcde")}
    x = tokens()
    made = router(SpectralRouter, SpectralConfig(top_k=2, prefilter=3), experts)
    arrow = (x @ made.prototypes.to(x).T).abs()
    norms = torch.stack([(x @ dense(w).T).norm(dim=-1) for w in experts.values()], -1)
    cut = arrow.sort(dim=-1, descending=True).values[..., 2:3]
    want = softmax_of_best(norms.masked_fill(arrow < cut, -1e9), 2)
    torch.testing.assert_close(made(x, Frame()).dense(5), want, rtol=1e-4, atol=1e-5)


def test_frobenius_divides_by_the_size_of_the_change():
    experts = {"a": lora(1, alpha=40.0), "b": lora(2)}
    x = tokens()
    made = router(SpectralRouter, SpectralConfig(calibrate="frobenius", top_k=None), experts)
    want = torch.stack([(x @ dense(w).T).norm(dim=-1) / dense(w).norm() for w in experts.values()], -1)
    torch.testing.assert_close(made(x, Frame()).weights, want.softmax(-1), rtol=1e-5, atol=1e-6)


def test_zscore_needs_statistics_and_then_uses_them():
    experts = {"a": lora(1), "b": lora(2)}
    x = tokens()
    made = router(SpectralRouter, SpectralConfig(calibrate="zscore", top_k=None), experts)
    with pytest.raises(ValueError, match="dataset="):
        made(x, Frame())
    made.take_calibration({0: (3.0, 2.0), 1: (1.0, 0.5)})
    norms = torch.stack([(x @ dense(w).T).norm(dim=-1) for w in experts.values()], -1)
    want = torch.stack([(norms[..., 0] - 3) / 2, (norms[..., 1] - 1) / 0.5], -1).softmax(-1)
    torch.testing.assert_close(made(x, Frame()).weights, want, rtol=1e-5, atol=1e-6)


def test_statistics_are_carried_for_experts_that_are_as_they_were():
    config = SpectralConfig(calibrate="zscore")
    old = router(SpectralRouter, config, {"a": lora(1), "b": lora(2)})
    old.take_calibration({0: (3.0, 2.0), 1: (1.0, 0.5)})
    new = router(SpectralRouter, config, {"c": lora(3), "b": lora(2), "a": lora(9)})
    new.carry(old)
    assert new.mean.tolist() == [0.0, 1.0, 0.0]
    assert new.deviation.tolist() == [1.0, 0.5, 1.0]
    assert new.calibrated.tolist() == [False, True, False]


# ---- general knowledge
def spent(routing, experts):
    """The naive sum of dense changes [B, T, d_out, d_in] for a routing."""
    weights = routing.dense(len(experts))
    return torch.einsum("bte,eoi->btoi", weights, torch.stack([dense(w) for w in experts.values()]))


@pytest.mark.parametrize("top_k", [1, 2, None])
def test_subtracting_changes_equals_dense_subtraction(top_k):
    experts = {"a": lora(1), "g": lora(5, rank=2), "b": lora(2, alpha=8.0), "h": lora(6, rslora=True), "c": lora(3)}
    made = router(ArrowRouter, ArrowConfig(top_k=top_k, general_experts=("g", "h")), experts)
    x, mean = tokens(), (dense(experts["g"]) + dense(experts["h"])) / 2
    less = {name: dense(experts[name]) - mean for name in "abc"}
    scores = torch.stack([(x @ torch.linalg.svd(change).Vh[0]).abs() for change in less.values()], -1)
    want = torch.einsum("bte,eoi->btoi", softmax_of_best(scores, top_k or 3), torch.stack(list(less.values())))
    torch.testing.assert_close(spent(made(x, Frame()), experts).double(), want, rtol=1e-5, atol=1e-5)


def test_spectral_takes_general_knowledge_off_too():
    experts = {"a": lora(1), "g": lora(5, rank=2), "b": lora(2)}
    made = router(SpectralRouter, SpectralConfig(general_experts=("g",)), experts)
    x = tokens()
    want = torch.stack([(x @ (dense(experts[n]) - dense(experts["g"])).T).norm(dim=-1) for n in "ab"], -1)
    torch.testing.assert_close(made.norms(x)[..., [0, 2]], want, rtol=1e-5, atol=1e-6)


def test_subtracting_factors_equals_the_formula_by_hand():
    experts = {"a": lora(1), "g": lora(5), "b": lora(2), "h": lora(6)}
    config = ArrowConfig(general_experts=("g", "h"), subtract="factors")
    made = router(ArrowRouter, config, experts)
    mean_a = (experts["g"].A + experts["h"].A) / 2
    mean_b = (experts["g"].B + experts["h"].B) / 2
    for index, name in ((0, "a"), (2, "b")):
        v = torch.linalg.svd((experts[name].B - mean_b) @ (experts[name].A - mean_a)).Vh[0]
        assert abs(float(made.prototypes[index] @ v)) == pytest.approx(1.0, abs=1e-6)
    weights = made(tokens(), Frame()).dense(4)
    assert (weights[..., [1, 3]] == 0).all()


@pytest.mark.parametrize(
    ("experts", "says"),
    [
        ({"a": lora(1, rank=3), "g": lora(2)}, "factors of one rank"),
        ({"a": lora(1), "g": lora(2, magnitude=torch.ones(D_OUT))}, "'g' has DoRA"),
    ],
)
def test_what_cannot_be_subtracted_is_said(experts, says):
    with pytest.raises(ValueError, match=says):
        router(ArrowRouter, ArrowConfig(general_experts=("g",), subtract="factors"), experts)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"subtract": "delta"}, "need router.general_experts"),
        ({"general_experts": ("g",), "combine": "parameters"}, "combine=outputs"),
        ({"general_experts": ("g",), "missing": "renormalise"}, "missing=drop"),
        ({"general_experts": ("g", "g")}, "twice"),
        ({"general_experts": ("g",), "subtract": "factors", "subtract_rank": 2}, "keeps the rank"),
        ({"scope": "group"}, "group_by or router.num_groups"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options, says):
    for config in (ArrowConfig, SpectralConfig):
        with pytest.raises(ValueError, match=says):
            config(**options)


def test_general_experts_have_to_be_in_the_mixture_and_leave_others():
    with pytest.raises(ValueError, match="did you mean gen"):
        router(ArrowRouter, ArrowConfig(general_experts=("gem",)), {"a": lora(1), "gen": lora(2)})
    with pytest.raises(ValueError, match="names every expert"):
        router(ArrowRouter, ArrowConfig(general_experts=("a",)), {"a": lora(1)})


# ---- PHATGOOSE and average activation
def prepared(cls, config, vectors, dtype=torch.float64):
    made = cls(config, shape([f"e{i}" for i in range(len(vectors))]), input_dim=D_IN).to(dtype)
    made.take_prototypes(dict(enumerate(vectors)))
    return made


def test_phatgoose_scores_are_correlations_times_the_root_of_the_width():
    x, v = tokens(), torch.randn(3, D_IN, dtype=torch.float64)
    made = prepared(PhatgooseRouter, PhatgooseConfig(top_k=None), v)
    logits = made(x, Frame()).logits
    for e in range(3):
        for b in range(2):
            for t in range(7):
                r = torch.corrcoef(torch.stack([x[b, t], v[e]]))[0, 1]
                assert float(logits[b, t, e]) == pytest.approx(float(r) * math.sqrt(D_IN), abs=1e-3)
    assert logits.abs().max() <= math.sqrt(D_IN)


def test_phatgoose_ignores_size_and_offset_of_input_and_gate():
    x, v = tokens(), torch.randn(3, D_IN, dtype=torch.float64)
    first = prepared(PhatgooseRouter, PhatgooseConfig(), v)(x, Frame()).weights
    second = prepared(PhatgooseRouter, PhatgooseConfig(), 40 * v - 3)(17 * x + 5, Frame()).weights
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_average_activation_scores_are_cosines():
    x, v = tokens(), torch.randn(3, D_IN, dtype=torch.float64)
    made = prepared(AverageActivationRouter, AverageActivationConfig(temperature=0.3, top_k=2), v)
    cosines = torch.nn.functional.cosine_similarity(x[:, :, None], v, dim=-1)
    torch.testing.assert_close(made(x, Frame()).dense(3), softmax_of_best(cosines / 0.3, 2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.angles(x), cosines, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("cls", "config"), [(PhatgooseRouter, PhatgooseConfig()), (AverageActivationRouter, AverageActivationConfig())]
)
def test_a_router_without_prototypes_says_how_they_are_made(cls, config):
    made = cls(config, shape(["a", "b"]), input_dim=D_IN)
    with pytest.raises(ValueError, match=f"mole build-moe router={config.name} dataset="):
        made(tokens(), Frame())


def test_a_null_temperature_is_the_root_of_the_width():
    v = torch.randn(2, D_IN, dtype=torch.float64)
    config = AverageActivationConfig(score="dot", temperature=None, top_k=None)
    logits = prepared(AverageActivationRouter, config, v)(tokens(), Frame()).logits
    torch.testing.assert_close(logits, tokens() @ v.T / math.sqrt(D_IN))


def test_prototypes_of_experts_that_stay_are_carried():
    v = torch.randn(2, D_IN, dtype=torch.float64)
    old = prepared(PhatgooseRouter, PhatgooseConfig(), v)
    new = PhatgooseRouter(PhatgooseConfig(), shape(["new", "e1"]), input_dim=D_IN).double()
    new.carry(old)
    assert torch.equal(new.prototypes[1], v[1])
    assert new.present.tolist() == [False, True]


@pytest.mark.parametrize(("cls", "config"), [(ArrowRouter, ArrowConfig()), (SpectralRouter, SpectralConfig())])
def test_angles_with_singular_vectors_have_no_sign(cls, config):
    made = cls(config, shape(["a", "b"]), input_dim=D_IN).double()
    v = torch.randn(2, D_IN, dtype=torch.float64)
    made.take_prototypes({0: v[0], 1: v[1]})
    x = tokens()
    cosines = torch.nn.functional.cosine_similarity(x[:, :, None], v, dim=-1)
    assert (cosines < 0).any()
    torch.testing.assert_close(made.angles(x), cosines.abs(), rtol=1e-5, atol=1e-6)


def test_angles_are_there_for_who_records_and_only_then():
    x, v = tokens(), torch.randn(3, D_IN, dtype=torch.float64)
    made = prepared(PhatgooseRouter, PhatgooseConfig(), v)
    assert made(x, Frame()).angles is None
    torch.testing.assert_close(made(x, Frame(recording=True)).angles, made.angles(x))
