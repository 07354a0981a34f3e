"""What every rank imports; loaded once by the fork server (see tests/ranks.py)."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed  # noqa: F401
    import torch._dynamo  # noqa: F401

    import trainer.loop  # noqa: F401
