"""Linear maps as engines run them: matrix products, and what those cost in packed ciphertexts."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from graphopt.private.circuit import Circuit, Step


@dataclass(frozen=True)
class Product:
    """Some matrix products of one size, each ``(m, k) x (k, n)``.

    Attributes:
        count: How many, one after the other.
        m: Rows of the left one.
        k: Columns of the left one.
        n: Columns of the right one.
    """

    count: int
    m: int
    k: int
    n: int

    @property
    def operands(self) -> int:
        """Elements of all operands."""
        return self.count * (self.m * self.k + self.k * self.n)

    @property
    def result(self) -> int:
        """Elements of all results."""
        return self.count * self.m * self.n


def product(circuit: Circuit, step: Step) -> Product:
    """A ``matmul`` or ``conv`` as matrix products over patches of the input."""
    left, right = (circuit.shape(name) for name in step.inputs)
    if step.op == "conv":
        groups = step.attributes["groups"]
        positions = step.shape[0] * math.prod(step.shape[2:])
        return Product(groups, positions, math.prod(right[1:]), right[0] // groups)
    left = left if len(left) > 1 else (1, *left)
    right = right if len(right) > 1 else (*right, 1)
    if len(right) == 2:
        return Product(1, math.prod(left[:-1]), left[-1], right[-1])
    count = math.prod(step.shape[:-2])
    return Product(count, left[-2], left[-1], right[-1])


def is_depthwise(circuit: Circuit, step: Step) -> bool:
    """Whether a step is a convolution of each channel by itself."""
    return (
        step.op == "conv" and step.attributes["groups"] > 1
        and circuit.shape(step.inputs[1])[1] == 1
    )  # fmt: skip


@dataclass(frozen=True)
class Packing:
    """Cheetah's products over packed ciphertexts, as SPU 0.9.5 sends them.

    Attributes:
        degree: Coefficients of a polynomial.
        sent: Bytes of an encrypted operand.
        response: Bytes of a packed encrypted result.
        single: Bytes of a result that fits one polynomial, which isn't packed ...
        element: ... and for each of its elements.
    """

    degree: int
    sent: float
    response: float
    single: float
    element: float

    def bytes(self, p: Product) -> float:
        """Bytes of the products: two cross terms each, since both operands are shared."""
        sent, responses, polynomials = blocks(p.m, p.k, p.n, self.degree)
        one = self.sent * sent
        if polynomials == 1:
            one += self.single + self.element * p.m * p.n
        else:
            one += self.response * responses
        return 2 * p.count * one


@functools.lru_cache(maxsize=4096)
def blocks(m: int, k: int, n: int, degree: int) -> tuple[int, int, int]:
    """How the operands are cut into polynomials so that the least is sent.

    Blocks of ``(a, b, c)`` of the three sizes fit one polynomial if ``a b c <= degree``; ``b``
    results are packed into one ciphertext (Huang et al., Cheetah, USENIX Security 2022, section 3,
    with the packing of Lu et al., BumbleBee, NDSS 2025).  Among equal traffic the cheaper
    arithmetic wins: an automorphism counts as a thousandth of a ciphertext, a product as a tenth
    of that.  Operands that fit one polynomial together are neither cut nor packed.

    Returns:
        Ciphertexts sent, ciphertexts received, result polynomials before packing.
    """
    if m * k * n <= degree:
        return 1, 1, 1
    best = (math.inf, 0, 0, 0)
    for a in range(1, min(degree, m) + 1):
        rows = -(-m // a)
        for b in (2**i for i in range((min(k, degree // a)).bit_length())):
            deep, columns = -(-k // b), -(-n // min(n, degree // (a * b)))
            sent, received = min(rows, columns) * deep, -(-rows * columns // b)
            work = -(-m * n // degree) * b + rows * deep * columns / 10
            cost = 1000.0 * (sent + received) + work
            if cost <= best[0]:
                best = (cost, sent, received, rows * columns)
    return best[1:]


@dataclass(frozen=True)
class TriplePool:
    """Multiplication triples that are made in batches and kept for later calls.

    Attributes:
        batch: Triples in a batch.
        bytes: Bytes of making one.
        tiles: Parts that a large call is cut into, one for each thread.
        direct: A call whose parts have so many elements multiplies without triples, in pieces of
            that size, ...
        direct_bytes: ... each of which costs so many bytes, whatever fills it.
    """

    batch: int
    bytes: float
    tiles: int
    direct: int
    direct_bytes: float

    def takes_triples(self, n: int) -> bool:
        """Whether a call with n elements multiplies by triples."""
        return n < self.tiles * self.direct

    def take(self, left: int, n: int) -> tuple[int, float]:
        """Multiply n pairs with so many triples left: triples left then, bytes of the making."""
        if not self.takes_triples(n):
            parts = [(n + tile) // self.tiles for tile in range(self.tiles)]
            return left, self.direct_bytes * sum(-(-part // self.direct) for part in parts)
        if left >= n:
            return left - n, 0.0
        made = -(-n // self.batch)
        return left + made * self.batch - n, made * self.bytes
