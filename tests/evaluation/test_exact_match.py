"""Exact match: generation against a naive greedy loop without cache and without padding."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mole.data import IGNORED, Sample
from mole.evaluation import completions, exact_match

END, PAD = 1, 0


class Letters:
    """Token 2 is a space, token i > 2 is a letter; no package's tokenizer is needed."""

    eos_token_id, pad_token_id = END, PAD

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(" " if token == 2 else chr(ord("a") + token - 3) for token in ids if token > PAD + 1)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=END, pad_token_id=PAD,
        initializer_range=1.0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def sample(prompt, completion="", task="a", answer=4):
    ids = (*prompt, *([3] * answer))
    return Sample(ids, (*[IGNORED] * len(prompt), *[3] * answer), task, "", completion, tuple(prompt))


PROMPTS = [[5], [3, 9, 4, 12], [7, 7], [15, 3, 14, 2, 8, 6], [10, 11, 12], [4, 4, 4], [6, 13], [9]]


def greedy(model, prompt, steps):
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == END:
            break
        ids.append(token)
    return Letters().decode(ids[len(prompt) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_completions_are_those_of_a_naive_greedy_loop(llama, batch_size):
    expected = [greedy(llama, prompt, 6) for prompt in PROMPTS]
    assert len(set(expected)) > 3
    found = completions(llama, [sample(p) for p in PROMPTS], Letters(), batch_size=batch_size, max_new_tokens=6)
    assert found == expected


def test_the_share_of_right_answers_ignores_space_around_them(llama):
    texts = [greedy(llama, prompt, 4) for prompt in PROMPTS]
    samples = [sample(p, f"  {text}\n" if i % 2 else f"{text}x") for i, (p, text) in enumerate(zip(PROMPTS, texts))]  # noqa: B905
    assert exact_match(llama, samples, Letters(), batch_size=4, max_new_tokens=4) == 0.5


class Script(torch.nn.Module):
    """Writes what it is told, and keeps what it was given."""

    generation_config = None

    def __init__(self, *rows):
        super().__init__()
        self.rows, self.calls = rows, []

    def generate(self, input_ids, generation_config, **others):
        self.calls.append((input_ids, generation_config, others, self.training))
        return torch.cat([input_ids, torch.tensor(self.rows[: len(input_ids)])], dim=1)


def test_text_after_the_end_of_sequence_does_not_count():
    model = Script([3, END, 4], [3, 4, 5])
    assert completions(model, [sample([7]), sample([7])], Letters(), batch_size=2) == ["a", "abc"]


def test_every_end_token_of_the_model_ends_a_text():
    model = Script([3, 9, 4])
    model.generation_config = type("Config", (), {"eos_token_id": [9, END]})
    assert completions(model, [sample([7])], Letters(), batch_size=1) == ["a"]
    assert model.calls[0][1].eos_token_id == [END, 9]


def test_prompts_are_padded_on_the_left_and_masked():
    model = Script([3], [3])
    completions(model, [sample([7]), sample([8, 9, 10])], Letters(), batch_size=2)
    ids, config, others, training = model.calls[0]
    assert ids.tolist() == [[8, 9, 10], [PAD, PAD, 7]]
    assert others["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert not training
    assert model.training
    assert (config.do_sample, config.num_beams, config.repetition_penalty) == (False, 1, 1.0)


def test_as_many_tokens_are_written_as_the_longest_completion_has():
    model = Script([3], [3])
    completions(model, [sample([7], answer=2), sample([7], answer=5)], Letters(), batch_size=2)
    assert model.calls[0][1].max_new_tokens == 5


def test_further_inputs_are_made_for_the_samples_of_each_batch():
    model = Script([3], [3])
    samples = [sample([7], task="a"), sample([8, 9], task="b"), sample([7, 8, 9], task="c")]
    completions(model, samples, Letters(), batch_size=2, inputs=lambda batch: {"task_names": [s.task for s in batch]})
    assert [others["task_names"] for _, _, others, _ in model.calls] == [["c", "b"], ["a"]]


def test_a_repetition_penalty_of_the_model_does_not_change_the_answer(llama):
    samples = [sample(p) for p in PROMPTS]
    expected = completions(llama, samples, Letters(), batch_size=8, max_new_tokens=6)
    llama.generation_config.repetition_penalty = 100.0
    try:
        assert completions(llama, samples, Letters(), batch_size=8, max_new_tokens=6) == expected
    finally:
        llama.generation_config.repetition_penalty = 1.0


def test_what_cannot_be_generated_from_is_refused(llama):
    with pytest.raises(ValueError, match="no samples"):
        exact_match(llama, [], Letters(), batch_size=1)
    with pytest.raises(ValueError, match="sample 1 .* has no prompt"):
        completions(llama, [sample([3]), sample([])], Letters(), batch_size=1)
    with pytest.raises(ValueError, match="batch_size"):
        completions(llama, [sample([3])], Letters(), batch_size=0)
