"""Out of memory: the error says what takes less; the search finds the largest micro-batch and leaves no trace."""

import json
from dataclasses import replace

import pytest
import torch
from training_toy import ToyModel, fit_toy, lines, recipe, toy_data, weight_bytes

from mole.run_folder import RunFolder
from mole.training import OutOfMemory, TrainingFailed
from mole.training.memory import ran_out, smaller_sizes


class Small(ToyModel):
    """A model on a device that holds `room` token positions, and tells which batches it was given."""

    def __init__(self, room: int, **options):
        super().__init__(**options)
        self.room, self.seen = room, []

    def forward(self, input_ids, attention_mask=None, task_names=None):
        self.seen.append(tuple(input_ids.shape))
        if input_ids.numel() > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(input_ids, attention_mask, task_names)


def sized():
    """The toy's data, which knows how long its samples are."""
    return replace(toy_data(), size=lambda row: len(row[0]))


def test_errors_of_the_allocators_are_known_and_others_are_not():
    assert ran_out(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert ran_out(MemoryError())
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**62, dtype=torch.uint8)
    assert ran_out(found.value)
    assert not ran_out(RuntimeError("the sizes do not match"))
    assert not ran_out(ValueError("can't allocate memory"))


def test_sizes_are_divisors_and_at_least_halve():
    assert list(smaller_sizes(16, 16)) == [8, 4, 2, 1]
    assert list(smaller_sizes(12, 12)) == [6, 3, 1]
    assert list(smaller_sizes(7, 7)) == [1]
    assert list(smaller_sizes(1, 1)) == []


def test_a_step_that_does_not_fit_says_what_does(tmp_path):
    with pytest.raises(OutOfMemory, match="step 1, in a micro-batch of 8 × 11 tokens") as found:
        fit_toy(Small(room=60), tmp_path, recipe(max_steps=3, batch_size=8), sized())
    said = str(found.value)
    assert "training.micro_batch_size=4 or auto" in said
    assert "training.gradient_checkpointing=true" in said
    assert "dataset.max_length=5" in said
    assert isinstance(found.value, TrainingFailed)


def test_what_helps_follows_from_what_is_set(tmp_path):
    with pytest.raises(OutOfMemory) as found:
        fit_toy(Small(room=2), tmp_path, recipe(max_steps=3, batch_size=8, micro_batch_size=1), sized())
    assert "micro_batch_size" not in str(found.value)


def test_an_evaluation_that_does_not_fit_is_called_so(tmp_path):
    model, data = Small(room=60), sized()
    with pytest.raises(OutOfMemory, match="the evaluation after step 0.*training.batch_size=4"):
        fit_toy(
            model,
            tmp_path,
            recipe(max_steps=3, batch_size=8, micro_batch_size=2),
            data,
            evaluate=lambda step: {"loss": float(model(data.collate(data.train)["input_ids"]).logits.mean())},
        )


def test_another_error_is_left_as_it_is(tmp_path):
    class Broken(ToyModel):
        def forward(self, *args, **kwargs):
            raise RuntimeError("the sizes do not match")

    with pytest.raises(RuntimeError, match=r"^the sizes do not match$"):
        fit_toy(Broken(), tmp_path, recipe(max_steps=1), sized())


@pytest.mark.parametrize(("room", "wanted"), [(1000, 8), (60, 4), (30, 2), (13, 1)])
def test_auto_takes_the_largest_that_fits_the_longest_samples(room, wanted, tmp_path):
    model = Small(room)
    fit_toy(model, tmp_path, recipe(max_steps=3, batch_size=8, micro_batch_size="auto"), sized())
    assert RunFolder(tmp_path).facts()["micro_batch_size"] == wanted
    assert model.seen[0] == (8, 12)  # the longest first
    assert {rows for rows, _ in model.seen[-8 // wanted :]} == {wanted}


def test_the_search_changes_nothing_that_is_learnt(tmp_path):
    plain = fit_for_bytes(tmp_path / "plain", 4)
    found = fit_for_bytes(tmp_path / "auto", "auto")
    assert found == plain
    losses = [[line["loss"] for line in lines(tmp_path / name, "train")] for name in ("plain", "auto")]
    assert losses[0] == losses[1]


def fit_for_bytes(folder, micro) -> bytes:
    model = Small(60, dropout=0.3)
    fit_toy(model, folder, recipe(max_steps=4, batch_size=8, micro_batch_size=micro), sized())
    return weight_bytes(model)


def test_one_sample_that_does_not_fit_ends_the_search(tmp_path):
    with pytest.raises(OutOfMemory, match="the search for a micro-batch of 1 × 12 tokens"):
        fit_toy(Small(room=5), tmp_path, recipe(max_steps=1, batch_size=8, micro_batch_size="auto"), sized())


def test_a_run_that_goes_on_keeps_its_micro_batch(tmp_path):
    def settings(steps):
        return recipe(max_steps=steps, batch_size=8, micro_batch_size="auto")

    fit_toy(Small(60), tmp_path, settings(2), sized())
    later = Small(1000)
    fit_toy(later, tmp_path, settings(4), toy_data(), resume=True)
    assert json.loads((tmp_path / "run.json").read_text())["micro_batch_size"] == 4
    assert {rows for rows, _ in later.seen} == {4}
