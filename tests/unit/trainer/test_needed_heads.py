"""Heads are chosen on one set of words and told of on another."""

from __future__ import annotations

import math

import pytest

from trainer.needed_heads import costs, interval
from trainer.silenced_heads import HeadName, Needed, Right

FIRST, SECOND, THIRD = (HeadName("cross", 0, number) for number in range(3))


def of(right, nats=1.0):
    """Right words by 1, wrong ones by 0."""
    each = tuple(map(bool, right))
    return Right(len(each), sum(each) / len(each), nats, each)


def needed(whole, **silenced):
    by_name = {"first": FIRST, "second": SECOND, "third": THIRD}
    return Needed(
        {"article": of(whole)},
        {by_name[name]: {"article": right} for name, right in silenced.items()},
        {"article": list(range(len(whole)))},
    )


def test_the_head_is_chosen_on_other_words_than_those_it_is_told_of():
    chosen = needed([1, 1, 1], first=of([1, 0, 0]), second=of([1, 1, 0]), third=of([1, 1, 1]))
    # On the words that are measured the second head costs more, and the third most of all.
    measured = needed(
        [1, 1, 1, 0], first=of([1, 1, 0, 1]), second=of([0, 1, 0, 0]), third=of([0, 0, 0, 0])
    )
    [article] = costs(chosen, measured)
    assert (article.group, article.cases, article.right) == ("article", 4, 0.75)
    assert [cost.head for cost in article.heads] == [FIRST, SECOND]
    first, second = article.heads
    assert (first.lost, first.won, first.right) == (1, 1, 0.75)
    assert (second.lost, second.won, second.right) == (2, 0, 0.25)
    [only] = costs(chosen, measured, most=1)
    assert [cost.head for cost in only.heads] == [FIRST]


def test_a_head_that_loses_nothing_where_it_is_chosen_is_not_needed():
    chosen = needed([1, 0], first=of([1, 0]), second=of([1, 1]), third=of([0, 0]))
    measured = needed([1, 1], first=of([0, 0]), second=of([0, 0]), third=of([1, 1]))
    [article] = costs(chosen, measured)
    assert [cost.head for cost in article.heads] == [THIRD]
    assert article.heads[0].interval is None  # no word changes
    unknown = Needed({}, {}, {})
    assert costs(unknown, measured)[0].heads == ()


def test_of_equals_that_with_the_worse_likelihood_comes_first():
    chosen = needed([1, 1], first=of([1, 0], nats=1.0), second=of([0, 1], nats=1.5))
    measured = needed([1, 1], first=of([1, 1]), second=of([1, 0]))
    assert [cost.head for cost in costs(chosen, measured)[0].heads] == [SECOND, FIRST]


def test_the_interval_of_independent_words_is_that_of_the_normal_law():
    lost = [1] * 300 + [-1] * 20 + [0] * 680
    mean = 0.28
    error = math.sqrt((0.32 - mean**2) / 1000)
    low, high = interval(lost, range(1000))
    assert low == pytest.approx(mean - 1.96 * error, abs=0.004)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.004)
    assert interval(lost, range(1000)) == (low, high)


def test_words_of_one_sentence_count_as_one_draw():
    lost = ([1] * 3 + [0] * 7) * 100
    alone = interval(lost, range(1000))
    # The same words, ten a sentence, that change all together or not at all.
    together = interval(sorted(lost), [number // 10 for number in range(1000)])
    wider = (together[1] - together[0]) / (alone[1] - alone[0])
    assert wider == pytest.approx(math.sqrt(10), rel=0.15)


def test_words_that_never_change_have_no_interval():
    assert interval([0, 0], [0, 1]) is None
    # In every sentence as many are lost as won: surely nothing.
    assert interval([1, -1], [0, 0]) == (0.0, 0.0)
