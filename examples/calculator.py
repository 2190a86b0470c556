"""A tool of one's own: the model is told of it by its annotations and its docstring."""


def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a * b
