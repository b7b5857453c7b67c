"""`phi3-dist board`: what it answers, whom, and from where; and the verbs around it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from typer.testing import CliRunner

from phi3_dist.cli import app
from phi3_dist.errors import ConfigError, MachineError, RunFolderError
from phi3_dist.report.board import open_board
from tests.unit.test_page import EVIL, write_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    write_run(folder / "one")
    write_run(folder / "deep" / "two & <three>", lr=5e-4)
    return folder


@pytest.fixture
def port(runs: Path) -> Iterator[int]:
    with open_board(runs, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield int(server.server_address[1])
        server.shutdown()
        thread.join()


def get(port: int, address: str, **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", address, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), text


def test_the_list_leads_to_every_run_and_to_their_comparison(port: int, runs: Path) -> None:
    status, headers, text = get(port, "/")
    assert status == 200
    assert "text/html" in headers["Content-Type"]
    assert "two &amp; &lt;three&gt;" in text
    assert "/run?run=deep%2Ftwo+%26+%3Cthree%3E" in text
    status, _, text = get(port, "/run?run=deep%2Ftwo+%26+%3Cthree%3E")
    assert status == 200
    assert "connect-src &#39;self&#39;" in text
    assert not (runs / "one" / "report.html").exists(), "a board writes nothing"
    _, _, text = get(port, f"/compare?run=one&run={quote('deep/two & <three>')}")
    assert "lr 0.0005" in text
    news = json.loads(get(port, f"/news/compare?run=one&run={quote('deep/two & <three>')}")[2])
    assert [run["label"] for run in news["runs"]] == ["lr 0.0001", "lr 0.0005"]
    assert "What differs" in news["above"]


def test_news_come_once(port: int, runs: Path) -> None:
    status, headers, text = get(port, "/news/run?run=one")
    assert status == 200
    news = json.loads(text)
    assert news["runs"][0]["train"]["step"] == [10, 20]
    assert "held-out loss" in news["above"]
    assert get(port, "/news/run?run=one", If_None_Match=headers["ETag"])[0] == 304
    with (runs / "one" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 21, "loss": 0.4}\n{"kind": "tra')  # half written while it is read
    status, _, text = get(port, "/news/run?run=one", If_None_Match=headers["ETag"])
    assert (status, json.loads(text)["runs"][0]["train"]["step"]) == (200, [10, 20, 21])
    write_run(runs / "later")
    assert "later" in json.loads(get(port, "/news")[2])["above"]


def test_only_this_machine_is_answered_and_only_for_runs_of_the_folder(port: int, runs: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "private")
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        assert get(port, "/", Host=host)[0] == 403
    for host in ("localhost", f"LOCALHOST:{port}", f"127.0.0.1:{port}", "[::1]:1"):
        assert get(port, "/", Host=host)[0] == 200
    secret = quote(str(tmp_path / "private"))
    for address in (
        "/run?run=../private",
        f"/run?run={secret}",
        "/run?run=one/../../private",
        "/../private/metrics.jsonl",
        "/one/metrics.jsonl",
        "/run",
        "/run?run=one&run=one",
        "/compare?run=nobody",
        f"/{quote(EVIL)}",
        "/news/",
        "/run?run=%00",
    ):
        status, headers, text = get(port, address)
        assert status == 404, address
        assert headers["Content-Type"].startswith("text/plain")
        assert "private" not in text
    assert get(port, "/compare")[0] == 422
    assert "MachineError" not in get(port, "/compare")[2]


def test_runs_without_a_step_and_damaged_ones_hide_no_other(port: int, runs: Path) -> None:
    (runs / "begun").mkdir()
    (runs / "begun" / "config.yaml").write_text("name: begun\n")
    (runs / "begun" / "plan.json").write_text('{"steps": 5}')
    write_run(runs / "torn", plan_json="{")
    status, _, text = get(port, "/")
    assert (status, text.count("/run?run=")) == (200, 4)
    status, _, text = get(port, "/run?run=begun")
    assert status == 200
    assert "starting" in text
    status, headers, text = get(port, "/run?run=torn")
    assert status == 422
    assert "plan.json: is not JSON" in text
    assert headers["Content-Type"].startswith("text/plain")


def test_a_port_that_is_taken_and_a_folder_that_is_none_are_one_message(port: int, runs: Path) -> None:
    with pytest.raises(MachineError, match=f"port {port}: cannot be listened on(.|\n)*--port"):
        open_board(runs, port)
    with pytest.raises(RunFolderError, match="is not a folder"):
        open_board(runs / "nothing", 0)


def test_report_takes_one_run_or_several(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, other = str(runs / "one"), str(runs / "deep" / "two & <three>")
    done = CliRunner().invoke(app, ["report", one, other])
    assert done.output == "page: comparison.html\n"
    assert (tmp_path / "comparison.html").is_file()
    done = CliRunner().invoke(app, ["report", one])
    assert done.output.splitlines() == [f"page: {one}/report.html", f"curves: {one}/curves.png"]
    done = CliRunner().invoke(app, ["report", one, "--output", "x.html"])
    assert isinstance(done.exception, ConfigError)
