"""What a process imports before it forks ranks: all that costs a start its seconds."""

import contextlib

import sentencepiece  # noqa: F401

import trainer.attempt  # noqa: F401
from trainer.engine import import_deepspeed

import_deepspeed()
# deepspeed.initialize imports it, and with it torch's compiler: longer than all else that it does.
with contextlib.suppress(ImportError):
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
