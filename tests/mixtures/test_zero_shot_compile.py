"""torch.compile and gradient checkpointing under routers that are not trained."""

import threading

import pytest
import torch
from test_zero_shot_mixtures import CASES, batch, mixture

# torch's own: its tracer makes an object of every autograd function that it meets.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
# The predictor reads texts, and looks whether it knows them: that is no graph.
GRAPHS = [name for name in CASES if not name.startswith("predictor")]
QUICK = ("arrow_general",)


def inputs(length):
    given = batch(length=length)
    return {name: value for name, value in given.items() if name != "texts"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in GRAPHS])
def test_a_mixture_compiles_as_one_graph(name):
    model = mixture(CASES[name])
    with torch.no_grad():
        want = model(**inputs(9), use_cache=False).logits
        torch._dynamo.reset()
        made = []

        def backend(graph, example_inputs):
            made.append(graph)
            return graph.forward

        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        torch.testing.assert_close(compiled(**inputs(9), use_cache=False).logits, want, rtol=0, atol=1e-4)
    assert len(made) == 1


@pytest.mark.parametrize("name", CASES)
def test_gradient_checkpointing_changes_no_gradient(name):
    found = []
    for checkpointing in (False, True):
        model = mixture(CASES[name])
        model.backbone.lm_head.weight.requires_grad_(True)
        model.backbone.model.layers[0].input_layernorm.weight.requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        outputs = [model(**batch(rows, 6), use_cache=False).logits.square().mean() for rows in (2, 3)]
        sum(outputs).backward()
        found.append(model.backbone.model.layers[0].input_layernorm.weight.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert found[0].abs().sum() > 0


@pytest.mark.parametrize("name", ["arrow_groups", "predictor", "hash_example"])
def test_two_threads_compute_what_one_does(name):
    model = mixture(CASES[name])
    given = [batch(rows, length) for rows, length in ((2, 6), (3, 9))]
    with torch.no_grad():
        want = [model(**one).logits for one in given]
    found: list = [None, None]

    def work(place):
        with torch.no_grad():
            for _ in range(3):
                found[place] = model(**given[place]).logits

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
