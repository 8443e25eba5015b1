"""The seeds of a run's random streams."""

import hashlib


def seed_for(stream: str, seed: int, rank: int = 0) -> int:
    """The seed, from 0 to 2**63 - 1, of one named random stream ("init", "data", "dropout" …) on one rank of a run.

    It depends on its three arguments alone, so that a new stream leaves all others as they were.
    """
    digest = hashlib.sha256(f"mole\n{stream}\n{seed}\n{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
