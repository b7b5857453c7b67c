"""`python -m phi3_dist.bench.generate`: vLLM beside the others, where it is."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from phi3_dist.bench.generate import of_vllm
from phi3_dist.errors import MachineError
from phi3_dist.inference.open_model import open_model
from tests.unit.test_serving import server


def test_vllm_gets_the_same_batch_and_its_rounds_are_counted_by_answers_alone(tmp_path: Path) -> None:
    """A stand-in echoes what it was asked in its answers."""
    echo = (
        "[{'answers': [{'ids': [request['together'], request['rounds'], request['new_tokens'], 9], 'logprobs': []}"
        " for _ in request['prompts']], 'seconds': [9.0, 2.0, 4.0]}]"
    )
    words = argparse.Namespace(
        target="tiny-random", server_python=server(tmp_path, echo), batch=3, rounds=2, max_new_tokens=5
    )
    made, rates = of_vllm(open_model("tiny-random"), [[1, 2], [3]], [9], words)
    assert made == [[3, 3, 5], [3, 3, 5]]  # without the id that ends an answer
    assert rates == [6 / 2, 6 / 4]  # without the first round
    words.server_python = server(tmp_path, "[{'error': 'ValueError: no such model'}]")
    with pytest.raises(MachineError, match="no such model"):
        of_vllm(open_model("tiny-random"), [[1]], [9], words)
