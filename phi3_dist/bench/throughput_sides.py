"""The sides of the throughput benchmark: each a process that trains one pass over the rows when it is told to.

All load the same random base, and all measure themselves in the same way; see throughput.py, which gives them turns.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = [
    "LORA_RANK",
    "MIB",
    "PACK_LENGTH",
    "SHAPE",
    "Meter",
    "Round",
    "Stand",
    "linear_sizes",
    "make_token_packs",
    "matrix_flops_per_s",
    "save_base",
    "train_ours",
    "train_peft",
    "train_trl",
]

MIB = 2**20
PACK_LENGTH = 1024
LORA_RANK = 16
LR = 1e-4
SHAPE: dict[str, Any] = {
    "vocab_size": 32064,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 4096,
    "sliding_window": None,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Round:
    """One pass over all rows. Memory in MiB above the weights; supervised tokens are those that are predicted.

    `cpu_seconds` is the processor time of all threads of the process: other work on the machine hardly changes it.
    """

    tokens: int
    supervised_tokens: int
    seconds: float
    peak_mib: float
    cpu_seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def linear_sizes(shape: Mapping[str, Any] = SHAPE) -> list[tuple[int, int]]:
    """(inputs, outputs) of a layer's four linears; the first is qkv_proj. Without grouped queries."""
    hidden, inner = int(shape["hidden_size"]), int(shape["intermediate_size"])
    return [(hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)]


def save_base(pipe: Connection, folder: Path, shapes: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write the random Phi-3 that all sides load into `folder`; with `shapes`, one for each name into `folder`/name."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    for name, shape in (shapes or {"": SHAPE}).items():
        torch.manual_seed(0)
        model = Phi3ForCausalLM(Phi3Config(**shape)).to(getattr(torch, shape.get("dtype", "float32")))
        model.save_pretrained(folder / name)
    pipe.send("saved")
    pipe.recv()


# --- what all sides measure with --------------------------------------------------------------------------------------


def _status_kib(name: str) -> int:
    """A field of /proc/self/status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}: this benchmark needs Linux")


def _allocated_mib() -> float:
    """What torch holds on the device now: a peak would be that of whatever ran before in this process."""
    import torch

    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() / MIB


class Meter:
    """Time and peak memory of rounds, above what there was before the model was loaded and the weights.

    On CUDA the memory is what torch has allocated, and the clock is read when the device has done its work.
    """

    def __init__(self, *, cuda: bool = False) -> None:
        gc.collect()
        self.cuda = cuda
        self.before_mib = _allocated_mib() if cuda else _status_kib("VmRSS") / 1024
        self.weights_mib = 0.0
        self.start_s = self.start_cpu_s = 0.0

    def count_weights(self, model: Any) -> None:
        self.weights_mib = sum(p.numel() * p.element_size() for p in model.parameters()) / MIB

    def _peak_mib(self) -> float:
        if not self.cuda:
            return _status_kib("VmHWM") / 1024
        import torch

        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / MIB

    def start(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size
        self.start_s, self.start_cpu_s = time.perf_counter(), time.process_time()

    def stop(self, tokens: int, supervised_tokens: int) -> Round:
        peak_mib = self._peak_mib() - self.before_mib - self.weights_mib
        seconds, cpu_seconds = time.perf_counter() - self.start_s, time.process_time() - self.start_cpu_s
        return Round(tokens, supervised_tokens, seconds, peak_mib, cpu_seconds)


def make_token_packs(rows: list[tuple[list[int], int]], pack_length: int = PACK_LENGTH) -> Any:
    """The rows as `phi3-dist train` packs them."""
    from phi3_dist.data.pack.packs import make_packs
    from phi3_dist.data.render.encode import Encoded
    from phi3_dist.data.token_rows import TokenRows

    encoded = [Encoded(ids, [i >= answer for i in range(len(ids))]) for ids, answer in rows]
    packs, _ = make_packs(TokenRows.of(encoded, [str(i) for i in range(len(rows))]), pack_length, "error")
    return packs


def matrix_flops_per_s(
    shape: Mapping[str, Any] = SHAPE, tokens: int = PACK_LENGTH, *, cuda: bool = False
) -> tuple[float, float]:
    """The rate of a layer's base products, forward and for the input's gradient; float32, and bf16 on CUDA.

    FLOPs by second of the clock, and by second of the processor.
    """
    import torch

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16) if cuda else torch.randn(size)

    pairs = []
    for inputs, outputs in linear_sizes(shape):
        weight = random(outputs, inputs)
        pairs += [(random(tokens, inputs), weight.T), (random(tokens, outputs), weight)]
    flops = sum(2 * left.shape[0] * left.shape[1] * right.shape[1] for left, right in pairs)
    times, cpu_times = [], []
    for _ in range(9):
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        for left, right in pairs:
            torch.mm(left, right)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start_s)
        cpu_times.append(time.process_time() - start_cpu_s)
    return flops / statistics.median(times[1:]), flops / statistics.median(cpu_times[1:])


# --- this project's side ----------------------------------------------------------------------------------------------


class Stand:
    """A model as `phi3-dist train` builds it, ready to take steps. Collective with more ranks than one.

    On the CPU in float32, or on a GPU as `model` (fields of the run file's section) says. `zero` is DeepSpeed's JSON.
    """

    def __init__(
        self,
        folder: Path,
        *,
        longest_row: int = PACK_LENGTH,
        world: int = 1,
        use_cpu: bool = True,
        model: Mapping[str, Any] | None = None,
        strategy: str | None = None,
        zero: Mapping[str, Any] | None = None,
    ) -> None:
        from phi3_dist.config.schema import DataConfig, LoraConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
        from phi3_dist.machine.probe import probe
        from phi3_dist.modeling.base import find_base
        from phi3_dist.planning.facts import LaunchFacts
        from phi3_dist.planning.plan import make_plan
        from phi3_dist.training.build import build_model
        from phi3_dist.training.engines.backward_and_update import make_engine
        from phi3_dist.training.runtime import start_runtime

        cfg = RunConfig(
            model=ModelConfig(source=str(folder), **(model or {"precision": "fp32"})),
            data=DataConfig(train="none", pack_length=longest_row),
            lora=LoraConfig(r=LORA_RANK, alpha=2 * LORA_RANK, dropout=0.0),
            optim=OptimConfig(lr=LR, schedule="constant"),
            train=TrainConfig(global_batch=world, micro_batch=1),
        )
        strategy, zero = strategy or ("ddp" if world > 1 else "single"), zero or {}
        launch = LaunchFacts(world_size=world, strategy=strategy, zero_settings=zero, use_cpu=use_cpu)
        base = find_base(str(folder))
        plan = make_plan(cfg, probe(use_cpu=use_cpu), launch, family_or_shape=base.config.to_dict())
        self.runtime = start_runtime(plan, zero, max_grad_norm=cfg.optim.max_grad_norm, trackers=(), folder=folder)
        self.meter = Meter(cuda=not use_cpu)
        built = build_model(cfg, base, self.runtime, longest_row=longest_row)
        self.model, self.choices = built.model, (*plan.choices, *built.choices)
        self.engine = make_engine(self.model, self.runtime, cfg.optim)
        self.meter.count_weights(self.model)
        self.world, self.next_step = world, 0

    @property
    def facts(self) -> dict[str, int]:
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return {"trainable": sum(n for n, trained in sizes if trained), "parameters": sum(n for n, _ in sizes)}

    def round(self, packs: Any) -> Round:
        """One pass over the packs; tokens are those of all ranks."""
        from phi3_dist.data.pack_order import Order
        from phi3_dist.training.train_step import train_step

        order = Order(len(packs), global_batch=self.world, seed=0, shuffle=True)
        count = max(len(packs) // self.world, 1)
        self.meter.start()
        steps = range(self.next_step, self.next_step + count)
        done = [train_step(self.engine, self.runtime, packs, order, step, lr=LR, seed=0) for step in steps]
        self.next_step = steps.stop
        return self.meter.stop(sum(d.tokens for d in done), sum(d.supervised_tokens for d in done))


def train_ours(pipe: Connection, folder: Path, rows: list[tuple[list[int], int]]) -> None:
    """One round for each "round" received, the matrix rate for each "rate"."""
    stand, packs = Stand(folder), make_token_packs(rows)
    pipe.send(stand.facts)
    while (command := pipe.recv()) != "stop":
        pipe.send(matrix_flops_per_s() if command == "rate" else stand.round(packs))


# --- PEFT's side: what one writes by hand -----------------------------------------------------------------------------


def train_peft(pipe: Connection, folder: Path, rows: list[tuple[list[int], int]]) -> None:
    """PEFT in a plain loop over the same packs: transformers keeps documents apart by their positions, all logits."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Phi3ForCausalLM

    from phi3_dist.data.batch import assemble

    meter = Meter()
    base = Phi3ForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="sdpa")
    settings = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, settings).train()
    meter.count_weights(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    batches = []
    packs = make_token_packs(rows)
    for pack in range(len(packs.packs)):
        batch = assemble(packs, [pack])
        ids, predict = torch.from_numpy(batch.ids_T), torch.from_numpy(batch.predict_S)
        labels = torch.full_like(ids, -100)
        labels[predict + 1] = ids[predict + 1]
        batches.append((ids[None], torch.from_numpy(batch.positions_T)[None], labels[None], len(predict)))
    pipe.send({"trainable": sum(p.numel() for p in trained), "parameters": sum(p.numel() for p in model.parameters())})
    while pipe.recv() != "stop":
        meter.start()
        for ids, positions, labels, _ in batches:
            model(input_ids=ids, position_ids=positions, labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        pipe.send(meter.stop(sum(ids.numel() for ids, *_ in batches), sum(count for *_, count in batches)))


# --- TRL's side -------------------------------------------------------------------------------------------------------


def _trl_settings(folder: Path) -> Any:
    """What TRL is fastest with on a CPU."""
    return import_module("trl").SFTConfig(
        output_dir=str(folder / "trl"),
        packing=True,
        packing_strategy="bfd",
        padding_free=True,
        max_length=PACK_LENGTH,
        per_device_train_batch_size=1,
        num_train_epochs=1000,
        learning_rate=LR,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,  # on by default, and then it computes every layer's forward twice
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _turns(pipe: Connection, meter: Meter) -> Any:
    """A Trainer callback that sends the round that has ended, and waits until the next may begin."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):  # type: ignore[misc]
        tokens = supervised = steps = 0

        def _wait(self, control: Any) -> None:
            if pipe.recv() == "stop":
                control.should_training_stop = True
            meter.start()

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._wait(control)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % self.steps == 0:
                pipe.send(meter.stop(self.tokens, self.supervised))
                self._wait(control)

    return Turns()


def train_trl(pipe: Connection, folder: Path, rows: list[tuple[list[int], int]]) -> None:
    """SFTTrainer over the same rows; a callback lets it wait for its turn between two passes."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import Phi3ForCausalLM

    from phi3_dist.modeling.tokenizer import tiny_tokenizer

    trl = import_module("trl")
    meter = Meter()
    model = Phi3ForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="sdpa")
    labels = [[-100] * answer + ids[answer:] for ids, answer in rows]
    turns = _turns(pipe, meter)
    trainer = trl.SFTTrainer(
        model,
        args=_trl_settings(folder),
        train_dataset=Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "labels": labels}),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(
            r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[turns],
    )
    meter.count_weights(trainer.model)
    batches = list(trainer.get_train_dataloader())
    turns.steps = len(batches)
    turns.tokens = sum(batch["input_ids"].numel() for batch in batches)
    turns.supervised = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    pipe.send({"trainable": trainable, "parameters": sum(p.numel() for p in trainer.model.parameters())})
    trainer.train()
