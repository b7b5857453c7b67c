"""Adapter folders: written whole or not at all, read back, loadable by plain PEFT, damage refused."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phi3_dist.adapters import files
from phi3_dist.adapters.files import recover, save_adapter, write_adapter
from phi3_dist.adapters.gather import gather_adapter
from phi3_dist.adapters.publishing import publish
from phi3_dist.adapters.reading import read_adapter
from phi3_dist.errors import AdapterError, ConfigError
from tests import warm
from tests.ranks.gather_bodies import same, tiny_peft, tiny_phi3

# peft 0.21 asks transformers 5.24 for a name that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "checksums.json"]


def saved(folder: Path, kind: str = "lora", seed: int = 1) -> Path:
    receipt = save_adapter(tiny_peft(kind, seed), folder, card="a card")
    assert receipt is not None
    return folder


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@contextmanager
def files_no_larger_than(limit_bytes: int) -> Iterator[None]:
    """The kernel refuses to write past the limit, as a full disk or quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_folder_holds_the_adapter_and_nothing_of_the_base(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "adapter"
    model = tiny_peft()
    receipt = save_adapter(model, folder, card="a card")
    assert receipt is not None
    assert names(folder) == FILES
    assert names(folder.parent) == ["adapter"]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert same(tensors, gather_adapter(model))
    assert all("lora_" in key for key in tensors)
    assert (receipt.tensors, receipt.bytes) == (len(tensors), (folder / "adapter_model.safetensors").stat().st_size)
    checksums = json.loads((folder / "checksums.json").read_text())
    assert checksums == {"sha256": {"adapter_model.safetensors": receipt.sha256}}
    again, config = read_adapter(folder)
    assert same(again, tensors)
    assert config["inference_mode"] is True
    assert config["r"] == 4


_LOAD = """
import sys, torch
from peft import PeftModel
from tests.ranks.gather_bodies import tiny_phi3
model = PeftModel.from_pretrained(tiny_phi3(), sys.argv[1]).eval()
torch.save(model(torch.arange(9)[None]).logits.detach(), sys.argv[2])
"""


def test_plain_peft_in_a_fresh_process_gives_the_same_logits(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", "dora")
    command = [warm.python(), "-c", _LOAD, str(folder), str(tmp_path / "logits.pt")]
    repo = Path(__file__).resolve().parents[2]
    subprocess.run(command, check=True, cwd=repo, env=warm.environment())
    with torch.no_grad():
        expected = tiny_peft("dora").eval()(torch.arange(9)[None]).logits
        base = tiny_phi3().eval()(torch.arange(9)[None]).logits
    logits = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(logits, base, atol=1e-2)


@pytest.mark.parametrize("kind", ["lora", "head", "rslora"])
def test_plain_peft_restores_every_value(tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    folder = saved(tmp_path / "adapter", kind)
    assert same(gather_adapter(PeftModel.from_pretrained(tiny_phi3(), folder)), gather_adapter(tiny_peft(kind)))


def text_of(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.iterdir()) if path.suffix in {".json", ".md"})


@pytest.mark.parametrize("how", ["whole", "relative", "symbolic"])
def test_plain_peft_finds_a_local_base_from_any_folder(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    tiny_phi3().save_pretrained(tmp_path / "bases" / "phi3")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "bases")
    monkeypatch.chdir(tmp_path)
    name = {"whole": str(tmp_path / "bases/phi3"), "relative": "bases/phi3", "symbolic": "link/phi3"}[how]
    model = tiny_peft()
    model.peft_config["default"].base_model_name_or_path = name
    model.peft_config["default"].task_type = "CAUSAL_LM"
    save_adapter(model, "adapter")
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    assert same(gather_adapter(loaded), gather_adapter(model))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits
        # transformers' own way, too
        found = AutoModelForCausalLM.from_pretrained(str(tmp_path / "adapter")).eval()(ids).logits
        torch.testing.assert_close(loaded.eval()(ids).logits, expected)
        torch.testing.assert_close(found, expected)
    assert "| base |" not in (tmp_path / "adapter" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "adapter" / "README.md").read_text()

    copy = publish(tmp_path / "adapter", tmp_path / "out" / "copy", "someone/phi3-tiny", "v2")
    assert str(tmp_path) not in text_of(copy)
    config = read_adapter(copy)[1]
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/phi3-tiny", "v2")
    card = (copy / "README.md").read_text()
    assert "base_model: someone/phi3-tiny\n" in card
    assert "- base_model:adapter:someone/phi3-tiny\n" in card
    assert "A LoRA adapter for `someone/phi3-tiny` (revision `v2`)" in card
    assert 'from_pretrained("someone/phi3-tiny", revision="v2", dtype="auto")' in card
    assert "local folder" not in card
    assert read_adapter(tmp_path / "adapter")[1]["base_model_name_or_path"] == str(tmp_path / "bases/phi3")


def test_what_cannot_be_published(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    for base in ("phi3", "/data/phi3", "./phi3/tiny", "~/phi3", "a/b/c", str(tmp_path)):
        with pytest.raises(ConfigError, match="is not a model on the hub"):
            publish(folder, tmp_path / "copy", base)
    with pytest.raises(AdapterError, match="exists"):
        publish(folder, folder, "a/b")
    with pytest.raises(AdapterError, match=r"cannot be written: (Not a directory|File exists)"):
        publish(folder, folder / "README.md" / "copy", "a/b")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match="is damaged"):
        publish(folder, tmp_path / "copy", "a/b")
    assert names(tmp_path) == ["adapter"]


def test_the_hint_of_a_base_takes_its_place(tmp_path: Path) -> None:
    tensors, config = read_adapter(saved(tmp_path / "first"))
    hint = {"base_model_name_or_path": "microsoft/Phi-3-mini-4k-instruct", "revision": "main"}
    write_adapter(tmp_path / "second", tensors, config, card="", base_hint=hint)
    assert read_adapter(tmp_path / "second")[1].items() >= hint.items()


def test_an_adapter_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", seed=1)
    saved(folder, seed=2)
    assert same(read_adapter(folder)[0], gather_adapter(tiny_peft(seed=2)))
    assert names(tmp_path) == ["adapter"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(AdapterError, match="exists and is not an adapter"):
        saved(tmp_path / "thesis")
    assert names(tmp_path / "thesis") == ["chapter.tex"]


def test_what_somebody_puts_beside_an_adapter_is_carried_over(tmp_path: Path) -> None:
    """Also where the writer was killed before it came to it."""
    folder = saved(tmp_path / "adapter", seed=1)
    (folder / "merged").mkdir()
    (folder / "merged" / "model.safetensors").write_text("hours of work")
    (folder / "tokenizer.model").write_text("of the old one")
    saved(folder, seed=2)
    assert names(tmp_path) == ["adapter"]
    assert (folder / "merged" / "model.safetensors").read_text() == "hours of work"
    assert not (folder / "tokenizer.model").exists()
    (tmp_path / f"adapter.old-{os.getpid()}").mkdir()
    (tmp_path / f"adapter.old-{os.getpid()}" / "notes.txt").write_text("a thought")
    recover(folder)
    assert names(tmp_path) == ["adapter"]
    assert (folder / "notes.txt").read_text() == "a thought"
    assert same(read_adapter(folder)[0], gather_adapter(tiny_peft(seed=2)))


@pytest.mark.parametrize("limit_bytes", [0, 100, 8192])
def test_a_full_disk_leaves_the_old_adapter_and_no_trace(tmp_path: Path, limit_bytes: int) -> None:
    folder = saved(tmp_path / "adapter", seed=1)
    with files_no_larger_than(limit_bytes), pytest.raises(AdapterError, match=r"cannot be written: .*File too large"):
        saved(folder, seed=2)
    with files_no_larger_than(limit_bytes), pytest.raises(AdapterError, match="free some space"):
        saved(tmp_path / "new", seed=2)
    assert names(tmp_path) == ["adapter"]
    assert same(read_adapter(folder)[0], gather_adapter(tiny_peft(seed=1)))


def test_a_place_that_cannot_be_written_is_named() -> None:
    with pytest.raises(AdapterError, match=r"/proc/adapter: the adapter cannot be written: .*\n.*fix: choose a folder"):
        saved(Path("/proc/adapter"))


_KILLED = """
import os, signal, sys
from pathlib import Path
from phi3_dist.adapters import files
from tests.ranks.gather_bodies import tiny_peft
stop_at = sys.argv[2]
seen = 0
def watch(event, args):
    global seen
    if event == "os.rename":
        seen += 1
        if seen == int(stop_at):
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
files.save_adapter(tiny_peft(seed=2), sys.argv[1], card="")
"""


@pytest.mark.parametrize(("rename", "seed_after"), [(1, 1), (2, 2)])
def test_a_writer_that_is_killed_leaves_one_whole_adapter(tmp_path: Path, rename: int, seed_after: int) -> None:
    """Killed before the first rename the old adapter stands; before the second the new one is complete."""
    folder = saved(tmp_path / "adapter", seed=1)
    repo = Path(__file__).resolve().parents[2]
    ended = subprocess.run(
        [warm.python(), "-c", _KILLED, str(folder), str(rename)], cwd=repo, env=warm.environment(), check=False
    )
    assert ended.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    recover(folder)
    assert names(tmp_path) == ["adapter"]
    assert same(read_adapter(folder)[0], gather_adapter(tiny_peft(seed=seed_after)))


def test_recover_takes_the_old_adapter_where_the_new_is_not_whole(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", seed=1)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder.rename(tmp_path / f"adapter.old-{dead.pid}")
    partial = saved(tmp_path / f"adapter.tmp-{dead.pid}", seed=2)
    (partial / "checksums.json").unlink()  # it is written last
    alive = tmp_path / f"adapter.tmp-{os.getppid()}"
    alive.mkdir()
    recover(folder)
    assert names(tmp_path) == sorted(["adapter", alive.name])
    assert same(read_adapter(folder)[0], gather_adapter(tiny_peft(seed=1)))


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path / "adapter") / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors: is damaged: SHA-256"):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("keep", [0, 7, 2000, -1])
def test_a_truncated_file_without_checksums_is_found(tmp_path: Path, keep: int) -> None:
    folder = saved(tmp_path / "adapter")
    (folder / "checksums.json").unlink()  # as PEFT itself writes a folder
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterError, match="is damaged or cannot be read"):
        read_adapter(folder)


def test_every_fault_of_a_folder_is_told_at_once(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    (folder / "adapter_config.json").write_text("{")
    (folder / "checksums.json").write_text("[]")
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    assert "adapter_config.json: is damaged" in str(caught.value)
    assert "checksums.json is damaged" in str(caught.value)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="it has no peft_type"):
        read_adapter(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_an_adapter_of_integers_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    tensors, config = read_adapter(folder)
    whole = {name: torch.ones(tensor.shape).to(dtype) for name, tensor in tensors.items()}
    save_file(whole, folder / "adapter_model.safetensors")
    (folder / "checksums.json").unlink()  # as PEFT itself writes a folder
    with pytest.raises(AdapterError, match=r"lora_A\.weight \(torch\..*is not of a floating dtype"):
        read_adapter(folder)
    with pytest.raises(AdapterError, match="is not of a floating dtype"):
        write_adapter(tmp_path / "new", whole, config, card="")


def test_the_counter_of_a_module_that_is_saved_whole_may_be_an_integer(tmp_path: Path) -> None:
    tensors, config = read_adapter(saved(tmp_path / "adapter"))
    tensors["base_model.model.norm.num_batches_tracked"] = torch.tensor(3)
    write_adapter(tmp_path / "new", tensors, config, card="")
    assert read_adapter(tmp_path / "new")[0]["base_model.model.norm.num_batches_tracked"] == 3


@pytest.mark.parametrize("kind", ["NONSENSE", "lora", 7, None, ["LORA"]])
def test_a_peft_type_that_nobody_knows_is_refused(kind: object, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": kind}))
    with pytest.raises(AdapterError, match=r"adapter_config.json: peft_type is .*which PEFT does not know"):
        read_adapter(folder)


def test_a_value_that_peft_cannot_use_is_named_by_its_key(tmp_path: Path) -> None:
    """Every verb reads an adapter here: none copies it, serves it, or ends in PEFT's traceback."""
    folder = saved(tmp_path / "adapter")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    wrong = {
        "r": ["8", -1, 0, True, 2.5],
        "lora_alpha": ["16", float("nan"), float("inf"), [16]],
        "lora_dropout": ["none"],
        "bias": [0],
        "target_modules": [5, [5], {"qkv_proj": 1}],
        "modules_to_save": ["lm_head", [None]],
        "rank_pattern": [[4], {"qkv_proj": "4"}],
        "alpha_pattern": [{"qkv_proj": "4"}],
        "use_dora": ["false", 1],
        "base_model_name_or_path": [7, ["a"]],
        "revision": [1],
    }
    for key, values in wrong.items():
        for value in values:
            path.write_text(json.dumps({**config, key: value}))
            with pytest.raises(AdapterError, match=rf"adapter_config.json: {key} is .*, where PEFT has "):
                read_adapter(folder)
    path.write_text(json.dumps({**config, "modules_to_save": None, "rank_pattern": {"o_proj": 2}, "lora_alpha": 1.5}))
    read_adapter(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "checksums.json"])
def test_a_pipe_in_an_adapters_folder_is_not_waited_for(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    signal.alarm(20)
    try:
        with pytest.raises(AdapterError, match="is not a plain file"):
            read_adapter(folder)
    finally:
        signal.alarm(0)


def test_pickled_weights_and_missing_folders_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="a pickle, which can run any code"):
        read_adapter(folder)
    with pytest.raises(AdapterError, match=r"adapter_config.json: cannot be read: No such file"):
        read_adapter(tmp_path / "nowhere")


def test_bad_tensors_are_not_written(tmp_path: Path) -> None:
    tensors, config = read_adapter(saved(tmp_path / "adapter"))
    first, second, *_ = tensors
    tensors[first] = torch.empty(0)
    tensors[second] = torch.full((2, 2), float("nan"))
    with pytest.raises(AdapterError) as caught:
        write_adapter(tmp_path / "bad", tensors, config, card="")
    assert "has no elements" in str(caught.value)
    assert "NaN or infinity" in str(caught.value)
    with pytest.raises(AdapterError, match="no tensor at all"):
        write_adapter(tmp_path / "bad", {}, config, card="")
    assert not (tmp_path / "bad").exists()


def test_two_names_for_one_memory_are_both_written(tmp_path: Path) -> None:
    _, config = read_adapter(saved(tmp_path / "adapter"))
    shared = torch.arange(6.0)
    write_adapter(tmp_path / "shared", {"a": shared, "b": shared, "c": shared.view(2, 3).T}, config, card="")
    tensors, _ = read_adapter(tmp_path / "shared")
    assert torch.equal(tensors["a"], tensors["b"])
    assert torch.equal(tensors["c"], shared.view(2, 3).T)


def test_the_comparison_sees_one_bit(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    tensors, _ = read_adapter(folder)
    files._compare(folder / "adapter_model.safetensors", tensors)
    key = next(iter(tensors))
    tensors[key].view(torch.uint8).view(-1)[0] ^= 1
    with pytest.raises(AdapterError, match="1 tensors read back different"):
        files._compare(folder / "adapter_model.safetensors", tensors)


def test_a_model_without_peft_has_no_adapter_folder(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no PEFT adapter"):
        save_adapter(torch.nn.Linear(2, 2), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
