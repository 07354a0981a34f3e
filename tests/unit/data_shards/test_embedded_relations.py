"""What belongs together in generated sentences, by hand and as a property."""

from __future__ import annotations

import pytest

from data_shards.embedded import Sentence, sentences
from data_shards.embedded_clauses import Combination
from data_shards.embedded_relations import Span, other_number, relations


def made(pattern: str, english: str, german: str, *combinations: tuple[str, str, str]) -> Sentence:
    chosen = frozenset(Combination(*one) for one in combinations)  # type: ignore[arg-type]
    return Sentence(english, german, pattern, chosen)


def said(one: Sentence) -> set[tuple[str, str, str, tuple[str, ...]]]:
    def text(span: Span) -> str:
        return (one.english if span.side == "source" else one.german)[span.start : span.end]

    return {
        (found.name, text(found.word), text(found.partner), tuple(map(text, found.rivals)))
        for found in relations(one)
    }


SUBJECT, OBJECT, ADJECTIVE = "subject+verb", "verb+object", "adjective+noun"


def test_a_separable_verb() -> None:
    one = made(
        "separable", "The young boy closes the window.", "Der junge Junge macht das Fenster zu.",
        (SUBJECT, "boy", "close"), (OBJECT, "close", "window"), (ADJECTIVE, "young", "boy"),
    )  # fmt: skip
    assert said(one) == {
        ("verb → its subject", "closes", "boy", ("window",)),
        ("verb → its object", "closes", "window", ("boy",)),
        ("finite verb → the subject", "macht", "boy", ("window",)),
        ("finite verb → its subject", "macht", "Junge", ()),
        ("adjective → the noun", "junge", "boy", ("window",)),
        ("article → the noun", "Der", "boy", ("window",)),
        ("article → the noun", "das", "window", ("boy",)),
        ("particle → the verb", "zu", "closes", ()),
        ("particle → its verb", "zu", "macht", ()),
    }


@pytest.mark.parametrize(
    ("pattern", "english", "german", "last"),
    [
        ("subordinate", "I sing because boys sleep.", "Ich singe, weil Jungen schlafen.",
         "schlafen"),
        ("perfect", "Boys have slept.", "Jungen haben geschlafen.", "geschlafen"),
        ("modal", "Boys can sleep.", "Jungen können schlafen.", "schlafen"),
        ("modal", "Can boys sleep?", "Können Jungen schlafen?", "schlafen"),
        ("relative", "The boys who sleep sing.", "Die Jungen, die schlafen, singen.", "schlafen"),
        ("main_clause", "Boys sleep.", "Jungen schlafen.", None),
        ("inversion", "Today boys sleep.", "Heute schlafen Jungen.", None),
    ],
)  # fmt: skip
def test_which_verb_stands_at_the_end(
    pattern: str, english: str, german: str, last: str | None
) -> None:
    found = said(made(pattern, english, german, (SUBJECT, "boy", "sleep")))
    at_the_end = {word for name, word, *_ in found if name == "verb at the end → the verb"}
    assert at_the_end == ({last} - {None})
    finite = {word for name, word, *_ in found if name == "finite verb → the subject"}
    assert finite == (set() if pattern in ("perfect", "modal") else {"schlafen"})


def test_a_particle_at_the_end_of_its_verb_is_none() -> None:
    one = made(
        "subordinate", "I sing because the boy closes it.", "Ich singe, weil der Junge es zumacht.",
        (SUBJECT, "boy", "close"),
    )  # fmt: skip
    found = said(one)
    assert ("verb at the end → the verb", "zumacht", "closes", ()) in found
    assert not any(name.startswith("particle") for name, *_ in found)


def test_it_takes_its_gender_from_the_noun() -> None:
    one = made(
        "reference", "The boy sells the car because it is old.",
        "Der Junge verkauft das Auto, weil es alt ist.",
        (SUBJECT, "boy", "sell"), (OBJECT, "sell", "car"), (ADJECTIVE, "old", "car"),
    )  # fmt: skip
    assert {found for found in said(one) if found[1] in ("it", "es")} == {
        ("it → its noun", "it", "car", ("boy",)),
        ("er/sie/es → the noun", "es", "car", ("boy",)),
    }


def test_numbers_turn_round() -> None:
    one = made("numbers", "We see twenty-three cars.", "Wir sehen dreiundzwanzig Autos.")
    assert said(one) == {("ones of a number → the ones", "drei", "three", ("twenty",))}


def test_what_stands_twice_is_left_out() -> None:
    one = made(
        "coordination", "The boy sleeps and the boys laugh.", "Der Junge schläft und die Jungen"
        " lachen.", (SUBJECT, "boy", "sleep"),
    )  # fmt: skip
    assert said(one) == set()


def test_what_does_not_agree_has_no_subject() -> None:
    one = made(
        "passive", "The letter is written by the boy.", "Der Brief wird vom Jungen geschrieben.",
        (SUBJECT, "boy", "write"), (OBJECT, "write", "letter"),
    )  # fmt: skip
    names = {name for name, *_ in said(one)}
    assert "verb at the end → the verb" in names
    assert not any("subject" in name for name in names)


@pytest.mark.parametrize(
    ("pattern", "english", "german", "verb", "word", "other"),
    [
        ("separable", "The boy closes it.", "Der Junge macht es zu.", "close", "macht", "machen"),
        ("subordinate", "I sing because the boy closes it.",
         "Ich singe, weil der Junge es zumacht.", "close", "zumacht", "zumachen"),
        ("yes_no_question", "Do boys sleep?", "Schlafen Jungen?", "sleep", "Schlafen", "Schläft"),
        ("main_clause", "The boy sleeps.", "Der Junge schläft.", "sleep", "schläft", "schlafen"),
        ("modal", "The boy can sleep.", "Der Junge kann schlafen.", "sleep", "", ""),
        ("liking", "The boys like the dog.", "Der Hund gefällt den Jungen.", "like", "", ""),
    ],
)  # fmt: skip
def test_a_verb_in_the_other_number(
    pattern: str, english: str, german: str, verb: str, word: str, other: str
) -> None:
    found = other_number(made(pattern, english, german, (SUBJECT, "boy", verb)))
    assert [(german[span.start : span.end], form) for span, form in found] == (
        [(word, other)] if word else []
    )


def test_of_many_sentences() -> None:
    names = set()
    for one in sentences("train", 400):
        for found in relations(one):
            names.add(found.name)
            word, partner = found.word, found.partner
            for span in (word, partner, *found.rivals):
                text = one.english if span.side == "source" else one.german
                assert 0 <= span.start < span.end <= len(text)
            assert partner not in found.rivals
            if word.side == partner.side == "target":
                assert partner.end < word.start  # else it is not written yet
    assert len(names) == 12
