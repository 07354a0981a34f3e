"""Profiles of made-up heads whose measures are known."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.attention import AttentionMaps
from trainer.heads import most, position_names, profiles

SOURCE = ["▁a", "▁b", ",", "▁c", "</s>"]
OUTPUTS = ["▁x", "▁y", "."]  # and the end
INPUTS = ["<s>", *OUTPUTS]


def one_hot(places, keys):
    return torch.eye(keys)[torch.tensor(places)]


def made(**weights):
    return AttentionMaps(SOURCE, INPUTS, [*OUTPUTS, "</s>"], weights)


@pytest.fixture
def profile():
    even = torch.full((5, 5), 0.2)
    encoder = torch.stack(
        [one_hot([0, 0, 1, 2, 4], 5), one_hot([4] * 5, 5), one_hot([2] * 5, 5), even]
    )
    decoder = torch.stack([torch.eye(4), one_hot([0] * 4, 4)])
    cross = torch.full((1, 1, 4, 5), 0.2)
    return profiles([made(cross=cross, encoder=encoder[None], decoder=decoder[None])] * 2)


def test_what_is_known_of_made_up_heads(profile):
    encoder = profile["encoder"]
    assert encoder.sentences == 2
    # Rows of words only: the end sign's own row looks at itself and does not count.
    assert encoder.at[-1][0, 0] == 1
    assert encoder.edge[0].tolist() == pytest.approx([0, 1, 0, 0.2])
    assert encoder.marks[0].tolist() == pytest.approx([0.25, 0, 1, 0.2])
    assert encoder.sharpest[0].tolist() == pytest.approx([1, 0, 1, 0.2])
    assert encoder.spread[0].tolist() == pytest.approx([1, 1, 1, 5])
    assert profile["decoder"].edge[0].tolist() == pytest.approx([1 / 3, 1])
    assert profile["decoder"].best_place()[0] == 0
    assert list(profile) == ["cross", "encoder", "decoder"]


def test_heads_are_named_for_their_place(profile):
    assert position_names(profile["encoder"]) == {
        (0, 0): ("at the piece before", 1.0),
        (0, 1): ("at the end sign", 1.0),
        (0, 2): ("at punctuation", 1.0),
    }
    assert position_names(profile["decoder"]) == {
        (0, 0): ("at the piece just written", 1.0),
        (0, 1): ("at the begin sign", 1.0),
    }
    assert position_names(profile["cross"]) == {}
    assert set(position_names(profile["cross"], least=0.0)) == {(0, 0)}


def test_sentences_count_alike_whatever_their_length(profile):
    short = AttentionMaps(["▁a", "</s>"], INPUTS[:2], ["▁x", "</s>"],
                          {"cross": torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])})  # fmt: skip
    long = made(cross=torch.full((1, 1, 4, 5), 0.2))
    found = profiles([short, long])["cross"]
    assert found.sharpest.item() == pytest.approx((1 + 0.2) / 2)
    # No row of the short sentence has a key two places ahead.
    assert found.at[2].item() == pytest.approx(0.2)
    assert found.spread.item() == pytest.approx((1 + 5) / 2)


def test_of_no_words_there_is_no_profile():
    empty = AttentionMaps(["</s>"], ["<s>"], ["</s>"], {"cross": torch.ones(1, 1, 1, 1)})
    assert profiles([empty]) == {}
    assert profiles([]) == {}


def test_most():
    layer, head, share = most(torch.tensor([[0.1, 0.2], [0.5, math.inf], [0.3, 0.0]]))
    assert (layer, head, share) == (1, 1, math.inf)
