"""The words of the generated corpus: English beside German, as tables to read and to extend.

One line is one entry, its columns are parted by blanks, ``_`` stands for a blank inside an English
word, ``-`` for a form that does not exist (or is not used). Every English entry has exactly one
German counterpart in every place where the grammar can put it: that is what makes the translation
of a sentence a function.

Nouns carry the classes (``food``, ``opens``...) that verbs and adjectives select, so that people
read letters and do not eat them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

Gender = Literal["m", "f", "n"]

# english, plural, gender, German, plural, genitive ("weak": the n-declension, whose oblique cases
# look like the plural), classes besides "person". "own": of whom one says "my".
_PERSONS = """
man          men           m  Mann              Männer             Mannes    -
father       fathers       m  Vater             Väter              Vaters    own
brother      brothers      m  Bruder            Brüder             Bruders   own
uncle        uncles        m  Onkel             Onkel              Onkels    own
son          sons          m  Sohn              Söhne              Sohnes    own
teacher      teachers      m  Lehrer            Lehrer             Lehrers   own
doctor       doctors       m  Arzt              Ärzte              Arztes    own
friend       friends       m  Freund            Freunde            Freundes  own
baker        bakers        m  Bäcker            Bäcker             Bäckers   -
gardener     gardeners     m  Gärtner           Gärtner            Gärtners  -
guest        guests        m  Gast              Gäste              Gastes    own
king         kings         m  König             Könige             Königs    -
boy          boys          m  Junge             Jungen             weak      -
neighbour    neighbours    m  Nachbar           Nachbarn           weak      own
student      students      m  Student           Studenten          weak      own
colleague    colleagues    m  Kollege           Kollegen           weak      own
customer     customers     m  Kunde             Kunden             weak      own
woman        women         f  Frau              Frauen             Frau      -
mother       mothers       f  Mutter            Mütter             Mutter    own
sister       sisters       f  Schwester         Schwestern         Schwester own
daughter     daughters     f  Tochter           Töchter            Tochter   own
aunt         aunts         f  Tante             Tanten             Tante     own
grandmother  grandmothers  f  Großmutter        Großmütter         Großmutter own
queen        queens        f  Königin           Königinnen         Königin   -
nurse        nurses        f  Krankenschwester  Krankenschwestern  Krankenschwester -
child        children      n  Kind              Kinder             Kindes    own
girl         girls         n  Mädchen           Mädchen            Mädchens  -
"""

_ANIMALS = """
dog     dogs     m  Hund       Hunde      Hundes  own
cat     cats     f  Katze      Katzen     Katze   own
horse   horses   n  Pferd      Pferde     Pferdes own
bird    birds    m  Vogel      Vögel      Vogels  own
mouse   mice     f  Maus       Mäuse      Maus    own
cow     cows     f  Kuh        Kühe       Kuh     own
bear    bears    m  Bär        Bären      weak    -
lion    lions    m  Löwe       Löwen      weak    -
rabbit  rabbits  n  Kaninchen  Kaninchen  Kaninchens own
"""

# english, plural, gender, German, plural, classes. A thing's genitive is never used; a plural "-"
# marks what is not counted.
_THINGS = """
apple      apples      m  Apfel         Äpfel          food,sweet
cake       cakes       m  Kuchen        Kuchen         food,sweet
pear       pears       f  Birne         Birnen         food,sweet
potato     potatoes    f  Kartoffel     Kartoffeln     food
tomato     tomatoes    f  Tomate        Tomaten        food
orange     oranges     f  Orange        Orangen        food,sweet
egg        eggs        n  Ei            Eier           food
roll       rolls       n  Brötchen      Brötchen       food
coffee     -           m  Kaffee        -              drink
tea        -           m  Tee           -              drink
juice      -           m  Saft          -              drink
milk       -           f  Milch         -              drink
water      -           n  Wasser        -              drink
lemonade   -           f  Limonade      -              drink
letter     letters     m  Brief         Briefe         text,flat
novel      novels      m  Roman         Romane         text,flat
report     reports     m  Bericht       Berichte       text,flat
story      stories     f  Geschichte    Geschichten    text
poem       poems       n  Gedicht       Gedichte       text
book       books       n  Buch          Bücher         text,flat
key        keys        m  Schlüssel     Schlüssel      thing,flat
ball       balls       m  Ball          Bälle          thing
umbrella   umbrellas   m  Regenschirm   Regenschirme   thing,opens
suitcase   suitcases   m  Koffer        Koffer         thing,opens,upright
plate      plates      m  Teller        Teller         thing,upright
mirror     mirrors     m  Spiegel       Spiegel        thing,hangs
cup        cups        f  Tasse         Tassen         thing,upright
bottle     bottles     f  Flasche       Flaschen       thing,opens,upright
box        boxes       f  Kiste         Kisten         thing,opens,upright
bag        bags        f  Tasche        Taschen        thing,opens
flower     flowers     f  Blume         Blumen         thing
lamp       lamps       f  Lampe         Lampen         thing,machine,upright
clock      clocks      f  Uhr           Uhren          thing,hangs
knife      knives      n  Messer        Messer         thing,flat
glass      glasses     n  Glas          Gläser         thing,upright
picture    pictures    n  Bild          Bilder         thing,hangs
gift       gifts       n  Geschenk      Geschenke      thing,opens
radio      radios      n  Radio         Radios         thing,machine,upright
computer   computers   m  Computer      Computer       thing,machine
coat       coats       m  Mantel        Mäntel         wear,flat
hat        hats        m  Hut           Hüte           wear,flat
shoe       shoes       m  Schuh         Schuhe         wear
jacket     jackets     f  Jacke         Jacken         wear,flat
dress      dresses     n  Kleid         Kleider        wear,flat
shirt      shirts      n  Hemd          Hemden         wear,flat
car        cars        n  Auto          Autos          vehicle
bicycle    bicycles    n  Fahrrad       Fahrräder      vehicle
boat       boats       n  Boot          Boote          vehicle
table      tables      m  Tisch         Tische         furniture,surface
chair      chairs      m  Stuhl         Stühle         furniture,surface
cupboard   cupboards   m  Schrank       Schränke       furniture,surface,opens
bed        beds        n  Bett          Betten         furniture,surface
sofa       sofas       n  Sofa          Sofas          furniture,surface
shelf      shelves     n  Regal         Regale         furniture,surface
bench      benches     f  Bank          Bänke          furniture,surface
door       doors       f  Tür           Türen          opens,part
window     windows     n  Fenster       Fenster        opens,part
wall       walls       f  Wand          Wände          wall,part
garden     gardens     m  Garten        Gärten         place
park       parks       m  Park          Parks          place
forest     forests     m  Wald          Wälder         place
shop       shops       m  Laden         Läden          place,room
kitchen    kitchens    f  Küche         Küchen         place,room
school     schools     f  Schule        Schulen        place
church     churches    f  Kirche        Kirchen        place
city       cities      f  Stadt         Städte         place
house      houses      n  Haus          Häuser         place,room
room       rooms       n  Zimmer        Zimmer         place,room
office     offices     n  Büro          Büros          place,room
hotel      hotels      n  Hotel         Hotels         place
village    villages    n  Dorf          Dörfer         place
"""

# english, comparative, German, its stem before an ending, comparative, classes it goes with.
_ADJECTIVES = """
old          older             alt          alt          älter         person,animal,text,thing,wear,vehicle,furniture,place,part
young        younger           jung         jung         jünger        person,animal
strong       stronger          stark        stark        stärker       person,animal
clever       cleverer          klug         klug         klüger        person,animal
brave        braver            mutig        mutig        mutiger       person,animal
tired        more_tired        müde         müd          müder         person,animal
friendly     friendlier        freundlich   freundlich   freundlicher  person
happy        happier           glücklich    glücklich    glücklicher   person
rich         richer            reich        reich        reicher       person
poor         poorer            arm          arm          ärmer         person
famous       more_famous       berühmt      berühmt      berühmter     person,text
sad          sadder            traurig      traurig      trauriger     person,text
funny        funnier           lustig       lustig       lustiger      person,text
big          bigger            groß         groß         größer        animal,food,thing,vehicle,furniture,place,part
small        smaller           klein        klein        kleiner       animal,food,thing,vehicle,furniture,place,part
beautiful    more_beautiful    schön        schön        schöner       animal,text,thing,wear,place
new          newer             neu          neu          neuer         text,thing,wear,vehicle,furniture,part
long         longer            lang         lang         länger        text
short        shorter           kurz         kurz         kürzer        text
interesting  more_interesting  interessant  interessant  interessanter text,place
boring       more_boring       langweilig   langweilig   langweiliger  text,place
good         better            gut          gut          besser        text,food,drink
heavy        heavier           schwer       schwer       schwerer      thing,furniture
expensive    more_expensive    teuer        teur         teurer        thing,wear,vehicle,furniture,food
cheap        cheaper           billig       billig       billiger      thing,wear,vehicle,furniture,food
dark         darker            dunkel       dunkl        dunkler       wear,place
clean        cleaner           sauber       sauber       sauberer      wear,place
quiet        quieter           ruhig        ruhig        ruhiger       place
fresh        fresher           frisch       frisch       frischer      food,drink
sweet        sweeter           süß          süß          süßer         sweet,drink
cold         colder            kalt         kalt         kälter        drink
warm         warmer            warm         warm         wärmer        drink
hot          hotter            heiß         heiß         heißer        drink
black        -                 schwarz      schwarz      -             animal,thing,wear,vehicle
white        -                 weiß         weiß         -             animal,thing,wear,vehicle,part
red          -                 rot          rot          -             thing,wear,vehicle
blue         -                 blau         blau         -             thing,wear,vehicle,part
green        -                 grün         grün         -             thing,wear,vehicle,part
broken       -                 kaputt       kaputt       -             thing,vehicle,part
"""  # noqa: E501

# english base, third person, participle; German infinitive (a bar parts the separable prefix),
# du-form, er-form, participle, imperative; the perfect's auxiliary; classes of the subject; classes
# of the object.
_TRANSITIVE = """
see         sees         seen         sehen        siehst     sieht     gesehen      -         haben person,animal person,animal,text,thing,wear,vehicle,furniture,place
hear        hears        heard        hören        hörst      hört      gehört       -         haben person,animal person,animal
find        finds        found        finden       findest    findet    gefunden     -         haben person,animal person,animal,text,thing,wear,vehicle,food
look_for    looks_for    looked_for   suchen       suchst     sucht     gesucht      such      haben person,animal person,animal,text,thing,wear,vehicle
love        loves        loved        lieben       liebst     liebt     geliebt      -         haben person        person,animal,place,text
know        knows        known        kennen       kennst     kennt     gekannt      -         haben person        person,text,place
visit       visits       visited      besuchen     besuchst   besucht   besucht      besuch    haben person        person,place
greet       greets       greeted      grüßen       grüßt      grüßt     gegrüßt      grüß      haben person        person
ask         asks         asked        fragen       fragst     fragt     gefragt      frag      haben person        person
draw        draws        drawn        zeichnen     zeichnest  zeichnet  gezeichnet   zeichne   haben person        person,animal,place
feed        feeds        fed          füttern      fütterst   füttert   gefüttert    füttere   haben person        animal
buy         buys         bought       kaufen       kaufst     kauft     gekauft      kauf      haben person        food,drink,text,thing,wear,vehicle,furniture
sell        sells        sold         verkaufen    verkaufst  verkauft  verkauft     verkauf   haben person        animal,food,drink,thing,wear,vehicle,furniture
need        needs        needed       brauchen     brauchst   braucht   gebraucht    -         haben person        text,thing,wear,vehicle,furniture
lose        loses        lost         verlieren    verlierst  verliert  verloren     -         haben person        text,thing,wear
forget      forgets      forgotten    vergessen    vergisst   vergisst  vergessen    vergiss   haben person        text,thing,wear
read        reads        read         lesen        liest      liest     gelesen      lies      haben person        text
write       writes       written      schreiben    schreibst  schreibt  geschrieben  schreib   haben person        text
eat         eats         eaten        essen        isst       isst      gegessen     iss       haben person,animal food
drink       drinks       drunk        trinken      trinkst    trinkt    getrunken    trink     haben person        drink
wash        washes       washed       waschen      wäschst    wäscht    gewaschen    wasch     haben person        wear,vehicle,food
wear        wears        worn         tragen       trägst     trägt     getragen     trag      haben person        wear
repair      repairs      repaired     reparieren   reparierst repariert repariert    repariere haben person        vehicle,machine,furniture
build       builds       built        bauen        baust      baut      gebaut       bau       haben person        furniture,vehicle
open        opens        opened       auf|machen   machst     macht     aufgemacht   mach      haben person        opens
close       closes       closed       zu|machen    machst     macht     zugemacht    mach      haben person        opens
turn_on     turns_on     turned_on    ein|schalten schaltest  schaltet  eingeschaltet schalte  haben person        machine
turn_off    turns_off    turned_off   aus|schalten schaltest  schaltet  ausgeschaltet schalte  haben person        machine
pick_up     picks_up     picked_up    ab|holen     holst      holt      abgeholt     hol       haben person        person
call        calls        called       an|rufen     rufst      ruft      angerufen    ruf       haben person        person
invite      invites      invited      ein|laden    lädst      lädt      eingeladen   lade      haben person        person
put_on      puts_on      put_on       an|ziehen    ziehst     zieht     angezogen    zieh      haben person        wear
take_off    takes_off    taken_off    aus|ziehen   ziehst     zieht     ausgezogen   zieh      haben person        wear
try_on      tries_on     tried_on     an|probieren probierst  probiert  anprobiert   probiere  haben person        wear
throw_away  throws_away  thrown_away  weg|werfen   wirfst     wirft     weggeworfen  wirf      haben person        text,thing,food
take_along  takes_along  taken_along  mit|nehmen   nimmst     nimmt     mitgenommen  nimm      haben person        text,thing,wear
tidy_up     tidies_up    tidied_up    auf|räumen   räumst     räumt     aufgeräumt   räum      haben person        room
look_at     looks_at     looked_at    an|sehen     siehst     sieht     angesehen    sieh      haben person,animal person,animal,thing
"""  # noqa: E501

_INTRANSITIVE = """
sleep        sleeps        slept         schlafen       schläfst   schläft   geschlafen    schlaf  haben person,animal -
wait         waits         waited        warten         wartest    wartet    gewartet      warte   haben person,animal -
play         plays         played        spielen        spielst    spielt    gespielt      spiel   haben person,animal -
sing         sings         sung          singen         singst     singt     gesungen      sing    haben person        -
dance        dances        danced        tanzen         tanzt      tanzt     getanzt       tanz    haben person        -
laugh        laughs        laughed       lachen         lachst     lacht     gelacht       lach    haben person        -
cry          cries         cried         weinen         weinst     weint     geweint       weine   haben person        -
work         works         worked        arbeiten       arbeitest  arbeitet  gearbeitet    arbeite haben person        -
swim         swims         swum          schwimmen      schwimmst  schwimmt  geschwommen   schwimm sein  person,animal -
run          runs          run           laufen         läufst     läuft     gelaufen      lauf    sein  person,animal -
get_up       gets_up       got_up        auf|stehen     stehst     steht     aufgestanden  steh    sein  person        -
arrive       arrives       arrived       an|kommen      kommst     kommt     angekommen    -       sein  person        -
come_back    comes_back    come_back     zurück|kommen  kommst     kommt     zurückgekommen komm   sein  person,animal -
fall_asleep  falls_asleep  fallen_asleep ein|schlafen   schläfst   schläft   eingeschlafen schlaf  sein  person,animal -
run_away     runs_away     run_away      weg|laufen     läufst     läuft     weggelaufen   lauf    sein  person,animal -
"""  # noqa: E501

_DATIVE = """
help         helps         helped        helfen      hilfst     hilft     geholfen    hilf      haben person person
thank        thanks        thanked       danken      dankst     dankt     gedankt     danke     haben person person
answer       answers       answered      antworten   antwortest antwortet geantwortet antworte  haben person person
trust        trusts        trusted       vertrauen   vertraust  vertraut  vertraut    vertraue  haben person person,animal
follow       follows       followed      folgen      folgst     folgt     gefolgt     folge     sein  person,animal person,animal
listen_to    listens_to    listened_to   zu|hören    hörst      hört      zugehört    hör       haben person person,animal
"""  # noqa: E501

# The receiver is a person; the classes are those of the thing that changes hands.
_DITRANSITIVE = """
give    gives   given   geben        gibst     gibt      gegeben     gib      haben person food,drink,text,thing,wear
show    shows   shown   zeigen       zeigst    zeigt     gezeigt     zeig     haben person animal,text,thing,wear,vehicle,place
send    sends   sent    schicken     schickst  schickt   geschickt   schick   haben person text,thing,wear
lend    lends   lent    leihen       leihst    leiht     geliehen    leih     haben person text,thing,wear,vehicle
bring   brings  brought bringen      bringst   bringt    gebracht    bring    haben person food,drink,text,thing,wear
offer   offers  offered an|bieten    bietest   bietet    angeboten   biete    haben person food,drink
"""  # noqa: E501

# After the object's classes: the preposition and the case it takes with this verb.
_PREPOSITIONAL = """
wait_for     waits_for     waited_for    warten      wartest   wartet   gewartet     warte   haben person,animal person,animal       auf  acc
think_of     thinks_of     thought_of    denken      denkst    denkt    gedacht      denk    haben person        person,animal,place an   acc
laugh_about  laughs_about  laughed_about lachen      lachst    lacht    gelacht      lach    haben person        person,animal,text  über acc
write_about  writes_about  written_about schreiben   schreibst schreibt geschrieben  schreib haben person        person,animal,place über acc
dream_of     dreams_of     dreamt_of     träumen     träumst   träumt   geträumt     träum   haben person        person,animal,place von  dat
play_with    plays_with    played_with   spielen     spielst   spielt   gespielt     spiel   haben person,animal person,animal       mit  dat
talk_to      talks_to      talked_to     reden       redest    redet    geredet      rede    haben person        person,animal       mit  dat
look_after   looks_after   looked_after  auf|passen  passt     passt    aufgepasst   pass    haben person        person,animal,thing auf  acc
"""  # noqa: E501

# Verbs with their own patterns. "lie" and "lay", "stand" and "place": the same preposition takes
# the dative for where, the accusative for where to.
_SPECIAL = """
lie      lies      lain      liegen      liegst     liegt      gelegen     -       haben flat -
stand    stands    stood     stehen      stehst     steht      gestanden   -       haben upright -
hang     hangs     hung      hängen      hängst     hängt      gehangen    -       haben hangs -
lay      lays      laid      legen       legst      legt       gelegt      leg     haben person flat
place    places    placed    stellen     stellst    stellt     gestellt    stell   haben person upright
go       goes      gone      gehen       gehst      geht       gegangen    geh     sein  person,animal place
come     comes     come      kommen      kommst     kommt      gekommen    komm    sein  person,animal place
like     likes     liked     gefallen    gefällst   gefällt    gefallen    -       haben - -
say      says      said      sagen       sagst      sagt       gesagt      -       haben person -
know     knows     known     wissen      weißt      weiß       gewusst     -       haben person -
believe  believes  believed  glauben     glaubst    glaubt     geglaubt    -       haben person -
hope     hopes     hoped     hoffen      hoffst     hofft      gehofft     -       haben person -
try      tries     tried     versuchen   versuchst  versucht   versucht    -       haben person -
promise  promises  promised  versprechen versprichst verspricht versprochen -      haben person -
begin    begins    begun     an|fangen   fängst     fängt      angefangen  -       haben person -
"""  # noqa: E501

# english, German; true of now or again and again, so that the present tense fits.
_PRESENT_TIMES = """
today            heute
now              jetzt
every_day        jeden_Tag
every_morning    jeden_Morgen
every_evening    jeden_Abend
every_week       jede_Woche
every_year       jedes_Jahr
in_the_morning   am_Morgen
in_the_evening   am_Abend
at_night         in_der_Nacht
at_noon          am_Mittag
on_Monday        am_Montag
on_Tuesday       am_Dienstag
on_Wednesday     am_Mittwoch
on_Thursday      am_Donnerstag
on_Friday        am_Freitag
on_Saturday      am_Samstag
on_Sunday        am_Sonntag
in_spring        im_Frühling
in_summer        im_Sommer
in_autumn        im_Herbst
in_winter        im_Winter
"""
_FUTURE_TIMES = """
tomorrow         morgen
soon             bald
next_week        nächste_Woche
next_month       nächsten_Monat
next_year        nächstes_Jahr
"""
_PERFECT_TIMES = """
today            heute
this_week        diese_Woche
this_month       diesen_Monat
this_year        dieses_Jahr
"""

# english statement (third person), base as after "does"; German ich, du, er, wir. What does not
# bend in English ("can") stands as its own auxiliary in questions.
_MODALS = """
can             -              kann    kannst    kann    können
must            -              muss    musst     muss    müssen
may             -              darf    darfst    darf    dürfen
should          -              sollte  solltest  sollte  sollten
would_like_to   -              möchte  möchtest  möchte  möchten
wants_to        want_to        will    willst    will    wollen
"""

_SMALL_NUMBERS = """
zero       null
one        eins
two        zwei
three      drei
four       vier
five       fünf
six        sechs
seven      sieben
eight      acht
nine       neun
ten        zehn
eleven     elf
twelve     zwölf
thirteen   dreizehn
fourteen   vierzehn
fifteen    fünfzehn
sixteen    sechzehn
seventeen  siebzehn
eighteen   achtzehn
nineteen   neunzehn
"""
_TENS = """
twenty     zwanzig
thirty     dreißig
forty      vierzig
fifty      fünfzig
sixty      sechzig
seventy    siebzig
eighty     achtzig
ninety     neunzig
"""


# Entries are compared, and hashed, by identity: there is one object per entry.
@dataclass(frozen=True, slots=True, eq=False)
class Noun:
    """One noun; ``genitive`` is empty for things, ``plural`` for what is not counted."""

    english: str
    english_plural: str
    gender: Gender
    german: str
    german_plural: str
    genitive: str
    weak: bool
    classes: frozenset[str]


@dataclass(frozen=True, slots=True, eq=False)
class Adjective:
    """One adjective; ``stem`` is what endings are added to (teuer, teur-es)."""

    english: str
    english_comparative: str
    german: str
    stem: str
    comparative: str
    classes: frozenset[str]


@dataclass(frozen=True, slots=True, eq=False)
class Verb:
    """One verb in both languages; ``forms`` are ich, du, er and wir (which serves all plurals)."""

    english: str
    english_third: str
    english_participle: str
    forms: tuple[str, str, str, str]
    infinitive: str
    prefix: str
    participle: str
    imperative: str
    auxiliary: str
    subjects: frozenset[str]
    objects: frozenset[str]
    preposition: str = ""
    case: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Modal:
    """A verb that sends another one, as an infinitive, to the end of the German clause."""

    english: str
    english_base: str
    forms: tuple[str, str, str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Adverb:
    """An expression of time, as it stands within a sentence."""

    english: str
    german: str


def _rows(table: str) -> list[list[str]]:
    """The table's cells: ``-`` becomes empty, ``_`` a blank."""
    lines = (line.split() for line in table.strip().splitlines())
    return [["" if cell == "-" else cell.replace("_", " ") for cell in line] for line in lines]


def _classes(cell: str, *more: str) -> frozenset[str]:
    return frozenset(filter(None, cell.split(","))) | frozenset(more)


def _gender(cell: str) -> Gender:
    assert cell in ("m", "f", "n"), cell
    return cell  # type: ignore[return-value]


def _beings(table: str, kind: str) -> list[Noun]:
    return [
        Noun(
            english, english_plural, _gender(gender), german, plural,
            plural if genitive == "weak" else genitive, genitive == "weak", _classes(classes, kind),
        )
        for english, english_plural, gender, german, plural, genitive, classes in _rows(table)
    ]  # fmt: skip


def _things(table: str) -> list[Noun]:
    return [
        Noun(english, english_plural, _gender(gender), german, plural, "", False,
             _classes(classes, "own"))
        for english, english_plural, gender, german, plural, classes in _rows(table)
    ]  # fmt: skip


def _verbs(table: str) -> tuple[Verb, ...]:
    verbs = []
    for row in _rows(table):
        english, third, english_participle, infinitive, du, er, participle, imperative = row[:8]
        auxiliary, subjects, objects, *government = row[8:]
        prefix, _, bare = infinitive.rpartition("|")
        stem = bare[:-2] if bare.endswith("en") else bare[:-1]
        verbs.append(
            Verb(
                english, third, english_participle, (stem + "e", du, er, bare), prefix + bare,
                prefix, participle, imperative, auxiliary, _classes(subjects), _classes(objects),
                *government,
            )
        )  # fmt: skip
    return tuple(verbs)


def _adverbs(table: str) -> tuple[Adverb, ...]:
    return tuple(Adverb(english, german) for english, german in _rows(table))


def _spell(number: int, joined: Callable[[str, str], str], column: int) -> str:
    if not 0 <= number <= 99:
        raise ValueError(f"only 0 to 99 can be spelt, not {number}")
    small = _rows(_SMALL_NUMBERS)
    if number < 20:
        return small[number][column]
    tens, ones = divmod(number, 10)
    name = _rows(_TENS)[tens - 2][column]
    return joined(name, small[ones][column]) if ones else name


@cache
def number_in_english(number: int) -> str:
    """``23`` → ``twenty-three``, for 0 to 99."""
    return _spell(number, lambda tens, ones: f"{tens}-{ones}", 0)


@cache
def number_in_german(number: int) -> str:
    """``23`` → ``dreiundzwanzig``, for 0 to 99: ones before tens, written as one word."""
    return _spell(number, lambda tens, ones: f"{'ein' if ones == 'eins' else ones}und{tens}", 1)


NOUNS = (*_beings(_PERSONS, "person"), *_beings(_ANIMALS, "animal"), *_things(_THINGS))
NOUN = {noun.english: noun for noun in NOUNS}
ADJECTIVES = tuple(
    Adjective(english, degree, german, stem, german_degree, _classes(classes))
    for english, degree, german, stem, german_degree, classes in _rows(_ADJECTIVES)
)
TRANSITIVE = _verbs(_TRANSITIVE)
INTRANSITIVE = _verbs(_INTRANSITIVE)
DATIVE = _verbs(_DATIVE)
DITRANSITIVE = _verbs(_DITRANSITIVE)
PREPOSITIONAL = _verbs(_PREPOSITIONAL)
SPECIAL = {verb.english: verb for verb in _verbs(_SPECIAL)}
# "wissen" bends like a modal verb.
SPECIAL["know"] = replace(SPECIAL["know"], forms=("weiß", "weißt", "weiß", "wissen"))
MODALS = tuple(
    Modal(english, base, (ich, du, er, wir)) for english, base, ich, du, er, wir in _rows(_MODALS)
)
WILL = Modal("will", "", ("werde", "wirst", "wird", "werden"))
CLOCK = tuple(
    Adverb(
        f"at {number_in_english(hour)} o'clock",
        f"um {'ein' if hour == 1 else number_in_german(hour)} Uhr",
    )
    for hour in range(1, 13)
)
PRESENT_TIMES = (*_adverbs(_PRESENT_TIMES), *CLOCK)
FUTURE_TIMES = _adverbs(_FUTURE_TIMES)
PERFECT_TIMES = _adverbs(_PERFECT_TIMES)


@cache
def nouns_of(classes: frozenset[str]) -> tuple[Noun, ...]:
    """The nouns that belong to one of ``classes``, in the order of the tables."""
    return tuple(noun for noun in NOUNS if noun.classes & classes)


@cache
def adjectives_of(classes: frozenset[str], *, comparable: bool = False) -> tuple[Adjective, ...]:
    """The adjectives that go with a noun of ``classes``; ``comparable``: that have degrees."""
    return tuple(
        adjective
        for adjective in ADJECTIVES
        if adjective.classes & classes and (adjective.comparative or not comparable)
    )
