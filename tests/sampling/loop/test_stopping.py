from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.sampling.loop.stopping import StopMatcher, TextReader
from table_model import ByteDecoder


def read(pieces: list[str], stop: list[str], include_stop: bool = False) -> tuple[str, bool]:
    matcher = StopMatcher(stop, include_stop)
    text = ""
    for piece in pieces:
        more, stopped = matcher.push(piece)
        text += more
        if stopped:
            return text, True
    return text + matcher.flush(), False


def reference(text: str, stop: list[str], include_stop: bool = False) -> tuple[str, bool]:
    """Read character by character; the longest stop string that the text so far ends with ends it."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end if include_stop else end - max(map(len, found))], True
    return text, False


letters = st.text("ab", min_size=1, max_size=5)


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.lists(st.text("abc", max_size=4), max_size=10), st.lists(letters, max_size=3), st.booleans())
def test_any_cut_of_the_text_reads_like_single_characters(pieces, stop, include_stop):
    assert read(pieces, stop, include_stop) == reference("".join(pieces), stop, include_stop)


def test_a_stop_string_that_overlaps_itself_is_found():
    assert read(list("5556"), ["556"]) == ("5", True)
    assert read(["aab", "aabaa", "ab"], ["aabaaab"]) == ("aab", True)


@pytest.mark.parametrize("cuts", list(itertools.product([False, True], repeat=5)))
def test_a_stop_string_is_found_inside_one_piece_and_across_pieces(cuts):
    pieces, current = [], ""
    for letter, cut in zip("x END", [*cuts], strict=True):
        current += letter
        if cut:
            pieces.append(current)
            current = ""
    assert read([*pieces, current, " more"], ["END"]) == ("x ", True)
    assert read([*pieces, current, " more"], ["END"], include_stop=True) == ("x END", True)


def test_the_first_to_be_complete_wins_and_of_those_the_longest():
    assert read(["xabc"], ["abc", "b"]) == ("xa", True)
    assert read(["xab"], ["b", "ab"]) == ("x", True)


def test_only_what_may_begin_a_stop_string_is_held_back():
    matcher = StopMatcher(["\n\nQ:"])
    assert matcher.push("one\n") == ("one", False)
    assert matcher.push("two") == ("\ntwo", False)
    assert matcher.push("\n\n") == ("", False)
    assert matcher.push("\n") == ("\n", False)
    assert matcher.flush() == "\n\n"


def test_a_stop_string_within_a_character_of_several_tokens_is_found_when_it_is_whole():
    reader = TextReader(ByteDecoder(), stop=["é!"])
    shown = [reader.push(token) for token in "café!?".encode()[:-1]]
    assert "".join(text for text, _ in shown) == "caf"
    assert [stopped for _, stopped in shown] == [False] * 5 + [True]
    assert reader.flush() == ("", True)


def test_half_a_character_and_held_back_text_come_out_at_the_end():
    reader = TextReader(ByteDecoder(), stop=["END"])
    assert reader.push(ord("E")) == ("", False)
    assert reader.push(0xC3) == ("", False)
    assert reader.flush() == ("E\ufffd", False)


def test_half_a_character_may_complete_a_stop_string():
    reader = TextReader(ByteDecoder(), stop=["\ufffd"])
    assert reader.push(0xE2) == ("", False)
    assert reader.flush() == ("", True)
