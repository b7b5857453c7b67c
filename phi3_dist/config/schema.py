"""What a user asks for: one frozen object per section of the run file.

The run file holds the experiment (model, data, LoRA, optimizer, schedule). Topology (how many processes, which
ZeRO stage) is in the Accelerate config that `accelerate launch` gets, and nowhere else.
Every field says its unit. Unknown keys are refused. Nothing here imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


Count = Annotated[StrictInt, Field(ge=1, le=2**40)]
Real = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]
"""A finite number. PyYAML reads `1e-4` as text, which becomes a number here; `true` does not become 1."""
LORA_INITS = r"^(default|pissa|pissa_niter_[1-9][0-9]*|loftq|eva)$"
Share = Annotated[Real, Field(ge=0, lt=1)]
_Length = Annotated[StrictInt, Field(ge=16, le=2**31 - 1)]
if TYPE_CHECKING:  # what readers see: planning/auto_fields.py puts a number in the place of `auto` before all else
    AutoCount = int
    AutoLength = int
    AutoBool = bool
else:
    AutoCount = Literal["auto"] | Count
    AutoLength = Literal["auto"] | _Length
    AutoBool = Literal["auto"] | StrictBool


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelConfig(Section):
    source: StrictStr
    """Base model: a local folder, a hub id, or `tiny-random` (a seeded random Phi-3 with a byte tokenizer)."""
    revision: StrictStr | None = None
    """Hub revision: a branch, tag or commit. Only with a hub id."""
    tokenizer: StrictStr | None = None
    """Tokenizer folder or hub id, if it is not the base model's."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute dtype. `auto`: bf16 where the hardware is fast in it, else fp32; the reason is printed at start."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Storage of the frozen base. `nf4` is QLoRA (double quantised NF4), `int8` is LLM.int8()."""
    dequantized_layers: Literal["auto"] | Annotated[StrictInt, Field(ge=0, le=2**40)] = "auto"
    """nf4: decoder layers, counted from the last, that keep their dequantised weights from forward to backward:
    dequantised once instead of twice, the same numbers. `auto`: with activation checkpointing all, one at a time; else
    none, because NF4 is there to save memory. A number takes 2 bytes a weight (bf16); no gain in time was measured on a
    CPU, and no GPU was timed."""
    fp8: StrictBool = False
    """Keep the frozen linears under the adapter in FP8 (E4M3): half the memory of bf16 (with Triton's kernels as much
    as bf16), and FP8 products on GPUs that have them. The losses differ a little. One process or DDP."""
    attention: Literal[
        "auto", "flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen", "flex", "sdpa"
    ] = "auto"
    """Attention backend: flash-attention by its own packages, `varlen` as built into torch, torch's `flex`, or `sdpa`,
    one call for each document. `auto` takes the first in this order that can run, except `flex`, and prints why. With
    every backend, documents of a pack never attend to each other."""
    loss: Literal["auto", "chunked", "liger"] = "auto"
    """What computes lm_head and the cross-entropy, a chunk of logits at a time: this toolkit, or on a GPU Liger's
    kernel (`phi3-dist[kernels]`). `auto` is this toolkit; the plan prints why."""
    fused_lora: StrictBool = True
    """LoRA and its base linear as one function, where PEFT's layer is the plain one: less time and memory, the same
    numbers and files. `false`: PEFT's own forward everywhere."""
    longrope: Literal["auto", "short", "long"] = "auto"
    """Factors of a LongRoPE model, one choice for the whole run: `auto` takes the long ones if any row is longer than
    the model's original context. Serve an adapter with the factors it was trained with."""
    fused_layers: StrictBool = True
    """Norms, rotary embedding and SwiGLU in fewer passes over memory, and the last layer's MLP over supervised
    tokens only: the same numbers except for the dropout drawn there. `false`: transformers' own modules."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """What computes the fused functions on a GPU: torch's operations, or Triton's kernels, which move fewer bytes and
    draw LoRA's dropout mask again in backward (other masks than torch's). `auto`: Triton's where
    `make card` has timed whole steps with them on such a card and they gained, else torch's."""
    compile: Literal["auto"] | StrictBool = "auto"
    """Compile the fused layers' passes over memory (torch.compile), once for all packs: the same numbers to rounding.
    `auto`: on a CPU if the run is long enough to gain more than compiling takes; on a GPU if `make card` has measured a
    gain on such a card; else not. The plan prints why."""
    activation_checkpointing: AutoBool = False
    """Recompute each decoder layer in backward (non-reentrant): less memory, about a fifth more time.
    `auto`: only where a micro batch does not fit without it, by the plan."""
    adapter: StrictStr | None = None
    """Folder of an existing LoRA adapter to continue training. The `lora` section must agree with it."""
    new_tokens: tuple[StrictStr, ...] = ()
    """New tokens to train, such as `<|tool|>`: added to the tokenizer where it lacks them, in spare rows of the base's
    tables. Only these rows of embedding and head train; they are saved in the adapter, with the tokenizer beside it."""


class DataSource(Section):
    path: StrictStr
    """A file, a folder or a hub id, as in `data.train`."""
    weight: Annotated[Real, Field(gt=0)] = 1.0
    """How often its rows count: 2 repeats each, 0.25 takes a quarter of them, chosen by a hash of the row."""
    split: StrictStr | None = None
    """As `data.split`, for this source."""
    subset: StrictStr | None = None
    """As `data.subset`, for this source."""


class ColumnsConfig(Section):
    """The columns that the keys of a format are read from, if they have other names."""

    messages: StrictStr = "messages"
    """`messages`: the list of role and content."""
    conversations: StrictStr = "conversations"
    """`sharegpt`: the list of from and value."""
    instruction: StrictStr = "instruction"
    """`alpaca`: the question."""
    input: StrictStr = "input"
    """`alpaca`: the text under the question; may be missing or empty."""
    output: StrictStr = "output"
    """`alpaca`: the answer."""
    prompt: StrictStr = "prompt"
    """`prompt_completion`: the question, a text or a list of messages."""
    completion: StrictStr = "completion"
    """`prompt_completion`: the answer, of the same kind as the prompt."""
    text: StrictStr = "text"
    """`text`: the document."""
    system: StrictStr = "system"
    """Every format but `messages` and `text`: the system message; may be missing or empty."""


class DataConfig(Section):
    train: StrictStr | tuple[StrictStr | DataSource, ...]
    """Rows: a file (JSONL, JSON, CSV, each also .gz or .zst; Parquet), a folder of them, a folder of `save_to_disk`,
    or a hub id. Several are read one after the other; `{path, weight}` repeats or thins a source's rows."""
    validation: StrictStr | tuple[StrictStr, ...] | None = None
    """Held-out rows, as `train` but without weights. Without it, `validation_share` of the training rows is used."""
    validation_share: Share = 0.05
    """Share of prompts held out, chosen by a hash of the prompt: equal prompts stay on one side. 0: none."""
    split: StrictStr = "train"
    """Split of a hub data set, of a folder of `save_to_disk`, and of a folder whose files or folders are named after
    splits (train, validation, test, dev, eval, the hub's `NAME-00000-of-00001`). A notice lists what is left out."""
    validation_split: StrictStr = "test"
    """The same for what `validation` names."""
    subset: StrictStr | None = None
    """Configuration of a hub data set, or of a clone of one, that has several."""
    revision: StrictStr | None = None
    """Revision of a hub data set."""
    cache: StrictStr | None = None
    """Folder that keeps tokens, packs and hashes of weights between runs; by default phi3_dist below XDG_CACHE_HOME or
    ~/.cache. Finished entries are read without write permission."""
    pack_length: AutoLength = 2048
    """Most tokens in a pack. Packs hold whole rows, without padding. `auto`: a power of two that holds the longest
    row and keeps the device busy, as far as memory goes; a step then takes train.global_batch packs of that length."""
    on_long_row: Literal["error", "drop", "cut_turn"] = "error"
    """A row longer than `pack_length`: stop, drop it, or cut it after the last learned answer that fits (and drop it
    where none does). Dropped and cut rows are counted and named; nothing is cut silently."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A row that cannot be used: stop and name all of them, or skip, count and list them."""
    supervise: Literal["all", "last"] = "all"
    """Which assistant turns are learned: every one, or the last. A message with `weight: 0` never is."""
    max_rows: Count | None = None
    """Use only the first n training rows (before the split and the weights). For experiments."""
    max_validation_rows: Count | None = None
    """Measure the held-out loss over at most n rows, evenly spread over all that are held out. By default over all."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """What a row looks like. `auto`: that of the first good row of each source; anything but messages is shown. `text`
    is a document of raw text, to which the tokenizer's end-of-document token is added; all but its first is learned."""
    ignore: tuple[StrictStr, ...] = ()
    """Columns and message keys to skip without a notice: `[chosen, rejected]`, or flags that do not apply.
    `[images]` reads the text of rows with pictures, `['<image>']` learns that as text."""
    reasoning: Literal["auto", "drop", "refuse"] = "auto"
    """`reasoning_content` or `thinking` before an answer. `auto`: learned where the chat template renders it, else
    dropped and counted; `drop`: never rendered; `refuse`: a row that has it can't be used."""
    columns: ColumnsConfig = ColumnsConfig()
    """Names of the columns that rows are read from, such as `{prompt: question, completion: answer}`."""


class LoraConfig(Section):
    r: Count = 16
    """Rank of the update."""
    alpha: Annotated[Real, Field(gt=0)] = 32.0
    """Scale: the update is multiplied by alpha / r (alpha / sqrt(r) with `rslora`)."""
    dropout: Share = 0.05
    """Dropout on the adapter's input."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that train beside the adapter: none, every one, or those of adapted layers. Phi-3 has none."""
    targets: Literal["all-linear"] | tuple[StrictStr, ...] = "all-linear"
    """Modules that get an adapter, by the end of their name. Phi-3's are qkv_proj, o_proj, gate_up_proj, down_proj."""
    modules_to_save: tuple[StrictStr, ...] = ()
    """Modules trained in full and saved with the adapter, such as lm_head."""
    rslora: StrictBool = False
    """Rank-stabilised scale, alpha / sqrt(r)."""
    dora: StrictBool = False
    """Weight-decomposed LoRA: trains a magnitude vector beside A and B."""
    rank_pattern: dict[StrictStr, Count] = {}
    """Other ranks than `r` for some modules, by the end of their name or a regular expression, as PEFT matches them:
    `{down_proj: 8}`, `{'layers.[0-3].*': 4}`. The first match counts."""
    alpha_pattern: dict[StrictStr, Annotated[Real, Field(gt=0)]] = {}
    """The same for `alpha`."""
    layers: tuple[Annotated[StrictInt, Field(ge=0, le=2**40)], ...] | None = None
    """Decoder layers that get an adapter, counted from 0. By default every one."""
    plus_ratio: Annotated[Real, Field(ge=1)] = 1.0
    """LoRA+: B learns with `optim.lr` times this. 1 is plain LoRA; the paper (arXiv 2402.12354) suggests about 16."""
    freeze_a: StrictBool = False
    """LoRA-FA (arXiv 2308.03303): A keeps its initial values and only B trains: about half the optimizer's
    memory."""
    init: Annotated[StrictStr, Field(pattern=LORA_INITS)] = "default"
    """How A and B start. `default`: A drawn, B zero. `pissa`: the largest singular vectors of the weight, which are
    taken out of it; `pissa_niter_16` finds them approximately, in 16 iterations, and faster. `loftq`: what NF4 lost of
    the weight. `eva`: A from the activations of the training rows, B zero. See the table of `phi3-dist support`."""


class OptimConfig(Section):
    name: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw"
    """Optimizer. The paged and 8-bit ones are bitsandbytes', for one process or DDP; the paged ones need a GPU."""
    lr: Annotated[Real, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up; cosine and linear end at 0."""
    warmup: Annotated[Real, Field(ge=0)] = 0.03
    """Warm-up: a share of all steps if below 1, else a number of steps."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """Decoupled weight decay of all trained weights except biases and DoRA magnitudes."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Adam's two decay rates."""
    eps: Annotated[Real, Field(gt=0)] = 1e-8
    """Adam's epsilon."""
    max_grad_norm: Annotated[Real, Field(ge=0)] = 1.0
    """Gradients are scaled down to this global norm. 0: no clipping; the norm is still measured."""


class TrainConfig(Section):
    epochs: Annotated[Real, Field(gt=0)] | None = None
    """Passes over the packs. Either this or `max_steps`; without either, 1 epoch."""
    max_steps: Count | None = None
    """Optimizer steps."""
    global_batch: Count = 16
    """Packs in one optimizer step, over all ranks. Accumulation follows: global_batch / (micro_batch * ranks),
    where ranks that share their packs count as one."""
    micro_batch: AutoCount = 1
    """Packs in one forward pass of one rank, joined into one ragged row. `auto`: as many as fit by the plan and gain
    time, the same on all ranks; the smallest card decides."""
    sequence_parallel: Count = 1
    """Neighbouring ranks that share each pack, for rows too long for one: each holds its part of the tokens and attends
    over the whole pack for its part of the heads (DeepSpeed's Ulysses). Divides ranks, heads and key/value heads."""
    eval_every: Annotated[StrictInt, Field(ge=0, le=2**40)] = 0
    """Steps between two measurements of the held-out loss. 0: only at the end."""
    patience: Annotated[StrictInt, Field(ge=0, le=2**40)] = 0
    """Evaluations in a row without an improvement of the held-out loss after which the run ends early. 0: never."""
    min_improvement: Annotated[Real, Field(ge=0)] = 0.0
    """The least improvement that counts for `patience`, in nats per supervised token."""
    max_bad_steps: Count = 3
    """A step whose loss or gradient is not a finite number is skipped; the run stops at this many in a row."""
    profile: Annotated[StrictInt, Field(ge=0, le=2**40)] = 0
    """Steps, from the second on, that torch's profiler records on rank 0: a trace and a table of where the time went,
    in `profile/` of the run folder. 0: none."""
    seed: Annotated[StrictInt, Field(ge=0, le=2**63)] = 0
    """Seed of the adapter's initial values, the order of packs and dropout."""
    shuffle: StrictBool = True
    """Draw a new order of packs each epoch."""
    deterministic: Literal["auto"] | StrictBool = "auto"
    """The same run twice, or resumed, gives the same bits. On a CPU it always does. On a GPU attention's backward adds
    gradients in whatever order they arrive, unless this is set: on an H200 torch's varlen then took from no extra time
    (documents of 512 tokens) to two thirds more (of 64). `auto` is true."""


class SaveConfig(Section):
    folder: StrictStr = "runs/{name}"
    """The run folder. `{name}` is the run file's name without its ending."""
    every: Annotated[StrictInt, Field(ge=0, le=2**40)] = 100
    """Steps between two checkpoints; one more at the end. 0: none. A checkpoint costs what the adapter costs."""
    keep: Count = 2
    """How many of the newest checkpoints that verify to keep, besides the best by held-out loss and the one resumed."""
    final: Literal["last", "best"] = "last"
    """Which state becomes the adapter: that of the last step, or that with the lowest held-out loss (each evaluation
    that is the best so far then writes a checkpoint)."""


class EvalConfig(Section):
    generate: Annotated[StrictInt, Field(ge=0, le=2**40)] = 0
    """Held-out rows whose answers are generated and scored at each evaluation. 0: none. Each new token takes a forward
    pass over the rows that are still being answered: keep it to a few."""
    max_new_tokens: Count = 64
    """Most tokens of such an answer."""


class LogConfig(Section):
    every: Count = 1
    """Steps between two log lines and two rows of metrics.jsonl."""
    trackers: tuple[StrictStr, ...] = ("tensorboard",)
    """Accelerate trackers: tensorboard, wandb, trackio, mlflow, … An empty list: none."""
    project: StrictStr = "phi3_dist"
    """Project name given to the trackers."""


class RunConfig(Section):
    """One run. See `configs/run/` for examples and `phi3-dist config schema` for the JSON Schema."""

    name: StrictStr = ""
    """Name of the run; by default the run file's name without its ending."""
    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()
