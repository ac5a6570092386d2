"""The bugs that `tests/mutations.py` plants are bugs of today's code. That each turns a test red is for that script to show: it takes minutes."""

import ast

import pytest
from conftest import ROOT
from mutations import BUGS, planted


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_fits_the_code_and_its_test_is_there(bug):
    text = (ROOT / bug.file).read_text(encoding="utf-8")
    assert ast.dump(ast.parse(planted(bug, text))) != ast.dump(ast.parse(text)), "it changes nothing"
    file, name = bug.tests.split("::")
    assert f"def {name.split('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8")
