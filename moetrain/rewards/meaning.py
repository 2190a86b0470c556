"""What an answer can say. Numbers are exact; what needs algebra is kept as LaTeX."""

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Number:
    """Exactly."""

    value: Fraction
    unit: str | None = None
    digits: int = 0  # behind the decimal point, as it is written


@dataclass(frozen=True)
class Algebra:
    """What needs a computer algebra system to compare, as LaTeX."""

    text: str
    unit: str | None = None


@dataclass(frozen=True)
class Words:
    """Anything else."""

    text: str


@dataclass(frozen=True)
class Group:
    """Several, in brackets: (, [, { or none."""

    bracket: str
    items: tuple["Reading", ...]


@dataclass(frozen=True)
class Piece:
    """The numbers between two ends; None: without end."""

    low: "Number | Algebra | None"
    high: "Number | Algebra | None"
    has_low: bool = False
    has_high: bool = False


@dataclass(frozen=True)
class Region:
    """A set of real numbers, as pieces of the line."""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Named:
    """`name` = what it is, or lies in."""

    name: str
    content: "Reading"


Reading = Number | Algebra | Words | Group | Region | Named
