"""The tables of a page come from what was measured."""

from __future__ import annotations

import pytest
import torch

from data_shards.errors import UserError
from trainer.grammar_heads import Finding
from trainer.heads import Profile
from trainer.heads_page import parts_of, write_page
from trainer.needed_heads import Cost, Costs
from trainer.silenced_heads import HeadName

PROFILE = Profile(
    "decoder", 3, {0: torch.tensor([[0.5, 0.7]])}, torch.tensor([[0.8, 0.9]]), torch.ones(1, 2),
    torch.tensor([[0.1, 0.2]]), torch.zeros(1, 2),
)  # fmt: skip
FINDING = Finding("a → b", "cross", 1, 2, 1234, 0.956, 0.98, 0.1, -2, 0.37, 0.01, 0.95)
NEEDED = [
    Costs(
        "article",
        1000,
        0.986,
        (
            Cost(HeadName("cross", 1, 2), 0.537, 460, 11, (0.412, 0.4871)),
            Cost(HeadName("encoder", 0, 0), 0.985, 2, 1, (-0.0004, 0.003)),
        ),
    ),
    Costs("particle", 62, 1.0, (Cost(HeadName("cross", 1, 3), 1.0, 0, 0, None),)),
    Costs("ones of a number", 23, 1.0, ()),
]


def page(tmp_path, *parts):
    file = tmp_path / "page.md"
    marks = [f"<!-- {part}: begin -->\nold\n<!-- {part}: end -->\n" for part in parts]
    file.write_text("# Title\n" + "".join(marks), encoding="utf-8")
    return file


def test_parts_that_the_page_has_are_replaced(tmp_path):
    file = page(tmp_path, "demo grammar", "demo silenced", "demo places", "other grammar")
    write_page(file, "demo", {"decoder": PROFILE}, [FINDING], NEEDED)
    text = file.read_text(encoding="utf-8")
    assert text.count("old") == 1  # of the other run
    for line in (
        "| a → b | `cross 2.3` | 1,234 | 96 % | 98 % | 10 % | 37 % (-2) | 1 % of 95 % |",
        "| article | 1,000 | 98.6 % | `cross 2.3` | 53.7 % | 460 | 11 | 41.2 to 48.7 |",
        "|  |  |  | `encoder 1.1` | 98.5 % | 2 | 1 | 0.0 to 0.3 |",
        "| particle | 62 | 100.0 % | `cross 2.4` | 100.0 % | 0 | 0 | - |",
        "| ones of a number | 23 | 100.0 % | none | - | - | - | - |",
        "| decoder: at the piece just written | `decoder 1.2` | 70 % | 2 of 2 |",
        "| decoder: at the begin sign | `decoder 1.2` | 20 % | 0 of 2 |",
        "| decoder: at its strongest piece, wherever that stands | `decoder 1.2` | 90 % | 2 of 2 |",
    ):
        assert line in text
    again = file.read_text(encoding="utf-8")
    write_page(file, "demo", {"decoder": PROFILE}, [FINDING], NEEDED)
    assert file.read_text(encoding="utf-8") == again


def test_what_was_not_measured_stays(tmp_path):
    file = page(tmp_path, "demo places", "demo silenced")
    write_page(file, "demo", {"decoder": PROFILE}, [], [])
    assert file.read_text(encoding="utf-8").count("old") == 1


def test_a_page_without_the_runs_parts(tmp_path):
    with pytest.raises(UserError, match="none of the parts of this run: put in <!-- demo places"):
        write_page(page(tmp_path, "m30 places"), "demo", {"decoder": PROFILE}, [], [])
    with pytest.raises(UserError, match="cannot be read"):
        write_page(tmp_path / "none.md", "demo", {"decoder": PROFILE}, [], [])
    (tmp_path / "latin.md").write_bytes(b"\xe4")
    with pytest.raises(UserError, match="not UTF-8"):
        parts_of(tmp_path / "latin.md", "demo", ["places"])


def test_which_parts_a_page_has(tmp_path):
    file = page(tmp_path, "demo silenced", "demo places", "other grammar")
    assert parts_of(file, "demo", ["places", "grammar", "silenced"]) == ["places", "silenced"]
