"""How many examples a fuzz test tries.

Without CODISTILL_FUZZ_EXAMPLES in the environment a quarter of its budget, with `full` all of it: the same ones each
time. With a number: so many new ones.
"""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

CHOSEN = os.environ.get("CODISTILL_FUZZ_EXAMPLES", "")
LONG = int(CHOSEN) if CHOSEN not in ("", "full") else 0


def budget(examples: int) -> settings:
    """Return the settings of a fuzz test with a budget of so many examples."""
    return settings(
        max_examples=LONG or (examples if CHOSEN else examples // 4),
        derandomize=not LONG,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@st.composite
def mutations(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draw a copy of some bytes with a few pieces replaced, removed or inserted."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.sampled_from((0, 1, 1, 4, 64, len(whole)))))
        content[start:stop] = draw(st.binary(max_size=8))
    return bytes(content)
