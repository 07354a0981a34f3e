"""One trial of Table 3: a row trained with one seed in this process, then judged.

What it found lies in the run's folder, written last: with it the trial is done, without it the next
call goes on from the run's newest checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed

from data_shards.config import PAD_ID
from data_shards.errors import UserError
from trainer.attempt import train
from trainer.config import RunConfig
from trainer.paper.table3_statistics import bleu_counts
from trainer.run import LoadedModel, evaluation_dir, load_model, read_events
from trainer.storage import write_atomically
from trainer.test_sets import open_test_sets
from trainer.translate import Translator
from trainer.validation import ValidationSet

RESULT = "table3.json"
TEST_SETS = ("valid", "test")


@dataclass(frozen=True)
class Trial:
    """What one training came to.

    Attributes:
        steps: updates made.
        parameters: counted in the model.
        target_tokens: trained on.
        seconds: of training, by the clock.
        nll: of the validation set, nats of each sentence, in the order of ``ValidationSet``.
        pieces: of each of those sentences, its end among them.
        counts: by test set, what BLEU needs of each sentence: see ``bleu_counts``.
        signature: of BLEU.
        machine, versions: what it ran on.
    """

    steps: int
    parameters: int
    target_tokens: int
    seconds: float
    nll: list[float]
    pieces: list[int]
    counts: dict[str, list[list[int]]]
    signature: str
    machine: dict[str, Any]
    versions: dict[str, str]


def read_trial(run_dir: Path) -> Trial | None:
    """What a finished trial found; None if it is not done.

    Raises:
        UserError: the file holds something else.
    """
    file = run_dir / RESULT
    try:
        return Trial(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{file} holds no result of a trial ({error}): remove it, and the same command judges "
            "the run again"
        ) from None


def run_trial(config: RunConfig, run_dir: Path) -> None:
    """Train to the end, or go on with what is there, and judge the last checkpoint.

    A process can do so once: it makes a process group of its own.

    Args:
        config: the run's; it lies in ``run_dir`` already.
        run_dir: the run's folder, which nobody else writes to.

    Raises:
        DataError, RunFailedError, UserError: as ``trainer.attempt.train``.
    """
    has_gpu = torch.cuda.is_available()
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group(
        "nccl" if has_gpu else "gloo", rank=0, world_size=1, store=store
    )
    train(config, run_dir, rank=0, world_size=1, resume=True)
    found = _judged(load_model(run_dir, "last", device="cuda" if has_gpu else "cpu"), run_dir)
    write_atomically(run_dir / RESULT, json.dumps(asdict(found)) + "\n")


def _judged(loaded: LoadedModel, run_dir: Path) -> Trial:
    events = read_events(run_dir)
    began = [event for event in events if event["event"] in {"started", "resumed"}][-1]
    ended = [event for event in events if event["event"] == "finished"][-1]
    nll, pieces = sentence_nll(loaded)
    translator = Translator([loaded], loaded.config.evaluation)
    counts, signature = {}, ""
    for test_set in open_test_sets(TEST_SETS, loaded.manifest):
        lines = [found[0].text for found in translator.translate(test_set.sources)]
        file = evaluation_dir(run_dir) / f"{test_set.stem}-{loaded.label}.hypotheses.txt"
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, "".join(f"{line}\n" for line in lines))
        counted, signature = bleu_counts(
            lines,
            test_set.reference_streams,
            target_language=loaded.manifest.target_language,
        )
        counts[test_set.name] = counted.tolist()
    return Trial(
        steps=loaded.step,
        parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        target_tokens=ended["target_tokens"],
        seconds=ended["elapsed_s"],
        nll=[round(float(value), 5) for value in nll],
        pieces=[int(number) for number in pieces],
        counts=counts,
        signature=signature,
        machine=began["machine"],
        versions=began["versions"],
    )


def sentence_nll(loaded: LoadedModel) -> tuple[np.ndarray, np.ndarray]:
    """Of every held-out pair, in the order of ``ValidationSet``: nats (float32), and pieces."""
    model = loaded.model
    device = next(model.parameters()).device
    data = ValidationSet.of(loaded.manifest, max_length=loaded.config.data.max_length)
    nats, pieces = [], []
    with torch.no_grad():
        for batch in data.batches:
            source_BS, target_in_BT, target_out_BT = (tensor.to(device) for tensor in batch)
            logits_BTV = model.project(model.states(source_BS, target_in_BT)).float()
            nll_BT = torch.nn.functional.cross_entropy(
                logits_BTV.transpose(1, 2), target_out_BT, ignore_index=PAD_ID, reduction="none"
            )
            nats.append(nll_BT.sum(1).cpu().numpy())
            pieces.append((target_out_BT != PAD_ID).sum(1).cpu().numpy())
    return np.concatenate(nats), np.concatenate(pieces)
