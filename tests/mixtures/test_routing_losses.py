"""A mixture's output in training carries the losses on its routing; nothing else changes."""

from inspect import signature

import pytest
import torch
from mixture_cases import TASKS, llama, mixture, three_experts

from mole.mixtures import MultiExpertModel
from mole.routers import PolyConfig, XLoraConfig
from mole.routing import Routing

IDS = torch.randint(3, 101, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["xlora", "xlora_layerwise", "xlora_top_k", "top_k"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_loss_reach_the_router_alone(name, checkpointing):
    model = mixture(name, torch.float64)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    model.losses = {"expert_label": 0.5, "load_balance": 0.25}
    output = model(input_ids=IDS, task_names=["spell", "date"], use_cache=False)
    parts = output.auxiliary_losses
    assert output.auxiliary_loss.item() == pytest.approx(
        0.5 * parts["expert_label"].item() + 0.25 * parts["load_balance"].item()
    )
    output.auxiliary_loss.backward()
    routers = [p for router in model.routers().values() for p in router.parameters()]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in routers)
    assert all(p.grad is None for n, p in model.named_parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", ["xlora", "top_k"])
def test_losses_change_no_logits_and_are_absent_in_eval(name):
    model = mixture(name, torch.float64).eval()
    with torch.no_grad():
        want = model(input_ids=IDS, use_cache=False).logits
        model.losses = {"token_entropy": 1.0}
        output = model(input_ids=IDS, use_cache=False)
    assert torch.equal(output.logits, want)
    assert not hasattr(output, "auxiliary_loss")


def test_given_labels_go_before_tasks():
    model = mixture("xlora", torch.float64).train()
    model.losses = {"expert_label": 1.0}
    torch.manual_seed(0)
    by_task = model(input_ids=IDS, task_names=["spell", "spell"], use_cache=False).auxiliary_loss
    torch.manual_seed(0)
    given = model(input_ids=IDS, expert_labels=torch.tensor([1, 1]), task_names=["date"] * 2, use_cache=False)
    assert given.auxiliary_loss.item() == by_task.item()


def test_supervised_gates_find_the_expert_of_the_task():
    model = mixture("xlora").train()
    model.losses = {"expert_label": 1.0}
    optimizer = torch.optim.Adam(model.router.parameters(), lr=0.05)
    for _ in range(60):
        loss = model(input_ids=IDS, task_names=["spell", "date"], use_cache=False).auxiliary_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        model.eval()(input_ids=IDS, use_cache=False)
    assert (model.router.latest.scalings[0, :, 0].argmax(-1) == 1).all()
    assert (model.router.latest.scalings[1, :, 0].argmax(-1) == 2).all()


def test_what_the_losses_are_taken_over_reaches_them():
    model, values = mixture("top_k", torch.float64).train(), {}
    model.losses = {"load_balance": 1.0}
    for over in ("microbatch", "sequence"):
        model.loss_options = {"over": over}
        torch.manual_seed(0)
        values[over] = float(model(input_ids=IDS, use_cache=False).auxiliary_loss.detach())
    assert values["sequence"] > values["microbatch"]


def test_labels_that_no_loss_reads_and_names_and_indices_that_nobody_has_are_refused_before_the_forward():
    model = mixture("xlora").train()
    model.backbone.model.register_forward_pre_hook(lambda module, args: pytest.fail("a forward began"))
    with pytest.raises(ValueError, match=r"expert_labels: no loss reads them.*set losses\['expert_label'\]"):
        model(input_ids=IDS, labels=IDS, expert_labels=torch.tensor([0, 1]))
    model.losses = {"expert_labels": 1.0}
    with pytest.raises(ValueError, match="'expert_labels'.*expert_label"):
        model(input_ids=IDS, expert_labels=torch.tensor([0, 1]))
    model.losses = {"expert_label": 1.0}
    for odd in (3, -1):
        with pytest.raises(ValueError, match=rf"expert_labels: got {odd}, need the index of an expert \(0 sums, 1 "):
            model(input_ids=IDS, expert_labels=torch.tensor([-100, odd]))


def test_losses_have_no_place_in_a_tuple():
    model = mixture("xlora").train()
    assert torch.equal(model(input_ids=IDS, return_dict=False)[0], model(input_ids=IDS).logits)
    model.losses = {"token_entropy": 1.0}
    with pytest.raises(ValueError, match="a tuple has no place for auxiliary_loss"):
        model(input_ids=IDS, return_dict=False)


@pytest.mark.parametrize("name", ["xlora", "uniform"])
def test_the_backbone_s_labels_are_a_parameter_with_a_name_as_trainers_look_for_it(name):
    model = mixture(name)
    assert "labels" in signature(model.forward).parameters
    found = model(input_ids=IDS, labels=IDS, use_cache=False)
    want = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(found.loss, want)


def test_losses_are_on_the_tokens_that_are_asked_for():
    model = mixture("top_k", torch.float64).train()
    model.losses, found = {"z_loss": 1.0}, {}
    prompt = torch.arange(7).expand(2, 7) < 4
    for on in ("valid", "prompt", "target"):
        model.loss_options = {"on": on}
        found[on] = model(input_ids=IDS, prompt_mask=prompt, use_cache=False).auxiliary_loss.item()
    assert found["valid"] == pytest.approx((4 * found["prompt"] + 3 * found["target"]) / 7)
    assert found["prompt"] != pytest.approx(found["target"])
    with pytest.raises(ValueError, match="tokens of targets need the prompts"):
        model(input_ids=IDS, use_cache=False)


@pytest.mark.parametrize(("field", "value"), [("lr", 0.3), ("weight_decay", 0.1)])
def test_a_router_of_the_whole_model_trains_with_settings_of_its_own(field, value):
    backbone = llama()
    model = MultiExpertModel(backbone, three_experts(backbone), XLoraConfig(**{field: value}))
    assert model.parameter_settings() == {f"router.classifier.0.{n}": {field: value} for n in ("weight", "bias")}


def test_one_router_may_serve_all_modules():
    backbone = llama()
    model = MultiExpertModel(
        backbone, three_experts(backbone), PolyConfig(scope="model", combine="outputs"), tasks=TASKS
    )
    (site,) = model.routers()
    assert site == model.sites[0]
    assert model.groups == {"model": model.sites}
    with torch.no_grad():
        want = model.eval()(input_ids=IDS, task_names=["add", "date"]).logits
        model.routers()[site].table.data[0] = torch.tensor([50.0, -50.0, -50.0])
        model.routers()[site].table.data[3] = torch.tensor([-50.0, -50.0, 50.0])
        found = model(input_ids=IDS, task_names=["add", "date"]).logits
        with model.fixed_routing(Routing(torch.eye(3)[[0, 2]][:, None])):
            alone = model(input_ids=IDS, task_names=["add", "date"]).logits
    assert not torch.allclose(found, want)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-4)
