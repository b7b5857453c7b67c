"""`phi3-dist push` against a stand-in on this machine that speaks as much of the hub as huggingface_hub asks it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from phi3_dist.adapters.files import save_adapter
from phi3_dist.adapters.model_card import adapter_card
from phi3_dist.errors import AdapterError, ConfigError, MachineError
from phi3_dist.exports.pushing import push
from phi3_dist.modeling.lora import quiet_peft
from tests.small_models import small_phi3

# huggingface_hub 1 hands its HTTP client bytes in a way that one has deprecated
pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>' to upload raw bytes/text content:DeprecationWarning"
)

REPO = "someone/tickets"
HUB_BASE = "microsoft/Phi-3-mini-4k-instruct"


class Hub(ThreadingHTTPServer):
    """Keeps what was committed in `files`, and what was asked in `asked`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.private: bool | None = None
        self.refuses = 0


class Answering(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _say(self, value: Any, code: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.refuses:
            self._say({"error": "no"}, self.server.refuses)
        else:
            self._say({"id": REPO, "modelId": REPO, "private": self.server.private, "siblings": [], "tags": []})

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rsplit("/", 1)[-1]] = self._body()
        self._say({})

    def do_POST(self) -> None:
        body = self._body()
        self.server.asked.append(self.path)
        if self.server.refuses:
            self._say({"error": "no"}, self.server.refuses)
        elif self.path == "/api/repos/create":
            said = json.loads(body)
            if self.server.private is None:
                self.server.private = said.get("visibility") == "private" or bool(said.get("private"))
            self._say({"url": f"{self.server.url}/{REPO}"})
        elif self.path == "/api/validate-yaml":
            self._say({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            said = [{"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")]} for f in files]
            self._say({"files": [{**one, "shouldIgnore": False} for one in said]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}} for o in objects]
            self._say({"transfer": "basic", "objects": actions})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                said = json.loads(line)
                if said["key"] == "file":
                    self.server.files[said["value"]["path"]] = base64.b64decode(said["value"]["content"])
                elif said["key"] == "lfsFile":
                    self.server.files[said["value"]["path"]] = self.server.blobs[said["value"]["oid"]]
            self._say({"commitUrl": f"{self.server.url}/{REPO}/commit/1", "commitOid": "1", "success": True})
        else:
            self._say({"error": self.path}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, not spoken here
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with its adapter, trained on a base in a folder, and its evaluation."""
    base = tmp_path / "bases" / "my-phi3"
    base.mkdir(parents=True)
    with quiet_peft():
        model = get_peft_model(small_phi3(), LoraConfig(target_modules=["o_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(base)
    run = tmp_path / "runs" / "tickets"
    card = adapter_card({"name": "tickets", "base": str(base), "lora": {"r": 8}})
    save_adapter(model, run / "adapter", card=card)
    (run / ".phi3_dist_run").write_text('{"phi3_dist_run": "1"}')
    said = {"adapter": {"heldout_loss": 0.25, "exact_match": 0.9}, "data": "held-out rows"}
    (run / "evaluation.json").write_text(json.dumps(said))
    return run


def upload(run: Path, hub: Hub, **more: Any) -> Any:
    return push(run, REPO, base=HUB_BASE, upload=True, endpoint=hub.url, token="hf_x", **more)


def test_nothing_goes_out_before_it_was_shown(run: Path, hub: Hub) -> None:
    shown = push(run, REPO, base=HUB_BASE, endpoint=hub.url)
    assert hub.asked == []
    assert not shown.url
    assert shown.private
    names = [name for name, _ in shown.files]
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors", "checksums.json"]
    assert dict(shown.files)["adapter_model.safetensors"] > 1000
    assert [note.split(": ")[-1] for note in shown.notes] == ["--license", "--language", "--dataset"]


def test_what_is_uploaded_is_private_whole_and_names_the_hubs_base(run: Path, hub: Hub, tmp_path: Path) -> None:
    (run / "adapter" / "notes.txt").write_text("mine")
    done = upload(run, hub, license="mit", languages=["en"], datasets=["someone/chats"])
    assert hub.private is True
    assert done.url == f"{hub.url}/{REPO}"
    assert done.left_out == ("notes.txt",)
    assert set(hub.files) == {name for name, _ in done.files}
    assert hub.files["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == HUB_BASE
    card = hub.files["README.md"].decode()
    assert not any(str(tmp_path) in text.decode("utf-8", "replace") for text in hub.files.values())
    data = ModelCard(card, ignore_metadata_errors=False).data
    assert (data.base_model, data.license, data.language, data.datasets) == (HUB_BASE, "mit", ["en"], ["someone/chats"])
    assert {(r.metric_type, r.metric_value) for r in data.eval_results} == {("loss", 0.25), ("exact_match", 0.9)}
    assert f"vllm serve {HUB_BASE} " in card
    assert "my-phi3" not in card
    assert done.notes == ()


def test_a_public_repository_is_asked_for(run: Path, hub: Hub) -> None:
    upload(run, hub, public=True)
    assert hub.private is False
    hub.files.clear()
    with pytest.raises(ConfigError, match="is there already, and is public") as refused:
        upload(run, hub)
    assert "--public" in refused.value.problems[0].fix
    assert hub.files == {}


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("README.md", "token: hf_" + "aB3" * 10, "a secret"),
        ("README.md", "read /home/me/rows.jsonl", "a path of a machine"),
        ("tokenizer_config.json", '{"api_key": "0123456789abcdef"}', "a secret"),
        ("chat_template.jinja", "-----BEGIN RSA " + "PRIVATE KEY-----", "a secret"),
    ],
)
def test_secrets_and_paths_stay_here(file: str, text: str, said: str, run: Path, hub: Hub) -> None:
    path = run / "adapter" / file
    path.write_text((path.read_text() if path.exists() else "") + "\n" + text + "\n")
    with pytest.raises(AdapterError, match=rf"{file}:\d+: holds .*{said}") as refused:
        upload(run, hub)
    assert "aB3aB3aB3" not in str(refused.value)
    assert hub.asked == []


def test_a_base_in_a_folder_wants_its_hub_id(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"the adapter's base is a folder \(my-phi3\)"):
        push(run, REPO)
    for name in ("tickets", "a/b/c", "/data/x"):
        with pytest.raises(ConfigError, match="REPO"):
            push(run, name, base=HUB_BASE)


@pytest.mark.parametrize(("code", "said"), [(401, "does not know the token"), (403, "may not write there")])
def test_a_hub_that_refuses_is_one_message(code: int, said: str, run: Path, hub: Hub) -> None:
    hub.refuses = code
    with pytest.raises(MachineError, match=said):
        upload(run, hub)


def test_an_upload_that_breaks_off_is_one_message(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Error while uploading 'adapter_model.safetensors' to the Hub.")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", broken)
    with pytest.raises(MachineError, match="can't be reached: RuntimeError"):
        upload(run, hub)
    assert hub.files == {}


def test_a_hub_that_can_not_be_reached_is_one_message(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(MachineError, match=r"the hub at http://127\.0\.0\.1:9 can't be reached"):
        push(run, REPO, base=HUB_BASE, upload=True, endpoint="http://127.0.0.1:9", token="hf_x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match="HF_HUB_OFFLINE is set"):
        push(run, REPO, base=HUB_BASE, upload=True, token="hf_x")


def test_a_card_whose_head_is_none_is_told(run: Path) -> None:
    path = run / "adapter" / "README.md"
    front = yaml.safe_dump({"model-index": [{"results": "none"}]})
    path.write_text(f"---\n{front}---\n# mine\n")
    (run / "evaluation.json").unlink()
    with pytest.raises(AdapterError, match="the hub cannot read its front matter"):
        push(run, REPO, base=HUB_BASE)
