from __future__ import annotations

import logging
import xml.etree.ElementTree as ElementTree

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from data_shards.errors import UserError
from trainer.attention import AttentionMaps
from trainer.heatmaps import Panel, select, write_image


@pytest.fixture
def maps():
    """Weights that tell their layer (tens) and head (units), counted from 1."""

    def made(layers, queries, keys):
        numbers = torch.tensor([[10.0 * a + b for b in (1, 2, 3)] for a in range(1, layers + 1)])
        return numbers[:, :, None, None].expand(-1, -1, queries, keys)

    source, inputs, outputs = ["▁a", "</s>"], ["<s>", "▁b", "c"], ["▁b", "c", "</s>"]
    weights = {"cross": made(2, 3, 2), "encoder": made(1, 2, 2), "decoder": made(2, 3, 3)}
    return AttentionMaps(source, inputs, outputs, weights)


def _panels(number, queries, keys):
    rng = np.random.default_rng(1)
    return [Panel(f"head {n}", rng.dirichlet(np.ones(keys), queries)) for n in range(number)]


def _write(file, panels, rows, columns, **options):
    names = {"title": "T", "row_name": "r", "column_name": "c"}
    write_image(file, panels, rows, columns, **{**names, **options})


def test_what_is_chosen_is_drawn(maps):
    def chosen(*arguments):
        return {panel.title: panel.weights.flat[0] for panel in select(maps, *arguments)}

    assert chosen("cross", 2, 3) == {"layer 2, head 3": 23}
    assert chosen("encoder", 1, "mean") == {"layer 1, mean of 3 heads": 12}
    assert list(chosen("decoder", 1, "all").values()) == [11, 12, 13]
    assert list(chosen("decoder", None, 2).values()) == [12, 22]
    assert list(chosen("cross", None, "all").values()) == [11, 12, 13, 21, 22, 23]
    assert maps.labelled("decoder")[1:] == (["▁b", "c", "</s>"], ["<s>", "▁b", "c"])
    assert maps.labelled("cross")[1:] == (["▁b", "c", "</s>"], ["▁a", "</s>"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("encoder", 2, 1), "--layer 2: the encoder has layers 1 to 1"),
        (("cross", 3, 1), "--layer 3: the decoder has layers 1 to 2"),
        (("cross", 0, 1), "--layer 0"),
        (("cross", 1, 4), "--head 4: a layer has heads 1 to 3"),
        (("cross", None, 0), "--head 0"),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(maps, arguments, message):
    with pytest.raises(UserError, match=message):
        select(maps, *arguments)


def test_darker_is_more(tmp_path):
    weights = np.array([[0.0, 1.0], [0.5, 0.5]])
    _write(tmp_path / "a.png", [Panel("", weights)], ["x", "y"], ["x", "y"])
    image = imread(tmp_path / "a.png")[:, :, :3].sum(2)
    # The strongest cell is the darkest large area: more than a hundredth of the picture.
    values, counts = np.unique(image.round(3), return_counts=True)
    areas = values[counts > 0.01 * image.size]
    assert areas.min() < 1.0 < areas.max() == 3.0


@pytest.mark.parametrize(("number", "length"), [(1, 2), (1, 21), (3, 7), (17, 4), (2, 40)])
def test_any_number_of_maps_of_any_length(tmp_path, number, length):
    pieces = [f"▁piece{n}" for n in range(length)]
    _write(tmp_path / "a.png", _panels(number, length, length), pieces, pieces)
    height, width, _ = imread(tmp_path / "a.png").shape
    assert 300 < height < 5000
    assert 300 < width < 5000


def test_a_vector_file_has_its_text_and_the_page_has_its_settings(tmp_path):
    before = dict(mpl.rcParams)
    pieces = ["▁$x_", "a&b<", "日本", "ক"]
    file = tmp_path / "new" / "a.svg"
    _write(file, _panels(1, 4, 4), pieces, pieces, title="Of “x” & <y> $z")
    text = "".join(ElementTree.parse(file).getroot().itertext())
    for expected in ("·$x_", "a&b<", "日本", "ক", "Of “x” & <y> $z, head 0"):
        assert expected in text
    first = file.read_bytes()
    _write(file, _panels(1, 4, 4), pieces, pieces, title="Of “x” & <y> $z")
    assert file.read_bytes() == first
    assert dict(mpl.rcParams) == before


def test_a_character_of_no_font_is_named_and_drawn_as_a_box(tmp_path, caplog):
    unassigned = "\U000e1234"
    with caplog.at_level(logging.WARNING):
        _write(tmp_path / "a.pdf", _panels(1, 2, 2), ["a", unassigned], ["ß", "Ж"])
    assert unassigned in caplog.text
    assert "ß" not in caplog.text
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    caplog.clear()
    _write(tmp_path / "a.svg", _panels(1, 2, 2), ["a", unassigned], ["ß", "Ж"])
    assert not caplog.text


def test_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written: .*choose another --output"):
        _write(tmp_path / "file" / "a.png", _panels(1, 1, 1), ["a"], ["b"])
    with pytest.raises(UserError, match=r"a\.jpg: an image ends in \.png, \.svg, \.pdf"):
        _write(tmp_path / "a.jpg", _panels(1, 1, 1), ["a"], ["b"])
