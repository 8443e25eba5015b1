"""Packed rows: several samples in a row are for backbone, experts, routers, losses and logs what they are alone."""

import pytest
import torch
from learned_cases import LEARNED, learned
from mixture_cases import CONFIGS, llama
from mixture_cases import mixture as two_pass
from test_zero_shot_mixtures import CASES, TEXTS
from test_zero_shot_mixtures import mixture as zero_shot

from mole.adapters import PrefixConfig, PromptConfig, attach, extract
from mole.data import Sample, collate, collate_packed
from mole.mixtures import MultiExpertModel
from mole.mixtures.two_pass.hidden_store import HiddenStore
from mole.routers import UniformConfig
from mole.routing import Packing, Routing
from mole.routing.log import RoutingLog
from mole.routing.statistics import RoutingStatistics
from mole.training import check_isolation
from mole.training.loss import Objective, valid_tokens

LENGTHS = ((4, 7), (9,), (3, 2, 5))  # of the samples in each row
BUILT = {
    **{f"learned_{name}": lambda name=name: learned(name, torch.float64) for name in LEARNED},
    **{f"two_pass_{name}": lambda name=name: two_pass(name, torch.float64) for name in CONFIGS},
    **{f"zero_shot_{name}": lambda name=name: zero_shot(CASES[name], dtype=torch.float64) for name in CASES},
}
DRAWS = {"learned_per_example", "learned_attention"}  # noise and dropout, which fall on other shapes otherwise
WITHOUT_LOGITS = {"learned_static", "learned_cat", "two_pass_uniform", "two_pass_task"}
EVERY = pytest.mark.parametrize("name", BUILT)


def rows_of_samples(lengths=LENGTHS) -> list[list[Sample]]:
    generator, tasks, rows = torch.Generator().manual_seed(5), list(TEXTS), []
    for row in lengths:
        samples = []
        for length in row:
            ids = tuple(torch.randint(3, 101, (length,), generator=generator).tolist())
            prompt = 1 + length // 3
            task = tasks[length % len(tasks)]
            samples.append(Sample(ids, (-100,) * prompt + ids[prompt:], task, TEXTS[task], "", ids[:prompt]))
        rows.append(samples)
    return rows


def both() -> tuple[dict, dict]:
    """The samples packed, and one a row."""
    rows = rows_of_samples()
    return collate_packed(rows, 0), collate([sample for row in rows for sample in row], 0)


def apart(batch, tensor):
    """What stands at the samples' positions, one sample after another."""
    return tensor[batch["segment_ids"] >= 0] if "segment_ids" in batch else tensor[batch["attention_mask"].bool()]


@EVERY
def test_packed_samples_get_the_logits_of_the_samples_alone(name):
    model = BUILT[name]()
    packed, alone = both()
    with torch.no_grad():
        found, wanted = (apart(batch, Objective(model).output(batch).logits) for batch in (packed, alone))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in BUILT if not name.startswith("zero_shot")])
def test_loss_and_gradients_of_packed_rows_are_those_of_the_samples(name):
    found = []
    for batch in both():
        model = BUILT[name]().train()
        if name in DRAWS:
            for router in model.routers().values():
                router.eval()
        if name not in WITHOUT_LOGITS:
            model.losses = {"load_balance": 0.5, "token_entropy": 0.1}
        loss, auxiliary, _ = Objective(model)(batch)
        total = loss if auxiliary is None else loss + auxiliary
        if total.requires_grad:
            total.backward()
        found.append((loss, auxiliary, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, auxiliary, gradients), (wanted, wanted_auxiliary, wanted_gradients) = found
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
    if wanted_auxiliary is not None:
        torch.testing.assert_close(auxiliary, wanted_auxiliary, rtol=1e-6, atol=0)
    assert gradients.keys() == wanted_gradients.keys()
    for path, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[path], rtol=1e-6, atol=1e-9, msg=path)


@EVERY
def test_statistics_and_log_see_each_sample_for_itself(name, tmp_path):
    found = []
    for batch in both():
        model = BUILT[name]()
        statistics = RoutingStatistics(model.sites, model.expert_names, model.shape.expert_tasks, every=1)
        log = RoutingLog(model.sites, model.expert_names)
        model.observers.append(statistics)
        model.listeners.append(log)
        with torch.no_grad():
            Objective(model).output(batch)
        found.append((statistics.read(), log))
    (numbers, log), (wanted, wanted_log) = found
    assert numbers == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert len(log) == len(wanted_log) > 0


def test_valid_tokens_of_packed_rows_are_those_of_their_samples():
    packed, alone = both()
    assert valid_tokens(packed) == valid_tokens(alone) == sum(map(sum, LENGTHS))
    assert packed["task_names"] == alone["task_names"]
    assert torch.equal(apart(packed, packed["prompt_mask"]), apart(alone, alone["prompt_mask"]))


def test_attention_of_either_kind_keeps_to_the_sample():
    for attention in ("eager", "sdpa"):
        model = llama(torch.float64, attn_implementation=attention)
        packed, alone = both()
        with torch.no_grad():
            found, wanted = (apart(batch, Objective(model).output(batch).logits) for batch in (packed, alone))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def wide_llama():
    """One whose pad token is as any other, in float64."""
    return llama(torch.float64)


def test_a_model_that_lets_samples_see_each_other_is_found_out():
    rows = rows_of_samples()[:1]
    packed, alone = collate_packed(rows, 0), [collate([sample], 0) for sample in rows[0]]
    check_isolation(wide_llama(), packed, alone)
    leaking = {**packed, "attention_mask": torch.ones_like(packed["input_ids"])}  # with a mask nobody looks for borders
    with pytest.raises(ValueError, match="see each other"):
        check_isolation(wide_llama(), leaking, alone)
    runs_on = {**packed, "position_ids": torch.arange(packed["input_ids"].shape[1])[None]}
    with pytest.raises(ValueError, match="see each other"):
        check_isolation(wide_llama(), runs_on, alone)


def test_a_prefix_is_seen_by_every_sample_or_refused():
    model = llama(torch.float64)
    attach(model, PrefixConfig(tokens=3), seed=0)
    rows = rows_of_samples()[:1]
    packed, alone = collate_packed(rows, 0), [collate([sample], 0) for sample in rows[0]]
    with torch.no_grad():
        found = apart(packed, Objective(model).output(packed).logits)
        wanted = torch.cat([Objective(model).output(batch).logits[0] for batch in alone])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_prompt_experts_and_other_inputs_are_refused():
    model = llama()
    attach(model, PromptConfig(tokens=3), seed=0)
    model = MultiExpertModel(llama(), {"a": extract(model)}, UniformConfig())
    packed, _ = both()
    with pytest.raises(ValueError, match="prompt experts"):
        Objective(model).output(packed)
    model = two_pass("task")
    with pytest.raises(ValueError, match="neither an attention_mask nor a cache"):
        model(**packed, attention_mask=torch.ones_like(packed["input_ids"]))
    with pytest.raises(ValueError, match="6 samples, and there are 2 task_names"):
        Objective(model).output({**packed, "task_names": ["add", "date"]})


def test_positions_are_made_where_they_are_missing():
    model, (packed, _) = two_pass("xlora", torch.float64), both()
    wanted = Objective(model).output(packed).logits
    without = {name: packed[name] for name in ("input_ids", "segment_ids")}
    assert torch.equal(apart(packed, model(**without).logits), apart(packed, wanted))


def test_hidden_states_of_packed_rows_are_kept_without_their_padding(tmp_path):
    model = two_pass("xlora").train()
    packed, _ = both()
    wanted = Objective(model).output(packed).logits
    model.hidden_store = HiddenStore(tmp_path)
    for _ in range(2):
        assert torch.equal(apart(packed, Objective(model).output(packed).logits), apart(packed, wanted))
    wider = {n: torch.nn.functional.pad(packed[n], (0, 2), value=v) for n, v in (("input_ids", 0), ("segment_ids", -1))}
    model(**wider)
    assert (model.hidden_store.hits, model.hidden_store.misses) == (6, 3)
    model.hidden_store.close()


@pytest.mark.parametrize(
    "segments",
    [[[0, 0, 2]], [[0, 1, 0]], [[0], [0]], [[-1, -1]], [[1, 2]]],
    ids=["hole", "broken", "twice", "none", "from_1"],
)
def test_segments_that_are_none_are_refused(segments):
    with pytest.raises(ValueError, match="number the samples from 0"):
        Packing(torch.tensor(segments))


def test_samples_are_taken_apart_and_put_together_in_the_order_of_their_numbers():
    packing = Packing(torch.tensor([[1, 1, 0, -1, -1], [2, 2, 2, 3, -1]]))
    x = torch.arange(10).view(2, 5)
    assert packing.apart(x).tolist() == [[2, 2, 2], [0, 1, 1], [5, 6, 7], [8, 8, 8]]
    assert packing.mask.tolist() == [[True, False, False], [True, True, False], [True] * 3, [True, False, False]]
    assert packing.position_ids.tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 0, 0]]
    tokens = Routing(torch.arange(12.0).view(4, 3, 1))
    assert packing.together(tokens).weights[..., 0].tolist() == [[3, 4, 0, 0, 1], [6, 7, 8, 9, 0]]
    examples = Routing(torch.arange(4.0).view(4, 1, 1))
    assert packing.together(examples).weights[..., 0].tolist() == [[1, 1, 0, 0, 0], [2, 2, 2, 3, 0]]
    assert packing.together(examples).apart is examples
