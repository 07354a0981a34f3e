"""What a corpus is, how it is prepared and how it is dealt into batches: a torch-free schema."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# Ids of the special pieces, the same in every vocabulary.
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3

# Bump when the layout of a prepared folder changes, so that an old folder is never misread.
DATA_FORMAT = 1

# Settings of ``DataConfig`` that say where things lie on one machine, and nothing of the corpus.
PLACES = ("root", "dir", "mirror", "shards_url", "cache_dir")


# What may stand in an address of shards: nothing that a shell or a request takes for more.
_SHARDS_URL = re.compile(
    r"(https?|gs|s3)://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?"
    r"(/[A-Za-z0-9._~%!$&()*+,;=:@/-]*)?"
)


def check_shards_url(url: str) -> str:
    """The address, if shards can be fetched from it in every way that they are.

    Raises:
        ValueError: it is none. The message does not repeat it, for it may hold a password.
    """
    match = _SHARDS_URL.fullmatch(url)
    if match is None or int((match[3] or ":0")[1:]) >= 1 << 16:
        raise ValueError(
            "give an address such as https://HOST/FOLDER, gs://BUCKET/FOLDER or "
            "s3://BUCKET/FOLDER: http, https, gs or s3, a host, and no user, password, query or "
            "fragment (credentials: those that gsutil and aws find by themselves; shards in a "
            "folder of this machine: data.dir)"
        )
    return url


class DataConfig(BaseModel):
    """Corpus, cleaning, vocabulary, shards and batches.

    The fields from ``corpus`` to ``shard_pairs`` decide what ``data prepare`` writes (their
    fingerprint names the folder); the rest decides how it is read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # What is prepared.
    corpus: str = Field("embedded", description="a name of the catalogue, or 'files'")
    source: str = Field(
        "en", description="language code; with corpus=files, the source text's path"
    )
    target: str = Field(
        "de", description="language code; with corpus=files, the target text's path"
    )
    valid_source: str | None = Field(None, description="corpus=files: validation source path")
    valid_target: str | None = Field(None, description="corpus=files: validation target path")
    test_source: str | None = Field(None, description="corpus=files: test source path")
    test_target: str | None = Field(None, description="corpus=files: test target path")
    heldout_pairs: int = Field(
        1000, ge=1, description="pairs held out where no validation (or test) files are given"
    )
    embedded_pairs: int = Field(20_000, ge=100, description="size of the generated corpus")
    max_length: int = Field(
        256, ge=4, le=65_000, description="longest sentence kept, in pieces with the end sign"
    )
    max_ratio: float = Field(
        9.0, gt=1.0, description="largest ratio between the two sides' lengths in characters"
    )
    deduplicate: bool = Field(True, description="drop a pair whose two sides were both seen before")
    vocabulary_size: int = Field(8000, ge=32, le=1_000_000)
    vocabulary_type: Literal["unigram", "bpe"] = "bpe"
    vocabulary_sample: int = Field(
        5_000_000, ge=1000, description="sentences that the vocabulary is learnt from, at most"
    )
    block_pairs: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="pairs a block; by default 1024, fewer if the corpus is small",
    )
    shard_pairs: int = Field(262_144, ge=1, description="pairs a shard, about")

    # Where it lies and where it comes from.
    root: Path = Field(Path("data"), description="folder of prepared corpora")
    dir: Path | None = Field(None, description="this corpus' folder, instead of one under root")
    mirror: str | None = Field(None, description="folder or URL to take the raw files from")

    # How it is dealt into batches.
    lanes: int = Field(8, ge=1, le=4096, description="batches a step; ranks share them out")
    tokens_per_step: int = Field(
        25_000,
        ge=8,
        description="bound on a step's source and on its target tokens, padding included",
    )
    window_pairs: int = Field(65_536, ge=1, description="pairs that are sorted by length together")
    prefetch_steps: int = Field(8, ge=1, le=1024, description="steps read ahead of training")
    shards_url: str | None = Field(
        None, description="where the folder's shards lie instead of in it (http, https, gs, s3)"
    )
    cache_dir: Path | None = Field(None, description="where remote shards are kept once fetched")

    @field_validator("shards_url")
    @classmethod
    def _check_shards_url(cls, url: str | None) -> str | None:
        return url if url is None else check_shards_url(url)

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.tokens_per_step // self.lanes < self.max_length:
            raise ValueError(
                f"tokens_per_step {self.tokens_per_step} over {self.lanes} lanes leaves "
                f"{self.tokens_per_step // self.lanes} tokens a lane, fewer than the longest "
                f"sentence kept (max_length {self.max_length}): raise tokens_per_step, or lower "
                "lanes or max_length"
            )
        for kind in ("valid", "test"):
            one, other = getattr(self, f"{kind}_source"), getattr(self, f"{kind}_target")
            if (one is None) != (other is None):
                raise ValueError(f"give both {kind}_source and {kind}_target, or neither")
        return self

    def fingerprint(self) -> str:
        """Eight hexadecimal digits that change with whatever changes the prepared folder."""
        names = (
            "corpus", "source", "target", "valid_source", "valid_target", "test_source",
            "test_target", "heldout_pairs", "embedded_pairs", "max_length", "max_ratio",
            "deduplicate", "vocabulary_size", "vocabulary_type", "vocabulary_sample",
            "block_pairs", "shard_pairs",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in names}
        text = json.dumps([DATA_FORMAT, values], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def folder(self) -> Path:
        """Where the prepared corpus lies: ``dir``, or a folder under ``root`` named after it."""
        if self.dir is not None:
            return self.dir
        if self.corpus == "files":
            stem = Path(self.source).name.removesuffix(".gz")
        else:
            stem = f"{self.corpus}-{self.source}-{self.target}"
        return self.root / f"{stem}-{self.fingerprint()}"
