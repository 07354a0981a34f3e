"""What every rank imports; loaded once by the fork server (see tests/ranks.py)."""

import contextlib
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import torch._dynamo  # noqa: F401

    # deepspeed.initialize imports it, and with it torch's compiler: over a second a process.
    with contextlib.suppress(ImportError):
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    import trainer.loop  # noqa: F401
