"""The plots: every curve and name is in the file, twice the same, and faults are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_shards.errors import UserError
from trainer.paper.charts import Panel, Series, write_charts

_PANEL = Panel(
    title="time",
    x_label="length n",
    y_label="seconds",
    series=(
        Series("self-attention", (16, 32, 64), (1, 4, 16), low=(0.9, 3.9, 15), high=(1.1, 4.2, 17)),
        Series("theory", (16, 64), (1, 16), style="theory", look=0),
        Series("points", (16, 32), (2, 3), low=(1, 2), high=(3, 4), style="points"),
    ),
    x_log=True,
    y_log=True,
)


def test_the_same_panels_give_the_same_file_with_all_names(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        write_charts(tmp_path / "new" / name, [_PANEL, _PANEL, _PANEL], title="Table 1")
    text = (tmp_path / "new/one.svg").read_text()
    assert text == (tmp_path / "new/two.svg").read_text()
    for words in ("Table 1", "self-attention", "theory", "length n", "seconds"):
        assert words in text


def test_a_logarithmic_axis_has_numbers_that_can_be_read(tmp_path: Path) -> None:
    tiny = Panel(
        "", "", "", (Series("other", (1024, 4096), (1e-12, 1e-4)),), x_log=True, y_log=True
    )
    write_charts(tmp_path / "x.svg", [_PANEL, tiny], legend="below")
    text = (tmp_path / "x.svg").read_text()
    assert "mathdefault" not in text
    for tick in (">1,024<", ">1e-12<", ">10<", ">other<"):
        assert tick in text


def test_a_legend_below_is_one_for_panels_with_the_same_series(tmp_path: Path) -> None:
    for name, legend in (("inside", "inside"), ("below", "below")):
        write_charts(tmp_path / f"{name}.svg", [_PANEL, _PANEL], legend=legend)  # type: ignore[arg-type]
    count = [(tmp_path / f"{n}.svg").read_text().count(">points<") for n in ("inside", "below")]
    assert count == [2, 1]


@pytest.mark.parametrize(("file", "words"), [("x.bmp", "ends in"), ("file/x.svg", "written")])
def test_what_cannot_be_written_is_told(tmp_path: Path, file: str, words: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=words):
        write_charts(tmp_path / file, [_PANEL])
