"""IA3, bottleneck, prefix and prompt experts in use: pickles, threads, caches that go on, static caches, compiled."""

import pickle
import threading

import pytest
import torch
from mixture_cases import llama
from test_adapter_kinds_mixed import alone, made

from mole.mixtures import MultiExpertModel
from mole.routers import TaskConfig

KINDS = ["ia3", "houlsby", "parallel", "prefix", "prompt"]
TASKS = {"one": ("a",), "two": ("b",)}
NAMES = ["a", "b", "a"]


@pytest.fixture
def ids():
    return torch.randint(3, 101, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return MultiExpertModel(llama(), {"one": made(kind, 1), "two": made(kind, 2)}, TaskConfig(), tasks=TASKS).eval()


@torch.no_grad()
def test_a_pickled_mixture_gives_the_same_logits(model, ids):
    want = model(ids, task_names=NAMES).logits
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids, task_names=NAMES).logits, want)


@torch.no_grad()
def test_an_adapted_model_can_be_pickled(kind, ids):
    adapted = alone(made(kind, 1))
    assert torch.equal(pickle.loads(pickle.dumps(adapted))(ids).logits, adapted(ids).logits)


@torch.no_grad()
def test_forwards_in_two_threads_equal_those_one_after_another(model, ids):
    orders = [NAMES, ["b", "a", "b"]]
    found = [None, None]

    def forward(place):
        with torch.no_grad():
            found[place] = model(ids, task_names=orders[place]).logits

    threads = [threading.Thread(target=forward, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for logits, order in zip(found, orders, strict=True):
        assert torch.equal(logits, model(ids, task_names=order).logits)


@torch.no_grad()
def test_a_cache_goes_on_where_it_stopped(model, ids):
    want = model(ids, task_names=NAMES).logits
    first = model(ids[:, :4], use_cache=True, task_names=NAMES)
    rest = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True, task_names=NAMES).logits
    torch.testing.assert_close(rest, want[:, 4:], rtol=0, atol=2e-5)


@torch.no_grad()
def test_static_caches_serve_all_but_prompts_which_say_so(model, ids, kind):
    options = {"attention_mask": torch.ones_like(ids), "task_names": NAMES, "max_new_tokens": 4, "min_new_tokens": 4}
    want = model.generate(ids, **options)
    if kind == "prompt":
        with pytest.raises(ValueError, match="static caches"):
            model.generate(ids, cache_implementation="static", **options)
    else:
        assert torch.equal(model.generate(ids, cache_implementation="static", **options), want)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("second", ["prefix", "prompt longer"])
def test_a_compiled_mixture_is_one_graph_for_all_lengths(second, ids):
    adapters = {"one": made(second.split()[0], 1), "two": made(second, 2)}
    model = MultiExpertModel(llama(), adapters, TaskConfig(), tasks=TASKS).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for length in (7, 5):
        want = model(ids[:, :length], use_cache=False, task_names=NAMES).logits
        got = compiled(input_ids=ids[:, :length], use_cache=False, task_names=NAMES).logits
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
