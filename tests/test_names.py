"""The form in which names are compared. `test_patients.py` shows what follows from it over the wire."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clinic.frontdesk.v1 import patient_pb2 as pb
from frontdesk.core.names import folded, sought_words, without_invisible
from frontdesk.errors import InvalidField
from frontdesk.rpc.requests import request_from

CHARACTERS = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def refused(text: str) -> bool:
    """Whether the contract refuses to seek this text."""
    try:
        request_from(pb.ListPatientsRequest(name_prefix=text).SerializeToString(), pb.ListPatientsRequest)
    except InvalidField:
        return True
    return False


def test_the_contract_refuses_the_names_of_which_nothing_is_compared() -> None:
    """The list of invisible characters in rules.proto is the one in core/names.py, and the blank of Braille."""
    nothing = [character for character in CHARACTERS if not folded(character)]
    assert [character for character in [*nothing, "\u2800"] if not refused(character)] == []
    seen = [
        character
        for character in CHARACTERS[::53]
        if unicodedata.category(character)[0] in "LMNPS" and folded(character) and character != "\u2800"
    ]
    assert len(seen) > 1000
    assert [character for character in seen if refused(character)] == []


@given(WORDS, WORDS)
@example("\u1e9c", "\u025f")
@example("\u0130", "\u0131")
def test_a_compared_form_is_its_own(given_name: str, family_name: str) -> None:
    """What is compared compares as itself, so that the words of a stored form can be sought."""
    form = folded(given_name, family_name)
    assert folded(form) == form
    assert without_invisible(form) == form


@given(WORDS)
def test_letter_case_and_composition_do_not_matter(name: str) -> None:
    """A name in capitals, in small letters, composed or decomposed is the same name."""
    spellings = [name, name.upper().lower(), unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)]
    assert len({folded(spelling) for spelling in spellings if not _greek_breathing(spelling)}) <= 1


def _greek_breathing(text: str) -> bool:
    # Alone they stand for apostrophes, or for a blank with two marks, depending on the composition.
    return any("\u1fbd" <= character <= "\u1fff" and unicodedata.category(character) == "Sk" for character in text)


@pytest.mark.parametrize("letter", ["a", "d", "h", "i", "l", "o", "t", "z", "и", "е", "г", "α", "ω"])
def test_no_mark_makes_another_latin_greek_or_cyrillic_letter(letter: str) -> None:
    """Each letter that Unicode names as this one with a mark is compared as this one."""
    name = unicodedata.name(letter)
    marked = [
        each
        for each in CHARACTERS
        if unicodedata.name(each, "").startswith(f"{name} WITH ")
        # Some stand for a letter and a sign after it.
        and all(unicodedata.combining(part) for part in unicodedata.normalize("NFKD", each)[1:])
    ]
    assert marked
    assert {folded(each) for each in marked} == {letter}


def test_no_mark_of_another_script_is_lost() -> None:
    """Letters of other scripts that differ in a mark stay different."""
    for one, other in (("か", "が"), ("ハ", "パ"), ("स", "सु"), ("ก", "กุ"), ("ا", "أ"), ("ש", "שׁ"), ("하", "항")):
        assert folded(one) != folded(other)
        assert folded(other) == folded(unicodedata.normalize("NFD", other))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Souza, Ana  María", ["ana", "maria", "souza"]),
        ("ana an", ["ana"]),
        ("D’Arc", ["d'arc"]),
        ("Jean‑Luc , Picard", ["jean-luc", "picard"]),
        (" ,, ", []),
        ("x" * 200, ["x" * 64]),
    ],
)
def test_sought_words(text: str, words: list[str]) -> None:
    """A search looks for each word, without commas, once, and not for one that another begins with."""
    assert list(sought_words(text)) == words


def test_names_of_any_length_fit_an_index() -> None:
    """A character that stands for eighteen others makes no key that PostgreSQL cannot index."""
    assert len(folded("\ufdfa" * 200)) == 250
