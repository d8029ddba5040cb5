"""A short random walk, and that a walk finds what is broken. stateful.prove() walks for longer."""

from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest

from flaws import FLAWS
from stateful import Lab, walk

SEED = 3


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


def test_a_walk(lab: Lab) -> None:
    tally: Counter[str] = Counter()
    walk(lab, SEED, tally, examples=4, steps=40)
    print(f"\nseed {SEED}: {tally.total()} steps")
    assert len(tally) > 30


def test_a_seed_finds_a_flaw_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that uses an IV twice is found out, and the seed leads there by the same steps."""
    monkeypatch.setattr(lab, "template", lab.template)  # to be put back
    lab.break_product(FLAWS[0].sql())
    found = next(it for it in map(partial(outcome, lab), range(1, 20)) if it[2])
    assert "an IV was used twice" in found[2]
    assert outcome(lab, found[0]) == found


def outcome(lab: Lab, seed: int) -> tuple[int, Counter[str], str]:
    """Return the seed, the steps that it takes, and what they find."""
    tally: Counter[str] = Counter()
    try:
        walk(lab, seed, tally, examples=3, steps=30)
    except AssertionError as error:
        return seed, tally, str(error)
    return seed, tally, ""
