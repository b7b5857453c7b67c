"""Files of JSON that nest thousands deep are damaged files as any other: one message, and no RecursionError."""

from pathlib import Path

import pytest

from phi3_dist.adapters.reading import CONFIG, read_adapter
from phi3_dist.config.json_text import parse_json
from phi3_dist.errors import AdapterError, ModelError
from phi3_dist.modeling.weights import Weights
from phi3_dist.training.checkpoints.files import MANIFEST, verify
from phi3_dist.training.run_folder_contents import MARK, is_run

DEEP = "[" * 200_000


def test_damage_is_a_value_error() -> None:
    assert parse_json(b'{"a": [1]}') == {"a": [1]}
    for text in (DEEP, DEEP.encode(), "{", '{"a":' * 100_000):
        with pytest.raises(ValueError, match=r"deep|Expecting"):
            parse_json(text)


def test_every_reader_says_it_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(DEEP)
    with pytest.raises(ModelError, match="nests too deep"):
        Weights.of_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(len(DEEP).to_bytes(8, "little") + DEEP.encode())
    with pytest.raises(ModelError, match="nests too deep"):
        Weights.of_folder(tmp_path)
    (tmp_path / MANIFEST).write_text(DEEP)
    assert "nests too deep" in str(verify(tmp_path))
    (tmp_path / CONFIG).write_text(DEEP)
    with pytest.raises(AdapterError, match="nests too deep"):
        read_adapter(tmp_path)
    (tmp_path / MARK).write_text(DEEP)
    assert not is_run(tmp_path)
