from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_shards.errors import UserError
from trainer.average import average_weights


def _write(file: Path, weights: dict[str, torch.Tensor]) -> Path:
    save_file(weights, str(file))
    return file


def test_mean_is_the_mean_by_hand(tmp_path):
    files = [
        _write(
            tmp_path / f"{number}",
            {"a": torch.tensor([[1.0, 2.0], [3.0, number]]), "b": torch.full((3,), 2.0 * number)},
        )
        for number in (1.0, 2.0, 6.0)
    ]
    means = average_weights(files)
    assert set(means) == {"a", "b"}
    assert torch.equal(means["a"], torch.tensor([[1.0, 2.0], [3.0, 3.0]]))
    assert torch.equal(means["b"], torch.tensor([6.0, 6.0, 6.0]))
    assert means["a"].dtype == torch.float32


def test_a_single_file_comes_back_bit_by_bit(tmp_path):
    weights = {"w": torch.randn(17, 5)}
    assert torch.equal(average_weights([_write(tmp_path / "w", weights)])["w"], weights["w"])


def test_sums_do_not_lose_what_float32_would(tmp_path):
    # 2**24 + 1 is not a float32: summed in float32 the ones would vanish.
    values = [2.0**24, 1.0, 1.0, 2.0]
    files = [
        _write(tmp_path / f"{number}", {"w": torch.tensor([value])})
        for number, value in enumerate(values)
    ]
    expected = torch.tensor([(2.0**24 + 4.0) / 4.0])
    assert torch.equal(average_weights(files)["w"], expected)
    assert torch.equal(average_weights(files[::-1])["w"], expected)


def test_different_models_are_refused_by_name(tmp_path):
    one = _write(tmp_path / "one", {"w": torch.zeros(2), "x": torch.zeros(1)})
    other = _write(tmp_path / "other", {"w": torch.zeros(3), "x": torch.zeros(1)})
    lacking = _write(tmp_path / "lacking", {"w": torch.zeros(2)})
    with pytest.raises(UserError, match=r"w has shape \(2,\) in one and \(3,\)"):
        average_weights([one, other])
    with pytest.raises(UserError, match=r"x has shape .* none"):
        average_weights([one, lacking])


def test_a_file_that_is_not_one_of_weights_is_an_error_of_one_line(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"model\.safetensors.*choose another checkpoint"):
        average_weights([file])
    with pytest.raises(UserError, match="weights not found"):
        average_weights([tmp_path / "absent"])
