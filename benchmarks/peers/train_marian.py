"""Marian (``pymarian``): its command ``train`` in a process that is stopped between turns.

Marian logs the number of target pieces after every update, with end signs and without padding.
Source pieces are reckoned from the corpus' ratio: batches are drawn from all of it. Its processor
time is the kernel's count for that process, to a hundredth of a second.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from peer import MAX_LENGTH, Job, Meter

# "... : Cost 8.98 * 1,905 @ 967 after 3,810 : ..."; the last is the count of target pieces so far.
_UPDATE = re.compile(r"Up\. \d+ : .* after ([\d,]+) :")


def command(job: Job) -> list[str]:
    """The shape, the batches and the loss of the job, in Marian's options."""
    vocabulary = job.folder / "vocabulary.yml"
    words = ["</s>", "<unk>", *Path(job.words).read_text().split()]
    vocabulary.write_text("".join(f'"{word}": {number}\n' for number, word in enumerate(words)))
    normed = (
        {"transformer-preprocess": "n", "transformer-postprocess": "da"}
        if job.norm == "pre"
        else {"transformer-postprocess": "dan"}
    )
    options: dict[str, Any] = {
        "type": "transformer",
        "model": job.folder / "model.npz",
        "train-sets": [job.source, job.target],
        "vocabs": [vocabulary, vocabulary],
        "tied-embeddings-all": "true",
        "dim-emb": job.d_model,
        "enc-depth": job.layers,
        "dec-depth": job.layers,
        "transformer-heads": job.num_heads,
        "transformer-dim-ffn": job.d_ff,
        "transformer-ffn-activation": "relu",
        "transformer-dropout": job.dropout,
        **normed,
        "transformer-postprocess-top": "n" if job.norm == "pre" else "",
        "label-smoothing": job.label_smoothing,
        "max-length": MAX_LENGTH,
        "mini-batch": 100_000,  # no bound but the words
        # Of an update, as was measured: the delay cuts it.
        "mini-batch-words": job.tokens * job.batches,
        "mini-batch-round-up": "false",
        "maxi-batch": 10_000,  # all of a small corpus is sorted by length
        "maxi-batch-sort": "src",  # the side whose words are counted
        "optimizer-delay": job.batches,
        "optimizer-params": [0.9, 0.98, 1e-9],
        "learn-rate": 1e-4,
        "clip-norm": 1,
        "sync-sgd": "true",
        "cpu-threads": 1,
        "disp-freq": 1,
        "disp-label-counts": "true",
        "save-freq": 100_000_000,
        "after": "0e",
        "seed": 1,
        "shuffle-in-ram": "true",
        "tempdir": job.folder,
    }
    flags = []
    for name, value in options.items():
        if value != "":
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *(str(single) for single in values)]
    return [sys.executable, "-m", "pymarian", "train", *flags]


class Marian(Meter):
    """Marian's process, which runs while it is its turn."""

    def __init__(self, job: Job) -> None:
        self._ticks = os.sysconf("SC_CLK_TCK")
        self._process = subprocess.Popen(
            command(job), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        super().__init__(self._cpu)

    def _cpu(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / self._ticks

    def _answer(self, content: dict[str, Any]) -> None:
        self._process.send_signal(signal.SIGSTOP)
        super()._answer(content)
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """End Marian first, which stands still."""
        self._process.kill()
        super().end()

    def run(self, tokens_per_target: float) -> None:
        """Take turns until there are no more."""
        assert self._process.stderr is not None
        started, seen = False, 0
        for line in self._process.stderr:
            sys.stderr.write(line)
            found = _UPDATE.search(line)
            if not found:
                continue
            targets = int(found[1].replace(",", ""))
            if started:
                self.stepped(round((targets - seen) * tokens_per_target))
            else:
                self.start()
                started = True
            seen = targets


def main() -> None:
    """Train until there are no more turns."""
    job = Job.given()
    source, target = (
        sum(len(line) + 1 for line in job.sentences(file)) for file in (job.source, job.target)
    )
    Marian(job).run((source + target) / target)


if __name__ == "__main__":
    main()
