"""Seeds of many draws from the one that a user gives."""

import hashlib


def seed_of(seed: int, number: int) -> int:
    """What draw number `number`, from 0 on, is seeded with: no two share it, nor do those of neighbouring seeds.

    The first has the seed itself; torch takes 64 bits.
    """
    if not number:
        return seed % 2**63
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8]) % 2**63
