"""The README's example of mole.moe runs as it stands there."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_example_runs_and_does_what_it_says():
    section = README.read_text(encoding="utf-8").partition("## A mixture out of any module")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    torch.manual_seed(0)
    names: dict = {}
    exec(found[1], names)
    assert names["y"].shape == (3, 5, 8)
    assert sum(p.grad is not None for p in names["block"].parameters()) == 9
    assert names["report"].equals_dense
    assert type(names["model"][0]) is torch.nn.Linear
    (counted,) = names["statistics"].values()
    assert int(counted.loads.sum()) == 6
