"""What a shell offers after Tab where it is not a verb or option. Without an offer, shells complete names of files."""

from __future__ import annotations

__all__ = ["complete_file", "complete_model", "complete_strategy"]


def complete_file(incomplete: str) -> list[str]:
    """Nothing, so that the shell completes files and folders itself, without a space after a folder."""
    return []


def complete_model(incomplete: str) -> list[str]:
    """Hub ids of the family."""
    from phi3_dist.family.variants import FAMILIES

    ids = (hub_id for family in FAMILIES for hub_id in family.hub_ids)
    return [hub_id for hub_id in ids if hub_id.lower().startswith(incomplete.lower())]


def complete_strategy(incomplete: str) -> list[str]:
    """Names of strategies."""
    from phi3_dist.planning.support import STRATEGIES

    return [strategy for strategy in STRATEGIES if strategy.startswith(incomplete)]
