"""How fast one thread translates: babelray, CTranslate2 and Hugging Face's ``generate``, in turns.

    python benchmarks/decode.py --run runs/m30   # prints tables, writes results/decode.json

All have the same weights: the run is exported for CTranslate2, and copied into an
``MBartForConditionalGeneration``, whose layers are ours where the norm comes first (its extra norm
of the embeddings is taken out). A turn is the whole test set, from text to text; rates are
sentences per second of processor time, user and system, of all threads. Every contestant searches
with a beam of 4 for the best mean log-probability, in batches of the size that suits it best.

Besides speed: on how many sentences CTranslate2 agrees with us at float32, with every difference
and its scores, and the BLEU of each contestant's translations.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    RESULTS,
    Meter,
    Spread,
    Worker,
    default_corpora,
    machine,
    rates,
    ratios,
    row,
    take_turns,
    train_quickly,
    write_result,
)

from cluster import allocator
from trainer.config import EvaluationConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import MBartForConditionalGeneration

    from trainer.run import LoadedModel

GOALS = {"CTranslate2 fp32": 0.5, "generate": 2.0}


@dataclass(frozen=True)
class Contestant:
    """Who translates with what: ``batch_tokens``, the fastest that was found, are of the source."""

    kind: str
    precision: str
    batch_tokens: int


CONTESTANTS = {
    "babelray fp32": Contestant("ours", "fp32", 4096),
    "babelray bf16": Contestant("ours", "bf16", 4096),
    "CTranslate2 fp32": Contestant("ctranslate2", "float32", 256),
    "CTranslate2 int8": Contestant("ctranslate2", "int8", 256),
    "generate": Contestant("generate", "fp32", 1024),
}


def settings(batch_tokens: int, precision: str = "fp32") -> EvaluationConfig:
    """The search of all contestants."""
    from trainer.agreement import comparable

    evaluation = EvaluationConfig(beam=4, batch_tokens=batch_tokens)
    values = {"precision": precision, "max_extra_length": evaluation.max_extra_length}
    return comparable(evaluation).model_copy(update=values)


# The contestants: each gives a function from sentences to translations.


def ours(task: dict[str, Any]) -> Callable[[Sequence[str]], list[str]]:
    """This project's own decoder."""
    from trainer.run import load_model
    from trainer.translate import Translator

    loaded = load_model(Path(task["run"]), task["checkpoint"])
    translator = Translator([loaded], settings(task["batch_tokens"], task["precision"]))
    return lambda lines: [found[0].text for found in translator.translate(lines)]


def ctranslate2(task: dict[str, Any]) -> Callable[[Sequence[str]], list[str]]:
    """CTranslate2 on the export."""
    from ctranslate2 import Translator

    from data_shards.vocabulary import Vocabulary

    evaluation = settings(task["batch_tokens"])
    translator = Translator(task["export"], device="cpu", inter_threads=1, intra_threads=1)
    vocabulary = Vocabulary.load(Path(task["export"]) / "vocabulary.model")
    names = vocabulary.pieces(range(vocabulary.size))
    ids_of = {name: number for number, name in enumerate(names)}

    def translate(lines: Sequence[str]) -> list[str]:
        sources = vocabulary.encode(lines)
        results = translator.translate_batch(
            [[names[piece] for piece in ids] for ids in sources],
            max_batch_size=evaluation.batch_tokens,
            batch_type="tokens",
            beam_size=evaluation.beam,
            length_penalty=evaluation.length_penalty,
            max_decoding_length=max(map(len, sources)) + evaluation.max_extra_length,
        )
        return vocabulary.decode(
            [[ids_of[token] for token in result.hypotheses[0]] for result in results]
        )

    return translate


def generate(task: dict[str, Any]) -> Callable[[Sequence[str]], list[str]]:
    """``generate`` of Hugging Face's transformers, batches sorted by length."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from data_shards.config import EOS_ID, PAD_ID
    from trainer.run import load_model
    from trainer.translate import length_batches

    loaded = load_model(Path(task["run"]), task["checkpoint"])
    evaluation = settings(task["batch_tokens"])
    model = mbart(loaded)

    def translate(lines: Sequence[str]) -> list[str]:
        sources = [torch.tensor([*ids, EOS_ID]) for ids in loaded.vocabulary.encode(lines)]
        translations = [""] * len(lines)
        for batch in length_batches([len(ids) for ids in sources], evaluation.batch_tokens):
            source = pad_sequence(
                [sources[index] for index in batch], batch_first=True, padding_value=PAD_ID
            )
            found = model.generate(
                input_ids=source,
                attention_mask=(source != PAD_ID).long(),
                num_beams=evaluation.beam,
                length_penalty=evaluation.length_penalty,
                max_new_tokens=source.size(1) + evaluation.max_extra_length,
                do_sample=False,
            )
            for index, text in zip(batch, loaded.vocabulary.decode(found.tolist()), strict=True):
                translations[index] = text
        return translations

    return translate


def mbart(loaded: LoadedModel) -> MBartForConditionalGeneration:
    """Our model as Hugging Face has it: the same function of the same weights."""
    import torch
    from transformers import MBartConfig, MBartForConditionalGeneration

    from data_shards.config import BOS_ID, EOS_ID, PAD_ID
    from model.layers import sinusoids

    shape = loaded.config.model
    if shape.norm != "pre" or not shape.tie_embeddings:
        raise SystemExit("generate is compared for models with model.norm=pre and tied embeddings")
    config = MBartConfig(
        vocab_size=loaded.vocabulary.size,
        d_model=shape.d_model,
        encoder_layers=shape.encoder_layers,
        decoder_layers=shape.decoder_layers,
        encoder_ffn_dim=shape.d_ff,
        decoder_ffn_dim=shape.d_ff,
        encoder_attention_heads=shape.num_heads,
        decoder_attention_heads=shape.num_heads,
        activation_function="relu",
        scale_embedding=True,
        max_position_embeddings=shape.max_positions,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        decoder_start_token_id=BOS_ID,
        forced_eos_token_id=None,
    )
    model = MBartForConditionalGeneration(config).eval()
    for side in (model.model.encoder, model.model.decoder):
        side.layernorm_embedding = torch.nn.Identity()
    table = sinusoids(shape.max_positions, shape.d_model, torch.device("cpu"), torch.float32)
    weights = {f"model.{name}": weight for name, weight in _mbart_weights(loaded, table).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    # Tied to the shared matrix, or a bias of zero.
    assert all("embed_tokens" in name or name in {"lm_head.weight", "final_logits_bias"}
               for name in missing), missing  # fmt: skip
    return model


def _mbart_weights(loaded: LoadedModel, table: Tensor) -> dict[str, Tensor]:
    import torch

    shape, given = loaded.config.model, loaded.model.state_dict()
    weights = {"shared.weight": given["matrices.shared.weight"]}
    # Our names and theirs; joined projections become theirs of each.
    single = {
        "feed_forward.inner": "fc1",
        "feed_forward.outer": "fc2",
        "feed_forward_norm": "final_layer_norm",
        "attention_norm": "self_attn_layer_norm",
        "attention.output": "self_attn.out_proj",
        "cross_norm": "encoder_attn_layer_norm",
        "cross.query": "encoder_attn.q_proj",
        "cross.output": "encoder_attn.out_proj",
    }
    joined = {
        "attention.query_key_value": ("self_attn", "qkv"),
        "cross.key_value": ("encoder_attn", "kv"),
    }
    for name, weight in given.items():
        side, _, rest = name.partition(".")
        if side in {"encoder_norm", "decoder_norm"}:
            weights[f"{side.removesuffix('_norm')}.layer_norm.{rest}"] = weight
        if side not in {"encoder", "decoder"}:
            continue
        layer, _, rest = rest.partition(".")
        part, _, kind = rest.rpartition(".")
        begin = f"{side}.layers.{layer}"
        if part in single:
            weights[f"{begin}.{single[part]}.{kind}"] = weight
        else:
            attention, letters = joined[part]
            for letter, piece in zip(letters, weight.split(shape.d_model), strict=True):
                weights[f"{begin}.{attention}.{letter}_proj.{kind}"] = piece
    for side, positions in (("encoder", "source"), ("decoder", "target")):
        learned = given.get(f"{positions}_positions.weight", table)
        # MBart leaves its first two positions free.
        free = torch.zeros(2, shape.d_model)
        weights[f"{side}.embed_positions.weight"] = torch.cat([free, learned])
    return weights


WORKERS = {"ours": ours, "ctranslate2": ctranslate2, "generate": generate}


def work(kind: str, folder: Path) -> None:
    """A contestant's process: translates the whole test set each turn."""
    import torch

    meter = Meter()
    torch.set_num_threads(1)
    task = json.loads((folder / "task.json").read_text())
    lines = (folder / "source.txt").read_text().split("\n")
    translate = WORKERS[kind](task)
    meter.start()
    while True:
        translations = translate(lines)
        (folder / "translations.txt").write_text("\n".join(translations))
        meter.stepped(len(lines))


# The comparison.


def contestants(
    run: Path, checkpoint: str, source: list[str], folder: Path, exports: dict[str, Path]
) -> list[Worker]:
    """A process for each, set up."""
    workers = []
    for name, contestant in CONTESTANTS.items():
        own = folder / name
        own.mkdir()
        task = {
            "run": str(run.resolve()),
            "checkpoint": checkpoint,
            "precision": contestant.precision,
            "batch_tokens": contestant.batch_tokens,
            "export": str(exports.get(contestant.precision, "")),
        }
        (own / "task.json").write_text(json.dumps(task))
        (own / "source.txt").write_text("\n".join(source))
        workers.append(Worker(name, contestant.kind, own, environment=allocator.GLIBC))
    return workers


def measure(run: Path, checkpoint: str, rounds: int, folder: Path) -> dict[str, object]:
    """Export, check that the export agrees, take turns; prints and returns the results."""
    import torch
    from sacrebleu.metrics import BLEU

    from trainer.agreement import compare
    from trainer.export import export

    torch.set_num_threads(1)
    exports = {}
    for quantization in ("float32", "int8"):
        exports[quantization] = folder / quantization
        done = export(
            run,
            exports[quantization],
            format="ctranslate2",
            checkpoint=checkpoint,
            quantization=quantization,
        )
    loaded = done.loaded
    source, references = loaded.manifest.split_text("test")
    print(f"{run.name}, checkpoint {checkpoint} (step {loaded.step}), {len(source)} sentences")
    agreement = compare(loaded, exports["float32"], source, settings(4096))
    print(f"  CTranslate2 fp32 agrees on {agreement.num_same} of {agreement.num_lines}")
    for difference in agreement.differences:
        print(f"  {json.dumps(asdict(difference), ensure_ascii=False)}, tie: {difference.is_tie}")

    workers = contestants(run, checkpoint, source, folder, exports)
    try:
        turns = take_turns(workers, rounds=rounds, seconds=0, say=print)
    finally:
        for worker in workers:
            worker.close()
    own = {worker.name: taken for worker, taken in zip(workers, turns, strict=True)}
    base = (folder / "babelray fp32" / "translations.txt").read_text().split("\n")
    rows = []
    print(f"  {'':18}{'sentences/CPU s':>16}{'lowest':>8}{'highest':>8}{'ours is':>9}{'BLEU':>7}")
    for name, taken in own.items():
        rate, ratio = rates(taken), ratios(own["babelray fp32"], taken)
        texts = (folder / name / "translations.txt").read_text().split("\n")
        score = BLEU().corpus_score(texts, [references]).score
        rows.append(
            {
                "name": name,
                "batch_tokens": CONTESTANTS[name].batch_tokens,
                "sentences_per_cpu_s": asdict(rate),
                "babelray_fp32_is_times_as_fast": asdict(ratio),
                "bleu": score,
                "same_as_babelray_fp32": sum(
                    one == other for one, other in zip(texts, base, strict=True)
                ),
                "turns": [asdict(turn) for turn in taken],
            }
        )
        print(
            f"  {name:18}{rate.median:16,.1f}{rate.lowest:8,.1f}{rate.highest:8,.1f}"
            f"{ratio.median:9.2f}{score:7.2f}"
        )
    return {
        "run": run.name,
        "checkpoint": checkpoint,
        "step": loaded.step,
        "corpus": loaded.manifest.data.corpus,
        "sentences": len(source),
        "beam": settings(4096).beam,
        "agreement": {
            "sentences": agreement.num_lines,
            "same": agreement.num_same,
            "ties": len(agreement.differences) - len(agreement.faults),
            "differences": [
                {**asdict(difference), "is_tie": difference.is_tie}
                for difference in agreement.differences
            ],
        },
        "contestants": rows,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, help="by default one trained for a few minutes")
    parser.add_argument("--checkpoint", default="best")
    parser.add_argument("--corpora", type=Path, default=default_corpora())
    parser.add_argument("--output", type=Path, default=RESULTS / "decode.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker[0], Path(arguments.worker[1]))
        return
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    before = machine()
    before |= {name: importlib.metadata.version(name) for name in ("ctranslate2", "transformers")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = arguments.run or train_quickly(arguments.corpora, folder)
        checkpoint = arguments.checkpoint if arguments.run else "last"
        result = measure(run, checkpoint, arguments.rounds, folder)
    result["is_quickly_trained"] = arguments.run is None
    medians = {
        row["name"]: row["babelray_fp32_is_times_as_fast"]["median"]  # type: ignore[index]
        for row in result["contestants"]  # type: ignore[attr-defined]
    }
    print(
        "goals: "
        + ", ".join(f"{goal} of {name}: {medians[name]:.2f}" for name, goal in GOALS.items())
        + f" (load {before['load_average']:.1f})"
    )
    content = {"goals": GOALS, "result": result, "summary": summarize(result)}
    write_result(arguments.output, before, content)


def summarize(result: dict[str, Any]) -> list[dict[str, object]]:
    """The rows of the table of all benchmarks."""
    ours, *others = result["contestants"]
    return [
        row(
            "beam 4, fp32",
            Spread(**ours["sentences_per_cpu_s"]),
            "sentences/CPU s",
            ratio=Spread(**other["babelray_fp32_is_times_as_fast"]),
            against=other["name"],
            goal=GOALS.get(other["name"]),
        )
        for other in others
    ]


if __name__ == "__main__":
    main()
