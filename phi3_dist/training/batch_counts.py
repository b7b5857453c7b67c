"""Counts that follow from the packs and the run file: the order of packs, steps, tokens of a rank, the longest row."""

from __future__ import annotations

from phi3_dist.config.schema import RunConfig
from phi3_dist.data.pack.packs import Packs
from phi3_dist.data.pack_order import Order
from phi3_dist.data.prepare import Prepared

__all__ = ["longest_row", "order_of", "steps_of", "steps_of_an_evaluation", "tokens_of_rank"]


def order_of(cfg: RunConfig, packs: Packs) -> Order:
    """The order in which a run takes its packs."""
    return Order(len(packs.packs), cfg.train.global_batch, cfg.train.seed, cfg.train.shuffle)


def steps_of(cfg: RunConfig, order: Order) -> int:
    """The optimizer steps that a run file asks for."""
    return cfg.train.max_steps or order.steps(cfg.train.epochs or 1.0)


def longest_row(prepared: Prepared) -> int:
    """Tokens of the longest row that is trained on or measured: LongRoPE's one regime has to serve both."""
    parts = (prepared.train, *((prepared.held_out,) if prepared.held_out else ()))
    return max(int(packs.rows.lengths.max()) for packs in parts)


def tokens_of_rank(packs: Packs, taken: int, world: int) -> int:
    """Tokens that one rank of `world` trains on while all take so many packs, on average."""
    return len(packs.rows.ids) * taken // (len(packs.packs) * world)


def steps_of_an_evaluation(train: Packs, held_out: Packs | None, order: Order) -> float:
    """Tokens of all held-out rows over those of a step, on average."""
    if held_out is None:
        return 0.0
    return len(held_out.rows.ids) / (len(train.rows.ids) / len(train.packs) * order.global_batch)
