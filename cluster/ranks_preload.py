"""What ``RankServer`` imports before it forks ranks: all that costs a start its seconds."""

import contextlib
import os

import torch

if not torch.cuda.is_available():
    # Else DeepSpeed probes every accelerator it knows and warns about each.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import sentencepiece  # noqa: F401

# deepspeed.initialize imports it, and with it torch's compiler: longer than all else that it does.
with contextlib.suppress(ImportError):
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

import trainer.loop  # noqa: F401
