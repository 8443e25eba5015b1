"""The Accelerator comes from configuration alone."""

import pytest
import torch

from mole.training import TrainingConfig, make_accelerator, peak_memory

CPU = torch.device("cpu")


def test_accelerates_own_variables_do_not_act(monkeypatch):
    for name, value in {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    }.items():
        monkeypatch.setenv(name, value)
    accelerator = make_accelerator(TrainingConfig(), CPU)
    assert accelerator.mixed_precision == "no"
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.state.dynamo_plugin.backend.value == "NO"


def test_one_process_may_train_twice_in_different_precisions():
    for precision, theirs in (("fp32", "no"), ("bf16", "bf16"), ("fp32", "no")):
        assert make_accelerator(TrainingConfig(precision=precision), CPU).mixed_precision == theirs


def test_a_number_of_processes_that_did_not_join_is_an_error():
    with pytest.raises(ValueError, match=r"launcher\.num_processes=2, but 1 joined.*torchrun"):
        make_accelerator(TrainingConfig(), CPU, num_processes=2)


def test_peak_memory_of_a_cpu_run_is_this_processs_in_bytes():
    before = peak_memory(CPU)
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert 2**25 < before <= peak_memory(CPU) < 2**40
    assert block.sum() == 64 * 2**20
