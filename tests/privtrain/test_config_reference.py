"""The reference of configuration keys is complete and current."""

from __future__ import annotations

import pathlib
import re
from typing import Annotated

import pydantic
import pytest
from pydantic import Field
from typer.testing import CliRunner

from privtrain.cli import app
from privtrain.config import Config, reference
from privtrain.config.reference import markdown_reference

_PAGE = pathlib.Path(reference.__file__).parent / "README.md"
_ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| (.*?) \| (.*?) \|$", re.M)


def undescribed_keys(page: str) -> list[str]:
    return [key for key, kind, _, meaning in _ROW.findall(page) if kind != "section" and not meaning]


def test_reference_committed_page_is_current():
    """Write it again by: privtrain schema --markdown > privtrain/config/README.md"""
    result = CliRunner().invoke(app, ["schema", "--markdown"])
    assert result.exit_code == 0
    assert _PAGE.read_text(encoding="utf-8") == result.output


def test_reference_every_key_is_described():
    page = markdown_reference(Config)
    keys = {key for key, *_ in _ROW.findall(page)}
    assert {"target_epsilon", "loss_range", "count_noise", "subset", "betas", "retry_seconds"} <= keys
    assert undescribed_keys(page) == []
    assert len(_ROW.findall(page)) == page.count("\n| `"), "a row of another form escapes this test"


def test_reference_key_without_description_is_found():
    class Inner(pydantic.BaseModel):
        described: int = Field(default=1, description="A number.")
        silent: int = 1

    class Root(pydantic.BaseModel):
        section: Inner = Inner()

    assert undescribed_keys(markdown_reference(Root)) == ["silent"]


class _Sample(pydantic.BaseModel):
    """A section."""

    number: Annotated[int, Field(ge=1, lt=9)] = 3
    choice: str | None = Field(default=None, description="a|b")
    needed: float
    names: list[str] = Field(default=["x"], min_length=2)


class _Root(pydantic.BaseModel):
    sample: _Sample


@pytest.mark.parametrize(
    "row",
    [
        "| `number` | integer, ≥ 1, < 9 | `3` |  |",
        r"| `choice` | string | none | a\|b |",
        "| `needed` | number | required |  |",
        '| `names` | list: at least 2 of string | `["x"]` |  |',
    ],
)
def test_reference_row_shows_limits_and_default(row):
    assert row in markdown_reference(_Root).splitlines()
