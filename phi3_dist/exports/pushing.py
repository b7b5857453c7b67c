"""`phi3-dist push`: an adapter and its card to the Hugging Face hub. Nothing goes out before it was shown.

What is uploaded is a copy in which the base has its hub id and no path of this machine stands (adapters/publishing.py),
and of that the files of an adapter alone. HF_ENDPOINT, HF_TOKEN and `hf auth login` are huggingface_hub's own.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from phi3_dist.adapters.file_names import ADAPTER_FILE
from phi3_dist.adapters.files import CARD
from phi3_dist.adapters.front_matter import evaluation_of, model_index, said_of_hub, with_front
from phi3_dist.adapters.publishing import publish
from phi3_dist.adapters.reading import read_adapter, read_metadata
from phi3_dist.errors import AdapterError, ConfigError, MachineError, Problem, redacted
from phi3_dist.exports.open_adapter import adapter_folder, run_of

__all__ = ["Pushed", "push"]

_SECRET = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bAKIA[A-Z0-9]{16}\b|\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bxox[abpr]-[A-Za-z0-9-]{10,}|(?i:(?:api[_-]?key|password|secret)[\"']?\s*[:=]\s*[\"'][^\"']{8,})"
)
_PATH = re.compile(r"(?<![\w.:/-])/(?:home|root|Users|mnt|data|scratch|tmp|work)/[\w.-]+")
"""A path of a machine: where somebody works, and under which name."""
_LARGEST_TEXT = 64 * 2**20


@dataclass(frozen=True)
class Pushed:
    """What goes to the hub, or went: (name, bytes) of each file; `url` once it is there."""

    repo: str
    private: bool
    files: tuple[tuple[str, int], ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    url: str = ""


def push(
    where: str | Path,
    repo: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    languages: Sequence[str] = (),
    datasets: Sequence[str] = (),
    public: bool = False,
    upload: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Show what would be uploaded to `repo` (owner/name), or with `upload` do it, into a private repository.

    base: the hub id of the adapter's base, where it names a folder. license, languages, datasets: for the card's head;
    nothing stands there that nobody has said. An evaluation.json of the run becomes the card's model-index.
    Raises ConfigError (a name the hub refuses), AdapterError (a damaged adapter, a secret or a path in its files, a
    card that the hub would refuse), MachineError (a hub that can't be reached, or that refuses).
    """
    folder = adapter_folder(Path(where))
    _check_name(repo)
    _, config = read_adapter(folder)
    with tempfile.TemporaryDirectory() as temporary:
        copy = publish(folder, Path(temporary) / "adapter", _base_of(config, base), revision or config.get("revision"))
        notes = _complete_card(copy, run_of(folder), license, languages, datasets)
        files = sorted(p for p in copy.rglob("*") if p.is_file())
        ours = [p for p in files if ADAPTER_FILE.fullmatch(p.relative_to(copy).as_posix())]
        others = tuple(p.relative_to(copy).as_posix() for p in files if p not in ours)
        _refuse_secrets(copy, ours)
        shown = tuple((p.relative_to(copy).as_posix(), p.stat().st_size) for p in ours)
        plan = Pushed(repo, not public, shown, others, tuple(notes))
        if not upload:
            return plan
        return _upload(plan, copy, HfApi(endpoint=endpoint, token=token))


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(Problem("REPO", f"{repo!r} is not a name on the hub", "owner/name")) from error
    if "/" not in repo:
        raise ConfigError(Problem("REPO", f"{repo!r} names no owner", f"owner/{repo}"))


def _base_of(config: Mapping[str, Any], asked: str | None) -> str:
    named = asked or str(config.get("base_model_name_or_path") or "")
    if asked is None and not said_of_hub(named):
        what = f"the adapter's base is a folder ({Path(named).name})" if named else "the adapter names no base"
        fix = "--base owner/name, the model on the hub that the folder is a copy of"
        raise ConfigError(Problem("--base", f"{what}, and others load it by its hub id", fix))
    return named


def _complete_card(
    copy: Path, run: Path | None, license: str | None, languages: Sequence[str], datasets: Sequence[str]
) -> list[str]:
    """Put what was said into the card's head. Lines about what nobody has said. Raises AdapterError."""
    path = copy / CARD
    card = path.read_text("utf-8") if path.is_file() else "# LoRA adapter\n"
    changes: dict[str, Any] = {"license": license, "language": list(languages), "datasets": list(datasets)}
    changes = {key: value for key, value in changes.items() if value}
    notes = []
    evaluation = _evaluation(run)
    if evaluation:
        rows, measures = evaluation_of(evaluation)
        index = model_index(copy.name if run is None else run.name, rows, measures, datasets)
        changes |= {"model-index": index} if index else {}
    try:
        card = with_front(card, changes)
        read: Any = ModelCard(card, ignore_metadata_errors=False).data
        evaluation = read.to_dict()
    except (ValueError, TypeError, KeyError) as error:
        what = f"the hub cannot read its front matter: {' '.join(str(error).split())}"
        raise AdapterError(Problem(CARD, what, "fix or remove the YAML at its top")) from error
    path.write_text(card, encoding="utf-8")
    for key, option in (("license", "--license"), ("language", "--language"), ("datasets", "--dataset")):
        if key not in evaluation:
            notes.append(f"the card says nothing of its {key}: {option}")
    if "model-index" not in evaluation:
        notes.append("the card has no results: phi3-dist eval writes them into the run")
    return notes


def _evaluation(run: Path | None) -> dict[str, Any]:
    try:
        evaluation = json.loads((run / "evaluation.json").read_text("utf-8")) if run else {}
    except (OSError, ValueError):
        return {}
    return evaluation if isinstance(evaluation, dict) else {}


def _texts(folder: Path, files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    for path in files:
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            yield f"the header of {name}", json.dumps(read_metadata(path.parent))
        elif path.stat().st_size <= _LARGEST_TEXT:
            yield name, path.read_text("utf-8", errors="replace")


def _refuse_secrets(folder: Path, files: Sequence[Path]) -> None:
    """Raises AdapterError with the places of what looks like a password, a token, a key, or a path of this machine."""
    problems = []
    for name, text in _texts(folder, files):
        vocabulary = name in {"tokenizer.json", "vocab.json", "merges.txt"}  # holds words of all kinds, folders' too
        for number, line in enumerate(text.splitlines(), start=1):
            what = ""
            if _SECRET.search(line) or redacted(line) != line:
                what = "holds what looks like a secret"
            elif not vocabulary and _PATH.search(line):
                what = f"holds a path of a machine ({_PATH.findall(line)[0]}…)"
            if what:
                problems.append(Problem(f"{name}:{number}", what, "take it out of the adapter's folder"))
    if problems:
        raise AdapterError(*problems[:10])


def _upload(plan: Pushed, copy: Path, api: HfApi) -> Pushed:
    try:
        url = api.create_repo(plan.repo, private=plan.private, exist_ok=True, repo_type="model")
        if plan.private and not api.model_info(plan.repo).private:
            what = "is there already, and is public"
            raise ConfigError(Problem(plan.repo, what, "--public if everybody may have it, or another name"))
        # one commit: either all files are there or none
        api.create_commit(
            plan.repo,
            [CommitOperationAdd(name, copy / name) for name, _ in plan.files],
            commit_message="Upload a LoRA adapter with its card",
        )
    except LocalTokenNotFoundError as error:
        raise MachineError(Problem(plan.repo, "needs a token", "hf auth login, or HF_TOKEN")) from error
    except OfflineModeIsEnabled as error:
        what = "can't be uploaded to: HF_HUB_OFFLINE is set"
        raise MachineError(Problem(plan.repo, what, "unset it where there is a network")) from error
    except HfHubHTTPError as error:
        raise MachineError(_refusal(plan.repo, error)) from error
    except Exception as error:
        # huggingface_hub speaks through httpx (or a package of another such name), whose errors are no OSErrors
        upload_broke = isinstance(error, RuntimeError) and "while uploading" in str(error)
        spoke = type(error).__module__.startswith(("httpx", "requests"))
        if not (isinstance(error, OSError) or spoke or upload_broke):
            raise
        what = f"the hub at {redacted(api.endpoint)} can't be reached: {type(error).__name__}"
        raise MachineError(
            Problem(plan.repo, what, "try again where there is a network; HF_ENDPOINT names the hub")
        ) from error
    return Pushed(plan.repo, plan.private, plan.files, plan.left_out, plan.notes, str(url))


def _refusal(repo: str, error: HfHubHTTPError) -> Problem:
    code = getattr(error.response, "status_code", None)
    if code == 401:
        return Problem(repo, "the hub does not know the token", "hf auth login, or a HF_TOKEN that may write")
    if code == 403:
        return Problem(repo, "the token may not write there", "a token with the right to write, or another owner")
    return Problem(repo, f"the hub refused: {redacted(' '.join(str(error).split()))[:300]}", "try again later")
