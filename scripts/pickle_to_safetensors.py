"""Convert pickled weights, a flat dict of names to tensors, to safetensors: the only place that opens a pickle.

Usage: python scripts/pickle_to_safetensors.py <file> <folder>

A pickle can run any program that its author put inside. Do this only with a file that you trust, in a container
without network and without your tokens. Writes <folder>/<stem>.safetensors and <folder>/source.json (sha256 of the
input, names, shapes). mole never imports this file.
"""

import hashlib
import json
import sys
from pathlib import Path


def main() -> int:
    """0, or 2 with one line that says what is wrong."""
    if len(sys.argv) != 3:
        print(__doc__)
        return 2
    import torch
    from safetensors.torch import save_file

    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        print("torch 2.6 or newer is needed: weights_only of earlier ones can be got around", file=sys.stderr)
        return 2
    try:
        value = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign file makes the unpickler raise
        print(f"{source}: cannot be read as plain weights: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    ):
        print(f"{source}: not a flat dict of names to tensors", file=sys.stderr)
        return 2
    target = folder / f"{source.stem}.safetensors"
    if target.exists():
        print(f"{target} is there already", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    # Tensors that share memory, or are views, become their own.
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in value.items()}, target)
    facts = {
        "source": source.name,
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "tensors": {name: list(tensor.shape) for name, tensor in sorted(value.items())},
    }
    (folder / "source.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
