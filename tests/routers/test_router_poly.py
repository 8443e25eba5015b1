"""Poly and MHR: PEFT's `poly` with the same parameters, tasks that come and go, unknown tasks."""

import math

import pytest
import torch
from peft import PolyConfig as PeftPolyConfig
from peft import get_peft_model
from pydantic import ValidationError
from router_cases import DIM, build, frame, inputs, named, shape

from mole.kernels.parameters import parameters
from mole.kernels.stack import LoraStack
from mole.routers import MixtureShape, PolyConfig, PolyRouter

RANK, SKILLS, TASKS = 4, 3, ("add", "spell", "date")


def poly(num_experts=3, seed=0, **options) -> PolyRouter:
    router = build(PolyRouter, PolyConfig(**{"task_names": TASKS, **options}), shape(num_experts), seed)
    router.table.data += torch.randn(router.table.shape, generator=torch.Generator().manual_seed(seed))
    return router


def peft_layer(splits):
    """PEFT's poly over a linear map 6 → 8, all of its parameters random."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 8))
    config = PeftPolyConfig(r=RANK, target_modules=["0"], n_tasks=3, n_skills=SKILLS, n_splits=splits)
    layer = get_peft_model(model, config).base_model.model[0]
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return layer


def same_as(layer, splits):
    """Our router and factors with the parameters of PEFT's layer: features are cut into blocks, the rank is shared."""
    router = build(PolyRouter, PolyConfig(task_names=TASKS, num_splits=splits), shape(SKILLS))
    router.table.data = layer.poly_router["default"].module_logits.detach().view(3, splits, SKILLS).clone()
    A = layer.poly_lora_A["default"].detach()  # [Q, E, d_in / Q, r]
    B = layer.poly_lora_B["default"].detach()  # [Q, E, r, d_out / Q]
    A = A.permute(1, 3, 0, 2).reshape(SKILLS * RANK, 6)
    B = B.permute(0, 3, 1, 2).reshape(8, SKILLS * RANK)
    return router, LoraStack(A, B, torch.full((SKILLS,), 1 / RANK), (RANK,) * SKILLS)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_it_is_pefts_poly_with_the_same_parameters(splits, training):
    layer, x = peft_layer(splits), inputs(4, 5, 6)
    router, stack = same_as(layer, splits)
    layer.train(training), router.train(training)
    rows, names = torch.tensor([2, 0, 1, 2]), ("date", "add", "spell", "date")
    torch.manual_seed(4)
    want = layer(x, task_ids=rows)
    torch.manual_seed(4)
    routing = router(x, frame(task_names=names))
    assert routing.weights.shape == ((4, 1, SKILLS) if splits == 1 else (4, 1, splits, SKILLS))
    got = parameters(x, stack, routing.weights, layer.base_layer(x))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    want.square().sum().backward()
    got.square().sum().backward()
    theirs = layer.poly_router["default"].module_logits.grad.view(3, splits, SKILLS)
    torch.testing.assert_close(router.table.grad, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("splits", [1, 2])
def test_weights_in_eval_are_the_shares_of_the_sigmoids(splits):
    router = poly(num_splits=splits)
    u = torch.sigmoid(router.table.double())[[1, 1, 0]]
    want = u / (u.sum(-1, keepdim=True) + 1e-12)
    routing = router(inputs(3, 2, DIM), frame(task_names=("spell", "spell", "add")))
    torch.testing.assert_close(routing.dense(3).double().view(want.shape), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.softmax(routing.logits, -1), routing.weights)


def test_training_samples_skills_and_not_without_the_relaxed_bernoulli():
    one = frame(task_names=("add",) * 4000)
    router = poly(bernoulli_temperature=0.01).train()
    u = router(None, one).logits.exp()
    torch.testing.assert_close((u > 0.5).float().mean((0, 1)), torch.sigmoid(router.table[0, 0]), rtol=0, atol=0.03)
    still = poly(relaxed_bernoulli=False)
    before = still(None, one).weights
    assert torch.equal(still.train()(None, one).weights, before)


def test_tasks_are_those_of_the_experts_where_none_are_named():
    router = build(PolyRouter, PolyConfig(), shape(tasks=(("a", "b"), ("b", "c"), ())))
    assert router.tasks == ("a", "b", "c")
    with pytest.raises(ValueError, match="name the tasks in router.task_names"):
        build(PolyRouter, PolyConfig(), shape(tasks=((), (), ())))


def test_an_unknown_task_is_an_error_or_uniform_in_eval_and_always_an_error_in_training():
    given = frame(task_names=("dat", "add"))
    with pytest.raises(ValueError, match=r"unknown task 'dat'; did you mean date\?"):
        poly()(None, given)
    router = poly(unknown="uniform")
    weights = router(None, given).weights
    assert weights[0, 0].tolist() == pytest.approx([1 / 3] * 3)
    torch.testing.assert_close(weights[1], router(None, frame(task_names=("add",))).weights[0])
    for unknown in ("uniform", "nearest"):
        with pytest.raises(ValueError, match="unknown task 'dat'"):
            poly(unknown=unknown).train()(None, frame(task_names=("dat",), texts=("x",)))


def test_nearest_takes_the_row_of_the_task_whose_training_texts_are_most_alike():
    router = poly(unknown="nearest")
    assert router.needs == {"task_names", "texts"}
    texts = {"add": "12 plus 30 is", "spell": "spell the word house", "date": "which day of the month"}
    router.train()
    one = frame(task_names=tuple(texts), texts=tuple(texts.values()))
    router(None, one)
    seen = router.text_sums.clone()
    router(None, one)  # the same forward, computed again
    assert torch.equal(router.text_sums, seen)
    fresh = poly(seed=1, unknown="nearest")
    fresh.load_state_dict(router.state_dict())
    new = ("please spell the word mouse", "what is 4 plus 12", "spell the word house")
    got = fresh(None, frame(task_names=("new", "other", "add"), texts=new)).weights
    want = fresh(None, frame(task_names=("spell", "add", "add"), texts=new)).weights
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="texts"):
        fresh(None, frame(task_names=("new",)))


def test_rows_repeat_for_the_beams_of_an_example():
    router = poly()
    weights = router(inputs(4, 1, DIM), frame(task_names=("date", "add"))).weights
    assert torch.equal(weights, router(None, frame(task_names=("date", "date", "add", "add"))).weights)


def test_a_new_task_may_start_near_one_skill():
    router = build(PolyRouter, PolyConfig(task_names=("add", "new"), init_task={"new": "e1"}), shape(3))
    assert router.table[1, 0].tolist() == [-4.0, 4.0, -4.0]
    assert float(router(None, frame(task_names=("new",))).weights[0, 0, 1].detach()) > 0.96
    for options, says in [({"x": "e1"}, "init_task: unknown task 'x'"), ({"add": "e9"}, "init_task: unknown expert")]:
        with pytest.raises(ValueError, match=says):
            build(PolyRouter, PolyConfig(task_names=("add",), init_task=options), shape(3))


def test_new_tasks_and_other_experts_leave_the_rest_of_the_table_as_it_is():
    old = build(PolyRouter, PolyConfig(task_names=("s", "t"), num_splits=2, unknown="nearest"), named("abc"))
    old.table.data.normal_(), old.text_sums.normal_()
    new = build(
        PolyRouter, PolyConfig(task_names=("new", "t", "s"), num_splits=2, unknown="nearest"), named("dcxa"), seed=1
    )
    fresh = new.table.detach().clone()
    new.carry(old)
    assert torch.equal(new.table[[2, 1]][..., [3, 1]], old.table[..., [0, 2]])
    assert torch.equal(new.table[0], fresh[0])
    assert torch.equal(new.table[..., [0, 2]], fresh[..., [0, 2]])
    assert torch.equal(new.text_sums[[2, 1]], old.text_sums)


def test_dropped_skills_get_nothing():
    weights = poly(expert_dropout=0.5).train()(None, frame(task_names=("add",) * 300)).weights
    assert 0.2 < float((weights == 0).float().mean()) < 0.6
    torch.testing.assert_close(weights.sum(-1), torch.ones(300, 1))


def test_skills_tell_how_decided_the_tasks_are():
    router = poly()
    router.table.data[0] = 0.0
    router.table.data[1, 0] = torch.tensor([50.0, -50.0, -50.0])
    router.table.data[2, 0] = torch.tensor([50.0, 50.0, -50.0])
    skills = router.skills()
    assert skills["discreteness"].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)
    assert skills["sparsity"].tolist() == pytest.approx([0.0, 1 / 3, 2 / 3])
    assert skills["effective_skills"].tolist() == pytest.approx([3.0, 1.0, 2.0])
    one = torch.sigmoid(torch.tensor(0.3, dtype=torch.float64))
    router.table.data.fill_(0.3)
    entropy = -(one * one.log() + (1 - one) * (1 - one).log()) / math.log(2)
    assert skills["discreteness"].shape == (3,)
    assert router.skills()["discreteness"].tolist() == pytest.approx([float(entropy)] * 3, rel=1e-5)


def test_effective_skills_are_the_exp_of_the_entropy_of_the_mean_u():
    router = poly(num_splits=2)
    router.table.data[0, 0], router.table.data[0, 1] = (
        torch.tensor([50.0, -50.0, -50.0]),
        torch.tensor([-50.0, 50.0, -50.0]),
    )
    router.table.data[1], router.table.data[2] = router.table.data[0], router.table.data[0]
    assert router.skills()["effective_skills"].tolist() == pytest.approx([2.0] * 3)  # one in each block, two in all
    router.table.data[:, :] = torch.tensor([50.0, -50.0, -50.0])
    router.table.data[1, :] = torch.tensor([-50.0, 50.0, 50.0])
    router.table.data[2, :] = torch.tensor([-50.0, 50.0, -50.0])
    shares = torch.tensor([1, 2, 1], dtype=torch.float64) / 4
    said = router.own_statistics()
    assert said["effective_skills"] == pytest.approx(float((-(shares * shares.log()).sum()).exp()))
    assert list(said["tasks/effective_skills"].values()) == pytest.approx([1.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_splits": 2, "combine": "outputs"}, "set router.combine=parameters"),
        ({"task_names": ("a", "a")}, "names a task twice"),
        ({"task_names": ()}, "is empty"),
    ],
)
def test_settings_that_cannot_act_together_are_refused(options, says):
    with pytest.raises(ValidationError, match=says):
        PolyConfig(**options)


def test_the_shape_of_the_mixture_may_name_no_task_if_the_config_does():
    bare = MixtureShape(("a", "b"), ((), ()), sites=("s",), hidden_size=DIM)
    assert build(PolyRouter, PolyConfig(task_names=("x",)), bare).tasks == ("x",)
