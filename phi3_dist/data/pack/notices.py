"""What a user should know about the packs that were made."""

from __future__ import annotations

from phi3_dist.data.pack.packs import SHOWN_AT_MOST, Packs

__all__ = ["cut_notice", "fewer_notice"]


def fewer_notice(held: Packs | None, measured: Packs | None) -> list[str]:
    """That the held-out loss is measured over fewer rows than there are."""
    if held is None or measured is None or measured is held:
        return []
    return [f"held-out loss over {len(measured.rows):,} of {len(held.rows):,} held-out rows: data.max_validation_rows"]


def cut_notice(cut: dict[str, str]) -> list[str]:
    """Which rows were cut, by place and how."""
    if not cut:
        return []
    named = "; ".join(f"{place}: {what}" for place, what in list(cut.items())[:SHOWN_AT_MOST])
    rest = f"; and {len(cut) - SHOWN_AT_MOST:,} more" if len(cut) > SHOWN_AT_MOST else ""
    return [f"{len(cut):,} rows longer than data.pack_length end after the last answer that fits: {named}{rest}"]
