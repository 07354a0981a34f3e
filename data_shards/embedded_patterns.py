"""The sentence patterns of the generated corpus: each draws one whole sentence pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from data_shards.embedded_clauses import (
    BEINGS,
    DEGREES,
    GOODS,
    STATES,
    Combination,
    Draw,
    being,
    clause_of,
    copula,
    dative,
    ditransitive,
    intransitive,
    prepositional_object,
    start,
    transitive,
    with_object,
)
from data_shards.embedded_grammar import (
    BE,
    PERSONAL,
    PRONOUNS,
    Case,
    Clause,
    Mode,
    NounPhrase,
    Person,
    joined,
    noun_phrase,
    prepositional,
    pronoun_for,
    relative_pronoun,
    sentence,
    with_number,
    with_owner,
    words,
)
from data_shards.embedded_lexicon import (
    DATIVE,
    INTRANSITIVE,
    MODALS,
    NOUN,
    PRESENT_TIMES,
    SPECIAL,
    TRANSITIVE,
    WILL,
    Verb,
    number_in_english,
    number_in_german,
)

Pair = tuple[str, str]
Pattern = Callable[[Draw], Pair]
PATTERNS: dict[str, Pattern] = {}
WEIGHTED: list[str] = []  # every name as often as its weight says

_OF_GOODS = [verb for verb in TRANSITIVE if verb.objects & GOODS]


def _pattern(weight: int) -> Callable[[Pattern], Pattern]:
    """Register a pattern under the function's name; ``weight`` is its share of the draws."""

    def register(function: Pattern) -> Pattern:
        name = function.__name__.strip("_")
        PATTERNS[name] = function
        WEIGHTED.extend([name] * weight)
        return function

    return register


def _statement(clause: Clause) -> Pair:
    return sentence(clause.english()), sentence(clause.german_second())


@_pattern(2)
def _main_clause(draw: Draw) -> Pair:
    """The old man reads a book. Der alte Mann liest ein Buch."""
    clause = draw.pick((transitive, transitive, dative, prepositional_object))(draw)
    return _statement(replace(clause, adverb=draw.adverb(clause.verb)))


@_pattern(1)
def _two_objects(draw: Draw) -> Pair:
    """The man gives the child an apple. Der Mann gibt dem Kind einen Apfel."""
    clause = ditransitive(draw)
    return _statement(replace(clause, adverb=draw.adverb(clause.verb)))


@_pattern(2)
def _subordinate(draw: Draw) -> Pair:
    """..., weil das Kind das Fenster zumacht. Or first: Wenn ..., singt die Frau."""
    english, german = draw.pick(_CONJUNCTIONS)
    main = clause_of(draw)
    inner = copula(draw, BEINGS) if draw.chance(0.25) else clause_of(draw)
    if draw.chance(0.4):
        return (
            sentence(f"{english} {inner.english()}, {main.english()}"),
            sentence(f"{inner.german_final(german)}, {main.german_first()}"),
        )
    return (
        sentence(f"{main.english()} {english} {inner.english()}"),
        sentence(f"{main.german_second()}, {inner.german_final(german)}"),
    )


_CONJUNCTIONS = (
    ("because", "weil"), ("although", "obwohl"), ("when", "wenn"), ("before", "bevor"),
    ("while", "während"), ("if", "falls"),
)  # fmt: skip


@_pattern(1)
def _reported(draw: Draw) -> Pair:
    """The teacher knows that ... / asks whether ...: dass and ob."""
    inner = clause_of(draw)
    if draw.chance(0.65):
        verb = draw.pick((SPECIAL["say"], SPECIAL["believe"], SPECIAL["hope"], SPECIAL["know"]))
        outer, link = start(draw, verb, None), ("that", "dass")
    else:
        outer, link = start(draw, SPECIAL["know"], None), ("whether", "ob")
        outer = replace(outer, negated=True)
    return (
        sentence(f"{outer.english()} {link[0]} {inner.english()}"),
        sentence(f"{outer.german_second()}, {inner.german_final(link[1])}"),
    )


@_pattern(2)
def _relative(draw: Draw) -> Pair:
    """The man who sleeps ... / the dog that the woman sees ...: gender, number, case, verb last."""
    head, english, german = draw.pick((_relative_subject, _relative_object))(draw)
    if not head.human or draw.chance(0.3):
        noun = NOUN[head.lemma]
        outer = being(head, draw.adjective(noun), draw.pick(DEGREES))
    else:
        outer = clause_of(draw, head)
    return (
        sentence(words(head.english, english, outer.english_predicate())),
        sentence(f"{head.german[Case.NOM]}, {german}, {outer.german_predicate()}"),
    )


def _relative_subject(draw: Draw) -> tuple[NounPhrase, str, str]:
    """Head and relative clause (English, German) whose subject is the head."""
    head = draw.definite(BEINGS)
    inner = clause_of(draw, head)
    german = inner.german_final(relative_pronoun(head, Case.NOM), subject=False)
    return head, words("who" if head.human else "that", inner.english_predicate()), german


def _relative_object(draw: Draw) -> tuple[NounPhrase, str, str]:
    """Head and relative clause whose object, accusative or dative, is the head."""
    verb = draw.pick(TRANSITIVE if draw.chance(0.6) else DATIVE)
    subject = draw.subject(verb)
    head = draw.undergoing(draw.definite(verb.objects, besides=subject.lemma), verb)
    case = Case.DAT if verb in DATIVE else Case.ACC
    inner = Clause(subject, verb, mode=draw.mode())
    english = words("whom" if head.human else "that", inner.english())
    return head, english, inner.german_final(relative_pronoun(head, case))


@_pattern(2)
def _separable(draw: Draw) -> Pair:
    """The boy closes the window. Der Junge macht das Fenster zu."""
    verb = draw.pick(_SEPARABLE)
    clause = Clause(draw.subject(verb), verb, adverb=draw.adverb(verb))
    if verb.objects:
        case = Case.DAT if verb in DATIVE else Case.ACC
        clause = with_object(clause, draw.object(verb, clause.subject, bare=False), case)
    return _statement(clause)


_SEPARABLE = [verb for verb in (*TRANSITIVE, *INTRANSITIVE, *DATIVE) if verb.prefix]


@_pattern(2)
def _perfect(draw: Draw) -> Pair:
    """The man has come back. Der Mann ist zurückgekommen."""
    return _statement(clause_of(draw, mode="perfect"))


@_pattern(2)
def _modal(draw: Draw) -> Pair:
    """The woman wants to read the book. Die Frau will das Buch lesen."""
    return _statement(clause_of(draw, mode=draw.pick((*MODALS, WILL))))


@_pattern(2)
def _inversion(draw: Draw) -> Pair:
    """Today the man buys an apple. Heute kauft der Mann einen Apfel."""
    clause = clause_of(draw)
    adverb = draw.adverb(clause.verb, clause.mode, probability=1.0)
    assert adverb is not None
    clause = replace(clause, adverb=None)
    return (
        sentence(words(adverb.english, clause.english())),
        sentence(clause.german_first(adverb.german)),
    )


@_pattern(2)
def _yes_no_question(draw: Draw) -> Pair:
    """Does the man read the book? Liest der Mann das Buch?"""
    clause = clause_of(draw) if draw.chance(0.8) else copula(draw)
    return sentence(clause.english_question(), "?"), sentence(clause.german_first(), "?")


_WHO = NounPhrase("who", "whom", ("wer", "wen", "wem", ""), Person.HE, "m")
_WH_ADVERBS = (("why", "warum"), ("when", "wann"), ("where", "wo"), ("how often", "wie oft"))


@_pattern(2)
def _wh_question(draw: Draw) -> Pair:
    """Who, whom, what, which, why, when, where."""
    return draw.pick((_asked_subject, _asked_object, _asked_which, _asked_adverb))(draw)


def _asked_subject(draw: Draw) -> Pair:
    clause = clause_of(draw, _WHO)
    return sentence(clause.english(), "?"), sentence(clause.german_second(), "?")


def _asked_object(draw: Draw) -> Pair:
    verb = draw.pick(TRANSITIVE if draw.chance(0.7) else DATIVE)
    clause = Clause(draw.subject(verb), verb, mode=draw.mode())
    if verb in DATIVE or verb.objects == {"person"}:
        english, german = "whom", "wem" if verb in DATIVE else "wen"
    else:
        english, german = "what", "was"
    return sentence(clause.english_question(english), "?"), sentence(
        clause.german_first(german), "?"
    )


def _asked_which(draw: Draw) -> Pair:
    verb = draw.pick(TRANSITIVE)
    clause = Clause(draw.subject(verb), verb, mode=draw.mode())
    noun = draw.noun(verb.objects, besides=clause.subject.lemma)
    plural = bool(noun.english_plural) and draw.chance(0.25)
    asked = noun_phrase("which", draw.maybe_adjective(noun), noun, plural=plural)
    draw.undergoing(asked, verb)
    return (
        sentence(clause.english_question(asked.english), "?"),
        sentence(clause.german_first(asked.german[Case.ACC]), "?"),
    )


def _asked_adverb(draw: Draw) -> Pair:
    english, german = draw.pick(_WH_ADVERBS)
    mode: Mode = "present" if draw.chance(0.7) else draw.pick(MODALS)
    clause = replace(clause_of(draw, mode=mode), adverb=None)
    return sentence(clause.english_question(english), "?"), sentence(
        clause.german_first(german), "?"
    )


_NEGATABLE = tuple(modal for modal in MODALS if modal.english in ("can", "wants to", "should"))


@_pattern(2)
def _negation(draw: Draw) -> Pair:
    """does not buy a car → kauft kein Auto; does not read the book → liest das Buch nicht."""
    mode: Mode = draw.pick(("present", "present", "perfect", *_NEGATABLE))
    if draw.chance(0.3):
        verb = draw.pick(TRANSITIVE)
        clause = Clause(draw.subject(verb), verb, mode=mode, negated=True)
        english, german = _denied(draw, verb, clause.subject)
        return sentence(words(clause.english(), english)), sentence(
            replace(clause, negated=False, objects=german).german_second()
        )
    if draw.chance(0.2):
        return _statement(replace(copula(draw), negated=True))
    if draw.chance(0.3):
        return _statement(replace(intransitive(draw), mode=mode, negated=True))
    if draw.chance(0.3):
        clause = prepositional_object(draw)
        return _statement(replace(clause, mode=mode, negated=True))
    verb = draw.pick((*TRANSITIVE, *DATIVE))
    subject = draw.subject(verb)
    phrase = draw.undergoing(draw.definite(verb.objects, besides=subject.lemma), verb)
    clause = Clause(subject, verb, mode=mode, negated=True)
    return _statement(with_object(clause, phrase, Case.DAT if verb in DATIVE else Case.ACC))


def _denied(draw: Draw, verb: Verb, subject: NounPhrase) -> Pair:
    """An indefinite object: English as it is, German with ``kein``, accusative."""
    noun = draw.noun(verb.objects, besides=subject.lemma)
    adjective = draw.maybe_adjective(noun)
    plural = bool(noun.english_plural) and draw.chance(0.3)
    bare = plural or not noun.english_plural
    english = noun_phrase("" if bare else "a", adjective, noun, plural=plural)
    german = noun_phrase("no", adjective, noun, plural=plural)
    return draw.undergoing(english, verb).english, german.german[Case.ACC]


@_pattern(1)
def _passive(draw: Draw) -> Pair:
    """The letter was written by the teacher. Der Brief wurde vom Lehrer geschrieben."""
    verb = draw.pick(_ACTIONS)
    subject = draw.undergoing(draw.phrase(verb.objects), verb)
    agent = draw.doing(draw.phrase(frozenset({"person"}), besides=subject.lemma), verb)
    clause = Clause(
        subject, verb, f"by {agent.english}", complement=prepositional("von", agent, Case.DAT),
        mode="passive",
    )  # fmt: skip
    return _statement(clause)


_ACTIONS = [verb for verb in TRANSITIVE if verb.english not in STATES | {"wear"}]


@_pattern(1)
def _comparison(draw: Draw) -> Pair:
    """The dog is older than the cat; (not) as old as the cat."""
    classes = frozenset({draw.pick(_COMPARED)})
    noun = draw.noun(classes)
    adjective = draw.adjective(noun, comparable=True)
    subject = noun_phrase("the" if draw.chance(0.6) else "this", None, noun)
    other = draw.definite(classes, besides=noun.english)
    kind = draw.number(0, 3)
    if kind < 2:
        english, german = f"{adjective.english_comparative} than", f"{adjective.comparative} als"
        if kind:
            english, german = f"much {english}", f"viel {german}"
    else:
        english, german = f"as {adjective.english} as", f"so {adjective.german} wie"
    clause = Clause(
        subject, BE, f"{english} {other.english}", complement=f"{german} {other.german[Case.NOM]}",
        negated=kind == 3,
    )  # fmt: skip
    return _statement(clause)


_COMPARED = ("person", "animal", "text", "thing", "wear", "vehicle", "furniture", "place", "food")


@_pattern(2)
def _place(draw: Draw) -> Pair:
    """Where: in the garden, im Garten (dative). The book lies under the table."""
    if draw.chance(0.4):
        verb = draw.pick([SPECIAL["lie"], SPECIAL["stand"]])
        relation, classes = draw.pick(_RELATIONS), frozenset({"surface"})
    elif draw.chance(0.2):
        verb, relation, classes = SPECIAL["hang"], ("on", "an"), frozenset({"wall"})
    else:
        verb, relation, classes = draw.pick(_IN_PLACE), ("in", "in"), frozenset({"place"})
    clause = start(draw, verb, None)
    clause = replace(clause, adverb=draw.adverb(clause.verb, probability=0.15))
    return _statement(_situated(draw, clause, relation, classes, Case.DAT))


@_pattern(2)
def _direction(draw: Draw) -> Pair:
    """Where to: into the garden, in den Garten (accusative). She lays the book on the table."""
    if draw.chance(0.5):
        verb = draw.pick([SPECIAL["lay"], SPECIAL["place"]])
        relation, classes, case = draw.pick(_RELATIONS), frozenset({"surface"}), Case.ACC
        clause = Clause(draw.subject(verb), verb)
        clause = with_object(clause, draw.object(verb, clause.subject, bare=False), case)
    else:
        verb = draw.pick([SPECIAL["go"], SPECIAL["come"]])
        clause = Clause(draw.subject(verb), verb)
        relation, classes, case = draw.pick(_WAYS)
    mode: Mode = "present" if draw.chance(0.7) else draw.pick(MODALS)
    clause = replace(clause, mode=mode, adverb=draw.adverb(clause.verb, probability=0.15))
    return _statement(_situated(draw, clause, relation, classes, case))


_IN_PLACE = [verb for verb in INTRANSITIVE if not verb.prefix and verb.english != "swim"]
_RELATIONS = (
    ("on", "auf"), ("on", "auf"), ("under", "unter"), ("behind", "hinter"), ("beside", "neben"),
    ("in front of", "vor"),
)  # fmt: skip
_WAYS = (
    (("into", "in"), frozenset({"place"}), Case.ACC),
    (("out of", "aus"), frozenset({"place"}), Case.DAT),
    (("to", "zu"), frozenset({"person"}), Case.DAT),
)


def _situated(
    draw: Draw, clause: Clause, relation: Pair, classes: frozenset[str], case: Case
) -> Clause:
    """``clause`` with a place or a direction at the end of its middle field."""
    english, german = relation
    where = draw.phrase(classes, besides=clause.subject.lemma)
    draw.combinations.add(Combination("preposition+noun", english, where.lemma))
    return replace(
        clause,
        english_rest=words(clause.english_rest, english, where.english),
        complement=prepositional(german, where, case),
    )


@_pattern(3)
def _numbers(draw: Draw) -> Pair:
    """twenty-three apples → dreiundzwanzig Äpfel; forty-two years old."""
    number = draw.number(2, 99)
    english, german = number_in_english(number), number_in_german(number)
    if draw.chance(0.25):
        noun = draw.noun(frozenset({"person"}))
        determiner = draw.determiner(noun, plural=False, bare=True)
        subject = noun_phrase(determiner, draw.maybe_adjective(noun), noun)
        age = Clause(subject, BE, f"{english} years old", complement=f"{german} Jahre alt")
        return _statement(age)
    if draw.chance(0.4):
        verb = draw.pick(_IN_PLACE)
        noun = draw.noun(verb.subjects)
        counted = with_number(english, german, draw.maybe_adjective(noun), noun)
        clause = Clause(draw.doing(counted, verb), verb)
        clause = _situated(draw, clause, ("in", "in"), frozenset({"place"}), Case.DAT)
        time = draw.pick(PRESENT_TIMES)
        return (
            sentence(words(time.english, clause.english())),
            sentence(clause.german_first(time.german)),
        )
    verb = draw.pick(_OF_GOODS)
    clause = Clause(draw.subject(verb), verb, mode=draw.mode())
    noun = draw.noun(verb.objects & GOODS)
    counted = with_number(english, german, draw.maybe_adjective(noun), noun)
    return _statement(with_object(clause, draw.undergoing(counted, verb), Case.ACC))


@_pattern(2)
def _imperative(draw: Draw) -> Pair:
    """Please close the door! Mach bitte die Tür zu!"""
    verb = draw.pick(_COMMANDS)
    you = PERSONAL["you"]
    clause = Clause(you, verb, negated=draw.chance(0.3))
    if verb.objects:
        case = Case.DAT if verb in DATIVE else Case.ACC
        if draw.chance(0.15) and "person" in verb.objects:
            phrase = draw.pick([one for one in PRONOUNS if one is not you])
        else:
            phrase = draw.undergoing(draw.definite(verb.objects), verb)
        clause = with_object(clause, phrase, case)
    please = draw.chance(0.4)
    english = words("please" if please else "", "do not" if clause.negated else "", verb.english,
                    clause.english_rest)  # fmt: skip
    middle = replace(clause, pronoun="").middle()
    german = words(verb.imperative, clause.pronoun, "bitte" if please else "", middle, verb.prefix)
    return sentence(english, "!"), sentence(german, "!")


_COMMANDS = [verb for verb in (*TRANSITIVE, *INTRANSITIVE, *DATIVE) if verb.imperative]


@_pattern(2)
def _coordination(draw: Draw) -> Pair:
    """Two clauses, two predicates or two subjects."""
    kind = draw.number(0, 2)
    if kind == 0:
        (english, german), left, right = draw.pick(_AND), clause_of(draw), clause_of(draw)
        return (
            sentence(f"{left.english()}{english} {right.english()}"),
            sentence(f"{left.german_second()}{german} {right.german_second()}"),
        )
    left = clause_of(draw, mode="present")
    if kind == 1:
        right = clause_of(draw, left.subject, mode="present")
        return (
            sentence(f"{left.english()} and {right.english_predicate()}"),
            sentence(f"{left.german_second()} und {right.german_predicate()}"),
        )
    one = draw.definite(frozenset({"person"}))
    other = draw.definite(frozenset({"person"}), besides=one.lemma)
    clause = draw.pick((intransitive, transitive))(draw, joined(one, other))
    draw.doing(one, clause.verb)
    return _statement(clause)


_AND = ((" and", " und"), (", but", ", aber"))


@_pattern(1)
def _possession(draw: Draw) -> Pair:
    """The boy's dog sleeps. Der Hund des Jungen schläft. Or as an object."""
    possessor = draw.noun(frozenset({"person"}))
    determiner = draw.determiner(possessor, plural=False, bare=False)
    owner = noun_phrase(determiner, draw.maybe_adjective(possessor, 0.2), possessor)
    verb = draw.pick(_OF_OWNED)
    noun = draw.noun(verb.objects & _OWNED)
    owned = with_owner(owner, draw.maybe_adjective(noun), noun)
    draw.combinations.add(Combination("owner+noun", possessor.english, noun.english))
    if draw.chance(0.5):
        clause = being(owned, draw.adjective(noun), draw.pick(DEGREES))
        return _statement(clause)
    clause = Clause(draw.subject(verb), verb, mode=draw.mode())
    return _statement(with_object(clause, draw.undergoing(owned, verb), Case.ACC))


_OWNED = frozenset({"animal", "text", "thing", "wear", "vehicle"})
_OF_OWNED = [verb for verb in TRANSITIVE if verb.objects & _OWNED]


@_pattern(1)
def _liking(draw: Draw) -> Pair:
    """The boys like the dog. Der Hund gefällt den Jungen: the roles change places."""
    verb = SPECIAL["like"]
    liker = draw.pick(PRONOUNS) if draw.chance(0.25) else draw.phrase(BEINGS)
    draw.doing(liker, verb)
    liked = draw.undergoing(
        draw.definite(frozenset({"animal", "text", "thing", "wear", "vehicle", "place"}),
                      besides=liker.lemma), verb)  # fmt: skip
    english = Clause(liker, verb, liked.english)
    german = Clause(liked, verb, objects=liker.german[Case.DAT])
    return sentence(english.english()), sentence(german.german_second())


@_pattern(1)
def _infinitive(draw: Draw) -> Pair:
    """He tries to close the door. Er versucht, die Tür zuzumachen. In order to: um ... zu."""
    if draw.chance(0.7):
        outer = start(draw, draw.pick([SPECIAL[name] for name in _TO]), None)
        link = ("to", "")
    else:
        outer = start(draw, draw.pick([SPECIAL["go"], SPECIAL["come"]]), None)
        outer = _situated(draw, outer, *_WAYS[0])
        link = ("in order to", "um")
    frames = [transitive, transitive, dative, *([ditransitive] if outer.subject.human else [])]
    inner = draw.pick(frames)(draw, outer.subject)
    english = words(link[0], inner.verb.english, inner.english_rest)
    german = words(link[1], inner.german_infinitive())
    return (
        sentence(words(outer.english(), english)),
        sentence(f"{outer.german_second()}, {german}"),
    )


_TO = ("try", "hope", "promise", "begin")


@_pattern(1)
def _reference(draw: Draw) -> Pair:
    """She sells the car because it is old. ..., weil es alt ist: ``it`` has a gender in German."""
    verb = draw.pick(_OF_GOODS)
    clause = Clause(draw.subject(verb), verb, mode=draw.mode())
    noun = draw.noun(verb.objects & GOODS)
    plural = draw.chance(0.25)
    determiner = draw.determiner(noun, plural=plural, bare=False)
    phrase = draw.undergoing(noun_phrase(determiner, None, noun, plural=plural), verb)
    clause = with_object(clause, phrase, Case.ACC)
    reason = being(pronoun_for(phrase), draw.adjective(noun), draw.pick(DEGREES))
    english, german = draw.pick(_CONJUNCTIONS[:2])
    return (
        sentence(f"{clause.english()} {english} {reason.english()}"),
        sentence(f"{clause.german_second()}, {reason.german_final(german)}"),
    )
