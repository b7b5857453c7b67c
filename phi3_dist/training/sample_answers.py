"""Answers to a few held-out rows at each evaluation, scored: what the loss does not say."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from phi3_dist.config.schema import RunConfig
from phi3_dist.data.answers import Question, last_questions, spread, text_of
from phi3_dist.data.pack.packs import Packs
from phi3_dist.data.scores import Metric, available, metric_of, scored
from phi3_dist.modeling.packed_answers import packed_answers
from phi3_dist.modeling.stop_ids import published_stops, stop_ids
from phi3_dist.training.engines.backward_and_update import Engine
from phi3_dist.training.runtime import Runtime
from phi3_dist.training.signals import StopFlag

__all__ = ["SampleAnswers", "sample_answers"]


@dataclass(frozen=True)
class SampleAnswers:
    """The rows that are asked, the same ones at every evaluation, and how their answers are scored."""

    questions: tuple[Question, ...]
    stops: Collection[int]
    tokenizer: Any
    metrics: tuple[Metric, ...]
    max_new_tokens: int

    def scores(self, engine: Engine, runtime: Runtime, flag: StopFlag) -> tuple[dict[str, float | int] | None, int]:
        """`answers`, their number, `answers_s`, `answers_METRIC` from 0 to 1; or None and a stop signal. Collective.

        Ranks share the rows out; one that gets none goes along with the first.
        """
        start_s = time.perf_counter()
        mine = list(range(runtime.rank, len(self.questions), runtime.world))

        def agree(busy: bool) -> tuple[bool, int]:
            busy_and_signal = torch.tensor([float(busy), float(flag.signal)], device=runtime.device)
            if runtime.world > 1:
                torch.distributed.all_reduce(busy_and_signal, torch.distributed.ReduceOp.MAX)
            anyone, signal = busy_and_signal.tolist()
            return bool(anyone), int(signal)

        was_training = engine.model.training
        engine.model.eval()
        new, stop = packed_answers(
            engine.model,
            [self.questions[i].prompt for i in mine or [0]],
            self.stops,
            max_new_tokens=self.max_new_tokens,
            device=runtime.device,
            agree=agree,
        )
        engine.model.train(was_training)
        if new is None:
            return None, stop
        texts = [text_of(self.tokenizer, ids) for ids in new]
        wanted = [text_of(self.tokenizer, self.questions[i].wanted) for i in mine]
        places = [self.questions[i].place for i in mine]
        sums = [sum(scored(metric, texts[: len(mine)], wanted, places)) for metric in self.metrics]
        total = runtime.sum(torch.tensor(sums, dtype=torch.float64, device=runtime.device)).tolist()
        found = {f"answers_{m.name}": value / len(self.questions) for m, value in zip(self.metrics, total, strict=True)}
        return {"answers": len(self.questions), **found, "answers_s": round(time.perf_counter() - start_s, 3)}, 0


def sample_answers(
    cfg: RunConfig, model: Any, tokenizer: Any, folder: Any, held_out: Packs | None
) -> SampleAnswers | None:
    """What `eval.generate` asks for; None where it changes nothing. `folder` is the base's, or None.

    Raises DataError for held-out rows that ask nothing.
    """
    if not cfg.eval.generate or held_out is None:
        return None
    stops = {*stop_ids(model, tokenizer), *published_stops(folder)}
    which = spread(len(held_out.rows.lengths), cfg.eval.generate)
    metrics = tuple(metric_of(name) for name in available()[0])
    return SampleAnswers(
        tuple(last_questions(held_out.rows, which, stops)), stops, tokenizer, metrics, cfg.eval.max_new_tokens
    )
