"""What is printed reaches a terminal or log of any encoding, and moves no cursor."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from phi3_dist import cli
from phi3_dist.errors import ConfigError, Problem
from phi3_dist.machine.print_encoding import print_in_any_encoding
from phi3_dist.recipes.importing import findings_table, import_run

RECIPE = "x = TrainingArguments(learning_rate=1e-4, per_device_train_batch_size=4, run_name='é')\n"


def test_a_table_in_ascii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.py").write_text(RECIPE, encoding="utf-8")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    print_in_any_encoding()
    Console(width=200).print(findings_table(import_run(tmp_path / "s.py")))
    sys.stdout.write("\udcff")
    sys.stdout.flush()
    text = raw.getvalue().decode("ascii")
    assert "learning_rate = 0.0001 -> optim.lr" in text
    assert "4 per device x 1 accumulation" in text
    assert "run_name = \\xe9" in text
    assert text.endswith("\\udcff")


def test_a_verb_in_a_job_whose_language_is_c(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("prompt = 'user: é×'\n", encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "phi3_dist", "lint", "s.py"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **ascii_only}, capture_output=True, check=False)
    assert done.returncode == ConfigError.exit_code, done.stderr.decode()
    assert "user: \\xe9x" in done.stdout.decode("ascii")


def test_a_message_moves_no_cursor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cli._print_error(ConfigError(Problem("\x1b[31mkey", "is \x9b2J", "two\nlines")))
    text = capsys.readouterr().err
    assert "\\x1b[31mkey: is \\x9b2J" in text
    assert "two\nlines" in text


def ended(monkeypatch: pytest.MonkeyPatch, error: Exception) -> int:
    def app(prog_name: str) -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_path_that_is_too_long_anywhere_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OSError, match="too long") as caught:
        Path("x" * 300).stat()
    assert ended(monkeypatch, caught.value) == ConfigError.exit_code
    assert "is longer than a path can be" in capsys.readouterr().err


def test_a_leftover_rank_hides_no_fix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigError(Problem("here", "is wrong", "write it so"))
    for name in ("LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    cli._print_error(error)
    assert "fix: write it so" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    cli._print_error(error)
    assert capsys.readouterr().err == "[rank 1] ConfigError: here: is wrong fix: write it so\n"
