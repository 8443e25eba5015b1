"""Which kernel is taken for which routing: by shapes alone, and the same result whichever it is."""

import pytest
import torch
from kernel_cases import problem

from mole.kernels import KERNELS, loop, pick

FEW, MANY = (4,) * 4, (4,) * 64


@pytest.mark.parametrize(
    ("name", "ranks", "shape", "chosen", "length"),
    [
        ("stacked", FEW, (2, 400), None, 400),  # all experts of all tokens
        ("stacked", MANY, (2, 400), None, 400),
        ("stacked", FEW, (2, 400), 2, 400),  # half of the experts
        ("grouped", MANY, (2, 400), 2, 400),
        ("grouped", MANY, (2, 1), 2, 400),
        ("stacked", MANY, (2, 2), 2, 2),  # too few tokens to sort
        ("segments", MANY, (2, 1), 1, 400),
        ("segments", FEW, (1, 1), 1, 400),
        ("folded", MANY, (1, 1), None, 400),
        ("folded", MANY, (1, 1), 2, 400),
    ],
)
def test_the_kernel_goes_by_the_shape_of_the_routing(name, ranks, shape, chosen, length):
    p = problem(ranks, shape, chosen, batch=1 if name == "segments" and ranks is FEW else 2, length=length)
    assert pick(p.x, p.stack, p.weights, p.ids) == name
    if length < 50:
        return
    p = p._replace(x=p.x[:, :5], base_out=p.base_out[:, :5], weights=p.weights[:, :5])
    p = p._replace(ids=None if p.ids is None else p.ids[:, :5])
    assert torch.allclose(p.run(KERNELS[name]), p.run(loop))


def test_weights_that_train_are_not_folded():
    p = problem(FEW, (1, 1), length=400)
    assert pick(p.x, p.stack, p.weights.requires_grad_(), None) == "stacked"


def test_one_token_that_decodes_is_not_taken_for_static_weights():
    p = problem(FEW, (1, 1), batch=1, length=1)
    assert pick(p.x, p.stack, p.weights, None) == "stacked"


def test_a_device_that_would_have_to_be_waited_for_gets_no_kernel_that_looks_at_numbers():
    for shape, chosen in (((2, 400), 2), ((1, 1), None), ((1, 1), 2)):
        p = problem(MANY, shape, chosen, length=400)
        ids = None if p.ids is None else p.ids.to("meta")
        assert pick(p.x.to("meta"), p.stack, p.weights.to("meta"), ids) in ("stacked", "grouped")


def test_a_compiled_mixture_keeps_one_kernel_for_all_lengths():
    torch._dynamo.reset()
    p = problem(MANY, (2, 400), 2, length=400)
    names = []

    def run(x, weights, ids):
        names.append(pick(x, p.stack, weights, ids))
        return x

    torch.compile(run, backend="eager", dynamic=True)(p.x, p.weights, p.ids)
    assert names[-1] == "stacked"
    assert pick(p.x, p.stack, p.weights, p.ids) == "grouped"
