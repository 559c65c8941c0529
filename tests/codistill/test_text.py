"""What others wrote, in messages of one line."""

import pytest

from codistill.text import first_line, printable


@pytest.mark.parametrize(
    ("text", "expected"), [("plain ü", "plain ü"), ("a\x1b[0m\tb\x7f\x9b", "a?[0m?b??"), ("\ud800\u202e", "??")]
)
def test_what_cannot_be_printed_is_a_question_mark(text, expected):
    assert printable(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("one\ntwo", "one"), ("\n one", "one"), ("", "OSError"), (" \n", "OSError"), ("x" * 999, "x" * 200)],
)
def test_of_an_error_its_first_line_is_told_or_its_type(text, expected):
    assert first_line(OSError(text)) == expected
