"""Numbers for people."""

from __future__ import annotations

import pytest

from graphopt.budget import Budget
from graphopt.plain import human_bytes, human_count

BYTES = {
    0: "0 B",
    999: "999 B",
    1000: "1 kB",
    1024: "1.02 kB",
    999_400: "999 kB",
    999_700: "1 MB",
    2_500_000_000: "2.5 GB",
    5e15: "5e+03 TB",
}


@pytest.mark.parametrize("count", BYTES)
def test_bytes_are_powers_of_a_thousand_as_in_budgets(count: float) -> None:
    assert human_bytes(count) == BYTES[count]
    if 0 < count < 1e12:
        text = human_bytes(count).replace(" ", "")
        memory = Budget.parse(f"memory={text}").memory
        assert memory is not None
        assert memory.bytes_of(None) == pytest.approx(count, rel=5e-3)


def test_counts() -> None:
    assert [human_count(n) for n in (7, 12_340, 4.5e9)] == ["7", "12.3 k", "4.5 G"]
