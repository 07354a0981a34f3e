"""Files that ask a run for something."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.control import Requests


def test_a_file_is_seen_at_once_or_within_the_interval(tmp_path: Path) -> None:
    now_s = [0.0]
    requests = Requests(tmp_path, ("stop", "hold"), interval_s=1.0, clock=lambda: now_s[0])
    assert requests.look() == [False, False]
    before = tmp_path.stat()
    (tmp_path / "hold").touch()
    os.utime(tmp_path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert requests.look() == [False, True], "the folder has changed"
    (tmp_path / "stop").touch()
    os.utime(tmp_path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert requests.look() == [False, True], "as a file server would tell it: nothing new"
    now_s[0] = 1.0
    assert requests.look() == [True, True]
    (tmp_path / "stop").unlink()
    (tmp_path / "hold").unlink()
    os.utime(tmp_path, ns=(before.st_atime_ns, before.st_mtime_ns + 2))
    assert requests.look() == [False, False]
