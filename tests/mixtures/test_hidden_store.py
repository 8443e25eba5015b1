"""Hidden states of the routing pass, kept over epochs: the same values, one computation for each example."""

import errno

import pytest
import torch
from mixture_cases import mixture

from mole.mixtures.two_pass.hidden_store import HiddenStore, store_bytes


@pytest.fixture
def store(tmp_path):
    kept = HiddenStore(tmp_path)
    yield kept
    kept.close()


def batch(lengths: list[int], side: str = "right") -> dict:
    """Rows of these lengths, padded; row i always holds the same tokens."""
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens = torch.randint(3, 101, (12,), generator=torch.Generator().manual_seed(length))[:length]
        place = slice(0, length) if side == "right" else slice(width - length, None)
        ids[row, place], mask[row, place] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask}


def gradients(model, inputs) -> dict:
    model.zero_grad()
    model.train()
    torch.manual_seed(0)
    logits = model(**inputs, use_cache=False).logits
    logits[inputs["attention_mask"].bool()].square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.router.named_parameters()}


@pytest.mark.parametrize("name", ["xlora", "xlora_layerwise", "xlora_top_k"])
def test_gradients_are_those_without_a_store_in_every_epoch(name, store):
    model = mixture(name, torch.float64)
    model.router.configure(type(model.router.config)(**{**vars(model.router.config), "dropout": 0.0}))
    batches = [batch([4, 7]), batch([9, 4, 5]), batch([7, 9])]
    want = [gradients(model, one) for one in batches]
    model.hidden_store = store
    for _ in range(2):
        for one, expected in zip(batches, want, strict=True):
            for parameter, gradient in gradients(model, one).items():
                torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-7)
    assert (store.misses, store.hits) == (4, 10)


def test_the_backbone_s_first_pass_runs_for_new_examples_only(store):
    model = mixture("xlora")
    model.hidden_store = store
    rows = []
    model.backbone.model.layers[0].register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    for lengths in ([4, 7], [4, 7], [7, 9]):
        gradients(model, batch(lengths))
    assert rows == [2, 2, 2, 1, 2]


def test_bfloat16_takes_half_the_space_and_keeps_its_precision(tmp_path):
    assert store_bytes([10, 20], 64, "bfloat16") * 2 == store_bytes([10, 20], 64, "float32") == 30 * 64 * 4
    stores = {dtype: HiddenStore(tmp_path, dtype) for dtype in ("float32", "bfloat16")}
    inputs = batch([5, 8])
    states = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))
    for dtype, store in stores.items():
        first = store.hidden_states(inputs, lambda chosen: states)
        again = store.hidden_states(inputs, lambda chosen: pytest.fail("computed again"))
        assert torch.equal(first, again)
        want = torch.where(inputs["attention_mask"].bool()[..., None], states, 0.0)
        assert torch.equal(again, want.to(stores[dtype].dtype).float())
        assert store._end == store_bytes([5, 8], 6, dtype)
        store.close()


def test_padding_on_the_other_side_and_other_lengths_find_the_same_states(store):
    states = torch.arange(2 * 8 * 3, dtype=torch.float32).view(2, 8, 3)
    store.hidden_states(batch([5, 8]), lambda chosen: states)
    left = store.hidden_states(batch([5, 8], side="left"), lambda chosen: pytest.fail("computed again"))
    assert torch.equal(left[0, 3:], states[0, :5])
    alone = store.hidden_states(batch([5]), lambda chosen: pytest.fail("computed again"))
    assert torch.equal(alone[0], states[0, :5])


def test_other_positions_are_another_example(store):
    inputs = batch([4]) | {"position_ids": torch.arange(4)[None]}
    moved = batch([4]) | {"position_ids": torch.arange(3, 7)[None]}
    for one in (inputs, moved, inputs):
        store.hidden_states(one, lambda chosen: torch.zeros(1, 4, 2))
    assert (store.misses, store.hits) == (2, 1)


def test_a_full_disk_costs_time_and_nothing_else(store, caplog):
    class Full:
        def __init__(self, file):
            self.file, self.room = file, 40

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if self.room < len(data):
                raise OSError(errno.ENOSPC, "No space left on device")
            self.room -= len(data)
            return self.file.write(data)

    store._file = Full(store._file)
    states = torch.randn(3, 3, 2, generator=torch.Generator().manual_seed(0))
    inputs = batch([1, 2, 3])
    for _ in range(2):
        found = store.hidden_states(inputs, lambda chosen: states[-len(chosen["input_ids"]) :])
        assert torch.equal(found[2], states[2])
        assert torch.equal(found[1, :2], states[1, :2])
    assert store.misses == 4  # the third was computed twice
    assert "no longer kept" in caplog.text


def test_experts_in_the_routing_pass_forbid_it(store):
    model = mixture("xlora_scaling_pass")
    model.hidden_store = store
    with pytest.raises(ValueError, match="only if no expert works in the routing pass"):
        gradients(model, batch([4]))
