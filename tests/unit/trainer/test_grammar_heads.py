"""Heads that follow the grammar, with made-up weights whose shares are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from data_shards.embedded import Sentence
from data_shards.embedded_clauses import Combination
from data_shards.embedded_relations import Span
from trainer import grammar_heads
from trainer.grammar_heads import follow_grammar, has_grammar, places
from trainer.run import load_model

ONE = Sentence(
    "The boy closes the window.", "Der Junge macht das Fenster zu.", "separable",
    frozenset({Combination("subject+verb", "boy", "close"),
               Combination("verb+object", "close", "window")}),
)  # fmt: skip
ENGLISH = ["▁The", "▁boy", "▁clo", "ses", "▁the", "▁window", ".", "</s>"]
GERMAN = ["▁Der", "▁Junge", "▁macht", "▁das", "▁Fenster", "▁zu", "."]


class _Pieces:
    """A vocabulary that knows one pair."""

    written = ("<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys([*ENGLISH[:-1], *GERMAN]))

    def encode(self, lines):
        of = {ONE.english: ENGLISH[:-1], ONE.german: GERMAN}
        return [[self.written.index(piece) for piece in of[line]] for line in lines]

    def pieces(self, ids):
        return [self.written[number] for number in ids]


class _Model:
    """Weights by kind, [L, H, Q, K], for every pair."""

    def __init__(self, **weights):
        self.weights = weights

    def parameters(self):
        yield torch.zeros(1)

    def attention_maps(self, source_BS, _):
        return {
            kind: weights_LHQK[:, None].expand(-1, len(source_BS), -1, -1, -1)
            for kind, weights_LHQK in self.weights.items()
        }


@pytest.fixture
def findings(trained_run, monkeypatch):
    def found(**weights):
        loaded = replace(
            load_model(trained_run, "last"), model=_Model(**weights), vocabulary=_Pieces()
        )
        monkeypatch.setattr(grammar_heads, "sentences", lambda split, number: [ONE] * number)
        return {one.name: one for one in follow_grammar(loaded, 2)}

    return found


def _looking(rows, num_rows, num_keys):
    """Even weights but for some rows: by row, its key."""
    weights = torch.full((num_rows, num_keys), 1 / num_keys)
    for row, key in rows.items():
        weights[row] = torch.eye(num_keys)[key]
    return weights


def test_the_head_that_follows_is_found_and_set_beside_chance(findings):
    even = torch.full((8, 8), 1 / 8)
    # "clo" looks at "boy", "ses" at "window".
    subject = _looking({2: 1, 3: 5}, 8, 8)
    found = findings(cross=even[None, None], encoder=torch.stack([even, subject])[None])
    verb = found["verb → its subject"]
    assert (verb.kind, verb.layer, verb.head, verb.cases) == ("encoder", 0, 1, 2)
    assert verb.weight == pytest.approx(0.5)  # of its two pieces one
    assert verb.strongest == pytest.approx(0.5)
    assert verb.even == pytest.approx(1 / 8)
    # One piece back from "clo", two from "ses": each fixed place is right for half of the rows.
    assert (verb.offset, verb.at_offset) == (-1, pytest.approx(0.5))
    assert (verb.rival, verb.beside_rival) == (pytest.approx(0.5), pytest.approx(0.5))
    assert "particle → its verb" not in found  # there is no self-attention of the decoder


def test_what_is_written_looks_at_what_was_written_and_read(findings):
    # Row t is what predicts German piece t; the decoder's key t + 1 is piece t.
    decoder = torch.full((8, 8), 1 / 8).tril()
    decoder[5] = torch.eye(8)[3]
    cross = _looking({5: 2, 0: 5}, 8, 8)
    found = findings(cross=cross[None, None], decoder=decoder[None, None])
    particle = found["particle → its verb"]
    assert (particle.kind, particle.weight, particle.offset) == ("decoder", 1.0, -2)
    assert particle.even == pytest.approx(1 / 6)  # row 5 sees the begin sign and 5 pieces
    assert particle.rival is None
    assert found["particle → the verb"].weight == 1.0
    assert found["particle → the verb"].even == pytest.approx(2 / 8)
    # "Der" looks at "window", which is not its noun, and "das" nowhere in particular.
    article = found["article → the noun"]
    assert article.cases == 4
    assert article.weight == pytest.approx((0 + 1 / 8) / 2)
    assert article.rival == pytest.approx((1 + 1 / 8) / 2)


def test_pieces_of_a_stretch_of_text():
    def of(start, end):
        return places(ENGLISH, Span("source", start, end))

    assert of(0, 3) == [0]
    assert of(4, 7) == [1]
    assert of(8, 14) == [2, 3]
    assert of(10, 12) == [2, 3]
    assert of(25, 26) == [6]
    assert places(["<s>", *GERMAN], Span("target", 0, 3)) == [1]
    assert places(["▁", "a", "b"], Span("source", 0, 1)) == [1]


def test_only_generated_sentences_have_a_known_grammar(trained_run):
    loaded = load_model(trained_run, "last")
    assert not has_grammar(loaded)

    def of(**data):
        config = loaded.config.model_copy(
            update={"data": loaded.config.data.model_copy(update=data)}
        )
        return has_grammar(replace(loaded, config=config))

    assert of(corpus="embedded", source="en", target="de")
    assert not of(corpus="embedded", source="de", target="en")
