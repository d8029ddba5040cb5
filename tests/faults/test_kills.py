"""A short kill storm; `make prove KILLS=200` raises a long one."""

import random

from storm import storm


def test_nothing_is_lost_in_a_kill_storm() -> None:
    seed = random.SystemRandom().randrange(2**31)
    figures = storm(6, seed, lambda number, what: print(number, what))
    print(figures)
    assert figures.broken == ()
    assert (figures.lost, figures.undecryptable) == (0, 0)
    assert figures.kills == 6
    assert figures.rotations >= 1
    assert figures.rows_written > 20
    assert figures.rows_checked > 500
