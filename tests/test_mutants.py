from __future__ import annotations

import pytest

from tools.mutants import ROOT
from tools.planted_faults import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_a_mutant_changes_is_still_there(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    assert mutant.new not in source or mutant.new in mutant.old
    assert all((ROOT / name).is_file() for name in mutant.tests.split())
