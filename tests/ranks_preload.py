"""What every rank imports; loaded once by the fork server (see tests/ranks.py)."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trainer.preload  # noqa: F401
