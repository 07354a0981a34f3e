"""Where shards may lie."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from data_shards.config import DataConfig


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000", "https://host/a/b%20c/", "gs://bucket/x", "s3://my.bucket/a_b",
        "http://[::1]:80/x", None,
    ],
)  # fmt: skip
def test_addresses_of_shards(url: str | None) -> None:
    assert DataConfig(shards_url=url).shards_url == url


@pytest.mark.parametrize(
    "url",
    [
        "https://user:secret@host/x", "https://user@host", "https://host/x?token=secret",
        "https://host/x#secret", "corpus", "", "/mnt/secret", "file:///mnt/secret", "https://",
        "https:///secret", "pipe:cat secret", "ftp://host/secret", "https://host/a'secret",
        "https://host:99999/secret", "https://host/a secret", "https://host/a\nsecret",
    ],
)  # fmt: skip
def test_what_is_no_address_of_shards_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DataConfig(shards_url=url)
    [problem] = caught.value.errors()
    assert problem["type"] == "value_error"  # of which only the message is shown
    assert "https://HOST/FOLDER" in problem["msg"]
    assert "secret" not in problem["msg"]
