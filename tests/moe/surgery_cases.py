"""Small models for the tests of surgery, statistics and pictures."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

MLPS = r"model\.layers\.\d+\.mlp"


def llama(seed=0):
    """A Llama of two layers in eval mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def batch(rows=3, length=11, padded=0):
    """Token ids and mask [rows, length]; the last row has `padded` tokens of padding on the left."""
    ids = torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[-1, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


class Patches(nn.Module):
    """[B, C, H, W] → [B, rows · columns, patch² · C], row by row."""

    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, images):
        rows, channels, height, width = images.shape
        p = self.side
        cut = images.reshape(rows, channels, height // p, p, width // p, p).permute(0, 2, 4, 3, 5, 1)
        return cut.reshape(rows, (height // p) * (width // p), p * p * channels)


class Prefixed(nn.Module):
    """Puts `count` learned tokens before the others."""

    def __init__(self, count, width):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(count, width))

    def forward(self, x):
        return torch.cat([self.tokens.expand(len(x), -1, -1), x], dim=1)


class TwoBranches(nn.Module):
    """One MLP under two names, and another."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        self.right = self.left
        self.other = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))

    def forward(self, x):
        return self.left(x) + self.right(2 * x) + self.other(x)
