"""How long to search: a few hundred examples that are always the same, or CODISTILL_FUZZ_EXAMPLES new ones."""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONG = int(os.environ.get("CODISTILL_FUZZ_EXAMPLES", "0"))


def budget(examples: int) -> settings:
    """Give the settings of a fuzz test that takes so many examples when it is one test among many."""
    return settings(
        max_examples=LONG or examples,
        derandomize=not LONG,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@st.composite
def mutations(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draw a copy of some bytes with a few pieces replaced, left out or put in."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.sampled_from((0, 1, 1, 4, 64, len(whole)))))
        content[start:stop] = draw(st.binary(max_size=8))
    return bytes(content)
