"""What is saved is the same model, to the last bit, in a process that never saw it: every layout, with its experts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from xlora_cases import build, ids, logits

from mole.xlora.saving import LAYOUTS

READER = """
import json, sys, torch
from xlora_cases import ids, llama, logits
from mole import xlora

torch.set_num_threads(int(sys.argv[1]))
found = {}
for folder in sys.argv[2:]:
    model = xlora.from_pretrained(folder, llama(), "cpu")
    tokens = model.generate(input_ids=ids(), max_new_tokens=6, do_sample=False)
    found[folder] = [logits(model).numpy().tobytes().hex(), tokens.tolist(), list(model.experts)]
print(json.dumps(found))
"""
SETTINGS = {
    "plain": {},
    "layerwise": {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 16},
    "top-k": {"top_k_lora": 2, "enable_softmax": True},
    "softmax of top-k": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "scaled": {"scaling_pass_value": 0.3, "global_scaling_weight": 0.7, "softmax_temperature": 0.5},
}
WAYS = ((LAYOUTS, "embed"), (("xlora",), "embed"), (("xlora",), "reference"))


@pytest.mark.slow
def test_every_layout_gives_the_same_bits_in_a_new_process(folders, tmp_path):
    wanted = {}
    for name, fields in SETTINGS.items():
        model = build(folders, **fields)
        expected = [
            logits(model).numpy().tobytes().hex(),
            model.generate(input_ids=ids(), max_new_tokens=6, do_sample=False).tolist(),
            list(model.experts),
        ]
        for layouts, experts in WAYS:
            folder = tmp_path / f"{name}-{'-'.join(layouts)}-{experts}"
            model.save_pretrained(folder, layouts=layouts, experts=experts)
            wanted[str(folder)] = expected
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", READER, str(torch.get_num_threads()), *wanted],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert [folder for folder in wanted if found[folder] != wanted[folder]] == []
