"""Recurrent layers and cells: a unit of the hidden state is one row in each gate.

In the masked model a removed unit of an LSTM starts at zero and stays there: its cell adds
sigmoid(0) * tanh(0) = 0.  The same holds for a GRU and for plain recurrences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from graphopt.passes.prune.rule import Call, Result, Value, rule
from graphopt.passes.prune.units import Labels

aten = torch.ops.aten

_MEETS = "it meets an axis that keeps its size"
_LAYERS = {aten.lstm: 4, aten.gru: 3, aten.rnn_tanh: 1, aten.rnn_relu: 1}
_CELLS = {aten.lstm_cell: 4, aten.gru_cell: 3, aten.rnn_tanh_cell: 1, aten.rnn_relu_cell: 1}


def _gates(call: Call, rows: Labels, gates: int, hidden: Labels) -> None:
    """The rows of a weight or bias: for each gate all hidden units."""
    which, units = call.split(rows, gates, len(rows) // gates)
    call.freeze(which, "it is a gate")
    call.unify(units, hidden, _MEETS)


def _cell(
    call: Call, x: Value, weights: Sequence[Any], gates: int, hidden: Labels, inner: Labels
) -> None:
    """One step: input to hidden, hidden to hidden, two biases.

    Args:
        call: The call.
        x: The features.
        weights: Weights and biases.
        gates: How many gates there are.
        hidden: What the next step, and the next layer, sees of the state.
        inner: What each gate has: the same but for a projection.
    """
    w_ih, w_hh, *biases = weights
    call.unify(x.axes[-1], w_ih.axes[1], _MEETS)
    call.unify(w_hh.axes[1], hidden, _MEETS)
    for weight in (w_ih, w_hh, *biases):
        if isinstance(weight, Value):
            _gates(call, weight.axes[0], gates, inner)


@rule(*_CELLS)
def _step(call: Call) -> Result:
    gates = _CELLS[call.node.target.overloadpacket]  # type: ignore[union-attr]
    x, weights = call["input"], [call[n] for n in ("w_ih", "w_hh", "b_ih", "b_hh")]
    states = call["hx"] if gates == 4 else [call["hx"]]
    hidden = states[0].axes[-1]
    _cell(call, x, weights, gates, hidden, hidden)
    for state in states:
        call.unify(state.axes[-1], hidden, _MEETS)
        call.must_be_zero(state, len(state.axes) - 1, "the first state is not zero there")
    made = Value((*x.axes[:-1], hidden), (*(False for _ in x.axes[:-1]), True))
    return (made, made) if gates == 4 else made


@rule(*_LAYERS)
def _layers(call: Call) -> Result:
    if not call.has("input") or call.has("batch_sizes") or not call.has("num_layers"):
        return call.opaque("there is no rule for packed sequences")
    gates = _LAYERS[call.node.target.overloadpacket]  # type: ignore[union-attr]
    x, parameters = call["input"], call["params"]
    states = call["hx"] if isinstance(call["hx"], list) else [call["hx"]]
    directions, layers = 1 + bool(call.raw("bidirectional")), int(call.raw("num_layers"))
    each = len(parameters) // (directions * layers)
    projects = each - 2 - 2 * bool(call.raw("has_biases"))
    if projects not in (0, 1):
        return call.opaque("there is no rule for this form of recurrent layer")
    hidden, inner = states[0].axes[-1], states[-1].axes[-1]
    for state in states:
        call.freeze(state.axes[0], "it counts layers and directions")
        call.must_be_zero(state, 2, "the first state is not zero there")
    if projects:  # by their sizes alone the operator tells whether states are projected
        call.freeze(inner, "it is projected, and must stay wider than what it is projected to")
    else:
        call.unify(hidden, inner, _MEETS)
    features = x
    for layer in range(layers):
        for direction in range(directions):
            start = (layer * directions + direction) * each
            weights = parameters[start : start + each]
            _cell(call, features, weights[: each - projects], gates, hidden, inner)
            if projects:
                call.unify(weights[-1].axes[0], hidden, _MEETS)
                call.unify(weights[-1].axes[1], inner, _MEETS)
        joined = np.concatenate([hidden] * directions)
        features = Value((*x.axes[:-1], joined), (False, False, True))
    last = [
        Value((state.axes[0], *state.axes[1:-1], labels), (True, False, True))
        for state, labels in zip(states, (hidden, inner), strict=False)
    ]
    return (features, *last)
