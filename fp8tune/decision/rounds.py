"""In which order to run several things in a round, so that none is at a disadvantage.

What ran before leaves its mark: on caches, on the allocator, on the clock. Taking turns
in one order, forth and back, gives each the same two neighbours in every round. Here the
order changes from round to round so that over n rounds (2n if n is odd) each follows
each of the others equally often (Williams, Experimental designs balanced for the
estimation of residual effects of treatments, 1949). No random numbers are drawn, so all
ranks have the same order.
"""

__all__ = ["balanced_order"]


def balanced_order(number: int, turn: int) -> list[int]:
    """The order of a round.

    Args:
        number: how many things take turns.
        turn: number of the round, from 0.

    Returns:
        A permutation of ``range(number)``.
    """
    zigzag = [i // 2 if i % 2 == 0 else number - 1 - i // 2 for i in range(number)]
    order = [(x + turn) % number for x in zigzag]
    return order[::-1] if turn // number % 2 else order
