"""Results that are known without computing: one expert, two equal ones, ones that share nothing; and blocks of rows."""

import sys
from dataclasses import replace

import pytest
import torch
from merging_cases import SHAPES, dense, experts, lora

from mole.adapters import Adapter
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
    spaces,
)
from mole.merging.dare import uniform
from mole.merging.deltas import layers_of

ALL = TiesConfig(density=1.0), DareConfig(density=1.0), KnotsConfig(density=1.0)
KEEPING = [LinearConfig(), ConcatConfig(), TaskArithmeticConfig(), TsvConfig(), WudiConfig(), *ALL]
close = {"rtol": 0, "atol": 1e-11}


def merged(config, adapters, **options):
    return dense(merge(adapters, config, dtype="float64", **options).adapter)


def level(delta, factor=1.0):
    """The update with its mean singular value in every direction."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    real = 1e-6 * S[0] < S
    return factor * S[real].mean() * U[:, real] @ Vh[real]


@pytest.mark.parametrize("config", KEEPING, ids=lambda c: c.name)
def test_one_expert_stays_what_it_is(config):
    one = {"sums": experts()["sums"]}
    found = merged(config, one, rank="exact")
    for path, delta in dense(one["sums"]).items():
        torch.testing.assert_close(found[path], delta, **close)


@pytest.mark.parametrize("config", [*KEEPING, SlerpConfig()], ids=lambda c: c.name)
def test_two_equal_experts_are_one(config):
    one = experts()["sums"]
    found = merged(config, {"a": one, "b": one}, rank="exact")
    for path, delta in dense(one).items():
        factor = 2.0 if config.name == "task_arithmetic" else 1.0
        torch.testing.assert_close(found[path], factor * delta, **close)


def test_iso_c_of_one_and_of_two_equal_experts_levels_the_spectrum():
    one = experts()["words"]
    for adapters, factor in (({"a": one}, 1.0), ({"a": one, "b": one}, 2.0)):
        found = merged(IsoCConfig(), adapters)
        for path, delta in dense(one).items():
            torch.testing.assert_close(found[path], level(delta, factor), **close)


def apart() -> dict[str, Adapter]:
    """Two experts that read other inputs and write other outputs."""
    made = {}
    for place, name in enumerate(("a", "b")):
        part = lora((6, 6), 2, seed=place)
        A, B = torch.zeros(2, 12, dtype=torch.float64), torch.zeros(12, 2, dtype=torch.float64)
        A[:, 6 * place : 6 * place + 6], B[6 * place : 6 * place + 6] = part.A, part.B
        made[name] = Adapter("lora", {"m": replace(part, A=A, B=B)})
    return made


@pytest.mark.parametrize("config", [TaskArithmeticConfig(), TsvConfig(), WudiConfig(), *ALL[::2]], ids=lambda c: c.name)
def test_experts_that_share_nothing_are_added_up(config):
    two = apart()
    torch.testing.assert_close(
        merged(config, two, rank="exact")["m"], sum(dense(a)["m"] for a in two.values()), **close
    )


@pytest.mark.parametrize("config", [TiesConfig(space="core", density=1.0), KnotsConfig()], ids=str)
def test_directions_that_no_expert_has_are_no_part_of_a_space(config):
    one = experts()["sums"]
    for layer in layers_of({"a": one, "b": one}):
        core = spaces.core_of(layer)
        assert (core.U.shape[1], core.V.shape[1]) == (2, 2)
    result = merge({"a": one, "b": one}, config)
    assert {layer.rank for layer in result.layers} == {2}


def test_a_lower_rank_keeps_the_largest_singular_values_and_bounds_every_output():
    result = merge(experts(), TaskArithmeticConfig(), rank=3, dtype="float64")
    whole, found = merged(TaskArithmeticConfig(), experts()), dense(result.adapter)
    x = torch.randn(17, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for layer in result.layers:
        U, S, Vh = torch.linalg.svd(whole[layer.path], full_matrices=False)
        torch.testing.assert_close(found[layer.path], U[:, :3] * S[:3] @ Vh[:3], **close)
        rows = x[: SHAPES[layer.path][1]]
        moved = ((whole[layer.path] - found[layer.path]) @ rows).norm(dim=0)
        assert (moved <= layer.next_sigma * rows.norm(dim=0) * (1 + 1e-9)).all()
        weights = result.adapter.modules[layer.path]
        assert weights.A.norm(dim=1).tolist() == pytest.approx(weights.B.norm(dim=0).tolist())


def test_the_error_of_all_layers_is_that_of_all_updates_together():
    result = merge(experts(), TaskArithmeticConfig(), rank=2, dtype="float64")
    whole, found = merged(TaskArithmeticConfig(), experts()), dense(result.adapter)
    lost = sum((whole[p] - found[p]).square().sum() for p in SHAPES)
    assert result.error == pytest.approx(float((lost / sum(d.square().sum() for d in whole.values())).sqrt()))
    assert result.worst.error == max(layer.error for layer in result.layers)


@pytest.mark.parametrize(
    ("config", "rank", "ranks"),
    [
        (TiesConfig(), "auto", [9, 5, 9]),
        (TiesConfig(), "max", [4, 3, 4]),
        (TiesConfig(density=0.8), "exact", [12, 12, 12]),
        (TiesConfig(), "full", [12, 12, 12]),
        (LinearConfig(), "max", [4, 3, 4]),
        (LinearConfig(), 100, [9, 5, 9]),
        (KnotsConfig(), "auto", [9, 5, 9]),
    ],
)
def test_the_ranks_that_a_result_may_have(config, rank, ranks):
    assert [layer.rank for layer in merge(experts(), config, rank=rank).layers] == ranks


def test_more_rank_than_the_matrix_has_is_folded_without_loss():
    big = experts({"sums": 6, "words": 7, "dates": 8}, absent=())
    result = merge(big, LinearConfig(), dtype="float64")
    assert [layer.rank for layer in result.layers] == [12, 12, 12]
    for path in SHAPES:
        wanted = sum(dense(adapter)[path] for adapter in big.values()) / 3
        torch.testing.assert_close(dense(result.adapter)[path], wanted, **close)


def test_a_rank_beyond_what_an_adapter_holds_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(sys.modules["mole.merging.merge"], "MAX_RANK", 8)
    with pytest.raises(ValueError, match=r"q_proj: the result has rank 9, and adapters hold 8 at most: give a rank"):
        merge(experts(), LinearConfig())


@pytest.mark.parametrize("config", [TiesConfig(), DareConfig(then="ties"), KnotsConfig(), LinearConfig()], ids=str)
def test_how_the_rows_are_cut_into_blocks_changes_nothing(config, monkeypatch):
    whole = merged(config, experts(), rank="full")
    monkeypatch.setattr(spaces, "BLOCK", 40)
    assert sum(1 for _ in spaces.Grid("m", (17, 12), dict.fromkeys("abc", None)).blocks()) == 17
    parts = merged(config, experts(), rank="full")
    for path in SHAPES:
        torch.testing.assert_close(parts[path], whole[path], **close)


@pytest.mark.parametrize(
    "config", [TiesConfig(threshold="expert"), DareConfig(), KnotsConfig(), LinearConfig()], ids=str
)
def test_no_more_entries_of_updates_are_held_at_a_time_than_a_block_has(config, monkeypatch):
    sizes, make = [], spaces._product_rows

    def watched(left, right):
        rows = make(left, right)

        def held(start, stop):
            sizes.append((stop - start) * right.shape[1])
            return rows(start, stop)

        return held

    monkeypatch.setattr(spaces, "_product_rows", watched)
    monkeypatch.setattr(spaces, "BLOCK", 120)
    merge(experts(), config)
    assert max(sizes, default=0) <= 120 / 2  # of each of two or three experts
    assert bool(sizes) == (config.name != "linear")


def test_what_dare_draws_is_even_and_belongs_to_seed_expert_and_module():
    values = uniform(12345, torch.arange(1 << 16))
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, 64, 0, 1)
    assert (counts - 1024).abs().max() < 5 * 1024**0.5
    assert abs(float(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1])) < 0.02
    assert torch.equal(uniform(12345, torch.tensor([7])), values[7:8])
    one = experts()["sums"]
    found = [merged(DareConfig(seed=seed), {name: one}) for seed, name in ((0, "a"), (1, "a"), (0, "b"))]
    assert not torch.equal(found[0]["model.layers.0.self_attn.q_proj"], found[1]["model.layers.0.self_attn.q_proj"])
    assert not torch.equal(found[0]["model.layers.0.self_attn.q_proj"], found[2]["model.layers.0.self_attn.q_proj"])


def test_splitmix64_gives_its_published_numbers():
    # The first outputs of the reference implementation for the seed 1234567.
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert uniform(1234567, torch.arange(5)).tolist() == [(number >> 11) / 2**53 for number in wanted]
