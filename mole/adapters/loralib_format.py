"""loralib's state dicts, converted to safetensors: `<module>.lora_A`, `<module>.lora_B`, biases; no scale, no config.

A `MergedLinear` has one pair for several equal blocks of its outputs (query, key, value), of which some are adapted:
its A is [n r, d_in], its B [n d_block, r]. As one product that is a B with n blocks on its diagonal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from mole.adapters.adapter import Adapter
from mole.adapters.lora import LoraWeights
from mole.untrusted import Damaged, Refused, safetensors_tensors, shown

_FACTOR = re.compile(r"((?:[A-Za-z0-9_]+\.)*[A-Za-z0-9_]+)\.lora_(A|B)", re.ASCII)
_BIAS = re.compile(r"((?:[A-Za-z0-9_]+\.)*[A-Za-z0-9_]+)\.bias", re.ASCII)
_EMBEDDING = re.compile(r"(?:.*\.)?(?:wte|embed_tokens|word_embeddings|embed_in|tok_embeddings)", re.ASCII)


def is_loralib(names: Sequence[str]) -> bool:
    """Whether these are names of tensors in such a state dict."""
    return any(_FACTOR.fullmatch(name) for name in names)


def parse(
    weights: bytes, where: str, *, alpha: float, blocks: Sequence[bool] | None = None, transposed: bool = False
) -> Adapter:
    """The adapter in the bytes of a safetensors file; `where` names it in errors.

    `alpha` is `lora_alpha` of the training: the file does not hold it. `blocks` says of each block of a merged module's
    outputs whether it is adapted (`enable_lora`). `transposed`: the modules keep their matrix transposed (GPT-2).
    Raises Damaged, and Refused for tensors that belong nowhere, or merged factors where `blocks` is not given.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for name, tensor in safetensors_tensors(weights, where).items():
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[match[2]] = tensor
        elif match := _BIAS.fullmatch(name):
            biases[match[1]] = tensor
        else:
            raise Refused(
                f"{where}: tensor {shown(name)} is neither a LoRA factor nor a bias: save the adapter's tensors alone "
                "(loralib.lora_state_dict)"
            )
    if not factors:
        raise Damaged(f"{where}: no tensor of a LoRA factor in it")
    modules = {path: _weights(path, found, where, alpha, blocks) for path, found in factors.items()}
    kind = "none" if not biases else "lora_only" if set(biases) <= set(modules) else "all"
    return Adapter("lora", modules, biases=biases, bias_kind=kind, fan_in_fan_out=transposed)


def _weights(
    path: str, found: dict[str, Tensor], where: str, alpha: float, blocks: Sequence[bool] | None
) -> LoraWeights:
    if missing := sorted({"A", "B"} - set(found)):
        raise Damaged(f"{where}: {path} has no factor {missing[0]}")
    A, B = found["A"], found["B"]
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] % B.shape[1] != 0:
        raise Damaged(f"{where}: {path} has factors of shapes {tuple(A.shape)} and {tuple(B.shape)}")
    count = A.shape[0] // B.shape[1]
    if count > 1 or (blocks is not None and sum(blocks) == 1 < len(blocks)):
        A, B = unmerged(A, B, blocks, f"{where}: {path}")
    return LoraWeights(A=A, B=B, alpha=alpha * count, embedding=bool(_EMBEDDING.fullmatch(path)))


def unmerged(A: Tensor, B: Tensor, blocks: Sequence[bool] | None, where: str) -> tuple[Tensor, Tensor]:
    """The factors of a merged module, A [n r, d_in] and B [n d_block, r], as one product: B becomes [d_out, n r].

    Raises Refused where `blocks` is None or names another number of adapted blocks.
    """
    rank = B.shape[1]
    count = A.shape[0] // rank
    if blocks is None:
        raise Refused(
            f"{where}: one pair of factors for {count} blocks of outputs; say which blocks are adapted, in order, such "
            "as blocks=[true,false,true] for query, key and value"
        )
    if sum(blocks) != count or B.shape[0] % count:
        raise Refused(f"{where}: factors for {count} blocks of outputs, blocks names {sum(blocks)}")
    size = B.shape[0] // count
    whole = torch.zeros(size * len(blocks), count * rank, dtype=B.dtype)
    places = [place for place, is_adapted in enumerate(blocks) if is_adapted]
    for number, place in enumerate(places):
        whole[place * size : (place + 1) * size, number * rank : (number + 1) * rank] = B[
            number * size : (number + 1) * size
        ]
    return A, whole
