"""What ``RankServer`` imports before it forks ranks: all that costs a start its seconds."""

import contextlib
import os

import torch

if not torch.cuda.is_available():
    # Else DeepSpeed probes every accelerator it knows and warns about each.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: F401
import sentencepiece  # noqa: F401

# deepspeed.initialize imports it, which takes longer than all the rest of it.
with contextlib.suppress(ImportError):
    import torch._dynamo

import trainer.loop  # noqa: F401
