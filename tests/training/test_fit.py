"""The loop: what it learns, what it looks at on the way, what it keeps and what it refuses."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_toy import ToyModel, fit_toy, lines, mean_loss, recipe, toy_data, weight_bytes
from transformers import LlamaConfig, LlamaForCausalLM

from mole.run_folder import RunFolder
from mole.training import TrainingConfig, TrainingData, TrainingFailed
from mole.training.optimizers import AdamWConfig


def test_training_learns_and_leaves_what_is_frozen(tmp_path):
    model, data = ToyModel(), toy_data()
    frozen, before = model.embedding.clone(), mean_loss(model, data.train)
    result = fit_toy(model, tmp_path, recipe(max_steps=40, learning_rate=0.05, optimizer=AdamWConfig()), data)
    assert mean_loss(model, data.train) < before / 2
    assert torch.equal(model.embedding, frozen)
    assert (result.steps, result.best_step, result.stopped_early) == (40, None, False)
    assert result.tokens > result.supervised_tokens > 0
    assert result.seconds > 0
    assert result.tokens_per_second > 0
    assert result.peak_memory > 0
    assert not model.training


def test_the_run_is_running_once_steps_begin(tmp_path):
    seen = []
    fit_toy(ToyModel(), tmp_path, evaluate=lambda step: seen.append(RunFolder(tmp_path).started) or {"score": 0.0})
    assert seen == [False, True]


def test_evaluation_comes_before_step_1_every_n_steps_and_once_at_the_end(tmp_path):
    seen = []
    config = recipe(max_steps=7, evaluate_every=3)
    result = fit_toy(ToyModel(), tmp_path, config, evaluate=lambda step: seen.append(step) or {"score": step / 10})
    assert seen == [0, 3, 6, 7]
    assert [(row["step"], row["score"]) for row in lines(tmp_path, "evaluation")] == [(s, s / 10) for s in seen]
    assert result.metrics == {"score": 0.7}


def test_evaluation_at_the_last_step_is_not_done_twice(tmp_path):
    seen = []
    fit_toy(ToyModel(), tmp_path, recipe(evaluate_every=2), evaluate=lambda step: seen.append(step) or {"score": 0.0})
    assert seen == [0, 2, 4]


def scripted(scores: dict[int, float], model: ToyModel, kept: dict[int, bytes]):
    """An evaluation that says what it is told and notes the weights it saw."""

    def evaluate(step: int) -> dict[str, float]:
        assert not model.training
        kept[step] = weight_bytes(model)
        return {"score": scores[step], "other": float(step)}

    return evaluate


@pytest.mark.parametrize(("direction", "best"), [("min", 2), ("max", 3)])
def test_the_best_weights_are_what_is_left(direction, best, tmp_path):
    model, kept = ToyModel(), {}
    config = recipe(max_steps=4, evaluate_every=1, best_metric="score", best_direction=direction)
    scores = {0: -9.0, 1: 3.0, 2: 1.0, 3: 4.0, 4: 2.0}
    result = fit_toy(model, tmp_path, config, evaluate=scripted(scores, model, kept))
    assert (result.best_step, result.best_score) == (best, scores[best])
    assert result.metrics == {"score": scores[best], "other": float(best)}
    assert weight_bytes(model) == kept[best]
    assert len(set(kept.values())) == 5
    assert (tmp_path / f"checkpoints/step-{best}/complete").is_file()


def test_a_score_that_is_not_a_number_is_never_the_best(tmp_path):
    model = ToyModel()
    scores = {0: 1.0, 1: float("nan"), 2: 5.0, 3: float("nan"), 4: 6.0}
    config = recipe(evaluate_every=1, best_metric="score", best_direction="min")
    assert fit_toy(model, tmp_path, config, evaluate=scripted(scores, model, {})).best_step == 2
    assert lines(tmp_path, "evaluation")[1]["score"] is None


def test_training_stops_early_when_patience_runs_out(tmp_path):
    model, kept = ToyModel(), {}
    config = recipe(
        max_steps=9,
        evaluate_every=1,
        best_metric="score",
        best_direction="min",
        early_stopping_patience=2,
        early_stopping_gain=0.5,
    )
    scores = {0: 0.0, 1: 9.0, 2: 8.0, 3: 7.9, 4: 7.8, **dict.fromkeys(range(5, 10), 0.0)}
    result = fit_toy(model, tmp_path, config, evaluate=scripted(scores, model, kept))
    assert (result.steps, result.stopped_early, result.best_step) == (4, True, 4)
    assert max(kept) == 4


def test_a_metric_that_the_evaluation_lacks_is_refused_before_the_first_step(tmp_path):
    config = recipe(best_metric="validation_los")
    with pytest.raises(ValueError, match="did you mean validation_loss"):
        fit_toy(ToyModel(), tmp_path, config, evaluate=lambda step: {"validation_loss": 1.0})
    assert not RunFolder(tmp_path).started


def test_evaluating_more_often_does_not_change_what_is_learnt(tmp_path):
    def draw(step: int) -> dict[str, float]:
        return {"score": random.random() + float(np.random.rand()) + float(torch.rand(()))}  # noqa: NPY002

    seldom, often = ToyModel(dropout=0.5), ToyModel(dropout=0.5)
    fit_toy(seldom, tmp_path / "seldom")
    fit_toy(often, tmp_path / "often", recipe(evaluate_every=1), evaluate=draw)
    assert weight_bytes(seldom) == weight_bytes(often)
    assert weight_bytes(seldom) != weight_bytes(ToyModel())


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    models = [ToyModel(dropout=0.5) for _ in range(3)]
    for name, model, seed in zip("abc", models, (1, 1, 2), strict=True):
        random.random(), torch.rand(3)
        fit_toy(model, tmp_path / name, seed=seed)
    first, again, other = (weight_bytes(model) for model in models)
    assert first == again != other
    assert lines(tmp_path / "a") == lines(tmp_path / "b") != lines(tmp_path / "c")


def test_the_callers_generators_are_left_as_they_were(tmp_path):
    torch.manual_seed(5), random.seed(5)
    expected = torch.rand(3), random.random()
    torch.manual_seed(5), random.seed(5)
    fit_toy(ToyModel(dropout=0.5), tmp_path)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


def test_entries_that_are_no_tensors_pass_through_and_unnamed_ones_stay_out(tmp_path):
    model = ToyModel()
    fit_toy(model, tmp_path, recipe(max_steps=1))
    assert model.saw_task_names == ["toy"] * 12


def test_every_logged_step_has_its_facts(tmp_path):
    fit_toy(ToyModel(), tmp_path, recipe(max_steps=5, log_every=2))
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 4, 5]
    assert set(rows[0]) == {
        *("step", "phase", "loss", "learning_rate", "gradient_norm", "epoch", "tokens", "supervised_tokens")
    }
    assert rows[-1]["epoch"] == 2.5
    assert rows[0]["learning_rate"] == 0.5


def test_epochs_say_how_many_steps_there_are(tmp_path):
    assert fit_toy(ToyModel(), tmp_path, recipe(epochs=1.5, max_steps=None, batch_size=8)).steps == 5


def test_every_sample_is_seen_once_an_epoch(tmp_path):
    data, seen = toy_data(10), []
    counted = TrainingData(data.train, lambda rows: seen.extend(map(id, rows)) or data.collate(rows), data.order)
    fit_toy(ToyModel(), tmp_path, recipe(max_steps=5, batch_size=4, micro_batch_size=2), counted)
    everything = sorted(map(id, data.train))
    assert sorted(seen[:10]) == everything
    assert sorted(seen[10:]) == everything
    assert seen[:10] != seen[10:]


def test_clipping_shortens_the_step(tmp_path):
    model, start = ToyModel(), ToyModel()
    fit_toy(model, tmp_path, recipe(max_steps=1, clip_norm=0.01, learning_rate=1.0))
    moved = sum(
        float((a - b).detach().pow(2).sum()) for a, b in zip(model.parameters(), start.parameters(), strict=True)
    )
    assert moved**0.5 == pytest.approx(0.01, rel=1e-3)
    assert lines(tmp_path)[0]["gradient_norm"] > 0.1


def test_bf16_trains_float32_weights_and_leaves_the_models_forward_alone(tmp_path):
    seen = set()

    class Watched(ToyModel):
        def forward(self, input_ids, attention_mask=None):
            seen.add((self.embedding @ self.mix).dtype)
            return super().forward(input_ids)

    model = Watched()
    fit_toy(model, tmp_path, recipe(precision="bf16"))
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert "forward" not in vars(model)
    assert lines(tmp_path)[-1]["loss"] < lines(tmp_path)[0]["loss"]


def test_fp16_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"training\.precision=fp16 needs a GPU"):
        fit_toy(ToyModel(), tmp_path, recipe(precision="fp16"))


def test_trainable_weights_in_half_precision_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mix is trainable in bfloat16.*float32"):
        fit_toy(ToyModel().bfloat16(), tmp_path)


def test_a_model_with_nothing_trainable_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing is trainable"):
        fit_toy(ToyModel().requires_grad_(False), tmp_path)


def test_an_empty_training_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no sample"):
        fit_toy(ToyModel(), tmp_path, data=toy_data(0))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = ToyModel()
    with torch.no_grad():
        model.embedding[:] = float("nan")
    before = weight_bytes(model)
    with pytest.raises(TrainingFailed, match=r"the loss is nan: lower training\.learning_rate"):
        fit_toy(model, tmp_path)
    assert weight_bytes(model) == before


class Steep(ToyModel):
    """Its loss is finite, its gradient is not: the root has no slope at 0."""

    def forward(self, input_ids, attention_mask=None):
        output = super().forward(input_ids)
        output.logits = output.logits + torch.sqrt(self.bias * 0)
        return output


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    model = Steep()
    before = weight_bytes(model)
    with pytest.raises(TrainingFailed, match="the gradient's norm is nan"):
        fit_toy(model, tmp_path, recipe(clip_norm=1.0))
    assert weight_bytes(model) == before


class Detached(ToyModel):
    """Its loss depends on the bias alone, or on nothing."""

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=super().forward(input_ids).logits.detach() + 0 * self.bias.sum())


def test_a_loss_that_depends_on_nothing_trainable_stops_the_run(tmp_path):
    with pytest.raises(TrainingFailed, match="no trainable parameter gets a gradient"):
        fit_toy(Detached(), tmp_path)


@pytest.mark.parametrize(
    ("micro", "near"), [(5, "10 or 15"), (24, "24"), (7, "7 or 14")], ids=["between", "above", "below"]
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(micro, near):
    with pytest.raises(ValueError, match=f"batch_size={near}"):
        recipe(micro_batch_size=micro)


def test_rules_across_fields_are_told_together():
    with pytest.raises(ValueError, match="both null") as error:
        TrainingConfig(epochs=None, best_metric=None, early_stopping_patience=1, evaluate_every=None)
    assert len(error.value.errors()) == 1  # type: ignore[attr-defined]
    for part in ("needs training.best_metric", "needs training.evaluate_every"):
        assert part in str(error.value)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for layer in model.model.layers:  # as adapters are: inside, after frozen embeddings
        layer.self_attn.q_proj.weight.requires_grad_(True)
    return model


def test_gradient_checkpointing_changes_no_gradient_and_is_off_afterwards(tmp_path):
    plain, recomputed = llama(), llama()
    calls = {"plain": 0, "recomputed": 0}

    def count(name: str):
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    plain.model.layers[1].mlp.register_forward_pre_hook(count("plain"))
    recomputed.model.layers[1].mlp.register_forward_pre_hook(count("recomputed"))
    fit_toy(plain, tmp_path / "plain", recipe(max_steps=2))
    fit_toy(recomputed, tmp_path / "recomputed", recipe(max_steps=2, gradient_checkpointing=True))
    assert calls == {"plain": 2, "recomputed": 4}
    before = dict(llama().named_parameters())
    for (name, mine), theirs in zip(recomputed.named_parameters(), plain.parameters(), strict=True):
        assert float((mine - theirs).detach().abs().max()) < 1e-6
        assert torch.equal(mine, before[name]) == (not mine.requires_grad)
    assert not any(getattr(layer, "gradient_checkpointing", False) for layer in recomputed.modules())


def test_gradient_checkpointing_of_a_model_that_cannot_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ToyModel has no gradient checkpointing"):
        fit_toy(ToyModel(), tmp_path, recipe(gradient_checkpointing=True))
