"""The Accelerator from configuration alone, and what the device tells about memory."""

import resource
import sys
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
)

from mole.training.settings import TrainingConfig

PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
PLAIN = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
)


def make_accelerator(config: TrainingConfig, device: torch.device, *, num_processes: int | None = None) -> Accelerator:
    """The Accelerator of this process, on `device`; nothing of accelerate's own files or variables acts in it.

    `num_processes`: how many were started, where the caller knows. Raises ValueError if another number joined, if
    the device cannot do the precision, or if the environment asks accelerate for a way to train that mole has not.
    """
    device = torch.device(device)
    if config.precision == "fp16" and device.type == "cpu":
        raise ValueError("training.precision=fp16 needs a GPU: on a CPU use training.precision=bf16 or fp32")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    AcceleratorState._reset_state(reset_partial_state=True)  # a process may train twice, not in the same precision
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=PRECISION[config.precision],
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend=DynamoBackend.NO),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=1))],
    )
    if accelerator.distributed_type not in PLAIN:
        raise ValueError(
            f"the environment asks accelerate for {accelerator.distributed_type.value}, which mole does not train "
            f"with: unset ACCELERATE_USE_DEEPSPEED, ACCELERATE_USE_FSDP and the like"
        )
    if num_processes is not None and accelerator.num_processes != num_processes:
        raise ValueError(
            f"launcher.num_processes={num_processes}, but {accelerator.num_processes} joined: start several with "
            f"launcher.num_processes, or with torchrun --nproc-per-node {num_processes}"
        )
    return accelerator


def peak_memory(device: torch.device) -> int:
    """Most bytes that were in use: of the GPU's memory on one, of this process elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(used) if sys.platform == "darwin" else int(used) * 1024  # kilobytes everywhere but on a Mac
