"""Which words of a generated sentence belong together by its grammar, and where they stand.

The grammar notes which content words it put together (``Sentence.combinations``); here they are
found in the two texts. A word that stands twice in a text is left out: nobody could tell which of
the two is meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

from data_shards.embedded import Sentence
from data_shards.embedded_lexicon import (
    ADJECTIVES,
    DATIVE,
    DITRANSITIVE,
    INTRANSITIVE,
    MODALS,
    NOUN,
    PREPOSITIONAL,
    SPECIAL,
    TRANSITIVE,
    WILL,
    Adjective,
    Noun,
    Verb,
    number_in_english,
    number_in_german,
)

Side = Literal["source", "target"]  # English, German

_VERBS = {
    verb.english: verb
    for verb in (*TRANSITIVE, *INTRANSITIVE, *DATIVE, *DITRANSITIVE, *PREPOSITIONAL,
                 *SPECIAL.values())
}  # fmt: skip
_ADJECTIVE = {adjective.english: adjective for adjective in ADJECTIVES}
_AUXILIARIES = frozenset(
    ("habe", "hast", "hat", "haben", "bin", "bist", "ist", "sind", "wurde", "wurden")
).union(*(modal.forms for modal in (*MODALS, WILL)))
_SUBORDINATORS = frozenset(("weil", "obwohl", "wenn", "bevor", "während", "falls", "dass", "ob"))
_RELATIVE_PRONOUNS = frozenset(("der", "die", "das", "den", "dem", "denen"))
_DETERMINER = re.compile(
    "(der|die|das|den|dem|des|im|ins|am|zum|zur|vom|beim"
    "|(ein|kein|mein|dein|sein|ihr|unser)(e|en|em|er|es|s)?|(dies|jed|welch)(e|en|em|er|es))",
    re.IGNORECASE,
)
# In these the verb does not agree with the noun that does what it says.
_NO_AGREEMENT = frozenset({"passive", "infinitive", "imperative"})
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")


class Span(NamedTuple):
    """A stretch of one of the two texts, in characters."""

    side: Side
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Relation:
    """A word, and one that by the grammar decides what it is or how it is inflected.

    Attributes:
        name: such as "verb → its subject".
        word: what is read or, on the German side, written.
        partner: what it depends on.
        rivals: others of the partner's kind in the same text, which it could be confused with.
    """

    name: str
    word: Span
    partner: Span
    rivals: tuple[Span, ...]


def relations(one: Sentence) -> list[Relation]:
    """The relations of a sentence whose words are found without doubt.

    Within English, from what is read: verb → its subject, verb → its object, it → its noun.
    Within German, from what is written: finite verb → its subject (written before), particle → its
    verb. From German to English: article → the noun, adjective → the noun, finite verb → the
    subject, verb at the end → the verb, particle → the verb, er/sie/es → the noun, ones of a
    number → the ones.
    """
    return _Texts(one).relations()


def other_number(one: Sentence) -> list[tuple[Span, str]]:
    """Each finite verb with a noun as subject, and its form if that were plural, or singular."""
    texts = _Texts(one)
    found = []
    if one.pattern == "liking":
        return []  # in German another noun is the subject
    for _, name in texts.agreeing():
        verb = _VERBS[name]
        span = texts.finite(verb)
        if span is None:
            continue
        said, (_, _, singular, plural) = texts.said(span), verb.forms
        for form, other in ((singular, plural), (plural, singular)):
            for prefix in {"", verb.prefix}:
                if said in _spellings(prefix + form) and form != other:
                    changed = prefix + other
                    is_capital = said[0].isupper()
                    found.append(
                        (span, changed[0].upper() + changed[1:] if is_capital else changed)
                    )
    return found


def _spellings(form: str) -> tuple[str, str]:
    return form, form[:1].upper() + form[1:]


class _Texts:
    """The two texts of a sentence and where the grammar's words stand in them."""

    def __init__(self, one: Sentence) -> None:
        self.one = one
        pairs = [(made.kind, made.first, made.second) for made in one.combinations]
        self.by_kind: dict[str, list[tuple[str, str]]] = {}
        for kind, first, second in pairs:
            self.by_kind.setdefault(kind, []).append((first, second))
        verbs = {second for _, second in self.by_kind.get("subject+verb", ())}
        self.verbs = sorted(verbs | {first for first, _ in self.by_kind.get("verb+object", ())})
        noun_at = {"adjective+noun": 1, "subject+verb": 0, "verb+object": 1,
                   "preposition+noun": 1, "owner+noun": 1}  # fmt: skip
        nouns = {pair[noun_at[kind]] for kind, *pair in pairs}
        self.nouns = sorted(nouns | {first for first, _ in self.by_kind.get("owner+noun", ())})
        self.verb_spans = self._located(self.verbs, _english_verb_forms)
        self.noun_spans = self._located(self.nouns, _english_noun_forms)

    def relations(self) -> list[Relation]:
        return [
            *self._of_subjects(),
            *self._of_objects(),
            *self._of_noun_phrases(),
            *self._of_verbs(),
            *self._of_it(),
            *self._of_numbers(),
        ]

    def _located(
        self, lemmas: Iterable[str], forms: Callable[[str], tuple[str, ...]]
    ) -> dict[str, Span]:
        found = {}
        for lemma in lemmas:
            span = self.find("source", forms(lemma))
            if span is not None:
                found[lemma] = span
        return found

    def find(self, side: Side, forms: Iterable[str]) -> Span | None:
        """Where the only one of ``forms`` stands; the longer form counts where two overlap."""
        text = self.text(side)
        found: list[Span] = []
        for form in sorted(set(forms) - {""}, key=len, reverse=True):
            for start in _starts(text, form):
                end = start + len(form)
                if not any(span.start < end and start < span.end for span in found):
                    found.append(Span(side, start, end))
        return found[0] if len(found) == 1 else None

    def text(self, side: Side) -> str:
        return self.one.english if side == "source" else self.one.german

    def _rivals(self, spans: dict[str, Span], lemma: str) -> tuple[Span, ...]:
        return tuple(span for other, span in spans.items() if other != lemma)

    def agreeing(self) -> Iterator[tuple[str, str]]:
        """Nouns, and the verbs whose one subject they are in English."""
        pairs = self.by_kind.get("subject+verb", [])
        for noun, verb in pairs:
            several = sum(other == verb for _, other in pairs) > 1  # the man and the woman
            if not several and self.one.pattern not in _NO_AGREEMENT and noun in self.noun_spans:
                yield noun, verb

    def _of_subjects(self) -> Iterator[Relation]:
        for noun, verb in self.agreeing():
            subject, rivals = self.noun_spans[noun], self._rivals(self.noun_spans, noun)
            if verb in self.verb_spans:
                yield Relation("verb → its subject", self.verb_spans[verb], subject, rivals)
            if self.one.pattern == "liking":
                continue  # in German the subject is what is liked
            finite = self.finite(_VERBS[verb])
            if finite is None:
                continue
            yield Relation("finite verb → the subject", finite, subject, rivals)
            before = self.find("target", _german_noun_forms(NOUN[noun]))
            if before is not None and before.end < finite.start:
                others = (
                    self.find("target", _german_noun_forms(NOUN[other]))
                    for other in self.nouns
                    if other != noun
                )
                seen = tuple(span for span in others if span and span.end < finite.start)
                yield Relation("finite verb → its subject", finite, before, seen)

    def _of_objects(self) -> Iterator[Relation]:
        pairs = self.by_kind.get("verb+object", [])
        for verb, noun in pairs:
            several = sum(other == verb for other, _ in pairs) > 1
            if not several and verb in self.verb_spans and noun in self.noun_spans:
                rivals = self._rivals(self.noun_spans, noun)
                word, partner = self.verb_spans[verb], self.noun_spans[noun]
                yield Relation("verb → its object", word, partner, rivals)

    def _of_noun_phrases(self) -> Iterator[Relation]:
        for noun, partner in self.noun_spans.items():
            german = self.find("target", _german_noun_forms(NOUN[noun]))
            if german is None:
                continue
            rivals = self._rivals(self.noun_spans, noun)
            word = self._word_before(german)
            for adjective, of in self.by_kind.get("adjective+noun", ()):
                if of == noun and word and self._is_form(word, _ADJECTIVE[adjective]):
                    yield Relation("adjective → the noun", word, partner, rivals)
                    word = self._word_before(word)
                    break
            if word and _DETERMINER.fullmatch(self.said(word)):
                yield Relation("article → the noun", word, partner, rivals)

    def _of_verbs(self) -> Iterator[Relation]:
        for name, partner in self.verb_spans.items():
            verb = _VERBS[name]
            rivals = self._rivals(self.verb_spans, name)
            last = self._at_the_end(verb)
            if last is not None:
                yield Relation("verb at the end → the verb", last, partner, rivals)
            finite = self.finite(verb)
            if not verb.prefix or finite is None:
                continue
            particle = self.find("target", [verb.prefix])
            if particle and finite.end < particle.start and self._is_last(particle):
                yield Relation("particle → the verb", particle, partner, rivals)
                others = (self.finite(_VERBS[other]) for other in self.verbs if other != name)
                seen = tuple(span for span in others if span and span.end < particle.start)
                yield Relation("particle → its verb", particle, finite, seen)

    def _of_it(self) -> Iterator[Relation]:
        if self.one.pattern != "reference":
            return
        it = self.find("source", ["it"])
        [(_, noun)] = self.by_kind["verb+object"]
        german = [
            match
            for match in _WORD.finditer(self.one.german)
            if match.start() and self._before(match.start()) in ("weil", "obwohl")
        ]
        if it is None or noun not in self.noun_spans or len(german) != 1:
            return
        partner, rivals = self.noun_spans[noun], self._rivals(self.noun_spans, noun)
        yield Relation("it → its noun", it, partner, rivals)
        yield Relation("er/sie/es → the noun", Span("target", *german[0].span()), partner, rivals)

    def _of_numbers(self) -> Iterator[Relation]:
        if self.one.pattern != "numbers":
            return
        for number in range(21, 100):
            english, german = number_in_english(number), number_in_german(number)
            if number % 10 == 0 or english not in self.one.english:
                continue
            source, target = self.find("source", [english]), self.find("target", [german])
            if source is None or target is None:
                continue
            hyphen = source.start + english.index("-")
            # The last "und": "hundert" has none, and no ones' name holds one.
            ones_end = target.start + german.index("und")
            ones, tens = (
                Span("source", hyphen + 1, source.end),
                Span("source", source.start, hyphen),
            )
            word = Span("target", target.start, ones_end)
            yield Relation("ones of a number → the ones", word, ones, (tens,))

    def finite(self, verb: Verb) -> Span | None:
        """The verb itself, inflected for its subject: not an infinitive or a participle."""
        forms = {*verb.forms, *(verb.prefix + form for form in verb.forms)}
        span = self.find("target", forms)
        if span is None or self._has_auxiliary(span) or self._before(span.start) == "zu":
            return None
        return span

    def _at_the_end(self, verb: Verb) -> Span | None:
        joined = [verb.prefix + form for form in verb.forms]
        bare = verb.infinitive.removeprefix(verb.prefix)
        with_zu = f"{verb.prefix}zu{bare}" if verb.prefix else ""
        span = self.find("target", {*joined, verb.infinitive, verb.participle, with_zu})
        if span is None or not self._is_last(span):
            return None
        sent_there = (
            self._has_auxiliary(span)
            or self._before(span.start) == "zu"
            or with_zu == (self.said(span))
        )
        return span if sent_there or self._is_subordinate(span) else None

    def _segment(self, span: Span) -> list[str]:
        """The words between the commas around ``span``."""
        before, after = self.one.german[: span.start], self.one.german[span.end :]
        return [
            *_WORD.findall(before.rpartition(",")[2]),
            self.said(span),
            *_WORD.findall(after.partition(",")[0]),
        ]

    def _is_last(self, span: Span) -> bool:
        return self.one.german[span.end] in ",.?!"

    def _has_auxiliary(self, span: Span) -> bool:
        return any(
            word.lower() in _AUXILIARIES and word != self.said(span) for word in self._segment(span)
        )

    def _is_subordinate(self, span: Span) -> bool:
        first = self._segment(span)[0].lower()
        behind_comma = "," in self.one.german[: span.start]
        return first in _SUBORDINATORS or (behind_comma and first in _RELATIVE_PRONOUNS)

    def _is_form(self, span: Span, adjective: Adjective) -> bool:
        form = self.said(span)
        return form[:1].lower() + form[1:] in {
            adjective.stem + ending for ending in ("e", "en", "em", "er", "es")
        }

    def said(self, span: Span) -> str:
        """What stands there."""
        return self.text(span.side)[span.start : span.end]

    def _before(self, start: int) -> str:
        words: list[str] = _WORD.findall(self.one.german[:start])
        return words[-1] if words else ""

    def _word_before(self, span: Span) -> Span | None:
        found = list(_WORD.finditer(self.text(span.side)[: span.start]))
        return Span(span.side, *found[-1].span()) if found else None


def _starts(text: str, form: str) -> Iterator[int]:
    """Where ``form`` stands as whole words, with a capital where it begins the sentence."""
    for match in re.finditer(rf"(?<![\w-]){re.escape(form)}(?![\w-])", text):
        yield match.start()
    capital = form[:1].upper() + form[1:]
    if capital != form and re.match(rf"{re.escape(capital)}(?![\w-])", text):
        yield 0


@cache
def _english_verb_forms(lemma: str) -> tuple[str, ...]:
    verb = _VERBS[lemma]
    return (verb.english, verb.english_third, verb.english_participle)


@cache
def _english_noun_forms(lemma: str) -> tuple[str, ...]:
    noun = NOUN[lemma]
    return (noun.english, noun.english_plural)


@cache
def _german_noun_forms(noun: Noun) -> tuple[str, ...]:
    return (noun.german, noun.german_plural, f"{noun.german_plural}n", noun.genitive)
