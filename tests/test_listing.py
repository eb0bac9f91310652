from __future__ import annotations

import inspect
import json
import re
import sys
from dataclasses import fields
from io import StringIO
from typing import get_type_hints

import pytest
from rich.console import Console

from fxprune import passes
from fxprune.pipeline.contract import Pass
from fxprune.pipeline.values import choices_of, show
from fxprune.report.listing import describe, print_passes

every_pass = pytest.mark.parametrize("step", passes.ALL, ids=[step.name for step in passes.ALL])


def printed(step: type[Pass]) -> str:
    out = StringIO()
    print_passes([step], Console(file=out, width=500))
    return out.getvalue()


@every_pass
def test_every_value_of_every_choice_is_listed(step: type[Pass]) -> None:
    options = json.loads(json.dumps(describe(step)))["options"]
    text, hints = printed(step), get_type_hints(step)
    assert set(options) == {one.name.replace("_", "-") for one in fields(step)}
    for one in fields(step):
        option = options[one.name.replace("_", "-")]
        assert option["values"] == list(choices_of(hints[one.name]))
        assert option["meaning"], one.name
        assert all(str(value) in text for value in option["values"])
        assert f"{one.name.replace('_', '-')}={option['default']}" in text


@every_pass
def test_documents_name_the_default_that_the_pass_has(step: type[Pass]) -> None:
    texts = (inspect.getdoc(sys.modules[step.__module__]) or "", inspect.getdoc(step) or "")
    for named in re.findall(r"The default, ``([\w-]+)``", " ".join(texts)):
        assert named in {show(getattr(step(), one.name)) for one in fields(step)}


def test_types_are_words() -> None:
    text = printed(passes.TrainQuantized)
    assert "(one of min-max, " in text or "(one of " in text
    assert "(true or false)" in text
    assert "(whole number)" in text
    assert "(list of text)" in printed(passes.InsertObservers)
    assert "(mapping from text to number)" in printed(passes.PlanChannels)
