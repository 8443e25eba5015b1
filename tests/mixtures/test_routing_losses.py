"""A mixture's output in training carries the losses on its routing; nothing else changes."""

from inspect import signature

import pytest
import torch
from mixture_cases import mixture

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
