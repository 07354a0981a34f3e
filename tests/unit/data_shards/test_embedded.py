"""The generated corpus: German against tables written by hand, splits, determinism."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import combinations, islice
from pathlib import Path

import pytest

from data_shards import embedded
from data_shards.embedded import Sentence, Split, generate, sentences, split_of, word_forms
from data_shards.embedded_clauses import Combination
from data_shards.embedded_grammar import (
    BE,
    PERSONAL,
    PRONOUNS,
    Case,
    Clause,
    NounPhrase,
    joined,
    noun_phrase,
    prepositional,
    pronoun_for,
    relative_pronoun,
    with_number,
    with_owner,
)
from data_shards.embedded_lexicon import (
    ADJECTIVES,
    DATIVE,
    DITRANSITIVE,
    INTRANSITIVE,
    MODALS,
    NOUN,
    NOUNS,
    PREPOSITIONAL,
    SPECIAL,
    TRANSITIVE,
    WILL,
    Verb,
    number_in_english,
    number_in_german,
)
from data_shards.embedded_patterns import PATTERNS
from data_shards.errors import DataError

ROOT = Path(__file__).parents[3]
ADJECTIVE = {adjective.english: adjective for adjective in ADJECTIVES}
ALL_VERBS = (
    *TRANSITIVE, *INTRANSITIVE, *DATIVE, *DITRANSITIVE, *PREPOSITIONAL, *SPECIAL.values(),
)  # fmt: skip
VERB = {verb.english: verb for verb in reversed(ALL_VERBS)}
MODAL = {modal.english: modal for modal in (*MODALS, WILL)}


def phrase(text: str, *, plural: bool = False) -> NounPhrase:
    """``the old man`` from its words; the noun in the singular even where ``plural``."""
    determiner, *adjective, noun = ["" if word == "-" else word for word in text.split()]
    return noun_phrase(
        determiner, ADJECTIVE[adjective[0]] if adjective else None, NOUN[noun], plural=plural
    )


# Nominative, accusative, dative.
SINGULAR = {
    "the old man": "der alte Mann | den alten Mann | dem alten Mann",
    "the old woman": "die alte Frau | die alte Frau | der alten Frau",
    "the old child": "das alte Kind | das alte Kind | dem alten Kind",
    "a old man": "ein alter Mann | einen alten Mann | einem alten Mann",
    "a old woman": "eine alte Frau | eine alte Frau | einer alten Frau",
    "a old child": "ein altes Kind | ein altes Kind | einem alten Kind",
    "- cold coffee": "kalter Kaffee | kalten Kaffee | kaltem Kaffee",
    "- cold milk": "kalte Milch | kalte Milch | kalter Milch",
    "- cold water": "kaltes Wasser | kaltes Wasser | kaltem Wasser",
    "this boy": "dieser Junge | diesen Jungen | diesem Jungen",
    "this cat": "diese Katze | diese Katze | dieser Katze",
    "this horse": "dieses Pferd | dieses Pferd | diesem Pferd",
    "every brave lion": "jeder mutige Löwe | jeden mutigen Löwen | jedem mutigen Löwen",
    "which new book": "welches neue Buch | welches neue Buch | welchem neuen Buch",
    "no big table": "kein großer Tisch | keinen großen Tisch | keinem großen Tisch",
    "no neighbour": "kein Nachbar | keinen Nachbarn | keinem Nachbarn",
    "my expensive car": "mein teures Auto | mein teures Auto | meinem teuren Auto",
    "your dark kitchen": "deine dunkle Küche | deine dunkle Küche | deiner dunklen Küche",
    "his tired student": "sein müder Student | seinen müden Studenten | seinem müden Studenten",
    "her colleague": "ihr Kollege | ihren Kollegen | ihrem Kollegen",
    "our quiet house": "unser ruhiges Haus | unser ruhiges Haus | unserem ruhigen Haus",
    "our bag": "unsere Tasche | unsere Tasche | unserer Tasche",
    "their customer": "ihr Kunde | ihren Kunden | ihrem Kunden",
    "the bear": "der Bär | den Bären | dem Bären",
}
PLURAL = {
    "the old man": "die alten Männer | die alten Männer | den alten Männern",
    "the girl": "die Mädchen | die Mädchen | den Mädchen",
    "the car": "die Autos | die Autos | den Autos",
    "the doctor": "die Ärzte | die Ärzte | den Ärzten",
    "the queen": "die Königinnen | die Königinnen | den Königinnen",
    "the bench": "die Bänke | die Bänke | den Bänken",
    "the key": "die Schlüssel | die Schlüssel | den Schlüsseln",
    "this white bird": "diese weißen Vögel | diese weißen Vögel | diesen weißen Vögeln",
    "- fresh egg": "frische Eier | frische Eier | frischen Eiern",
    "no good story": "keine guten Geschichten | keine guten Geschichten | keinen guten Geschichten",
    "our mouse": "unsere Mäuse | unsere Mäuse | unseren Mäusen",
    "which long poem": "welche langen Gedichte | welche langen Gedichte | welchen langen Gedichten",
}


@pytest.mark.parametrize(
    ("text", "plural", "expected"),
    [(text, False, forms) for text, forms in SINGULAR.items()]
    + [(text, True, forms) for text, forms in PLURAL.items()],
)
def test_noun_phrases_agree_in_case_gender_and_number(
    text: str, plural: bool, expected: str
) -> None:
    assert " | ".join(phrase(text, plural=plural).german[:3]) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the man", "des Mannes"),
        ("the old teacher", "des alten Lehrers"),
        ("a boy", "eines Jungen"),
        ("this neighbour", "dieses Nachbarn"),
        ("my father", "meines Vaters"),
        ("every child", "jedes Kindes"),
        ("the queen", "der Königin"),
        ("our rich aunt", "unserer reichen Tante"),
        ("the girl", "des Mädchens"),
    ],
)
def test_genitives(text: str, expected: str) -> None:
    assert phrase(text).german[Case.GEN] == expected


def test_an_owner_moves_behind_what_is_owned() -> None:
    owned = with_owner(phrase("the boy"), ADJECTIVE["old"], NOUN["dog"])
    assert owned.english == "the boy's old dog"
    assert owned.german[Case.ACC] == "den alten Hund des Jungen"


@pytest.mark.parametrize(
    ("text", "plural", "expected"),
    [
        ("a old man", False, "an old man"),
        ("a apple", False, "an apple"),
        ("a red apple", False, "a red apple"),
        ("a umbrella", False, "an umbrella"),
        ("this mouse", True, "these mice"),
        ("- knife", True, "knives"),
        ("the child", True, "the children"),
    ],
)
def test_english_noun_phrases(text: str, plural: bool, expected: str) -> None:
    assert phrase(text, plural=plural).english == expected


@pytest.mark.parametrize(
    ("preposition", "text", "case", "expected"),
    [
        ("in", "the garden", Case.DAT, "im Garten"),
        ("in", "the garden", Case.ACC, "in den Garten"),
        ("in", "the old house", Case.ACC, "ins alte Haus"),
        ("in", "the kitchen", Case.DAT, "in der Küche"),
        ("in", "a house", Case.DAT, "in einem Haus"),
        ("zu", "the doctor", Case.DAT, "zum Arzt"),
        ("zu", "the aunt", Case.DAT, "zur Tante"),
        ("zu", "my aunt", Case.DAT, "zu meiner Tante"),
        ("von", "the teacher", Case.DAT, "vom Lehrer"),
        ("auf", "the table", Case.ACC, "auf den Tisch"),
        ("auf", "the table", Case.DAT, "auf dem Tisch"),
        ("an", "the wall", Case.DAT, "an der Wand"),
    ],
)
def test_prepositions_take_their_case_and_contract(
    preposition: str, text: str, case: Case, expected: str
) -> None:
    assert prepositional(preposition, phrase(text), case) == expected


def test_relative_pronouns() -> None:
    forms = {
        text: [relative_pronoun(phrase(text), case) for case in (Case.NOM, Case.ACC, Case.DAT)]
        for text in ("the man", "the woman", "the child")
    }
    assert forms == {
        "the man": ["der", "den", "dem"],
        "the woman": ["die", "die", "der"],
        "the child": ["das", "das", "dem"],
    }
    plural = phrase("the man", plural=True)
    assert [relative_pronoun(plural, case) for case in (Case.NOM, Case.ACC, Case.DAT)] == [
        "die", "die", "denen",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("noun", "expected"), [("table", "er"), ("lamp", "sie"), ("book", "es"), ("shoe", "er")]
)
def test_it_takes_the_gender_of_its_noun(noun: str, expected: str) -> None:
    pronoun = pronoun_for(phrase(f"the {noun}"))
    assert (pronoun.english, pronoun.german[Case.NOM]) == ("it", expected)
    assert pronoun_for(phrase(f"the {noun}", plural=True)) is PERSONAL["they"]


def test_numbers_turn_round() -> None:
    table = {
        0: "null", 1: "eins", 6: "sechs", 7: "sieben", 10: "zehn", 11: "elf", 12: "zwölf",
        13: "dreizehn", 16: "sechzehn", 17: "siebzehn", 19: "neunzehn", 20: "zwanzig",
        21: "einundzwanzig", 23: "dreiundzwanzig", 30: "dreißig", 31: "einunddreißig",
        35: "fünfunddreißig", 40: "vierzig", 47: "siebenundvierzig", 56: "sechsundfünfzig",
        60: "sechzig", 66: "sechsundsechzig", 70: "siebzig", 77: "siebenundsiebzig",
        82: "zweiundachtzig", 90: "neunzig", 98: "achtundneunzig", 99: "neunundneunzig",
    }  # fmt: skip
    assert {number: number_in_german(number) for number in table} == table
    assert number_in_english(23) == "twenty-three"
    assert number_in_english(40) == "forty"
    assert len({number_in_german(number) for number in range(100)}) == 100
    assert len({number_in_english(number) for number in range(100)}) == 100


@pytest.mark.parametrize("number", [-1, 100])
def test_numbers_beyond_two_digits_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match="only 0 to 99"):
        number_in_german(number)


def test_a_number_takes_the_plural_and_strong_endings() -> None:
    counted = with_number("four", "vier", ADJECTIVE["old"], NOUN["man"])
    assert counted.english == "four old men"
    assert counted.german[:3] == ("vier alte Männer", "vier alte Männer", "vier alten Männern")


# ich, du, er, wir; participle with auxiliary.
VERB_FORMS = {
    "read": "lese liest liest lesen | gelesen haben",
    "see": "sehe siehst sieht sehen | gesehen haben",
    "eat": "esse isst isst essen | gegessen haben",
    "sleep": "schlafe schläfst schläft schlafen | geschlafen haben",
    "run": "laufe läufst läuft laufen | gelaufen sein",
    "help": "helfe hilfst hilft helfen | geholfen haben",
    "give": "gebe gibst gibt geben | gegeben haben",
    "forget": "vergesse vergisst vergisst vergessen | vergessen haben",
    "wash": "wasche wäschst wäscht waschen | gewaschen haben",
    "feed": "füttere fütterst füttert füttern | gefüttert haben",
    "wait": "warte wartest wartet warten | gewartet haben",
    "find": "finde findest findet finden | gefunden haben",
    "greet": "grüße grüßt grüßt grüßen | gegrüßt haben",
    "repair": "repariere reparierst repariert reparieren | repariert haben",
    "close": "mache machst macht machen | zugemacht haben",
    "invite": "lade lädst lädt laden | eingeladen haben",
    "take along": "nehme nimmst nimmt nehmen | mitgenommen haben",
    "throw away": "werfe wirfst wirft werfen | weggeworfen haben",
    "get up": "stehe stehst steht stehen | aufgestanden sein",
    "go": "gehe gehst geht gehen | gegangen sein",
    "follow": "folge folgst folgt folgen | gefolgt sein",
    "like": "gefalle gefällst gefällt gefallen | gefallen haben",
}


@pytest.mark.parametrize("name", VERB_FORMS)
def test_verb_forms(name: str) -> None:
    verb = VERB[name]
    assert f"{' '.join(verb.forms)} | {verb.participle} {verb.auxiliary}" == VERB_FORMS[name]


def close_the_window(subject: NounPhrase, mode: str = "present", **more: object) -> Clause:
    return Clause(
        subject, VERB["close"], "the window", objects="das Fenster",
        mode=MODAL.get(mode, mode), **more,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "english", "main", "question", "final"),
    [
        ("present", "the man closes the window", "der Mann macht das Fenster zu",
         "macht der Mann das Fenster zu", "weil der Mann das Fenster zumacht"),
        ("perfect", "the man has closed the window", "der Mann hat das Fenster zugemacht",
         "hat der Mann das Fenster zugemacht", "weil der Mann das Fenster zugemacht hat"),
        ("wants to", "the man wants to close the window", "der Mann will das Fenster zumachen",
         "will der Mann das Fenster zumachen", "weil der Mann das Fenster zumachen will"),
        ("will", "the man will close the window", "der Mann wird das Fenster zumachen",
         "wird der Mann das Fenster zumachen", "weil der Mann das Fenster zumachen wird"),
    ],
)  # fmt: skip
def test_the_verb_takes_its_places(
    mode: str, english: str, main: str, question: str, final: str
) -> None:
    clause = close_the_window(phrase("the man"), mode)
    assert clause.english() == english
    assert clause.german_second() == main
    assert clause.german_first() == question
    assert clause.german_final("weil") == final


def test_zu_goes_between_prefix_and_verb() -> None:
    assert close_the_window(PERSONAL["I"]).german_infinitive() == "das Fenster zuzumachen"
    assert Clause(PERSONAL["I"], VERB["read"]).german_infinitive() == "zu lesen"


def test_pronoun_object_negation_complement_keep_their_order() -> None:
    clause = Clause(
        PERSONAL["she"], VERB["give"], "me the book", pronoun="mir", objects="das Buch",
        mode="perfect", negated=True,
    )  # fmt: skip
    assert clause.german_second() == "sie hat mir das Buch nicht gegeben"
    waiting = Clause(
        PERSONAL["you"], VERB["wait for"], "the guest", complement="auf den Gast", negated=True
    )
    assert waiting.german_second() == "du wartest nicht auf den Gast"
    assert waiting.english() == "you do not wait for the guest"


@pytest.mark.parametrize(
    ("mode", "statement", "denied", "asked"),
    [
        ("present", "closes", "does not close", "does the man close"),
        ("perfect", "has closed", "has not closed", "has the man closed"),
        ("can", "can close", "cannot close", "can the man close"),
        ("wants to", "wants to close", "does not want to close", "does the man want to close"),
        ("would like to", "would like to close", "would not like to close",
         "would the man like to close"),
    ],
)  # fmt: skip
def test_english_verbs(mode: str, statement: str, denied: str, asked: str) -> None:
    man = phrase("the man")
    assert close_the_window(man, mode).english() == f"the man {statement} the window"
    negated = close_the_window(man, mode, negated=True)
    assert negated.english() == f"the man {denied} the window"
    assert close_the_window(man, mode).english_question() == f"{asked} the window"


def test_be_agrees_with_each_person() -> None:
    forms = [Clause(one, BE, "tired", complement="müde") for one in PRONOUNS]
    assert [one.english() for one in forms] == [
        "I am tired", "you are tired", "he is tired", "she is tired", "we are tired",
        "they are tired",
    ]  # fmt: skip
    assert [one.german_second() for one in forms] == [
        "ich bin müde", "du bist müde", "er ist müde", "sie ist müde", "wir sind müde",
        "sie sind müde",
    ]  # fmt: skip
    assert forms[0].english_question() == "am I tired"


def test_joined_subjects_take_the_plural() -> None:
    both = joined(phrase("the man"), phrase("the woman"))
    assert Clause(both, VERB["sleep"]).german_second() == "der Mann und die Frau schlafen"
    assert Clause(both, VERB["sleep"]).english() == "the man and the woman sleep"


# Properties of the tables.


def test_the_lexicon_is_a_function_from_english_to_german() -> None:
    for words in (
        [noun.english for noun in NOUNS],
        [adjective.english for adjective in ADJECTIVES],
        [verb.english for verb in (*TRANSITIVE, *INTRANSITIVE, *DATIVE, *PREPOSITIONAL)],
    ):
        assert [word for word, count in Counter(words).items() if count > 1] == []
    assert len(NOUNS) + len(ADJECTIVES) + len(ALL_VERBS) >= 200


def regular_third(base: str) -> str:
    verb, _, particle = base.partition(" ")
    irregular = {"be": "is"}
    if verb in irregular:
        third = irregular[verb]
    elif verb.endswith(("s", "sh", "ch", "o", "x")):
        third = verb + "es"
    elif verb[-1] == "y" and verb[-2] not in "aeiou":
        third = verb[:-1] + "ies"
    else:
        third = verb + "s"
    return f"{third} {particle}".strip()


@pytest.mark.parametrize("verb", ALL_VERBS, ids=lambda verb: verb.english)
def test_every_verb_has_well_formed_entries(verb: Verb) -> None:
    assert verb.english_third == regular_third(verb.english)
    assert verb.participle.startswith(verb.prefix)
    assert verb.infinitive.endswith("n")
    assert verb.infinitive == verb.prefix + verb.forms[3]
    assert verb.forms[1][-1] == "t" or verb.forms[1].endswith("st")
    assert verb.forms[2].endswith("t") or verb.infinitive == "wissen"
    assert verb.auxiliary in ("haben", "sein")


def test_every_german_noun_is_capitalised() -> None:
    assert all(noun.german[0].isupper() for noun in NOUNS)
    assert all(noun.german_plural[:1].isupper() for noun in NOUNS if noun.english_plural)


# Properties of what is generated.

NUM_TRAIN, NUM_HELD_OUT = 20_000, 500
HELD_OUT: tuple[Split, ...] = ("valid", "test")


@cache
def drawn(split: Split, seed: int = 1) -> list[Sentence]:
    return list(sentences(split, NUM_TRAIN if split == "train" else NUM_HELD_OUT, seed=seed))


@pytest.fixture(scope="module")
def train() -> list[Sentence]:
    return drawn("train")


@pytest.fixture(scope="module")
def samples(train: list[Sentence]) -> list[Sentence]:
    return train[:4000]


def test_every_pattern_occurs_often_in_every_split(train: list[Sentence]) -> None:
    assert len(PATTERNS) >= 14
    counts = Counter(one.pattern for one in train)
    assert set(counts) == set(PATTERNS)
    assert min(counts.values()) >= 200
    for split in HELD_OUT:
        assert {one.pattern for one in drawn(split)} == set(PATTERNS)


def test_lengths_vary(train: list[Sentence]) -> None:
    lengths = Counter(len(one.german.split()) for one in train)
    assert min(lengths) <= 3
    assert 18 <= max(lengths) <= 22
    assert max(len(one.english.split()) for one in train) <= 22


def test_sentences_are_well_formed(samples: list[Sentence]) -> None:
    mark = {"imperative": "!", "yes_no_question": "?", "wh_question": "?"}
    for one in samples:
        for text in (one.english, one.german):
            assert text[0].isupper(), text
            assert text[-1] == mark.get(one.pattern, "."), text
            assert not re.search(r"  | [,.?!]|,\S|[-|_]$|\bNone\b|\b-\b ", text), text
            assert text[:-1].count(".") + text[:-1].count("?") + text[:-1].count("!") == 0
        assert re.fullmatch(r"[A-Za-z ,.'?!-]+", one.english), one.english
        assert re.fullmatch(r"[A-Za-zÄÖÜäöüß ,.?!]+", one.german), one.german


def test_a_before_consonants_an_before_vowels(train: list[Sentence]) -> None:
    for one in train:
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", one.english), one.english


def test_subordinate_clauses_end_with_their_finite_verb(train: list[Sentence]) -> None:
    finite = {
        form
        for verb in ALL_VERBS
        for form in (*(verb.prefix + form for form in verb.forms), *BE.forms)
    }
    finite |= {form for modal in MODAL.values() for form in modal.forms}
    finite |= {"habe", "hast", "hat", "haben", "weiß", "weißt", "wissen"}
    openings = "weil|obwohl|wenn|bevor|während|falls|dass|ob"
    num_clauses = 0
    for one in train:
        for clause in re.findall(rf"\b(?:{openings})\b ([^,.]+)", one.german.lower()):
            num_clauses += 1
            assert clause.split()[-1] in finite, one.german
    assert num_clauses > 1000


def test_relative_clauses_stand_between_commas(train: list[Sentence]) -> None:
    relative = [one for one in train if one.pattern == "relative"]
    assert all(one.german.count(",") == 2 for one in relative)
    assert all(re.search(r", (der|die|das|den|dem|denen) ", one.german) for one in relative)


def test_german_commas_and_clauses_agree(train: list[Sentence]) -> None:
    commas = {
        "subordinate": {1}, "reported": {1}, "relative": {2}, "infinitive": {1}, "reference": {1},
        "coordination": {0, 1},
    }  # fmt: skip
    for one in train:
        assert one.german.count(",") in commas.get(one.pattern, {0}), one.german


def test_separable_prefixes_stand_at_the_end(train: list[Sentence]) -> None:
    prefixes = {verb.prefix for verb in ALL_VERBS if verb.prefix}
    separable = [one for one in train if one.pattern == "separable"]
    assert all(one.german[:-1].split()[-1] in prefixes for one in separable)


def test_german_nouns_are_capitalised_and_little_else(samples: list[Sentence]) -> None:
    nouns = {noun.german for noun in NOUNS} | {noun.german_plural for noun in NOUNS}
    nouns |= {noun.genitive for noun in NOUNS} | {noun.german_plural + "n" for noun in NOUNS}
    times = set(
        re.findall(
            r"\w+",
            "Tag Morgen Abend Nacht Woche Monat Jahr Jahre Mittag Montag Dienstag Mittwoch "
            "Donnerstag Freitag Samstag Sonntag Frühling Sommer Herbst Winter Uhr",
        )
    )
    for one in samples:
        for word in word_forms(one.german)[1:]:
            if word[0].isupper():
                assert word in nouns | times, one.german


# Splits.


def test_pairs_differ_within_a_split(train: list[Sentence]) -> None:
    assert len({one.english for one in train}) == len(train) == NUM_TRAIN


def test_translation_is_a_function(train: list[Sentence]) -> None:
    german = {one.english: one.german for one in train}
    for one in (*drawn("train", 2), *drawn("test"), *drawn("valid")):
        assert german.setdefault(one.english, one.german) == one.german


@pytest.mark.parametrize("split", HELD_OUT)
def test_held_out_combinations_never_occur_in_train(train: list[Sentence], split: Split) -> None:
    held_out = drawn(split)
    seen = {combination for one in train for combination in one.combinations}
    for one in held_out:
        mine = {combination for combination in one.combinations if split_of(combination) == split}
        assert mine, one
        assert not mine & seen, one
    # An independent look at the sentences themselves, adjective and noun side by side.
    pairs = {
        f"{combination.first} {combination.second}"
        for one in held_out
        for combination in one.combinations
        if combination.kind == "adjective+noun" and split_of(combination) == split
    }
    text = "\n".join(one.english.lower() for one in train if one.pattern != "comparison")
    assert len(pairs) > 10
    assert [pair for pair in pairs if re.search(rf"\b{pair}\b", text)] == []


def test_splits_share_no_sentence_whatever_the_seeds(train: list[Sentence]) -> None:
    texts: dict[Split, set[str]] = {"train": {one.english for one in train}}
    for split in HELD_OUT:
        texts[split] = {one.english for seed in (1, 2) for one in drawn(split, seed)}
    for one, other in combinations(texts.values(), 2):
        assert not one & other


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_word_form_of_a_held_out_sentence_occurs_in_train(seed: int) -> None:
    english = {word for one in drawn("train", seed) for word in word_forms(one.english)}
    german = {word for one in drawn("train", seed) for word in word_forms(one.german)}
    for split in HELD_OUT:
        for one in drawn(split, seed):
            assert not set(word_forms(one.english)) - english, one
            assert not set(word_forms(one.german)) - german, one


def test_the_rule_gives_each_split_about_its_share() -> None:
    counts = Counter(
        split_of(Combination("adjective+noun", str(first), str(second)))
        for first in range(100)
        for second in range(100)
    )
    assert 0.04 < counts["test"] / 10_000 < 0.06
    assert 0.02 < counts["valid"] / 10_000 < 0.04


# Determinism and bounds.


def digest(split: Split, num_pairs: int, seed: int) -> str:
    pairs = generate(split, num_pairs, seed=seed)
    return hashlib.sha256("".join(f"{one}\t{other}\n" for one, other in pairs).encode()).hexdigest()


def test_a_seed_gives_the_same_pairs_in_another_process() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import hashlib;"
        "from data_shards.embedded import generate;"
        "pairs = generate('test', 200, seed=5);"
        "text = ''.join(f'{a}\\t{b}\\n' for a, b in pairs);"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)],
        env={**os.environ, "PYTHONHASHSEED": "12345"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == digest("test", 200, 5)


def test_seeds_differ_and_a_shorter_corpus_begins_a_longer_one() -> None:
    assert digest("train", 50, 1) != digest("train", 50, 2)
    assert list(generate("train", 50)) == list(generate("train", 80))[:50]


def test_generation_streams() -> None:
    assert len(list(islice(generate("train", 10**9), 5))) == 5
    assert list(generate("train", 0)) == []


def test_asking_for_more_than_there_is_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"tiny": lambda draw: (f"{draw.number(1, 30)}.", "x.")}
    monkeypatch.setattr(embedded, "PATTERNS", numbers)
    monkeypatch.setattr(embedded, "WEIGHTED", ["tiny"])
    assert len(list(generate("train", 30))) == 30
    with pytest.raises(DataError, match="hardly more than 30 different train"):
        list(generate("train", 31))


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="no split 'dev'"):
        list(generate("dev", 1))  # type: ignore[arg-type]


def test_only_the_named_patterns_are_drawn() -> None:
    assert {one.pattern for one in sentences("train", 50, patterns=["passive"])} == {"passive"}
