"""Hidden states of the routing pass, kept over epochs: the same values, one computation for each example."""

import errno

import pytest
import torch
from mixture_cases import mixture
from transformers import GPT2Config, GPT2LMHeadModel

from mole.adapters import Adapter, LoraWeights
from mole.mixtures import MultiExpertModel
from mole.mixtures.two_pass.hidden_store import HiddenStore, store_bytes
from mole.routers import XLoraConfig


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


def test_a_backbone_with_absolute_positions_is_read_again_where_padding_moved_its_tokens(store):
    """GPT-2 without position_ids counts from the first slot; a Llama sees only how far tokens are apart."""
    sizes = {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    backbone = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3)).eval()
    a, b = torch.randn(2, 32, generator=torch.Generator().manual_seed(1)), torch.ones(96, 2)
    experts = {"one": Adapter(method="lora", modules={"transformer.h.0.attn.c_attn": LoraWeights(a, b, alpha=2.0)})}
    model = MultiExpertModel(backbone, experts, XLoraConfig())
    ids = torch.arange(3, 8)[None]
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {name: torch.nn.functional.pad(tensor, (3, 0)) for name, tensor in plain.items()}

    hidden = []
    model.router.register_forward_pre_hook(lambda module, args: hidden.append(args[1].inputs.hidden_states))

    def states(inputs):
        model.train()
        model(**inputs, use_cache=False)
        return hidden[-1]

    want = [states(plain), states(padded)]
    model.hidden_store = store
    for _ in range(2):
        for inputs, expected in zip((plain, padded), want, strict=True):
            torch.testing.assert_close(states(inputs)[:, -5:], expected[:, -5:])
    assert (store.misses, store.hits) == (2, 2)
    assert not torch.allclose(want[0], want[1][:, 3:], atol=1e-2)
    positions = {**plain, "position_ids": torch.arange(5)[None]}
    moved = {**padded, "position_ids": torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]])}
    states(positions), states(moved)
    assert (store.misses, store.hits) == (2, 4)  # the places that the plain row has anyway


def test_a_rotary_backbone_is_not_read_again_where_padding_moved_its_tokens(store):
    model = mixture("xlora").train()
    model.hidden_store = store
    model(**batch([5, 9]), use_cache=False)
    model(**batch([5, 9], side="left"), use_cache=False)
    assert (store.misses, store.hits) == (2, 2)
