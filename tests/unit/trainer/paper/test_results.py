"""Files of results: written whole or not at all, read only if nothing is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_shards.errors import UserError
from trainer.paper.results import check_place, read_result, write_result

_GOOD = {"format": 3, "machine": {"cpu": "x"}, "times": [{"n": 1, "s": 0.5}, {"n": 2, "s": None}]}


def _read(file: Path) -> dict[str, object]:
    return read_result(
        file, "table9", form=3, objects={"machine": ["cpu"]}, rows={"times": ["n", "s"]}
    )


def test_what_is_written_is_read_and_has_a_line_a_row(tmp_path: Path) -> None:
    file = tmp_path / "new" / "x.json"
    check_place(file)
    assert not file.parent.exists()
    write_result(file, _GOOD)
    assert _read(file) == _GOOD
    assert file.read_text().count("\n") == 8
    write_result(file, {**_GOOD, "more": 1})
    assert _read(file)["more"] == 1
    assert [path.name for path in file.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "no results of table9"),
        ({"machine": None}, "'machine' is missing"),
        ({"machine": {}}, "'machine' lacks 'cpu'"),
        ({"times": []}, "'times' is missing or empty"),
        ({"times": [{"n": 1, "s": 2}, {"n": 2}]}, "row 2 of 'times' lacks 's'"),
        ({"times": [1]}, "row 1 of 'times' lacks 'n'"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, change: dict[str, object], words: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps({**_GOOD, **change}))
    with pytest.raises(UserError, match=words) as told:
        _read(file)
    assert "babelray table9 --output" in str(told.value)


def test_a_place_that_takes_no_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, words in ((tmp_path, "it is a folder"), (tmp_path / "file" / "x", "is no folder")):
        with pytest.raises(UserError, match=words):
            check_place(place)
    with pytest.raises(UserError, match="the results cannot be written"):
        write_result(tmp_path / "file" / "x.json", _GOOD)
