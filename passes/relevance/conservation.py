"""What arrived at each operation of one run, and where it went."""

from __future__ import annotations

from typing import Any

from graphopt.passes.relevance.engine import Run

Entry = dict[str, Any]


def conservation(run: Run) -> list[Entry]:
    """Compare what arrived with what was handed on and booked, operation by operation.

    Args:
        run: An audited run, after its backward pass.

    Returns:
        ``{"node", "op", "rule", "arrived", "left", "sinks", "residual"}`` for each operation; the
        residual is relative to the sum of the absolute relevance that arrived, or to the smallest
        sum that the type can hold with full precision if that is larger.
    """
    assert run.accounts is not None
    found = []
    for op, account in run.accounts.items():
        sinks = {k: float(v.double().sum()) for k, v in run.ledger.entries.get(op, {}).items()}
        lost = account.arrived - account.left - sum(sinks.values())
        size = max(account.size, account.least) if account.size else 1.0
        found.append(
            {
                "node": op.node.name,
                "op": op.name,
                "rule": str(run.plan.rules[op]),
                "arrived": account.arrived,
                "left": account.left,
                "sinks": sinks,
                "residual": abs(lost) / size,
            }
        )
    return found
