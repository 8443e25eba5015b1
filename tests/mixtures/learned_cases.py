"""Mixtures of equal-rank experts under the learned routers, in variants that differ in shape or in what they keep."""

import torch
from mixture_cases import TASKS, expert, llama

from mole.mixtures import MultiExpertModel
from mole.routers import (
    AttentionConfig,
    GateConfig,
    PolyConfig,
    ProductKeyConfig,
    RkhsConfig,
    SmearConfig,
    StaticConfig,
    TopKConfig,
)

LEARNED = {
    "sigmoid": TopKConfig(score="sigmoid"),
    "cosine": TopKConfig(score="cosine", proj_dim=8, scope="block"),
    "per_example": TopKConfig(per="example", noise="learned"),
    "smear": SmearConfig(posterior=True, center_momentum=0.5),
    "smear_block": SmearConfig(scope="block", combine="outputs", top_k=2),
    "smear_causal": SmearConfig(pool="causal"),
    "gate": GateConfig(),
    "poly": PolyConfig(),
    "mhr": PolyConfig(num_splits=4, scope="group", num_groups=3),
    "rkhs": RkhsConfig(rkhs_dim=16, emb_dim=8, top_k=2),
    "product_key": ProductKeyConfig(num_heads=2, key_dim=8, top_k=2, query_norm="batch"),
    "attention": AttentionConfig(dropout=0.1),
    "attention_input": AttentionConfig(query="input", value=False),
    "static": StaticConfig(),
    "cat": StaticConfig(normalise="none", num_groups=None, site="module"),
}


def equal_experts(model, dtype=torch.float32, rank=4, targets=("q_proj", "v_proj", "down_proj")) -> dict:
    """Three experts of one rank and unlike scales; the second lacks down_proj."""
    some = [targets, targets[:2] or targets, targets]
    return {
        name: expert(model, on, rank=rank, alpha=alpha, seed=seed, dtype=dtype)
        for seed, (name, on, alpha) in enumerate(zip(TASKS, some, (4.0, 2.0, 6.0), strict=True), 1)
    }


def learned(name, dtype=torch.float32, **options) -> MultiExpertModel:
    """The mixture under `LEARNED[name]`, with a router that is not at its start."""
    model = llama(dtype)
    built = MultiExpertModel(model, equal_experts(model, dtype), LEARNED[name], tasks=TASKS, **options)
    generator = torch.Generator().manual_seed(7)
    for router in built.routers().values():
        if dtype == torch.float64:
            router.double()
        for parameter in router.parameters():
            parameter.data = parameter + 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return built.eval()


def left_padded() -> dict:
    """Two prompts, the first padded on the left."""
    ids = torch.randint(3, 101, (2, 7), generator=torch.Generator().manual_seed(11))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "task_names": ["spell", "date"]}


def full_inputs(batch) -> dict:
    """The batch, its prompts the first three tokens."""
    prompt = (torch.arange(9) < 3) & batch["attention_mask"].bool()
    return {**batch, "prompt_mask": prompt}
