from __future__ import annotations

import base64
import json
import shutil

import numpy as np
import pytest
import torch

from data_shards.config import EOS_ID
from data_shards.manifest import Manifest
from trainer import exhibits_attention
from trainer.attention import AttentionMaps, attention_maps
from trainer.exhibits_attention import attention
from trainer.run import load_model, read_config


@pytest.fixture(scope="module")
def shown(trained_run):
    manifest = Manifest.load(read_config(trained_run).data.folder())
    return attention(trained_run, manifest)


def _one_hot(places, keys):
    return torch.eye(keys)[torch.tensor(places)]


def test_every_weight_is_in_the_page(shown, trained_run):
    loaded = load_model(trained_run, "best")
    page = json.loads(shown["explorer"])
    assert len(page["sentences"]) == 4
    assert len({sentence["source"] for sentence in page["sentences"]}) == 4
    for sentence in page["sentences"]:
        source, target = loaded.vocabulary.encode([sentence["source"], sentence["target"]])
        maps = attention_maps(loaded, [*source, EOS_ID], target)
        if sentence["cross"]["rows"] != [p.replace("\u2581", "·") for p in maps.outputs]:
            continue  # the model cut the words otherwise than the vocabulary would
        for kind in ("encoder", "decoder", "cross"):
            packed, weights = sentence[kind], maps.labelled(kind)[0].numpy()
            stored = np.frombuffer(base64.b64decode(packed["weights"]), np.uint8)
            shape = (packed["layers"], packed["heads"], len(packed["rows"]), len(packed["columns"]))
            assert weights.shape == shape
            np.testing.assert_allclose(stored.reshape(shape) / 255, weights, atol=0.003)


def test_heads_are_named_for_what_they_do():
    source, target = 6, 5  # with the end
    dull = torch.full((2, 2, target, source), 1 / source)
    cross = dull.clone()
    cross[1, 0] = _one_hot([0, 1, 2, 3, 5], source)  # finds a word for each piece
    cross[0, 1] = _one_hot([5] * target, source)  # rests on the end
    encoder = torch.full((1, 2, source, source), 1 / source)
    encoder[0, 1] = _one_hot([0, 0, 1, 2, 3, 4], source)  # the piece before
    decoder = torch.full((2, 2, target, target), 1 / target).tril()
    decoder[1, 1] = torch.eye(target)
    letters = list("abcdefghij")
    weights = {"cross": cross, "encoder": encoder, "decoder": decoder}
    maps = AttentionMaps(letters[:source], letters[:target], letters[:target], weights)
    found = exhibits_attention._noted([maps, maps])
    assert [(head.kind, head.layer, head.head) for head in found] == [
        ("cross", 1, 0), ("cross", 0, None), ("encoder", 0, 1), ("decoder", 1, 1), ("cross", 0, 1),
    ]  # fmt: skip
    headings = [head.heading for head in found]
    assert headings == [
        "The sharpest head",
        "Where word alignments are read",
        "A head that looks at the piece before",
        "A head that looks at the piece just written",
        "A head that rests",
    ]
    assert "Head 1 of layer 2 of the cross-attention puts 100 % of its weight" in found[0].caption
    # A head that does nothing in particular is not named for it.
    weights = {
        "cross": torch.full((2, 1, target, source), 1 / source),
        "encoder": torch.full((1, 1, source, source), 1 / source),
        "decoder": torch.full((1, 1, target, target), 1 / target).tril(),
    }
    plain = AttentionMaps(letters[:source], letters[:target], letters[:target], weights)
    assert [head.kind for head in exhibits_attention._noted([plain])] == ["cross"] * 2


def test_of_a_single_attention_no_comparison_is_made():
    cross = _one_hot([0, 1, 2, 3, 5], 6)[None, None]
    maps = AttentionMaps(list("abcdef"), list("abcde"), list("abcde"), {"cross": cross})
    [head] = exhibits_attention._noted([maps])
    assert (head.kind, head.layer, head.head, head.heading) == ("cross", 0, 0, "The alignment")
    assert "than any other" not in head.caption
    page = json.loads(exhibits_attention._explorer([maps], ["a"], ["b"], [head]))
    assert list(page["names"]) == ["cross"]
    assert "encoder" not in page["sentences"][0]


def test_the_first_heads_weights_are_drawn(shown):
    assert shown["heads"]
    for head in shown["heads"]:
        assert "attends to" in head["svg"]
        assert head["caption"].endswith(".")
    assert shown["step"] == 180


def test_what_stands_in_a_script_cannot_end_it():
    nasty = "</script><b>&amp;"
    one = torch.ones(1, 1, 1, 1)
    weights = {"cross": one, "encoder": one, "decoder": one}
    maps = AttentionMaps([nasty], [nasty], [nasty], weights)
    text = exhibits_attention._explorer([maps], [nasty], [nasty], [])
    assert "<" not in text
    assert json.loads(text)["sentences"][0]["source"] == nasty


def test_a_page_stays_small(monkeypatch):
    one = torch.ones(1, 1, 1, 1)
    weights = {"cross": one, "encoder": one, "decoder": one}
    maps = AttentionMaps(["a"], ["a"], ["a"], weights)
    monkeypatch.setattr(exhibits_attention, "_MOST_BYTES", 7)
    text = exhibits_attention._explorer([maps] * 5, ["a"] * 5, ["b"] * 5, [])
    assert len(json.loads(text)["sentences"]) == 2


def test_without_what_it_takes_there_is_nothing(trained_run, tmp_path):
    manifest = Manifest.load(read_config(trained_run).data.folder())
    assert attention(trained_run, None) is None
    run_dir = shutil.copytree(trained_run, tmp_path / "demo")
    shutil.rmtree(run_dir / "checkpoints")
    assert attention(run_dir, manifest) is None
