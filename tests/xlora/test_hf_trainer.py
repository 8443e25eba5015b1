"""transformers' own Trainer: it finds the labels, checkpoints activations, saves, and goes on where it stopped."""

import pytest
import torch
from transformers import Trainer, TrainingArguments
from xlora_cases import build, ids

ROWS = [{"input_ids": row, "labels": row, "note": index} for index, row in enumerate(ids(8))]


def trainer(model, folder, **options) -> Trainer:
    settings = {"per_device_train_batch_size": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant"}
    settings |= {"activation_checkpointing": True, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return Trainer(model=model, args=TrainingArguments(str(folder), **settings, **options), train_dataset=ROWS)


@pytest.mark.parametrize("trains_experts", [False, True])
def test_training_goes_on_from_what_it_saved_as_if_it_had_never_stopped(trains_experts, folders, tmp_path):
    def fresh():
        return build(folders, use_trainable_adapters=trains_experts)

    whole, first, second = fresh(), fresh(), fresh()
    trainer(whole, tmp_path / "whole", max_steps=4, save_strategy="no").train()
    trainer(first, tmp_path / "parts", max_steps=2, save_steps=2).train()
    trainer(second, tmp_path / "parts", max_steps=4, save_steps=2).train(resume_from_checkpoint=True)
    start = dict(fresh().named_parameters())
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, dict(second.named_parameters())[name])
        assert torch.equal(parameter, start[name]) == (not parameter.requires_grad)
    assert all(tensor.is_contiguous() for tensor in whole.state_dict().values())
    assert whole.state_dict(keep_vars=True)["router.classifier.0.weight"] is whole.router.classifier[0].weight
