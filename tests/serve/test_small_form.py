"""The small form of `make test-serve`, in `make test` where the servers are: one adapter serves, another does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3_dist.exports.checking import compared, served_of
from phi3_dist.exports.exporting import export
from phi3_dist.exports.open_adapter import open_adapter
from phi3_dist.serving.asking import ask
from phi3_dist.serving.rules import judge
from tests.export_cases import small_adapter, small_base
from tests.serve.test_servers import HEAD_32, PROMPTS, PYTHON, ROWS, skip_without

pytestmark = pytest.mark.timeout(600)


def test_vllm_serves_lora_and_refuses_dora(tmp_path: Path) -> None:
    skip_without("vllm")
    base = small_base(tmp_path / "base", **HEAD_32)
    folders = [small_adapter(tmp_path / str(dora), base, dora=dora) for dora in (False, True)]
    request = {"base": str(base), "adapters": [str(f) for f in folders], "prompts": PROMPTS, "new_tokens": 8}
    said = ask("vllm", PYTHON, {**request, "context": 256, "max_lora_rank": 8})
    for folder, answers in zip(folders, said, strict=True):
        opened = open_adapter(folder)
        assert compared(answers, opened, PROMPTS, ROWS).right is judge(served_of(opened), "vllm").right


def test_llama_cpp_serves_a_merged_model(tmp_path: Path) -> None:
    skip_without("llama.cpp")
    adapter = small_adapter(tmp_path / "adapter", small_base(tmp_path / "base", **HEAD_32), dora=True)
    export(adapter, tmp_path / "out", "gguf-merged")
    request = {"base": str(tmp_path / "out" / "model.gguf"), "adapters": [None], "prompts": PROMPTS, "new_tokens": 8}
    (said,) = ask("llama.cpp", PYTHON, {**request, "context": 256})
    assert compared(said, open_adapter(adapter), PROMPTS, ROWS).right
