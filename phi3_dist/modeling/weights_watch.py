"""A base's weight files while a run needs them: hashed, loaded, and on a CPU mapped for as long as it trains."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from phi3_dist.errors import ModelError, Problem
from phi3_dist.machine.file_changes import changed_files, state_of, states_of

__all__ = ["WeightsWatch"]


class WeightsWatch:
    """The state of the files as it was before they were hashed."""

    def __init__(self, folder: Path | None) -> None:
        self._states = states_of(sorted(folder.glob("*.safetensors"))) if folder else {}
        self._mapped: dict[Path, list[int]] = {}

    def loaded(self, model: nn.Module) -> None:
        """Call it when the model is built. Raises ModelError where the files are no longer those that were hashed."""
        changed = changed_files(self._states)
        if changed:
            what = "was changed between hashing and loading: the run would train on other weights than it records"
            raise ModelError(
                *(Problem(path, what, "start again when nothing writes to it any more") for path in changed)
            )
        spans = _mapped_spans()
        starts = [parameter.data_ptr() for parameter in model.parameters()]
        for path, state in self._states.items():
            own = spans.get(str(Path(path).resolve()), ())
            if any(first <= start < end for first, end in own for start in starts):
                self._mapped[Path(path)] = state

    def check(self) -> None:
        """Raises ModelError where a mapped file was written to or cut short; a file put in its place does no harm."""
        for path, (size, changed_ns, _, inode) in self._mapped.items():
            try:
                now = state_of(path)
            except OSError:
                continue  # removed: what is mapped stays
            if now[3] == inode and now[:2] != [size, changed_ns]:
                what = "was written to while the run reads it: from here on the base would be another one"
                fix = "continue with --resume and the old file; put new weights into another folder"
                raise ModelError(Problem(str(path), what, fix))


def _mapped_spans() -> dict[str, list[tuple[int, int]]]:
    """The addresses that each mapped file has in this process, as Linux tells them; elsewhere nothing is known."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    spans: dict[str, list[tuple[int, int]]] = {}
    for line in lines:
        fields = line.split(maxsplit=5)  # addresses, rights, offset, device, inode, path
        if len(fields) == 6:
            first, _, end = fields[0].partition("-")
            spans.setdefault(fields[5], []).append((int(first, 16), int(end, 16)))
    return spans
