"""Budgets: what reads, what is refused and how, and text both ways."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.budget import Budget, Quantity, field_names
from graphopt.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "unit", "amount"),
    [
        ("50%", "%", 50),
        ("33.3 %", "%", 33.3),
        ("2GiB", "B", 2 * 2**30),
        ("1.5 MB", "B", 1_500_000),
        ("512kb", "B", 512_000),
        ("1_000_000", "B", 1_000_000),
        ("1e6", "B", 1_000_000),
    ],
)
def test_memory_reads_units(text: str, unit: str, amount: float) -> None:
    assert Budget(memory=text).memory == Quantity(amount, unit)  # type: ignore[arg-type]


def test_counts_and_seconds_read_units() -> None:
    budget = Budget.parse("flops=1.2e9, params=3M, relus=50_000, latency=12ms")
    assert budget.flops == Quantity(1_200_000_000, "")
    assert budget.params == Quantity(3_000_000, "")
    assert budget.relus == Quantity(50_000, "")
    assert budget.latency == Quantity(0.012, "s")


def test_text_dict_and_fields_are_the_same_budget() -> None:
    by_text = Budget.parse("memory=50%,flops=1e9")
    assert by_text == Budget.parse({"memory": "50%", "flops": 1e9})
    assert by_text == Budget(memory="50%", flops=1_000_000_000)  # type: ignore[arg-type]
    assert Budget.parse(by_text) is by_text


def test_a_percentage_is_of_the_reference_and_bytes_round_down() -> None:
    half = Budget.parse("memory=50%").memory
    assert half is not None
    assert half.of(1001) == 500.5
    assert half.bytes_of(1001) == 500
    with pytest.raises(BudgetError, match="unknown figure"):
        half.of(None)


def test_nothing_is_an_empty_budget() -> None:
    assert not Budget.parse(None)
    assert str(Budget()) == ""


def test_limits_leave_modifiers_out() -> None:
    budget = Budget.parse("memory=50%,memory_scope=step,gradient_error=5%")
    assert list(budget.limits()) == ["memory"]
    assert set(budget.items()) == {"memory", "memory_scope", "gradient_error"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("memroy=50%", "did you mean 'memory'"),
        ("flop=1e9", "did you mean 'flops'"),
        ("memory_scope=stp", "did you mean 'step'"),
        ("memory", "NAME=AMOUNT"),
        ("", "NAME=AMOUNT"),
        ("50%", "NAME=AMOUNT"),
        ("memory=", "NAME=AMOUNT"),
        ("memory=50%,memory=60%", "given twice"),
        ("memory=0", "zero can't be met"),
        ("memory=0%", "zero can't be met"),
        ("memory=-5", "negative"),
        ("memory=150%", "at most 100%"),
        ("memory=lots", "not a quantity"),
        ("memory=nan", "not a quantity"),
        ("memory=1e999", "finite"),
        ("memory=5 parsecs", "unknown unit 'parsecs'"),
        ("memory=0.5", "write memory=50%"),
        ("flops=2GiB", "unknown unit 'GiB'"),
    ],
)
def test_malformed_budgets_are_refused_with_advice(text: str, says: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("value", [True, [1], object()])
def test_values_of_other_types_are_refused(value: object) -> None:
    with pytest.raises(BudgetError, match="text or a number"):
        Budget.parse({"memory": value})


def test_what_is_no_budget_is_refused() -> None:
    with pytest.raises(BudgetError, match="text or a mapping"):
        Budget.parse(0.5)  # type: ignore[arg-type]


def test_zero_is_sensible_where_it_means_none_at_all() -> None:
    assert Budget.parse("relus=0,gradient_error=0").items()


PERCENT = st.floats(min_value=1e-3, max_value=100, allow_nan=False).map(lambda x: Quantity(x, "%"))
BYTES = st.integers(min_value=1, max_value=2**50).map(lambda x: Quantity(x, "B"))
COUNTS = st.integers(min_value=1, max_value=2**50).map(lambda x: Quantity(x, ""))
SECONDS = st.floats(min_value=1e-9, max_value=1e4).map(lambda x: Quantity(x, "s"))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "memory": PERCENT | BYTES,
            "memory_scope": st.sampled_from(["activations", "step"]),
            "relus": PERCENT | COUNTS,
            "flops": PERCENT | COUNTS,
            "latency": PERCENT | SECONDS,
        },
    )
)
def test_text_reads_back_as_the_same_budget(fields: dict[str, object]) -> None:
    budget = Budget(**fields)  # type: ignore[arg-type]
    if budget:
        assert Budget.parse(str(budget)) == budget
    assert Budget.parse(budget.to_dict()) == budget


@given(st.text(max_size=30))
def test_any_text_reads_or_is_refused_as_a_budget(text: str) -> None:
    try:
        budget = Budget.parse(text)
    except BudgetError:
        return
    assert set(budget.items()) <= set(field_names())
