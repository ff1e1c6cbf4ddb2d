"""Tables of embedded worlds: kinds of things, names, relations, and levels."""

from __future__ import annotations

import dataclasses

PERSON, COMPANY, CITY, BOOK = "person", "company", "city", "book"

# Kind -> relation -> kind of its value. A relation belongs to one kind only.
RELATIONS: dict[str, dict[str, str]] = {
    PERSON: {"mother": PERSON, "teacher": PERSON, "employer": COMPANY, "birthplace": CITY},
    COMPANY: {"founder": PERSON, "director": PERSON, "rival": COMPANY, "seat": CITY},
    CITY: {"mayor": PERSON, "architect": PERSON, "twin": CITY},
    BOOK: {"author": PERSON, "publisher": COMPANY, "setting": CITY},
}
KIND_OF_VALUE = {relation: value for table in RELATIONS.values() for relation, value in table.items()}


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


# Names share no words with each other, and no word of a name is a relation or a function word.
NAMES: dict[str, tuple[str, ...]] = {
    PERSON: _names(
        """anna reed, boris vale, clara hunt, dmitri lang, elena frost, felix ward, greta moss, henry pike,
        irene cole, jonas beck, karen holt, leon marsh, maria stone, niels dahl, olga finch, peter quill,
        rosa lind, simon gray, tilda berg, ursula fenn, victor sand, wanda kerr, xavier bloom, yara nash,
        zeno tarr, agnes boyle, bruno carr, celia dunn, edgar flint, freya gould, gustav hale, hilda irons,
        ivan jarvis, judith knox, lukas mead, nadia orr, oscar pell, petra rusk, stefan thorn, vera upton"""
    ),
    COMPANY: _names(
        """acme, borealis, cobalt, dynex, everline, fulcrum, granite, helix, ionic, junction, keystone, lumen,
        meridian, northgate, orbit, paragon, quantex, redwood, solaris, tundra, umbra, vertex, westfall,
        zenith"""
    ),
    CITY: _names(
        """alden, brask, corvo, drumlin, elmore, farholm, gravik, harlow, ister, jarrow, kelda, lorne, morvik,
        nysted, orsa, pelham, quorn, rask, selby, torvik, ulster, varde, wexham, yarrow"""
    ),
    BOOK: _names(
        """ashes, beacons, canvas, dunes, echoes, ferns, gallows, harbor, inkwell, jasmine, kites, lanterns,
        mirrors, nettles, oracles, petals, quartz, ravens, shadows, thickets, umbrellas, violets, willows,
        yonder"""
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Level:
    """A level of difficulty.

    Attributes:
      name: name of the level.
      hops: smallest and largest number of links from the name in the question to the answer.
      pages: number of passages of a world.
      facts: largest number of facts on a page (a kind may have fewer relations).
      mentions: number of distractor pages that mention something on the chain.
      share: fraction of the names that is in use.
      max_turns: number of steps after which an episode is truncated.
      train_tasks: size of the training panel.
    """

    name: str
    hops: tuple[int, int]
    pages: int
    facts: int
    mentions: int
    share: float
    max_turns: int
    train_tasks: int = 20_000


LEVELS = {
    level.name: level
    for level in (
        Level("tiny", hops=(2, 2), pages=12, facts=2, mentions=2, share=0.5, max_turns=8),
        Level("easy", hops=(2, 2), pages=24, facts=3, mentions=4, share=1.0, max_turns=8),
        Level("medium", hops=(2, 3), pages=36, facts=3, mentions=6, share=1.0, max_turns=10),
        Level("hard", hops=(3, 4), pages=48, facts=4, mentions=10, share=1.0, max_turns=12),
    )
}
