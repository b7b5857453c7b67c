"""What a user should hear of rows that were read: one line for each thing, with how often it was met."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3_dist.config.schema import DataConfig
from phi3_dist.data.read.printable import clipped
from phi3_dist.data.read.turns import Seen
from phi3_dist.errors import plain

if TYPE_CHECKING:
    from phi3_dist.data.render.template_probe import ChatFormat

__all__ = ["held_out_notice", "read_notices"]

_NAMES_SHOWN = 20


def read_notices(seen: Seen, fmt: ChatFormat | None = None) -> list[str]:
    """One line for each kind; with `fmt`, whether the chat template renders reasoning."""
    notices = [plain(text) for text in _names(seen, "said")]
    if names := _counted(seen, "turns in"):
        notices.append(f"turns are read from the column {names}: data.columns: {{messages: …}} says so in the run file")
    if names := _counted(seen, "not learned"):
        notices.append(f"answers that are not learned, by their own flag: {names}")
    if names := _counted(seen, "asks to learn"):
        notices.append(f"flags that ask to learn a turn that is not an answer, and are ignored: {names}")
    if n := seen["empty system", ""]:
        notices.append(f"{n:,} empty system messages are left out")
    if fmt and (names := _counted(seen, "reasoning")):
        if fmt.reasoning:
            notices.append(f"reasoning is rendered as the chat template does: {names}")
        else:
            why = "the chat template does not render it; data.reasoning: refuse stops there"
            notices.append(f"reasoning is dropped: {names} ({why})")
    unread = [(kind, _counted(seen, kind)) for kind in ("column", "message key")]
    told = "; ".join(f"{kind}s {names}" for kind, names in unread if names)
    if told:
        notices.append(f"not read: {told} (list intended ones in data.ignore)")
    return notices


def _names(seen: Seen, kind: str) -> list[str]:
    return [name for (its, name), count in seen.items() if its == kind and count]


def _counted(seen: Seen, kind: str) -> str:
    """`name (3), other (1)`: the most frequent first."""
    found = sorted(((-count, name) for (its, name), count in seen.items() if its == kind and count))
    names = ", ".join(f"{clipped(name)[:80]} ({-count:,})" for count, name in found[:_NAMES_SHOWN])
    return names + (f" and {len(found) - _NAMES_SHOWN:,} more" if len(found) > _NAMES_SHOWN else "")


def held_out_notice(cfg: DataConfig, kept: int, held: int, shares: tuple[float, float]) -> str:
    """Why no row is held out, and what to set."""
    none = "no row is held out, so there will be no held-out loss:"
    if held:
        return f"{none} all {held:,} held-out rows can't be used"
    least, most = shares
    if least >= most:
        why = "all rows have the same prompt, and equal prompts stay together"
        return f"{none} {why}; name rows in data.validation, or set data.validation_share: 0"
    # just above the smallest hash, in as few digits as leave something to train on
    enough = next(round(least + 10.0**-digits, digits) for digits in (2, 4, 6, 15) if least + 10.0**-digits < 1)
    why = f"of {kept:,} rows none has a prompt whose hash is below data.validation_share: {cfg.validation_share:g}"
    return f"{none} {why}; {enough:g} holds some out, or name rows in data.validation, or set it to 0"
