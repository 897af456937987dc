"""Seeds that have nothing in common where what they are for differs in anything.

Sums would not do: vLLM gives the answers of a request the seeds from the request's on, and the same prompt with the
same seed is the same answer.
"""

import hashlib
import json
from typing import Any


def mixed_seed(*parts: Any) -> int:
    """56 bits that all of ``parts`` decide: numbers, texts and lists of them."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:7])


def request_seed(seed: int, place: int) -> int:
    """That of the first answer to the prompt at this place of a call; vLLM adds the number of the answer."""
    return mixed_seed(seed, place)
