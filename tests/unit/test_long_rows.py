"""Packs that ranks share: how they are cut, what dropout draws, and what the plan says of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from phi3_dist.bench.throughput_sides import make_token_packs
from phi3_dist.config.schema import RunConfig
from phi3_dist.data.batch import assemble
from phi3_dist.errors import DataError, ModelError, PlanError
from phi3_dist.family.variants import FAMILIES
from phi3_dist.modeling.attention.sequence_parallel import Rows, equal_parts
from phi3_dist.modeling.fused_lora import dropped_positions
from phi3_dist.planning.facts import LaunchFacts
from phi3_dist.planning.memory import total_gib
from phi3_dist.planning.plan import RunPlan, make_plan
from phi3_dist.planning.sequence_parallel import exchanged_bytes
from phi3_dist.planning.support import QUANTIZATIONS, STRATEGIES, No, support, support_sharing
from phi3_dist.training.sequence_parallel import Cut, check_packs, cut_batch
from tests.small_models import small_phi3
from tests.unit.test_plan import GPU, PACKAGES, problems, run

SMALL = next(family for family in FAMILIES if family.shape.kv_heads == 8)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_a_cut_leaves_no_token_and_no_target_out_and_moves_none_to_another_rank(parts: int) -> None:
    packs = make_token_packs([(list(range(9, 9 + n)), answer) for n, answer in ((7, 4), (9, 8), (5, 2), (3, 1))], 16)
    batch = assemble(packs, range(len(packs.packs)))
    ids, predicted, targets = [], [], []
    for part in range(parts):
        tokens, supervised, share = cut_batch(batch, Cut(part, parts, None))
        assert (share.tokens.start, share.tokens.stop) == (tokens.start, tokens.stop)
        assert share.counts[part] == tokens.stop - tokens.start
        ids.append(batch.ids_T[tokens])
        predicted.append(batch.predict_S[supervised])
        targets.append(batch.target_S[supervised])
        assert all(tokens.start <= position < tokens.stop for position in predicted[-1])
        assert share.supervised == Rows(supervised.start, supervised.stop, len(batch.target_S))
    assert np.array_equal(np.concatenate(ids), batch.ids_T)
    assert np.array_equal(np.concatenate(predicted), batch.predict_S)
    assert np.array_equal(np.concatenate(targets), batch.target_S)
    assert sum(equal_parts(len(batch.ids_T), parts)) == len(batch.ids_T)


def test_a_pack_with_fewer_tokens_than_ranks_is_named() -> None:
    packs = make_token_packs([([5] * 7, 4), ([5] * 3, 2)], 8)
    check_packs(3, packs, None)
    with pytest.raises(DataError, match=r"train.sequence_parallel.*has 3 tokens to share"):
        check_packs(4, packs, None)


def test_a_share_of_dropouts_mask_is_that_of_the_whole_pack() -> None:
    whole_x, p = torch.zeros(1, 11, 6), 0.4
    torch.manual_seed(3)
    whole = dropped_positions(whole_x, p)
    after = torch.rand(1)
    for rows in (Rows(0, 4, 11), Rows(4, 4, 11), Rows(4, 11, 11)):
        torch.manual_seed(3)
        part = dropped_positions(whole_x[:, rows.start : rows.stop], p, rows=rows)
        assert torch.equal(part, whole[:, rows.start : rows.stop])
        assert part.untyped_storage().nbytes() == part.numel(), "the whole mask is let go"
        assert torch.equal(torch.rand(1), after), "the generator has advanced as in one process"


def test_dropout_that_pefts_forward_would_draw_for_a_part_is_refused_by_name() -> None:
    from phi3_dist.config.schema import LoraConfig
    from phi3_dist.modeling.fused_lora import install_fused
    from phi3_dist.modeling.lora import add_lora
    from phi3_dist.modeling.loss import PackedLoss
    from phi3_dist.training.build import _share_dropout

    def loss_of(dropout: float, *, fused: bool) -> PackedLoss:
        causal_lm = small_phi3()
        causal_lm.name_or_path = "x"
        model = PackedLoss(add_lora(causal_lm, LoraConfig(r=2, dropout=dropout, targets=("o_proj",)), "x"))
        if fused:
            install_fused(model)
        return model

    with pytest.raises(ModelError, match=r"lora.dropout: PEFT's own forward draws it in \d+ modules"):
        _share_dropout(loss_of(0.1, fused=False))
    for dropout, fused in ((0.0, False), (0.1, True)):
        _share_dropout(loss_of(dropout, fused=fused))


# --- the plan ---------------------------------------------------------------------------------------------------------


def planned(parts: int, world: int = 8, strategy: str = "zero3", nodes: int = 1, **sections: Any) -> RunPlan:
    sections = {**sections, "train": {"sequence_parallel": parts, "global_batch": 8, **sections.get("train", {})}}
    return make_plan(run(**sections), GPU, LaunchFacts(world, nodes, strategy), family_or_shape=SMALL)


def test_ranks_that_share_count_once_in_the_batch_and_hold_a_part_of_the_activations() -> None:
    long = {"data": {"pack_length": 65536}, "model": {"activation_checkpointing": True}}
    alone, shared = planned(1, **long), planned(4, **long)
    assert (alone.accumulation, shared.accumulation) == (1, 4)
    assert shared.sequence_parallel == 4
    choices = {choice.name: choice for choice in shared.choices}
    assert choices["sequence parallel"].value == "4 ranks share a pack"
    assert "inside a node" in choices["sequence parallel"].why
    assert choices["accumulation"].why == "global_batch 8 / (micro_batch 1 × 2 groups of 4 ranks)"
    assert "sequence parallel" not in {choice.name for choice in alone.choices}
    terms = [{term.name: term.gib for term in plan.memory or ()} for plan in (alone, shared)]
    activations = [term["activations (estimate)"] + term.get("backward's own (estimate)", 0.0) for term in terms]
    assert activations[0] / 8 < activations[1] < activations[0] / 3.9
    assert total_gib(shared.memory or ()) < total_gib(alone.memory or ()) / 2
    between = planned(4, world=4, nodes=2, train={"global_batch": 4})
    assert "between nodes" in {choice.name: choice.why for choice in between.choices}["sequence parallel"]


@pytest.mark.parametrize(
    ("parts", "world", "what", "near"),
    [
        (3, 6, "24 heads and 8 key/value heads do not divide among 3 ranks", 2),
        (16, 16, "do not divide among 16 ranks", 8),
        (4, 6, "the launch has 6 processes, not a multiple of 4", 2),
        (8, 2, "the launch has 2 processes, not a multiple of 8", 2),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_that_does(
    parts: int, world: int, what: str, near: int
) -> None:
    cfg = run(train={"sequence_parallel": parts, "global_batch": 48})
    launch = LaunchFacts(world, -(-world // 8), "ddp")
    found = problems(cfg, GPU, launch, family_or_shape=SMALL)
    assert set(found) == {"train.sequence_parallel"}
    assert what in found["train.sequence_parallel"][0]
    assert found["train.sequence_parallel"][1] == f"nearest: train.sequence_parallel={near}"
    make_plan(
        run(train={"sequence_parallel": near, "global_batch": 48}), GPU, launch, family_or_shape=SMALL,
    )  # fmt: skip


def test_what_cannot_be_shared_is_refused_in_one_message_each() -> None:
    config = {**small_config(), "attention_dropout": 0.1}
    two = {"train": {"sequence_parallel": 2}}
    refused = partial(problems, machine=GPU, launch=LaunchFacts(8, 1, "ddp"), family_or_shape=SMALL)
    assert set(refused(run(**two, model={"quantization": "int8"}))) == {"train.sequence_parallel"}
    assert set(refused(run(**two, model={"fp8": True}))) == {"train.sequence_parallel"}
    assert set(refused(run(**two, lora={"dora": True, "dropout": 0.1}))) == {"lora.dropout"}
    assert set(refused(run(**two, model={"fused_lora": False}))) == {"lora.dropout"}
    assert set(refused(run(**two, model={"kernels": "triton"}))) == {"model.kernels"}
    found = refused(run(**two), family_or_shape=config)
    assert "attention_dropout 0.1" in found["model.source"][0]
    alone = problems(run(**two), GPU, LaunchFacts(), family_or_shape=SMALL)
    assert set(alone) == {"train.sequence_parallel"}


def small_config() -> dict[str, Any]:
    shape = SMALL.shape
    return {
        "model_type": "phi3", "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab, "tie_word_embeddings": shape.tied,
    }  # fmt: skip


def test_every_refusal_of_the_matrix_names_a_nearest_that_shares() -> None:
    for strategy in STRATEGIES:
        for quantization in (*QUANTIZATIONS, "fp8"):
            answer = support_sharing(strategy, quantization)
            if isinstance(answer, No):
                assert answer.reason
                assert answer.nearest
    assert support_sharing("ddp")
    assert support_sharing("zero3", "nf4")
    assert support("zero3", "nf4")


def test_the_exchange_is_counted() -> None:
    shape = SMALL.shape
    one_way = shape.layers * 1000 / 2 * (2 * shape.q_out + 2 * shape.kv_out) * 2 / 2
    assert exchanged_bytes(shape, 2, 1000, precision="bf16", recompute=False) == 2 * one_way
    assert exchanged_bytes(shape, 2, 1000, precision="bf16", recompute=True) == 3 * one_way
    assert exchanged_bytes(shape, 1, 1000, precision="bf16", recompute=True) == 0


def test_the_planner_counts_it_in_network_and_time_and_proposes_it_for_rows_that_do_not_fit() -> None:
    from phi3_dist.planning.advice import Cluster, advise
    from phi3_dist.planning.gpus import find_gpu
    from phi3_dist.planning.timing import rates_of_gpu

    gpu = find_gpu("h100-80gb")
    cluster = Cluster(1, 8, 40.0, 2000.0, rates_of_gpu(gpu), gpu)

    def options(parts: int, **sections: Any) -> dict[str, Any]:
        cfg: RunConfig = run(train={"sequence_parallel": parts, "global_batch": 8}, **sections)
        return {one.name: one for one in advise(cfg, cluster, FAMILIES[0], PACKAGES).options}

    long = {"data": {"pack_length": 131072}, "model": {"activation_checkpointing": True}}
    alone, shared = options(1, **long)["zero3"], options(8, **long)["zero3"]
    assert alone.state == "too large"
    assert alone.why == "fits with train.sequence_parallel=2"
    assert shared.state == "fits"
    assert shared.traffic.exchanged > 0
    assert alone.traffic.exchanged == 0
    with pytest.raises(PlanError, match=r"train\.sequence_parallel"):
        options(3, **long)
