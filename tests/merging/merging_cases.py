"""Experts that differ in all that experts of one backbone may differ in, and what they add as whole matrices."""

import torch

from mole.adapters import Adapter, LoraWeights

torch.set_num_threads(1)
# path → (d_out, d_in): square, tall, wide; numbered blocks past ten
SHAPES = {
    "model.layers.0.self_attn.q_proj": (12, 12),
    "model.layers.2.mlp.up_proj": (17, 12),
    "model.layers.10.mlp.down_proj": (12, 17),
}
RANKS = {"sums": 2, "words": 4, "dates": 3}


def lora(shape, rank, *, seed, alpha=4.0, rslora=False, dtype=torch.float64, **more) -> LoraWeights:
    """Random factors for a matrix of that shape."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
    B = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    return LoraWeights(A=A.to(dtype), B=B.to(dtype), alpha=alpha, rslora=rslora, **more)


def experts(ranks=RANKS, dtype=torch.float64, absent=(("words", "model.layers.2.mlp.up_proj"),)) -> dict[str, Adapter]:
    """Ranks, alphas and scaling rules differ; `absent` are (expert, module) that are not there."""
    made = {}
    for place, (name, rank) in enumerate(ranks.items()):
        modules = {
            path: lora(shape, rank, seed=10 * place + n, alpha=2.0 + 3 * place, rslora=place == 1, dtype=dtype)
            for n, (path, shape) in enumerate(SHAPES.items())
            if (name, path) not in absent
        }
        made[name] = Adapter("lora", modules)
    return made


def alike(**options) -> dict[str, Adapter]:
    """Experts of equal ranks on the same modules."""
    return experts({"sums": 3, "words": 3, "dates": 3}, absent=(), **options)


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Path → ΔW, made whole; nothing of mole's arithmetic in it."""
    found = {}
    for path, weights in adapter.modules.items():
        divisor = weights.A.shape[0] ** 0.5 if weights.rslora else weights.A.shape[0]
        B, A = weights.B.double().flatten(1), weights.A.double().flatten(1)
        found[path] = weights.alpha / divisor * (B @ A)
    return found


def stacked(adapters: dict[str, Adapter], path: str) -> torch.Tensor:
    """ΔW of every expert at a module, [E, d_out, d_in], zeros where one adapts it not; in the order given."""
    return torch.stack([dense(a).get(path, torch.zeros(SHAPES[path], dtype=torch.float64)) for a in adapters.values()])


def rotated(adapters: dict[str, Adapter], seed=5) -> dict[str, Adapter]:
    """The same experts with other factors: (B M⁻¹, M A) for a random M."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, adapter in adapters.items():
        modules = {}
        for path, w in adapter.modules.items():
            M = torch.eye(w.rank, dtype=torch.float64) + 0.4 * torch.randn(
                w.rank, w.rank, generator=generator, dtype=torch.float64
            )
            B, A = w.B @ torch.linalg.inv(M), M @ w.A
            modules[path] = LoraWeights(A=A, B=B, alpha=w.alpha, rslora=w.rslora)
        made[name] = Adapter("lora", modules)
    return made
