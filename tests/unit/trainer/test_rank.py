"""What a rank says where it goes on from a checkpoint."""

from __future__ import annotations

import logging

import pytest

from trainer.rank import _tell_of_other_sums


def test_batches_that_are_computed_otherwise_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        _tell_of_other_sums("step-00000001", None, "padded, loss: own")
        _tell_of_other_sums("step-00000001", "padded, loss: own", "padded, loss: own")
        assert not caplog.text
        _tell_of_other_sums("step-00000001", "padded, loss: own", "packed, loss: own")
    assert "batches padded, loss: own; now they are packed, loss: own: sums" in caplog.text
