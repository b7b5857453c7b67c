"""`phi3-dist export`: make it aside, hold it against the live model, and then give it its name."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from phi3_dist.adapters.files import write_adapter
from phi3_dist.adapters.loading import load_adapter
from phi3_dist.adapters.reading import read_adapter
from phi3_dist.errors import ConfigError, Problem
from phi3_dist.exports.combining import combine
from phi3_dist.exports.drift import (
    Drift,
    Rows,
    compare,
    compute_dtype,
    live_logits,
    logits_of,
    plain_model,
    refuse_drift,
    rows_for,
    tokenizer_of,
)
from phi3_dist.exports.export_card import export_card, gguf_card, merged_card
from phi3_dist.exports.gguf_file import ADAPTER, read_gguf_adapter, refuse_for_gguf, write_gguf_adapter
from phi3_dist.exports.gguf_model import (
    MODEL,
    STORED,
    Stored,
    read_gguf_model,
    refuse_for_gguf_model,
    stored_as,
    write_gguf_model,
)
from phi3_dist.exports.merged import Into, settle_into, write_merged
from phi3_dist.exports.modelfile import MODELFILE
from phi3_dist.exports.open_adapter import Opened, open_adapter
from phi3_dist.exports.reshaped import joined, one_rank, split_names
from phi3_dist.exports.weight_updates import AdapterContents, contents_of
from phi3_dist.exports.whole_folder import new_folder, seal
from phi3_dist.modeling.base import find_base
from phi3_dist.modeling.rope import pin_longrope

__all__ = ["EXACT", "KINDS", "Exported", "Kind", "export"]

Kind = Literal["merged", "split", "one-rank", "gguf", "gguf-merged", "combine"]
KINDS: tuple[Kind, ...] = ("merged", "split", "one-rank", "gguf", "gguf-merged", "combine")
EXACT = 1e-4
"""Most that the logits of the same update in another form may be off, over their spread, computed in float32."""
ROUNDED = 0.05
"""The same where the weights are rounded to 16 bits: a bf16 Phi-3 is about 0.01 off its float32 self (README)."""


@dataclass(frozen=True)
class Exported:
    """What was written, in words, and how far it is from the live model."""

    folder: Path
    kind: Kind
    what: str
    drift: Drift


def export(
    where: str | Path,
    out: str | Path,
    kind: Kind,
    *,
    base: str | None = None,
    into: Into | None = None,
    stored: Stored | None = None,
    data: str | None = None,
    others: Sequence[str | Path] = (),
    weights: Sequence[float] = (),
    method: str = "cat",
    density: float | None = None,
) -> Exported:
    """Write the adapter of a run, or of a folder, to the new folder `out` in another form.

    kind: `merged`, a whole model; `split`, an adapter with Llama's module names; `one-rank`, an adapter without
    patterns and rsLoRA; `gguf`, llama.cpp's adapter and an Ollama Modelfile; `gguf-merged`, llama.cpp's whole model,
    its matrices `stored` as f32, f16 or bf16 (by default as the base's); `combine`, several adapters (`others`,
    `weights`, PEFT's `method`) as one. base: in place of the one that the adapter names. into: the weights that a
    merged form starts from. data: rows to compare on; by default the run's held-out ones.
    Raises ConfigError for a word that is not one of these and for what another form alone takes, AdapterError (an
    adapter that is damaged, of another base or can't be said in that form; an export that is not the live model),
    RunFolderError (an unfinished run), ModelError, DataError. Nothing is left of `out` then.
    """
    _refuse_unknown_words(kind, into, stored)
    given = {"into": into, "stored": stored, "others": others, "weights": weights, "density": density}
    _refuse_misplaced(kind, {key for key, value in given.items() if value is not None and value not in ((), [])})
    opened, out = open_adapter(where, base), Path(out)
    tokenizer = tokenizer_of(opened)
    if kind == "gguf":
        refuse_for_gguf(opened)
    settled = settle_into(opened, into) if kind in ("merged", "gguf-merged") else "base"
    both = [opened, *(open_adapter(other, base) for other in others)]
    rows = rows_for(opened, tokenizer, data)
    with new_folder(out) as folder:
        work = _Work(opened, folder, out, tokenizer, rows)
        if kind == "merged":
            return _merged(work, settled)
        if kind == "gguf-merged":
            return _gguf_merged(work, settled, stored_as(opened, stored))
        if kind == "combine":
            return _combined(work, both, list(weights) or [1 / len(both)] * len(both), method, density)
        return _reshaped(work, kind)


_TAKEN_BY: dict[str, tuple[Kind, ...]] = {
    "into": ("merged", "gguf-merged"),
    "stored": ("gguf-merged",),
    **dict.fromkeys(("others", "weights", "density"), ("combine",)),
}
_OPTIONS = {"stored": "--dtype", "others": "--with"}


def _refuse_unknown_words(kind: str, into: str | None, stored: str | None) -> None:
    """Raises ConfigError for words that name no form, no weights and no type."""
    options = (("--as", kind, KINDS), ("--into", into, (None, *get_args(Into))), ("--dtype", stored, (None, *STORED)))
    problems = []
    for option, word, known in options:
        if word not in known:
            words = ", ".join(filter(None, known))
            problems.append(Problem(option, f"{word!r} is not one of {words}", f"one of {words}"))
    if problems:
        raise ConfigError(*problems)


def _refuse_misplaced(kind: Kind, given: set[str]) -> None:
    """Raises ConfigError for what would be left unread."""
    problems = [
        Problem(_OPTIONS.get(key, f"--{key}"), f"has no effect with --as {kind}", f"--as {' or '.join(_TAKEN_BY[key])}")
        for key in sorted(given)
        if kind not in _TAKEN_BY[key]
    ]
    if problems:
        raise ConfigError(*problems)


@dataclass(frozen=True)
class _Work:
    """What is exported, the folder that is being filled, and the name that it will take."""

    opened: Opened
    folder: Path
    out: Path
    tokenizer: Any
    rows: Rows

    def write(self, tensors: dict[str, Tensor], config: dict[str, Any], card: str) -> None:
        metadata = self.opened.metadata_to_keep
        write_adapter(self.folder / "adapter", tensors, config, card=card, tokenizer=self.tokenizer, metadata=metadata)

    def lift(self) -> None:
        """The adapter's files up into the folder that will take the name."""
        for path in sorted((self.folder / "adapter").iterdir()):
            path.rename(self.folder / path.name)
        (self.folder / "adapter").rmdir()

    def logits(self, adapter: Path) -> list[Tensor]:
        """What PEFT computes with the adapter that lies in a folder."""
        base = self.opened.base
        model = plain_model(base, compute_dtype(base), self.opened.trained_on)
        return logits_of(load_adapter(model, adapter), self.rows)

    def logits_of_contents(self, contents: AdapterContents) -> list[Tensor]:
        """What PEFT computes with an update that was read back. Its files lie in the folder meanwhile."""
        again = self.folder / "compared"
        write_adapter(again, *one_rank(self.opened, contents), card="", metadata=self.opened.metadata_to_keep)
        try:
            return self.logits(again)
        finally:
            shutil.rmtree(again)


def _merged(work: _Work, into: Into) -> Exported:
    opened, folder, rows = work.opened, work.folder, work.rows
    shards = write_merged(opened, folder, into, work.tokenizer)
    live, plain = live_logits(opened, rows)
    written = find_base(str(folder))
    stored = str(written.weights.rows("model.embed_tokens.weight", 0, 0).dtype).removeprefix("torch.")
    model = plain_model(written, compute_dtype(written))
    _pin(model, opened)
    drift = compare(live, plain, logits_of(model, rows), rows)
    del model
    if opened.trained_on in {"none", into}:
        refuse_drift(drift, EXACT if stored == "float32" else ROUNDED, work.out)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30
    files = "1 file" if shards == 1 else f"{shards} files"
    what = f"{files}, {size:.2f} GiB, {stored}; {_into_words(opened, into)}"
    (folder / "README.md").write_text(merged_card(opened, what, drift), encoding="utf-8")
    seal(folder)
    return Exported(work.out, "merged", what, drift)


def _into_words(opened: Opened, into: Into) -> str:
    trained = {"none": "the base as it is", "nf4": "the base in NF4", "int8": "the base in int8"}[opened.trained_on]
    weights = "the dequantised NF4 weights" if into == "nf4" else "the base's own weights"
    return f"trained on {trained}, merged into {weights}"


def _gguf_merged(work: _Work, into: Into, stored: Stored) -> Exported:
    opened, folder, rows = work.opened, work.folder, work.rows
    words = refuse_for_gguf_model(opened, work.tokenizer)
    live, plain = live_logits(opened, rows)
    write_gguf_model(opened, folder, words, work.tokenizer, into=into, stored=stored)
    model = read_gguf_model(folder / MODEL, compute_dtype(opened.base))
    _pin(model, opened)
    drift = compare(live, plain, logits_of(model, rows), rows)
    del model
    if opened.trained_on in {"none", into}:
        refuse_drift(drift, EXACT if stored == "f32" else ROUNDED, work.out)
    size = (folder / MODEL).stat().st_size / 2**30
    notes = [*words.notes, *([_WINDOW.format(opened.base.config.sliding_window)] if _window(opened) else [])]
    what = "; ".join([f"{MODEL}, {size:.2f} GiB, {stored}", _into_words(opened, into), *notes])
    (folder / "README.md").write_text(gguf_card(opened, what, drift), encoding="utf-8")
    seal(folder)
    return Exported(work.out, "gguf-merged", what, drift)


_WINDOW = "llama.cpp ignores the base's attention window of {} tokens: longer texts are read differently"


def _window(opened: Opened) -> bool:
    window = opened.base.config.sliding_window
    return bool(window) and window < opened.base.config.max_position_embeddings


def _pin(model: Any, opened: Opened) -> None:
    factors = opened.metadata.get("longrope")
    if factors is not None:
        pin_longrope(model, 0, "short" if factors == "short" else "long")


def _reshaped(work: _Work, kind: Kind) -> Exported:
    """An adapter in another form, read back and put into PEFT's own again for the comparison."""
    opened, folder = work.opened, work.folder
    live, plain = live_logits(opened, work.rows)
    if kind == "gguf":
        write_gguf_adapter(opened, folder, work.tokenizer)
        (folder / "README.md").write_text(export_card(opened, kind), encoding="utf-8")
        back = read_gguf_adapter(folder / ADAPTER)
        what = f"{ADAPTER}, {len(back.updates)} modules, each scale in B; {MODELFILE} for Ollama"
    else:
        tensors, config = one_rank(opened, split_names(opened) if kind == "split" else None)
        work.write(tensors, config, export_card(opened, kind))
        read = contents_of(*read_adapter(folder / "adapter"))
        back = joined(read) if kind == "split" else read
        what = f"rank {config['r']} and alpha {config['lora_alpha']} for all of {len(read.updates)} modules"
        work.lift()
    drift = compare(live, plain, work.logits_of_contents(back), work.rows)
    refuse_drift(drift, EXACT, work.out)
    return Exported(work.out, kind, what, drift)


def _combined(
    work: _Work, both: Sequence[Opened], weights: Sequence[float], method: str, density: float | None
) -> Exported:
    tensors, config, live, plain = combine(both, weights, method, density=density, rows=work.rows)
    names = [one.run.name if one.run else one.folder.name for one in both]
    said = ", ".join(f"{weight:g} of {name}" for weight, name in zip(weights, names, strict=True))
    work.write(tensors, config, export_card(work.opened, "combine", f"{method}: {said}"))
    drift = compare(live, plain, work.logits(work.folder / "adapter"), work.rows)
    work.lift()
    refuse_drift(drift, EXACT, work.out)
    return Exported(work.out, "combine", f"{method} of {said}; rank {config['r']}", drift)
