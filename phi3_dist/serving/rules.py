"""What servers do with an adapter of Phi-3, as data: each rule with the place that it was read in.

`make test-serve` holds them against the servers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from phi3_dist.family.variants import TINY_RANDOM
from phi3_dist.serving.served import Served

__all__ = ["RULES", "SERVERS", "Finding", "Rule", "Server", "Verdict", "command", "judge"]

Server = Literal["vllm", "llama.cpp", "transformers", "peft"]
SERVERS: tuple[Server, ...] = ("vllm", "llama.cpp", "transformers", "peft")
Effect = Literal["refused", "wrong", "flag", "note"]
"""refused: it does not load. wrong: it loads, and answers something else. flag: right with it, wrong without."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM 0.32 takes as --max-lora-rank (vllm/config/lora.py, MaxLoRARanks)."""
_MERGE = "phi3-dist export {folder} OUT --as merged"
_MERGE_GGUF = "phi3-dist export {folder} OUT --as gguf-merged"
_LLAMA_NAMES = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


@dataclass(frozen=True)
class Rule:
    """`what` and `fix` are filled with the fields of `Served`. `flags` is part of a command line, or empty."""

    servers: tuple[Server, ...]
    effect: Effect
    applies: Callable[[Served], bool]
    what: str
    fix: str = ""
    flags: str = ""
    source: str = ""


@dataclass(frozen=True)
class Finding:
    """A rule that applies, in words."""

    effect: Effect
    what: str
    fix: str
    flags: str
    source: str


@dataclass(frozen=True)
class Verdict:
    """What a server will do with an adapter."""

    server: Server
    findings: tuple[Finding, ...]
    command: str

    @property
    def loads(self) -> bool:
        return not any(finding.effect == "refused" for finding in self.findings)

    @property
    def right(self) -> bool:
        """Whether it answers as it was trained to, with the flags of `command`."""
        return self.loads and not any(finding.effect == "wrong" for finding in self.findings)

    @property
    def summary(self) -> str:
        if not self.loads:
            return "does not load"
        if not self.right:
            return "loads, and answers differently from how it was trained"
        flags = any(finding.effect == "flag" for finding in self.findings)
        return "loads, and answers as trained with the flags below" if flags else "loads, and answers as trained"


_VLLM: tuple[Server, ...] = ("vllm",)
_LLAMA: tuple[Server, ...] = ("llama.cpp",)
_PYTHON: tuple[Server, ...] = ("transformers", "peft")
_HELPER, _LOADING = "vLLM 0.32, vllm/lora/peft_helper.py", "vLLM 0.32, vllm/lora/lora_model.py"
_ADAPTER_CPP = "llama.cpp, src/llama-adapter.cpp"

_IN_MEMORY = "its base, {base}, is made in memory by phi3_dist: no server and no other library finds it"

RULES: tuple[Rule, ...] = (
    Rule(
        (*_VLLM, *_PYTHON), "refused", lambda s: s.base == TINY_RANDOM, _IN_MEMORY, _MERGE,
        source="phi3_dist/modeling/base.py",
    ),
    Rule(
        _LLAMA, "refused", lambda s: s.base == TINY_RANDOM, _IN_MEMORY, _MERGE_GGUF,
        source="phi3_dist/modeling/base.py",
    ),
    Rule(_VLLM, "refused", lambda s: s.dora, "vLLM does not load DoRA", _MERGE, source=_HELPER),
    Rule(
        _VLLM, "refused", lambda s: s.bias != "none",
        "vLLM refuses a configuration with bias: {bias}, though Phi-3 has no bias that could have trained",
        "phi3-dist export {folder} OUT --as one-rank", source=_HELPER,
    ),
    Rule(_VLLM, "refused", lambda s: s.lora_bias, "vLLM does not load a bias of B", _MERGE, source=_HELPER),
    Rule(
        _VLLM, "refused", lambda s: bool(s.whole),
        "vLLM does not load modules that were trained in full ({whole})", _MERGE, source=_HELPER,
    ),
    Rule(
        _VLLM, "refused", lambda s: s.taught > 0,
        "vLLM knows no rows of new tokens ({taught} here)", _MERGE, source=_LOADING,
    ),
    Rule(
        _VLLM, "refused", lambda s: max(s.ranks) > VLLM_RANKS[-1],
        f"rank {{rank}} is above vLLM's largest, {VLLM_RANKS[-1]}", _MERGE, source="vLLM 0.32, vllm/config/lora.py",
    ),
    Rule(
        _VLLM, "refused", lambda s: bool(_LLAMA_NAMES & set(s.targets)),
        "its modules have Llama's names, and vLLM's Phi-3 has the fused ones",
        "give the adapter with qkv_proj and gate_up_proj", source="vLLM 0.32, vllm/model_executor/models/phi3.py",
    ),
    Rule(
        _VLLM, "flag", lambda s: max(s.ranks) <= VLLM_RANKS[-1], "it is of rank {rank}; vLLM allows 16 by default",
        flags="--max-lora-rank {vllm_rank}", source="vLLM 0.32, vllm/config/lora.py",
    ),
    Rule(
        _VLLM, "note", lambda s: s.patterns,
        "ranks or alphas differ by module: vLLM 0.32 reads them, older ones scale all modules alike",
        "phi3-dist export {folder} OUT --as one-rank, for older ones", source=_HELPER,
    ),
    Rule(
        _VLLM, "flag", lambda s: s.longrope == "short",
        "it was trained with LongRoPE's short factors, which vLLM takes where no sequence may be longer than that",
        flags="--max-model-len {original_context}",
        source="vLLM 0.32, rotary_embedding/phi3_long_rope_scaled_rope.py",
    ),
    Rule(
        _VLLM, "flag", lambda s: s.longrope == "long",
        "it was trained with LongRoPE's long factors, which vLLM takes where a sequence may be longer than "
        "{original_context}",
        flags="--max-model-len {twice}",
        source="vLLM 0.32, rotary_embedding/phi3_long_rope_scaled_rope.py",
    ),
    Rule(
        _VLLM, "flag", lambda s: s.has_tokenizer,
        "AutoTokenizer rebuilds the published Phi-3 tokenizer and drops its normalizer: the word after each role token "
        "gets other ids than in training. The adapter's folder holds the one of the training, and the template",
        flags="--tokenizer {folder}", source="transformers 5.24; phi3_dist/modeling/tokenizer.py",
    ),
    Rule(_VLLM, "flag", lambda s: s.revision is not None, "its base has a revision", flags="--revision {revision}"),
    Rule(
        _VLLM, "flag", lambda s: s.lora_init == "loftq",
        "LoftQ made up for what NF4 loses of the base: on the 16-bit base it would be applied twice",
        flags="--quantization bitsandbytes", source="arXiv 2310.08659",
    ),
    Rule(
        ("vllm", "llama.cpp"), "note", lambda s: s.trained_on != "none" and s.lora_init != "loftq",
        "it was trained on the base in {trained_on}: on another the answers drift (export --as merged measures it)",
    ),
    # llama.cpp
    Rule(_LLAMA, "refused", lambda s: s.dora, "llama.cpp computes no DoRA", _MERGE_GGUF, source=_ADAPTER_CPP),
    Rule(
        _LLAMA, "refused", lambda s: bool(s.whole),
        "llama.cpp's adapters hold A and B, and no modules trained in full ({whole})", _MERGE_GGUF, source=_ADAPTER_CPP,
    ),
    Rule(
        _LLAMA, "refused", lambda s: s.taught > 0,
        "the tokenizer in the base's GGUF file knows none of the {taught} new tokens", _MERGE_GGUF,
        source=_ADAPTER_CPP,
    ),
    Rule(
        _LLAMA, "flag", lambda s: True, "llama.cpp reads GGUF: phi3-dist export {folder} OUT --as gguf",
        flags="--lora OUT/adapter.gguf", source=_ADAPTER_CPP,
    ),
    Rule(
        _LLAMA, "note", lambda s: s.rslora or s.patterns,
        "llama.cpp has one alpha for all modules and no rsLoRA: the export writes each module's scale into its B",
        source="llama.cpp, src/llama-adapter.h, get_scale",
    ),
    Rule(
        _LLAMA, "flag", lambda s: s.longrope == "short",
        "it was trained with LongRoPE's short factors, which llama.cpp takes up to that context for each slot",
        flags="-c {original_context} -np 1", source="llama.cpp, src/llama-model.cpp, get_rope_factors",
    ),
    Rule(
        _LLAMA, "flag", lambda s: s.longrope == "long",
        "it was trained with LongRoPE's long factors, which llama.cpp takes above {original_context} for each slot",
        flags="-c {twice} -np 1", source="llama.cpp, src/llama-model.cpp, get_rope_factors",
    ),
    Rule(
        _LLAMA, "note", lambda s: bool(s.window) and (s.window or 0) < 2**17,
        "llama.cpp ignores Phi-3's attention window of {window} tokens: longer texts are read differently",
        source="llama.cpp, src/models/phi3.cpp; pull request 13676",
    ),
    Rule(
        _LLAMA, "wrong", lambda s: s.lora_init == "loftq",
        "LoftQ made up for what NF4 loses of the base, and llama.cpp has other quantisations",
        "phi3-dist export {folder} OUT --as gguf-merged --into nf4", source="arXiv 2310.08659",
    ),
    # in Python
    Rule(
        _PYTHON, "flag", lambda s: s.longrope is not None,
        "transformers chooses LongRoPE's factors in each pass, by the longest text: pin them to the {longrope} ones",
        "phi3_dist.adapters.loading.load_adapter(model, folder), or the card's lines",
        source="transformers 5.24, modeling_rope_utils.py",
    ),
    Rule(
        _PYTHON, "flag", lambda s: s.base_rows is not None,
        "the base's tables must be enlarged first: base.resize_token_embeddings({base_rows}, mean_resizing=False)",
        "phi3_dist.adapters.loading.load_adapter does this", source="PEFT 0.21",
    ),
    Rule(
        _PYTHON, "note", lambda s: s.trained_on != "none" and s.lora_init != "loftq",
        "it was trained on the base in {trained_on}: load the base so (the card has the lines)",
    ),
    Rule(
        _PYTHON, "flag", lambda s: s.lora_init == "loftq",
        "LoftQ is for the base in NF4: load it with BitsAndBytesConfig(load_in_4bit=True, …), as the card shows",
        source="arXiv 2310.08659",
    ),
    Rule(
        _PYTHON, "flag", lambda s: True,
        "take the tokenizer by PreTrainedTokenizerFast or phi3_dist.load_tokenizer: AutoTokenizer drops the published "
        "normalizer", source="transformers 5.24; phi3_dist/modeling/tokenizer.py",
    ),
)  # fmt: skip


def _words(served: Served) -> dict[str, object]:
    rank = max(served.ranks)
    return {
        **vars(served),
        "whole": ", ".join(served.whole),
        "rank": rank,
        "vllm_rank": next((r for r in VLLM_RANKS if r >= rank), VLLM_RANKS[-1]),
        "twice": 2 * served.original_context,
    }


def _findings(served: Served, server: Server) -> Iterator[Finding]:
    words = _words(served)
    for rule in RULES:
        if server in rule.servers and rule.applies(served):
            what, fix, flags = (text.format(**words) for text in (rule.what, rule.fix, rule.flags))
            yield Finding(rule.effect, what, fix, flags, rule.source)


def judge(served: Served, server: Server) -> Verdict:
    """All that the rules say of an adapter for one server, and the command that serves it."""
    found = tuple(_findings(served, server))
    verdict = Verdict(server, found, "")
    return Verdict(server, found, command(served, server, found) if verdict.loads else "")


def command(served: Served, server: Server, findings: tuple[Finding, ...]) -> str:
    """What to type for a server, or the lines of Python."""
    flags = " ".join(finding.flags for finding in findings if finding.flags)
    if server == "vllm":
        return f"vllm serve {served.base} --enable-lora --lora-modules adapter={served.folder} {flags}".strip()
    if server == "llama.cpp":
        return f"llama-server -m base.gguf {flags}"
    revision = f', revision="{served.revision}"' if served.revision else ""
    return (
        f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{served.base}", dtype="auto"{revision}), '
        f'"{served.folder}")'
    )
