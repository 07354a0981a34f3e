"""Random clauses of the generated corpus: the dice, and the frames that verbs bring with them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, TypeVar

from data_shards.embedded_grammar import (
    BE,
    CASES,
    PERSONAL,
    POSSESSIVES,
    PRONOUNS,
    Case,
    Clause,
    Mode,
    NounPhrase,
    noun_phrase,
    prepositional,
    words,
)
from data_shards.embedded_lexicon import (
    DATIVE,
    DITRANSITIVE,
    FUTURE_TIMES,
    INTRANSITIVE,
    MODALS,
    PERFECT_TIMES,
    PREPOSITIONAL,
    PRESENT_TIMES,
    TRANSITIVE,
    WILL,
    Adjective,
    Adverb,
    Noun,
    Verb,
    adjectives_of,
    nouns_of,
)

T = TypeVar("T")

BEINGS = frozenset({"person", "animal"})
GOODS = frozenset({"food", "text", "thing", "wear", "vehicle", "furniture"})
DESCRIBED = BEINGS | GOODS | {"drink", "place"}
STATES = frozenset({"love", "know", "need", "trust"})


class Combination(NamedTuple):
    """Two content words (English lemmas) that stand together, and how."""

    kind: Literal["adjective+noun", "subject+verb", "verb+object", "preposition+noun", "owner+noun"]
    first: str
    second: str


class Draw:
    """The dice of one sentence; remembers which combinations they made."""

    def __init__(self, rng: random.Random) -> None:
        self._random = rng.random
        self.combinations: set[Combination] = set()

    def pick(self, choices: Sequence[T]) -> T:
        """One of ``choices``. Only ``Random.random`` is used: its values are promised for ever."""
        return choices[int(self._random() * len(choices))]

    def chance(self, probability: float) -> bool:
        """True with ``probability``."""
        return self._random() < probability

    def number(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        return low + int(self._random() * (high + 1 - low))

    def adjective(self, noun: Noun, *, comparable: bool = False) -> Adjective:
        """An adjective that goes with ``noun``, noted as its attribute or predicate."""
        adjective = self.pick(adjectives_of(noun.classes, comparable=comparable))
        self.combinations.add(Combination("adjective+noun", adjective.english, noun.english))
        return adjective

    def maybe_adjective(self, noun: Noun, probability: float = 0.3) -> Adjective | None:
        """``adjective`` with ``probability``, else none."""
        return self.adjective(noun) if self.chance(probability) else None

    def noun(self, classes: frozenset[str], *, besides: str = "") -> Noun:
        """A noun of one of ``classes``, but not ``besides``."""
        noun = self.pick(nouns_of(classes))
        while noun.english == besides:
            noun = self.pick(nouns_of(classes))
        return noun

    def determiner(self, noun: Noun, *, plural: bool, bare: bool) -> str:
        """A determiner that suits; ``bare``: there may be none (``eats apples``)."""
        value = self._random()
        if value < 0.20 and "own" in noun.classes:
            return self.pick(POSSESSIVES)
        if value < 0.30:
            return "this"
        if plural or not noun.english_plural:
            return "" if bare and value < 0.60 else "the"
        if value < 0.36 and not bare:
            return "every"
        return "a" if value < 0.60 else "the"

    def phrase(
        self, classes: frozenset[str], *, besides: str = "", bare: bool = False
    ) -> NounPhrase:
        """A noun phrase whose noun belongs to one of ``classes`` and is not ``besides``."""
        noun = self.noun(classes, besides=besides)
        plural = bool(noun.english_plural) and self.chance(0.25)
        determiner = self.determiner(noun, plural=plural, bare=bare)
        return noun_phrase(determiner, self.maybe_adjective(noun), noun, plural=plural)

    def definite(self, classes: frozenset[str], *, besides: str = "") -> NounPhrase:
        """A phrase with ``the``, singular or plural."""
        noun = self.noun(classes, besides=besides)
        plural = bool(noun.english_plural) and self.chance(0.25)
        return noun_phrase("the", self.maybe_adjective(noun), noun, plural=plural)

    def subject(self, verb: Verb, *, pronouns: float = 0.25) -> NounPhrase:
        """A subject for ``verb``, a personal pronoun with that probability."""
        if "person" in verb.subjects and self.chance(pronouns):
            # "I" and "you" have verb forms of their own: draw them often.
            return self.pick((*PRONOUNS, PERSONAL["I"], PERSONAL["you"], PERSONAL["you"]))
        return self.doing(self.phrase(verb.subjects), verb)

    def object(
        self, verb: Verb, subject: NounPhrase, *, bare: bool = True, pronouns: float = 0.12
    ) -> NounPhrase:
        """An object for ``verb``; a pronoun differs in person from the subject."""
        if "person" in verb.objects and self.chance(pronouns):
            return self.pick([one for one in PRONOUNS if one.person is not subject.person])
        phrase = self.phrase(verb.objects, besides=subject.lemma, bare=bare)
        return self.undergoing(phrase, verb)

    def doing(self, subject: NounPhrase, verb: Verb) -> NounPhrase:
        """``subject``, noted as the subject of ``verb``."""
        if subject.lemma:
            self.combinations.add(Combination("subject+verb", subject.lemma, verb.english))
        return subject

    def undergoing(self, phrase: NounPhrase, verb: Verb) -> NounPhrase:
        """``phrase``, noted as an object of ``verb``."""
        if phrase.lemma:
            self.combinations.add(Combination("verb+object", verb.english, phrase.lemma))
        return phrase

    def mode(self) -> Mode:
        """Present, perfect, modal or future; the present most often."""
        value = self._random()
        if value < 0.65:
            return "present"
        if value < 0.80:
            return "perfect"
        return WILL if value < 0.85 else self.pick(MODALS)

    def adverb(
        self, verb: Verb, mode: Mode = "present", probability: float = 0.25
    ) -> Adverb | None:
        """An expression of time that the tense and the verb allow, or none."""
        if not self.chance(probability):
            return None
        if mode is WILL:
            return self.pick(FUTURE_TIMES)
        if mode == "perfect":
            return self.pick(PERFECT_TIMES)
        # One loves now, not at ten o'clock.
        return self.pick(PRESENT_TIMES[:2] if verb.english in STATES else PRESENT_TIMES)


# Frames: what a verb needs beside its subject. Each returns a clause in the present tense.

Frame = Callable[[Draw, NounPhrase | None], Clause]


def with_object(clause: Clause, phrase: NounPhrase, case: Case) -> Clause:
    """``clause`` with one object more, in front of those it has."""
    form = phrase.german[case]
    rest = words(phrase.english_object, clause.english_rest)
    if phrase.is_pronoun:
        return replace(clause, english_rest=rest, pronoun=form)
    return replace(clause, english_rest=rest, objects=words(form, clause.objects))


def start(draw: Draw, verb: Verb, subject: NounPhrase | None) -> Clause:
    """A clause of ``verb`` and ``subject``, or a subject drawn for it."""
    return Clause(draw.doing(subject, verb) if subject else draw.subject(verb), verb)


def _for_subject(draw: Draw, verbs: Sequence[Verb], subject: NounPhrase | None) -> Verb:
    """A verb, one that a given subject can do."""
    if subject is None or subject.human:
        return draw.pick(verbs)
    return draw.pick([verb for verb in verbs if "animal" in verb.subjects])


def intransitive(draw: Draw, subject: NounPhrase | None = None) -> Clause:
    """The child sleeps."""
    return start(draw, _for_subject(draw, INTRANSITIVE, subject), subject)


def transitive(draw: Draw, subject: NounPhrase | None = None) -> Clause:
    """The child reads a book: accusative."""
    clause = start(draw, _for_subject(draw, TRANSITIVE, subject), subject)
    return with_object(clause, draw.object(clause.verb, clause.subject), Case.ACC)


def dative(draw: Draw, subject: NounPhrase | None = None) -> Clause:
    """The child helps the man: dative."""
    clause = start(draw, _for_subject(draw, DATIVE, subject), subject)
    return with_object(clause, draw.object(clause.verb, clause.subject, bare=False), Case.DAT)


def ditransitive(draw: Draw, subject: NounPhrase | None = None) -> Clause:
    """The child gives the man a book: dative, then accusative."""
    clause = start(draw, draw.pick(DITRANSITIVE), subject)
    clause = with_object(clause, draw.object(clause.verb, clause.subject, pronouns=0), Case.ACC)
    if draw.chance(0.2):
        receiver = draw.pick([one for one in PRONOUNS if one.person is not clause.subject.person])
    else:
        receiver = draw.phrase(frozenset({"person"}), besides=clause.subject.lemma)
    return with_object(clause, receiver, Case.DAT)


def prepositional_object(draw: Draw, subject: NounPhrase | None = None) -> Clause:
    """The child waits for the man: the preposition and case that the verb governs."""
    clause = start(draw, _for_subject(draw, PREPOSITIONAL, subject), subject)
    verb = clause.verb
    about = draw.object(verb, clause.subject, bare=False)
    german = prepositional(verb.preposition, about, CASES[verb.case])
    return replace(clause, english_rest=about.english_object, complement=german)


_FRAMES: tuple[Frame, ...] = (
    intransitive, transitive, transitive, transitive, dative, ditransitive, prepositional_object,
)  # fmt: skip
_ANIMAL_FRAMES: tuple[Frame, ...] = (intransitive, transitive, dative, prepositional_object)
DEGREES = (("very", "sehr"), ("too", "zu"), ("quite", "ziemlich"), ("", ""))


def clause_of(draw: Draw, subject: NounPhrase | None = None, mode: Mode | None = None) -> Clause:
    """Any frame, in any mode unless one is given, with or without an expression of time."""
    frames = _FRAMES if subject is None or subject.human else _ANIMAL_FRAMES
    chosen = draw.mode() if mode is None else mode
    clause = draw.pick(frames)(draw, subject)
    return replace(clause, mode=chosen, adverb=draw.adverb(clause.verb, chosen))


def being(subject: NounPhrase, adjective: Adjective, degree: tuple[str, str] = ("", "")) -> Clause:
    """The child is (very) tired."""
    english, german = degree
    return Clause(
        subject, BE, words(english, adjective.english), complement=words(german, adjective.german)
    )


def copula(draw: Draw, classes: frozenset[str] = DESCRIBED) -> Clause:
    """``being`` with a drawn subject and an adjective that fits it."""
    noun = draw.noun(classes)
    plural = bool(noun.english_plural) and draw.chance(0.25)
    subject = noun_phrase(draw.determiner(noun, plural=plural, bare=False), None, noun,
                          plural=plural)  # fmt: skip
    return being(subject, draw.adjective(noun), draw.pick(DEGREES))
