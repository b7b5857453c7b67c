"""What `phi3-dist check` says of vLLM and llama.cpp is what they do: `make test-serve`.

Both live in .venv-serve, an environment of their own, and answer for adapters of each kind on a small base of wild
weights, by token ids. Where one is not there, its tests are skipped by name.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest

from phi3_dist.exports.checking import compared, greedy, served_of
from phi3_dist.exports.drift import Rows, compute_dtype, live_model
from phi3_dist.exports.exporting import export
from phi3_dist.exports.open_adapter import open_adapter
from phi3_dist.modeling.tokenizer import load_tokenizer, tiny_tokenizer
from phi3_dist.serving.asking import ask, ask_plainly, why_absent
from phi3_dist.serving.rules import judge
from tests.export_cases import CASES, LONGROPE, small_adapter, small_base
from tests.unit.test_gguf_model import TEXTS, llama_tokenizer

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1800)]

REPO = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("SERVE_PYTHON", str(REPO / ".venv-serve" / "bin" / "python"))
HEAD_32 = {"hidden_size": 128, "intermediate_size": 256}  # vLLM's attention on a CPU has no heads of 16
PROMPTS = [[3, 4, 5, 60, 61], [100, 20, 30], list(range(40, 60))]
ROWS = Rows((), (), "made ids")
KINDS: dict[str, dict[str, Any]] = {**CASES, "tokens": {"new_tokens": ("<|a|>",)}}
FACTORS = {
    **LONGROPE,
    "short_factor": [1.0 + 0.05 * i for i in range(16)],
    "long_factor": [2.0 + 0.5 * i for i in range(16)],
}
ORIGINAL = 4096


@functools.cache
def missing(server: Any) -> str:
    if not Path(PYTHON).exists():
        return "is not installed: make test-serve installs it"
    return why_absent(server, PYTHON)


def skip_without(server: Any) -> None:
    if why := missing(server):
        pytest.skip(f"{server} {why}")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("serve") / "base", **HEAD_32)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    return {name: small_adapter(base.parent / name, base, **kind) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def long_base(base: Path) -> Path:
    return small_base(
        base.parent / "long", rope_parameters={**FACTORS}, max_position_embeddings=4 * ORIGINAL, **HEAD_32
    )


@pytest.fixture(scope="module")
def long_adapters(long_base: Path) -> dict[str, Path]:
    return {
        f: small_adapter(long_base.parent / f"long_{f}", long_base, facts={"longrope": f}) for f in ("short", "long")
    }


# --- vLLM: one engine for all adapters of a base --------------------------------------------------------------------


@pytest.fixture(scope="module")
def from_vllm(base: Path, adapters: dict[str, Path]) -> dict[str, Any]:
    skip_without("vllm")
    folders = dict(adapters)
    for name in ("rslora", "patterns", "bias"):
        export(adapters[name], base.parent / f"{name}_one", "one-rank")
        folders[f"{name}_one"] = base.parent / f"{name}_one"
    export(adapters["lora"], base.parent / "split", "split")
    folders["split"] = base.parent / "split"
    request = {"base": str(base), "adapters": [str(f) for f in folders.values()], "prompts": PROMPTS}
    said = ask("vllm", PYTHON, {**request, "new_tokens": 8, "context": 256, "max_lora_rank": 8})
    return dict(zip(folders, said, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_vllm_does_what_check_says(name: str, adapters: dict[str, Path], from_vllm: dict[str, Any]) -> None:
    opened = open_adapter(adapters[name])
    verdict = judge(served_of(opened), "vllm")
    trial = compared(from_vllm[name], opened, PROMPTS, ROWS)
    assert bool(trial.refused) is not verdict.loads, trial
    assert trial.right is verdict.right, trial


@pytest.mark.parametrize("name", ["rslora", "patterns", "bias"])
def test_vllm_serves_the_form_of_one_rank(name: str, adapters: dict[str, Path], from_vllm: dict[str, Any]) -> None:
    trial = compared(from_vllm[f"{name}_one"], open_adapter(adapters[name]), PROMPTS, ROWS)
    assert trial.right, trial


def test_vllm_refuses_llamas_names(from_vllm: dict[str, Any]) -> None:
    assert isinstance(from_vllm["split"], str)
    assert "q_proj" in from_vllm["split"]


@pytest.mark.parametrize("name", ["dora", "tokens", "whole_head"])
def test_vllm_serves_the_merged_model(name: str, adapters: dict[str, Path], base: Path) -> None:
    skip_without("vllm")
    merged = base.parent / f"{name}_merged"
    export(adapters[name], merged, "merged")
    request = {"base": str(merged), "adapters": [None], "prompts": PROMPTS, "new_tokens": 8, "context": 256}
    (said,) = ask("vllm", PYTHON, request)
    trial = compared(said, open_adapter(adapters[name]), PROMPTS, ROWS)
    assert trial.right, trial


@pytest.mark.parametrize("context", [ORIGINAL, 2 * ORIGINAL])
def test_vllm_takes_longropes_factors_by_max_model_len(
    context: int, long_base: Path, long_adapters: dict[str, Path]
) -> None:
    skip_without("vllm")
    folders = [str(folder) for folder in long_adapters.values()]
    request = {"base": str(long_base), "adapters": folders, "prompts": PROMPTS, "new_tokens": 8}
    said = ask("vllm", PYTHON, {**request, "context": context, "max_lora_rank": 8})
    for factors, answers in zip(long_adapters, said, strict=True):
        trial = compared(answers, open_adapter(long_adapters[factors]), PROMPTS, ROWS)
        assert trial.right is ((factors == "long") == (context > ORIGINAL)), (factors, trial)


# --- llama.cpp ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "rslora", "patterns", "some_layers", "embedding"])
def test_llama_cpp_does_what_check_says(name: str, base: Path, adapters: dict[str, Path]) -> None:
    skip_without("llama.cpp")
    from tests.serve.gguf_base import write_gguf_base

    gguf = base.parent / "base.gguf"
    if not gguf.exists():
        write_gguf_base(base, gguf)
    out = base.parent / f"{name}_gguf"
    export(adapters[name], out, "gguf")
    request = {"base": str(gguf), "adapters": [str(out / "adapter.gguf")], "prompts": PROMPTS}
    (said,) = ask("llama.cpp", PYTHON, {**request, "new_tokens": 8, "context": 256})
    opened = open_adapter(adapters[name])
    assert judge(served_of(opened), "llama.cpp").right
    trial = compared(said, opened, PROMPTS, ROWS)
    assert trial.right, trial
    model = live_model(opened, compute_dtype(opened.base))
    with model.disable_adapter():
        assert [greedy(model, p, 8)[0] for p in PROMPTS] != [list(a.ids) for a in said], "the adapter must show"


@pytest.mark.parametrize("context", [ORIGINAL, 2 * ORIGINAL])
def test_llama_cpp_takes_longropes_factors_by_its_context(
    context: int, long_base: Path, long_adapters: dict[str, Path]
) -> None:
    skip_without("llama.cpp")
    from tests.serve.gguf_base import write_gguf_base

    gguf = write_gguf_base(long_base, long_base.parent / f"long_{context}.gguf")
    for factors, adapter in long_adapters.items():
        out = long_base.parent / f"long_{factors}_{context}"
        export(adapter, out, "gguf")
        request = {"base": str(gguf), "adapters": [str(out / "adapter.gguf")], "prompts": PROMPTS}
        (said,) = ask("llama.cpp", PYTHON, {**request, "new_tokens": 8, "context": context})
        trial = compared(said, open_adapter(adapter), PROMPTS, ROWS)
        assert trial.right is ((factors == "long") == (context > ORIGINAL)), (factors, trial)


@pytest.mark.parametrize("name", ["lora", "dora", "tokens", "whole_head", "embedding"])
def test_llama_cpp_serves_the_merged_model(name: str, base: Path, adapters: dict[str, Path]) -> None:
    skip_without("llama.cpp")
    out = base.parent / f"{name}_gguf_merged"
    export(adapters[name], out, "gguf-merged")
    request = {"base": str(out / "model.gguf"), "adapters": [None], "prompts": PROMPTS, "new_tokens": 8}
    (said,) = ask("llama.cpp", PYTHON, {**request, "context": 256})
    trial = compared(said, open_adapter(adapters[name]), PROMPTS, ROWS)
    assert trial.right, trial


@pytest.mark.parametrize("form", ["phi3", "bytes", "taught"])
def test_llama_cpp_reads_texts_as_in_training(form: str, tmp_path: Path) -> None:
    """Scores for SentencePiece's pieces, and merges for bytes, give the ids of tokenizer.json: roles, spaces, bytes."""
    skip_without("llama.cpp")
    tokenizer = llama_tokenizer() if form == "phi3" else tiny_tokenizer()
    base = small_base(tmp_path / "base", vocab_size=640, **HEAD_32)
    tokenizer.save_pretrained(str(base))
    adapter = small_adapter(tmp_path / "adapter", base, new_tokens=("<|a|>",) if form == "taught" else ())
    export(adapter, tmp_path / "out", "gguf-merged")
    ours = load_tokenizer(str(adapter))
    texts = [*TEXTS, "slowest  newer\n\nlow ", "Grüße, 你好 🙂 12345", " a b"]
    texts += ["low<|a|>wide", "<|a|>\nlow"] if form == "taught" else []
    turns = [{"role": "system", "content": "low"}, {"role": "user", "content": " Wide? \n"}]
    texts.append(ours.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    request = {"base": str(tmp_path / "out" / "model.gguf"), "adapters": [None], "prompts": [[5]], "new_tokens": 1}
    (said,) = ask_plainly("llama.cpp", PYTHON, {**request, "context": 256, "texts": texts})
    wanted = {text: list(ours(text, add_special_tokens=False)["input_ids"]) for text in texts}
    found = dict(zip(texts, said["tokens"], strict=True))
    if form == "taught":  # the one thing that the export says llama.cpp does otherwise
        assert found.pop("<|a|>\nlow") != wanted.pop("<|a|>\nlow")
    assert found == wanted
