"""How a run is asked to leave its machines: files in its folder, and what its ranks answer."""

from __future__ import annotations

# Whoever makes it asks the run to save a checkpoint and leave, to go on elsewhere or at another
# size. (trainer.config.STOP_FILE asks it to save and end.)
HOLD_FILE = "hold"

# Asks a run that does not improve any more to save and end: it has stopped early.
EARLY_STOP_FILE = "early_stop"

# Rank 0's answer to HOLD_FILE, after the commit: {"step": s}.
HELD_FILE = "held"


class Handover(Exception):  # noqa: N818 - not an error: the run goes on
    """Raised by every rank after a checkpoint that was asked for by ``HOLD_FILE``.

    It ends this group of ranks, and the run goes on from that checkpoint with another group.
    """
