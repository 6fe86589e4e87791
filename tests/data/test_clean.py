import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.data.clean import clean
from minigpt.data.config import CleanConfig
from minigpt.data.reading import Piece


def cleaned(texts: list[str], config: CleanConfig) -> list[str]:
    """The documents that come out, each document of `texts` given in one piece."""
    return [text for text, ends in clean((Piece(text, True) for text in texts), config)]


def cleaned_in_pieces(text: str, sizes: list[int], config: CleanConfig) -> str:
    pieces, begin = [], 0
    for size in sizes:
        pieces.append(Piece(text[begin : begin + size], False))
        begin += size
    pieces.append(Piece(text[begin:], True))
    return "".join(out for out, _ in clean(pieces, config))


def test_by_default_nothing_changes():
    assert cleaned(["<b>É\0</b>\r\n"], CleanConfig()) == ["<b>É\0</b>\r\n"]


@pytest.mark.parametrize(
    ("config", "text", "expected"),
    [
        (CleanConfig(normalize="NFC"), "e\u0301 ﬁ", "é ﬁ"),
        (CleanConfig(normalize="NFKC"), "e\u0301 ﬁ", "é fi"),
        (CleanConfig(lowercase=True), "ΟΔΟΣ ÀB", "οδος àb"),
        (CleanConfig(strip_control=True), "a\x00b\r\n\tc\x7fd\x85", "ab\n\tcd"),
        (CleanConfig(strip_html=True), "<p class='x'>a &lt; b &amp;c</p><p>d</p>", "a < b &c\nd\n"),
        (CleanConfig(strip_html=True), "a<script>if (a<b) x()</script>b<style>p {}</style>c", "abc"),
        (CleanConfig(strip_html=True), "one<br>two<br/>\nthree<!-- not me --><b>bold</b>", "one\ntwo\n\nthreebold"),
        (CleanConfig(strip_html=True, lowercase=True, normalize="NFC"), "<H1>E&#x301;A</H1>B", "éa\nb"),
    ],
)
def test_cleaning_worked_by_hand(config, text, expected):
    assert cleaned([text], config) == [expected]


def test_documents_do_not_run_into_each_other():
    config = CleanConfig(strip_html=True, normalize="NFC")
    assert cleaned(["<script>never closed", "e", "\u0301 &am", "p;"], config) == ["", "e", "\u0301 &am", "p;"]


ACCENTED = st.text(st.sampled_from("aeE \n\u0301\u0323\u03a3\u03c3'.\u1100\u1161\u11a8가が\u3099か漢1"), max_size=40)
MARKUP = st.lists(
    st.sampled_from(
        [
            "<p>",
            "</p>",
            "<b x='>'>",
            "<script>",
            "</script>",
            "&amp;",
            "&",
            "a",
            " ",
            "\n",
            "<!--",
            "-->",
            "<",
            "</",
            "<br/>",
            "x",
            ";",
            "lt",
            "#65",
            "<style>",
            "</style>",
            "<!",
            "<?",
            ">",
            "&#x41",
            "&ampx",
            "=",
            "y",
        ]
    )
).map("".join)
SIZES = st.lists(st.integers(0, 7), max_size=12)


@settings(max_examples=100, deadline=None)
@given(ACCENTED, SIZES, st.sampled_from(["none", "NFC", "NFKC"]), st.booleans())
def test_normal_form_and_lower_case_do_not_depend_on_where_pieces_end(text, sizes, normalize, lowercase):
    config = CleanConfig(normalize=normalize, lowercase=lowercase, strip_control=True)
    expected = text if normalize == "none" else unicodedata.normalize(normalize, text)
    expected = expected.lower() if lowercase else expected
    assert cleaned_in_pieces(text, sizes, config) == expected


@settings(max_examples=100, deadline=None)
@given(MARKUP, SIZES)
def test_text_of_html_does_not_depend_on_where_pieces_end(text, sizes):
    config = CleanConfig(strip_html=True)
    assert cleaned_in_pieces(text, sizes, config) == cleaned([text], config)[0]
