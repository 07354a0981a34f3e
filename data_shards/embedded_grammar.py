"""Phrases and clauses of the generated corpus, in English and German side by side.

German clauses are built from their topological fields: the finite verb stands second, first or
last, everything else keeps its order::

    front field   finite   middle field                               right bracket
    Heute         macht    der Mann das Fenster nicht                 zu
    -             (weil)   der Mann das Fenster heute                 zumacht
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache
from typing import Literal

from data_shards.embedded_lexicon import Adjective, Adverb, Modal, Noun, Verb


class Case(IntEnum):
    """The four cases; an index into every table of forms."""

    NOM, ACC, DAT, GEN = range(4)


class Person(IntEnum):
    """Who the finite verb agrees with; an index into ``Verb.forms`` (``you`` is always ``du``)."""

    I, YOU, HE, WE = range(4)  # noqa: E741


CASES = {"acc": Case.ACC, "dat": Case.DAT}
Column = Literal["m", "f", "n", "plural"]

# Per column the four cases' endings. DER: of the words that inflect like the article (dies-er).
_THE = {
    "m": ("der", "den", "dem", "des"),
    "f": ("die", "die", "der", "der"),
    "n": ("das", "das", "dem", "des"),
    "plural": ("die", "die", "den", "der"),
}
_DER_ENDINGS = {
    "m": ("er", "en", "em", "es"),
    "f": ("e", "e", "er", "er"),
    "n": ("es", "es", "em", "es"),
    "plural": ("e", "e", "en", "er"),
}
_EIN_ENDINGS = {**_DER_ENDINGS, "m": ("", "en", "em", "es"), "n": ("", "", "em", "es")}
_WEAK = {
    "m": ("e", "en", "en", "en"),
    "f": ("e", "e", "en", "en"),
    "n": ("e", "e", "en", "en"),
    "plural": ("en", "en", "en", "en"),
}
_MIXED = {**_WEAK, "m": ("er", "en", "en", "en"), "n": ("es", "es", "en", "en")}
_STRONG = {**_DER_ENDINGS, "m": ("er", "en", "em", "en"), "n": ("es", "es", "em", "en")}

_DER_WORDS = {"this": "dies", "every": "jed", "which": "welch"}
_EIN_WORDS = {
    "a": "ein", "no": "kein", "my": "mein", "your": "dein", "his": "sein", "her": "ihr",
    "our": "unser", "their": "ihr",
}  # fmt: skip
POSSESSIVES = ("my", "your", "his", "her", "our", "their")

_CONTRACTIONS = {
    ("in", "dem"): "im", ("in", "das"): "ins", ("an", "dem"): "am", ("zu", "dem"): "zum",
    ("zu", "der"): "zur", ("von", "dem"): "vom", ("bei", "dem"): "beim",
}  # fmt: skip

_HAVE = ("habe", "hast", "hat", "haben")
_SEIN = ("bin", "bist", "ist", "sind")
BE = Verb("be", "is", "been", _SEIN, "sein", "", "gewesen", "sei", "sein", frozenset(), frozenset())


def words(*parts: str) -> str:
    """The parts that are not empty, with blanks between."""
    return " ".join(filter(None, parts))


def sentence(text: str, mark: str = ".") -> str:
    """Capital first letter, final mark."""
    return text[0].upper() + text[1:] + mark


def article(following: str) -> str:
    """``a`` or ``an`` before ``following``."""
    return "an" if following[0] in "aeiou" else "a"


def _german_determiner(determiner: str, column: Column, case: Case) -> str:
    if determiner == "the":
        return _THE[column][case]
    if determiner in _DER_WORDS:
        return _DER_WORDS[determiner] + _DER_ENDINGS[column][case]
    if determiner in _EIN_WORDS:
        return _EIN_WORDS[determiner] + _EIN_ENDINGS[column][case]
    return ""


def _adjective_endings(determiner: str) -> dict[str, tuple[str, str, str, str]]:
    if determiner == "the" or determiner in _DER_WORDS:
        return _WEAK
    return _MIXED if determiner in _EIN_WORDS else _STRONG


def german_noun(noun: Noun, column: Column, case: Case) -> str:
    """The noun's form: plural, the dative plural's -n, the genitive, the n-declension."""
    if column == "plural":
        plural = noun.german_plural
        return plural + "n" if case is Case.DAT and plural[-1] not in "ns" else plural
    if case is Case.GEN:
        assert noun.genitive, noun
        return noun.genitive
    return noun.german_plural if noun.weak and case is not Case.NOM else noun.german


def german_noun_phrase(
    determiner: str, adjective: Adjective | None, noun: Noun, column: Column, case: Case
) -> str:
    """One German noun phrase.

    Args:
        determiner: English (``the``, ``a``, ``this``, ``every``, ``which``, ``no`` or a
            possessive), empty for none.
    """
    attribute = ""
    if adjective:
        attribute = adjective.stem + _adjective_endings(determiner)[column][case]
    return words(
        _german_determiner(determiner, column, case), attribute, german_noun(noun, column, case)
    )


@dataclass(frozen=True, slots=True)
class NounPhrase:
    """A noun phrase or pronoun in both languages.

    ``german`` holds the four cases; ``lemma`` is the English noun, empty for a pronoun.
    """

    english: str
    english_object: str
    german: tuple[str, str, str, str]
    person: Person
    column: Column
    lemma: str = ""
    human: bool = True
    determiner: str = ""

    @property
    def plural(self) -> bool:
        """Whether English and German verbs take their plural."""
        return self.person is Person.WE

    @property
    def is_pronoun(self) -> bool:
        """Pronouns stand first in the German middle field."""
        return not self.lemma

    @property
    def third(self) -> bool:
        """Whether the English verb takes its -s."""
        return self.person is Person.HE


PRONOUNS = tuple(
    NounPhrase(english, english_object, (*forms.split(), ""), person, column)  # type: ignore[arg-type]
    for english, english_object, forms, person, column in (
        ("I", "me", "ich mich mir", Person.I, "m"),
        ("you", "you", "du dich dir", Person.YOU, "m"),
        ("he", "him", "er ihn ihm", Person.HE, "m"),
        ("she", "her", "sie sie ihr", Person.HE, "f"),
        ("we", "us", "wir uns uns", Person.WE, "plural"),
        ("they", "them", "sie sie ihnen", Person.WE, "plural"),
    )
)
PERSONAL = {pronoun.english: pronoun for pronoun in PRONOUNS}


@cache
def noun_phrase(
    determiner: str, adjective: Adjective | None, noun: Noun, *, plural: bool = False
) -> NounPhrase:
    """A full noun phrase; see ``german_noun_phrase`` for the determiners."""
    column: Column = "plural" if plural else noun.gender
    name = noun.english_plural if plural else noun.english
    rest = words(adjective.english if adjective else "", name)
    english = {"a": article(rest), "this": "these" if plural else "this"}
    text = words(english.get(determiner, determiner), rest)
    cases = list(Case) if noun.genitive else [Case.NOM, Case.ACC, Case.DAT]
    forms = [german_noun_phrase(determiner, adjective, noun, column, case) for case in cases]
    forms += [""] * (4 - len(forms))
    return NounPhrase(
        text, text, (forms[0], forms[1], forms[2], forms[3]),
        Person.WE if plural else Person.HE, column, noun.english,
        "person" in noun.classes, determiner,
    )  # fmt: skip


def with_number(english: str, german: str, adjective: Adjective | None, noun: Noun) -> NounPhrase:
    """``twenty-three old dogs``: a numeral above one, a plural noun, strong adjective endings."""
    bare = noun_phrase("", adjective, noun, plural=True)
    nominative, accusative, dative, _ = (f"{german} {form}" for form in bare.german)
    text = f"{english} {bare.english}"
    return replace(
        bare, english=text, english_object=text, german=(nominative, accusative, dative, "")
    )


def with_owner(owner: NounPhrase, adjective: Adjective | None, noun: Noun) -> NounPhrase:
    """``the boy's old dog`` → ``der alte Hund des Jungen``: the owner moves behind."""
    owned = noun_phrase("the", adjective, noun)
    text = f"{owner.english}'s {owned.english.removeprefix('the ')}"
    genitive = owner.german[Case.GEN]
    assert genitive, owner
    nominative, accusative, dative, _ = (f"{form} {genitive}" for form in owned.german)
    return replace(
        owned, english=text, english_object=text, german=(nominative, accusative, dative, "")
    )


def joined(left: NounPhrase, right: NounPhrase) -> NounPhrase:
    """``the man and the woman``, a plural."""
    text = f"{left.english} and {right.english}"
    forms = [f"{one} und {other}" for one, other in zip(left.german, right.german, strict=True)]
    return NounPhrase(
        text, text, (forms[0], forms[1], forms[2], ""), Person.WE, "plural", right.lemma
    )


def pronoun_for(phrase: NounPhrase) -> NounPhrase:
    """What stands for a thing later in the sentence: ``it`` takes the German noun's gender."""
    if phrase.plural:
        return PERSONAL["they"]
    nominative = {"m": "er", "f": "sie", "n": "es"}[phrase.column]
    return NounPhrase("it", "it", (nominative, "", "", ""), Person.HE, phrase.column)


def relative_pronoun(head: NounPhrase, case: Case) -> str:
    """The German relative pronoun: ``head``'s gender and number, the ``case`` of its own clause."""
    return "denen" if head.plural and case is Case.DAT else _THE[head.column][case]


def prepositional(preposition: str, phrase: NounPhrase, case: Case) -> str:
    """The German prepositional phrase, contracted where one contracts (``im``, ``zum``)."""
    form = phrase.german[case]
    first, _, rest = form.partition(" ")
    short = _CONTRACTIONS.get((preposition, first)) if rest else None
    return f"{short} {rest}" if short else f"{preposition} {form}"


Mode = Literal["present", "perfect", "passive"] | Modal


@dataclass(frozen=True, slots=True)
class Clause:
    """A subject and what is said of it, before anything is put in order.

    ``english_rest`` follows the English verb; the German parts are the middle field in the order
    in which they stand in it: the adverb after the pronoun, ``nicht`` before the complement (a
    prepositional phrase or a predicate).
    """

    subject: NounPhrase
    verb: Verb
    english_rest: str = ""
    pronoun: str = ""
    objects: str = ""
    complement: str = ""
    adverb: Adverb | None = None
    mode: Mode = "present"
    negated: bool = False

    # German.

    def _german_verb(self) -> tuple[str, str]:
        """``(finite verb, right bracket)``."""
        person = self.subject.person
        if isinstance(self.mode, Modal):
            return self.mode.forms[person], self.verb.infinitive
        if self.mode == "perfect":
            forms = _SEIN if self.verb.auxiliary == "sein" else _HAVE
            return forms[person], self.verb.participle
        if self.mode == "passive":
            return "wurden" if self.subject.plural else "wurde", self.verb.participle
        return self.verb.forms[person], self.verb.prefix

    def middle(self) -> str:
        """The German middle field without its subject."""
        adverb = self.adverb.german if self.adverb else ""
        negation = "nicht" if self.negated else ""
        return words(self.pronoun, adverb, self.objects, negation, self.complement)

    def german_first(self, front: str = "") -> str:
        """Finite verb first, after ``front`` where there is one: questions and inversion."""
        finite, bracket = self._german_verb()
        return words(front, finite, self.subject.german[Case.NOM], self.middle(), bracket)

    def german_second(self) -> str:
        """A main clause that begins with its subject."""
        return words(self.subject.german[Case.NOM], self.german_predicate())

    def german_predicate(self) -> str:
        """What follows the subject of a main clause."""
        finite, bracket = self._german_verb()
        return words(finite, self.middle(), bracket)

    def german_final(self, opening: str, *, subject: bool = True) -> str:
        """A subordinate clause: ``opening`` (weil, den...), the finite verb at its end."""
        finite, bracket = self._german_verb()
        end = bracket + finite if self.mode == "present" else words(bracket, finite)
        name = self.subject.german[Case.NOM] if subject else ""
        return words(opening, name, self.middle(), end)

    def german_infinitive(self) -> str:
        """The infinitive with ``zu``, which goes between a separable prefix and its verb."""
        verb = self.verb
        bare = verb.infinitive.removeprefix(verb.prefix)
        return words(self.middle(), f"{verb.prefix}zu{bare}" if verb.prefix else f"zu {bare}")

    # English.

    def _english_verb(self) -> tuple[str, str]:
        """``(auxiliary, rest)`` as in a question; the auxiliary is ``do`` where there is none."""
        verb, third = self.verb, self.subject.third
        if isinstance(self.mode, Modal):
            if self.mode.english_base:
                return "does" if third else "do", words(self.mode.english_base, verb.english)
            auxiliary, _, rest = self.mode.english.partition(" ")
            return auxiliary, words(rest, verb.english)
        if self.mode == "perfect":
            return "has" if third else "have", verb.english_participle
        if self.mode == "passive":
            return "were" if self.subject.plural else "was", verb.english_participle
        if verb is BE:
            return {Person.I: "am", Person.HE: "is"}.get(self.subject.person, "are"), ""
        return "does" if third else "do", verb.english

    def _english_end(self) -> str:
        return words(self.english_rest, self.adverb.english if self.adverb else "")

    def english_predicate(self) -> str:
        """What follows the subject in a statement."""
        auxiliary, rest = self._english_verb()
        if self.negated:
            separator = "" if auxiliary == "can" else " "
            return words(f"{auxiliary}{separator}not", rest, self._english_end())
        if auxiliary in ("do", "does"):
            auxiliary = ""
            if isinstance(self.mode, Modal):
                base = self.mode.english if self.subject.third else self.mode.english_base
                rest = words(base, self.verb.english)
            elif self.subject.third:
                rest = self.verb.english_third
        return words(auxiliary, rest, self._english_end())

    def english(self) -> str:
        """A statement."""
        return words(self.subject.english, self.english_predicate())

    def english_question(self, front: str = "") -> str:
        """A question, after ``front`` (why, which book...) where there is one."""
        auxiliary, rest = self._english_verb()
        return words(front, auxiliary, self.subject.english, rest, self._english_end())
