"""Exact numbers of answers: sums of rationals times square roots, pi and letters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

MAX_BITS = 4096
"""Of a coefficient."""
MAX_TERMS = 64
MAX_ROOT = 10**12
MAX_EXPONENT = 1024
MAX_DEGREE = 64
"""Of a root."""

Monomial: TypeAlias = tuple[int, tuple[tuple[str, int], ...]]
"""A square-free n > 0 under the root, and letters with their exponents; "pi" is a letter that nothing else equals."""


class Beyond(ValueError):
    """A value that these numbers do not hold, or one beyond the limits."""


@dataclass(frozen=True)
class Exact:
    """sum of q sqrt(n) x^a y^b ... over distinct (n, letters), no q zero.

    Square roots of different square-free numbers are linearly independent over the rationals, and pi is
    transcendental: two values are equal if and only if their terms are.

    >>> Exact.of(12).root() == Exact.of(2) * Exact.of(3).root()
    True
    """

    terms: tuple[tuple[Monomial, Fraction], ...]

    @classmethod
    def make(cls, terms: dict[Monomial, Fraction]) -> Exact:
        """Sorted, without zeros.

        Raises:
          Beyond: more than MAX_TERMS terms, MAX_BITS bits, or exponents over MAX_EXPONENT.
        """
        kept = sorted((key, q) for key, q in terms.items() if q)
        if len(kept) > MAX_TERMS:
            raise Beyond(f"{len(kept)} terms; at most {MAX_TERMS} are kept")
        for (_, letters), q in kept:
            if max(q.numerator.bit_length(), q.denominator.bit_length()) > MAX_BITS:
                raise Beyond(f"a number of more than {MAX_BITS} bits")
            if any(abs(power) > MAX_EXPONENT for _, power in letters):
                raise Beyond(f"an exponent over {MAX_EXPONENT}")
        return cls(tuple(kept))

    @classmethod
    def of(cls, value: Fraction | int) -> Exact:
        """A rational number."""
        return cls.make({(1, ()): Fraction(value)})

    @classmethod
    def letter(cls, name: str) -> Exact:
        """A variable, or "pi"."""
        return cls(((((1, ((name, 1),))), Fraction(1)),))

    @property
    def rational(self) -> Fraction | None:
        """The value if it is rational, else None."""
        if not self.terms:
            return Fraction(0)
        ((key, q), *others) = self.terms
        return q if key == (1, ()) and not others else None

    @property
    def letters(self) -> set[str]:
        """Variables that it holds, pi not among them."""
        return {name for (_, powers), _ in self.terms for name, _ in powers} - {"pi"}

    def __add__(self, other: Exact) -> Exact:
        terms = dict(self.terms)
        for key, q in other.terms:
            terms[key] = terms.get(key, Fraction(0)) + q
        return Exact.make(terms)

    def __neg__(self) -> Exact:
        return Exact(tuple((key, -q) for key, q in self.terms))

    def __sub__(self, other: Exact) -> Exact:
        return self + -other

    def __mul__(self, other: Exact) -> Exact:
        terms: dict[Monomial, Fraction] = {}
        for (n, a), p in self.terms:
            for (m, b), q in other.terms:
                shared = math.gcd(n, m)  # sqrt(n m) = gcd sqrt(n/gcd m/gcd), square-free again
                root = (n // shared) * (m // shared)
                if root > MAX_ROOT:
                    raise Beyond(f"a root of more than {MAX_ROOT}")
                powers = dict(a)
                for name, power in b:
                    powers[name] = powers.get(name, 0) + power
                key = (root, tuple(sorted((name, power) for name, power in powers.items() if power)))
                terms[key] = terms.get(key, Fraction(0)) + p * q * shared
        return Exact.make(terms)

    def __truediv__(self, other: Exact) -> Exact:
        """By one term, or by two whose conjugate leaves one: 1/(a + b) = (a - b)/(a^2 - b^2)."""
        if not other.terms:
            raise Beyond("a division by zero")
        if len(other.terms) == 2:
            first, second = (Exact((term,)) for term in other.terms)
            return self * (first - second) / (first * first - second * second)
        if len(other.terms) > 2:
            raise Beyond(f"a division by a sum of {len(other.terms)} terms")
        (((n, letters), q),) = other.terms
        inverse = ((n, tuple((name, -power) for name, power in letters)), 1 / (q * n))
        return self * Exact((inverse,))

    def power(self, exponent: Fraction) -> Exact:
        """To an integer power, or a half of one where the root is kept.

        Raises:
          Beyond: other exponents, or a result beyond the limits (told before it is computed).
        """
        if exponent.denominator == 2:
            return self.root().power(Fraction(exponent.numerator))
        if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
            raise Beyond(f"the exponent {exponent}")
        if exponent < 0:
            return Exact.of(1) / self.power(-exponent)
        result, square, left = Exact.of(1), self, int(exponent)
        while left:
            if left & 1:
                result = result * square
            left >>= 1
            if left:
                square = square * square
        return result

    def root(self, degree: Fraction | int | None = 2) -> Exact:
        """The square root of a rational number >= 0: sqrt(p/q) = sqrt(pq)/q; other roots where they are rational.

        Raises:
          Beyond: not such a number or root, or pq over MAX_ROOT and no square.
        """
        value = self.rational
        if value is None or degree is None or Fraction(degree).denominator != 1 or not 2 <= degree <= MAX_DEGREE:
            raise Beyond(f"a root of degree {degree} of what is no rational number")
        if degree != 2 and value < 0 and degree % 2:
            return -(-self).root(degree)
        if value < 0:
            raise Beyond("a root of a number below 0")
        if degree != 2:
            return Exact.of(Fraction(*(_whole_root(part, int(degree)) for part in value.as_integer_ratio())))
        outside, inside = _square_free(value.numerator * value.denominator)
        return Exact.make({(inside, ()): Fraction(outside, value.denominator)})

    def __float__(self) -> float:
        """Nearly the value; variables have none.

        Raises:
          Beyond: it holds variables, or is too large.
        """
        if self.letters:
            raise Beyond("a value with variables")
        try:
            return math.fsum(
                float(q) * math.sqrt(n) * math.pi ** dict(powers).get("pi", 0) for (n, powers), q in self.terms
            )
        except OverflowError as error:
            raise Beyond("too large for a float") from error


def _whole_root(n: int, degree: int) -> int:
    """The a >= 0 with a^degree = n."""
    low, high = 0, 1 << -(-n.bit_length() // degree)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if middle**degree >= n else (middle + 1, high)
    if low**degree != n:
        raise Beyond(f"a root of degree {degree} that is not rational")
    return low


def _square_free(n: int) -> tuple[int, int]:
    """(a, b) with n = a^2 b and b square-free (1 for n = 0).

    Once primes up to the cube root are out, what is left has at most two prime factors: a square or square-free.
    """
    if n == 0:
        return 0, 1
    outside = math.isqrt(n)
    if outside * outside == n:
        return outside, 1
    if n > MAX_ROOT:
        raise Beyond(f"a root of more than {MAX_ROOT}")
    outside, inside, left, d = 1, 1, n, 2
    while d * d * d <= left:
        while left % (d * d) == 0:
            left //= d * d
            outside *= d
        if left % d == 0:
            left //= d
            inside *= d
        d += 1
    square = math.isqrt(left)
    return (outside * square, inside) if square * square == left else (outside, inside * left)
