"""docs/performance.md says what the kept measurements say."""

import importlib
import re

import pytest

from benchmarks import page, record
from benchmarks.__main__ import KEPT, QUESTIONS


def test_the_page_is_what_its_text_and_the_kept_rows_make_of_it():
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), "run: python -m benchmarks.page"


def test_the_page_has_every_row_of_its_questions_and_every_goal_in_its_table():
    text = page.render()
    assert "[[" not in text
    for question in re.findall(r"^\[\[rows (\w+)\]\]$", page.TEXT.read_text(encoding="utf-8"), flags=re.MULTILINE):
        path = record.path_of(KEPT, question, "cpu")
        for row in record.read(path) if path.exists() else ():
            assert f"\n| {row.name} |" in text
            assert (f"| {question} | {row.name} | {row.wanted} |" in text) is (row.goal is not None)


def test_every_picture_on_the_page_is_kept_beside_it():
    for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.render()):
        assert (page.PAGE.parent / name).is_file(), name


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_question_says_what_it_asks_and_what_change_it_tolerates(question):
    module = importlib.import_module(f"benchmarks.{QUESTIONS[question]}")
    assert module.__doc__.splitlines()[0].endswith("?")
    assert 0 < module.TOLERANCE < 1
    assert callable(module.measure)
