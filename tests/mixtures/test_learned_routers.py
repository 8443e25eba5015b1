"""Mixtures under learned routers, all of them: generation, training, files, threads, order of the experts."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from learned_cases import LEARNED, equal_experts, full_inputs, learned, left_padded
from mixture_cases import CONFIGS, TASKS, expert, llama
from test_zero_shot_mixtures import CASES as ZERO_SHOT

from mole.backbones import Backbone
from mole.backbones.load import shapes_digest
from mole.mixtures import MultiExpertModel, load_mixture, save_mixture
from mole.registry import ROUTERS
from mole.routers import StaticConfig, UniformConfig, UniformRouter

ALL = pytest.mark.parametrize("name", LEARNED)


def test_every_registered_router_is_in_a_list_that_these_tests_walk():
    """Those for branches (of whole sub-layers) have tests of their own: test_multi_adapter, test_adapter_fusion."""
    walked = {config.name for config in (*LEARNED.values(), *ZERO_SHOT.values(), *CONFIGS.values())}
    assert set(ROUTERS.names()) == walked | {"multi_adapter", "adapter_fusion"}


@pytest.fixture
def prompts() -> dict:
    return left_padded()


@pytest.fixture
def full(batch) -> dict:
    return full_inputs(batch)


def loss_of(model, inputs):
    out = model(**inputs)
    loss = out.logits.float().log_softmax(-1)[..., 5].mean()
    return loss + getattr(out, "auxiliary_loss", 0.0)


@ALL
@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}],
    ids=["greedy", "beams"],
)
def test_cached_generation_is_exact(name, options, prompts):
    model = learned(name, torch.float64)
    given = {**prompts, "prompt_mask": prompts["attention_mask"].bool()}
    cached, anew = (
        model.generate(
            **given,
            max_new_tokens=6,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_logits=True,
            eos_token_id=None,
            **options,
        )
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, anew.sequences)
    for first, second in zip(cached.logits, anew.logits, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-10)


@ALL
def test_training_reaches_every_parameter_of_the_router_and_nothing_else(name, full):
    model = learned(name).train()
    torch.manual_seed(0)
    loss_of(model, full).backward()
    for site, router in model.routers().items():
        for path, parameter in router.named_parameters():
            assert parameter.grad is not None, f"{site} {path}"
            assert parameter.grad.abs().sum() > 0, f"{site} {path}"
    routers = {id(p) for router in model.routers().values() for p in router.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in routers)


@ALL
def test_gradient_checkpointing_changes_no_gradient_and_no_state(name, full):
    plain, checkpointed = learned(name).train(), learned(name).train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        first = loss_of(model, full)
        (first + loss_of(model, full)).backward()  # two forwards before one backward
    for (site, one), two in zip(plain.routers().items(), checkpointed.routers().values(), strict=True):
        for (path, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=f"{site} {path}")
        for (path, a), b in zip(one.named_buffers(), two.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=f"{site} {path}")


@ALL
def test_padding_and_other_rows_change_nothing(name, full):
    model = learned(name, torch.float64)
    want = model(**full).logits
    left = {k: torch.nn.functional.pad(v, (4, 2)) for k, v in full.items() if isinstance(v, torch.Tensor)}
    positions = (left["attention_mask"].cumsum(1) - 1).clamp_min(0)
    got = model(**left, task_names=full["task_names"], position_ids=positions).logits[:, 4:-2]
    valid = full["attention_mask"].bool()
    torch.testing.assert_close(got[valid], want[valid], rtol=0, atol=1e-10)
    alone = model(**{k: v[:1] for k, v in full.items()}).logits
    torch.testing.assert_close(alone, want[:1], rtol=0, atol=1e-10)


@ALL
def test_a_copy_routes_alike(name, full):
    model = learned(name)
    want = model(**full).logits
    assert torch.equal(copy.deepcopy(model)(**full).logits, want)


@ALL
def test_saved_and_loaded_logits_are_equal_bit_for_bit(name, tmp_path, full):
    model = learned(name)
    for router in model.routers().values():  # what training remembers beside its parameters
        for key, buffer in router.state_dict().items():
            if key in ("center", "norm.mean"):
                buffer.normal_()
    whole = Backbone(model.backbone, None, "tests/llama", None, shapes_digest(llama()))
    save_mixture(model, tmp_path / "mixture", whole)
    fresh = load_mixture(tmp_path / "mixture", Backbone(llama(), None, "tests/llama", None, whole.shapes))
    with torch.no_grad():
        assert torch.equal(model(**full).logits, fresh(**full).logits)
    for site, router in fresh.routers().items():
        old = model.routers()[site].state_dict()
        assert all(torch.equal(tensor, old[key]) for key, tensor in router.state_dict().items())


@ALL
def test_the_order_of_the_experts_changes_nothing(name, full):
    """C6: experts in another order, and the router's rows with them."""
    model = learned(name, torch.float64)
    want = model(**full).logits
    routers = dict(model.routers())
    backbone = model.unload()
    experts = equal_experts(backbone, torch.float64)
    turned = {expert: experts[expert] for expert in ("dates", "sums", "words")}
    other = MultiExpertModel(backbone, turned, LEARNED[name], tasks=TASKS).eval()
    for site, router in other.routers().items():
        router.double().carry(routers[site])
    valid = full["attention_mask"].bool()  # a padding token is a zero vector, and its cosines are ties
    torch.testing.assert_close(other(**full).logits[valid], want[valid], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in LEARNED if n not in ("sigmoid", "gate", "cat", "attention")])
def test_weights_of_one_in_all_mix_copies_of_an_expert_to_that_expert(name, full):
    """M3: every routing whose weights sum to 1, spent on copies of one expert, is that expert."""
    backbone = llama(torch.float64)
    one = expert(backbone, ["q_proj", "v_proj"], rank=4, alpha=4.0, seed=1, dtype=torch.float64)
    config = StaticConfig(include_base=False) if name == "static" else LEARNED[name]
    model = MultiExpertModel(backbone, dict.fromkeys(TASKS, one), config, tasks=TASKS).eval()
    for router in model.routers().values():
        router.double()
    with model.fixed_routing({"sums": 1.0}):
        want = model(**full).logits
    torch.testing.assert_close(model(**full).logits, want, rtol=0, atol=1e-9)


@ALL
def test_two_threads_equal_one_after_the_other(name, full):
    model = learned(name)
    rows = [{k: v[i : i + 1] for k, v in full.items()} for i in (0, 1)] * 3
    with torch.no_grad():
        with ThreadPoolExecutor(1) as one:  # not this thread, in which torch may use other kernels
            want = list(one.map(lambda row: model(**row).logits, rows))
        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(lambda row: model(**row).logits, rows))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@ALL
def test_forward_and_generate_change_no_flag_and_no_state(name, full, prompts):
    model = learned(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [(p.requires_grad, m.training) for m in model.modules() for p in m.parameters()]
    model(**full)
    model.generate(**prompts, max_new_tokens=2)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [(p.requires_grad, m.training) for m in model.modules() for p in m.parameters()] == flags


@ALL
def test_another_router_in_its_place_is_what_that_router_says(name, full):
    model = learned(name).eval()
    for router in model.routers().values():  # away from any start at which it does nothing of its own
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    uniform = UniformRouter(UniformConfig(), model.shape)
    weights = dict.fromkeys(model.expert_names, 1 / len(model.expert_names))
    with torch.no_grad():
        with model.routed_by(uniform):
            found = model(**full, use_cache=False).logits
        with model.fixed_routing(weights):
            wanted = model(**full, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
