"""How large each state is, known without building one."""

from __future__ import annotations

from collections.abc import Mapping

NUM_MEDIUM = 4000
MEDIUM_KIB = (16, 32, 64, 128, 256, 512, 512, 512)
HUGE_BYTES = 128 << 20
STATE_BYTES: Mapping[str, int] = {
    "large": 64 << 24,
    "llm": 2_298_876_480,
    "many": 20_000 << 12,
    "mixed": NUM_MEDIUM // len(MEDIUM_KIB) * sum(MEDIUM_KIB) * 1024 + 4 * HUGE_BYTES,
}
"""By workload, at scale 1; a test compares with the states themselves."""
