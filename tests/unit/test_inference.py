"""What a run leaves is opened and answers: greedy as transformers and PEFT do, in batches that rows leave and join."""

from __future__ import annotations

import functools
import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import GenerationConfig, Phi3ForCausalLM

from phi3_dist.config.load import load_run
from phi3_dist.config.schema import DataConfig
from phi3_dist.data.answers import last_questions, spread, text_of
from phi3_dist.data.prepare import prepare
from phi3_dist.errors import AdapterError, ConfigError, DataError, Phi3DistError, RunFolderError
from phi3_dist.inference import engine
from phi3_dist.inference.engine import Sampling, answers, stream
from phi3_dist.inference.open_model import Opened, Options, open_model
from phi3_dist.inference.prompts import Prompt, prompt_ids, read_prompts
from phi3_dist.machine.probe import probe
from phi3_dist.modeling.lora import quiet_peft
from phi3_dist.modeling.stop_ids import stop_ids
from phi3_dist.modeling.tokenizer import load_tokenizer, tiny_tokenizer
from phi3_dist.planning.facts import LaunchFacts
from phi3_dist.training import whole_run
from tests.ranks.launcher import REPO
from tests.ranks.test_strategies import tiny_base
from tests.small_models import small_phi3

TOKENIZER = tiny_tokenizer()


def lively(**changes: object) -> Phi3ForCausalLM:
    """A random model whose answers vary."""
    model = small_phi3(**changes).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn_like(weight) * 0.5)
    return model


def some_prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [torch.randint(0, 90, (n,), generator=generator).tolist() for n in lengths]


def of_transformers(model: Any, prompt: list[int], stops: Sequence[int], count: int) -> list[int]:
    """The new tokens of plain `generate`, one prompt at a time, without the stop id."""
    config = GenerationConfig(do_sample=False, max_new_tokens=count, eos_token_id=list(stops), pad_token_id=stops[0])
    ids = torch.tensor([prompt])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :]
    return [token for token in out.tolist() if token not in stops]


@functools.cache
def wanted_answers(window: int | None) -> list[list[int]]:
    return [of_transformers(lively(sliding_window=window), prompt, [5, 40, 77], 40) for prompt in some_prompts(13)]


@pytest.mark.parametrize(("window", "batch_size"), [(None, 4), (8, 4), (8, 32), (None, 1)])
def test_greedy_answers_are_transformers_own(
    window: int | None, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows leave and join at different lengths, buffers grow, the window bites, and several ids end an answer."""
    monkeypatch.setattr(engine, "_LEAST_ROOM", 3)
    monkeypatch.setattr(engine, "_PREFILL_TOKENS", 64)
    model, stops, prompts = lively(sliding_window=window), [5, 40, 77], some_prompts(13)
    found = dict(answers(model, prompts, stops, max_new_tokens=40, batch_size=batch_size))
    wanted = wanted_answers(window)
    assert [found[i].ids for i in range(len(prompts))] == wanted
    assert {found[i].ended for i in range(13)} == {True, False}  # some end, some are cut off
    assert [found[i].ended for i in range(13)] == [len(ids) < 40 for ids in wanted]
    assert [found[i].prompt_tokens for i in range(13)] == [len(prompt) for prompt in prompts]


def test_no_more_passes_are_made_than_rows_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended rows make way: with a batch of 2, one long answer doesn't hold up five short ones."""
    model, prompts = lively(), some_prompts(6)
    lengths = dict.fromkeys(range(6), 3) | {0: 24}
    calls: list[int] = []
    monkeypatch.setattr(engine._Batch, "step", counted(engine._Batch.step, calls))
    monkeypatch.setattr(
        engine._Batch, "_choose", lambda self, rows, _: [end_at(row, lengths[row.number]) for row in rows]
    )
    found = dict(answers(model, prompts, [1], max_new_tokens=99, batch_size=2))
    assert {i: len(found[i].ids) for i in range(6)} == lengths
    assert len(calls) <= 26  # one after the other in pairs they would take more


def counted(function: Any, calls: list[int]) -> Any:
    def step(self: Any) -> None:
        calls.append(len(self.rows))
        function(self)

    return step


def end_at(row: Any, length: int) -> None:
    if not row.done:
        row.new.append(1 if len(row.new) == length else 7)
        row.done = row.new[-1] == 1


def test_a_sampled_answer_depends_on_seed_and_row_alone() -> None:
    model, prompts = lively(), some_prompts(6)
    warm = Sampling(temperature=1.0, top_p=0.9, top_k=20, seed=4)
    together = dict(answers(model, prompts, [5], max_new_tokens=12, batch_size=6, sampling=warm))
    alone = dict(answers(model, prompts, [5], max_new_tokens=12, batch_size=1, sampling=warm))
    later = dict(answers(model, prompts[4:], [5], max_new_tokens=12, batch_size=6, sampling=warm, numbers=[4, 5]))
    assert together == alone
    assert [later[0], later[1]] == [together[4], together[5]]
    other = dict(answers(model, prompts, [5], max_new_tokens=12, sampling=Sampling(1.0, 0.9, 20, seed=5)))
    assert other != together
    assert len({tuple(answer.ids) for answer in together.values()}) == 6


def test_sampling_draws_what_the_probabilities_say() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, -1)
    drawn = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = torch.bincount(engine._sampled(logits, Sampling(1.0), drawn), minlength=4) / 4000
    assert shares.tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    nucleus = torch.bincount(engine._sampled(logits, Sampling(1.0, top_p=0.7), drawn), minlength=4) / 4000
    assert nucleus.tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert set(engine._sampled(logits, Sampling(1.0, top_k=1), drawn).tolist()) == {0}
    assert set(engine._sampled(logits, Sampling(0.01), drawn).tolist()) == {0}
    with pytest.raises(ValueError, match="top_p"):
        Sampling(1.0, top_p=0)


def test_a_stream_gives_the_same_tokens_one_by_one() -> None:
    model, (prompt, *_) = lively(), some_prompts(1)
    wanted = of_transformers(model, prompt, [5, 40], 30)
    tokens = stream(model, prompt, [5, 40], max_new_tokens=30)
    assert [next(tokens) for _ in range(min(3, len(wanted)))] == wanted[:3]
    assert list(stream(model, prompt, [5, 40], max_new_tokens=30)) == wanted


def test_prompts_are_what_training_has_seen() -> None:
    """From messages, and read off a row of the cache: the same ids, up to the answer's first token."""
    row = json.loads((REPO / "configs/run/debug_chats.jsonl").read_text().splitlines()[0])
    packs = prepare(DataConfig(train=str(REPO / "configs/run/debug_chats.jsonl"), validation_share=0), TOKENIZER, None)
    stops = stop_ids(small_phi3(), TOKENIZER)
    (asked,) = last_questions(packs.train.rows, [0], stops)
    turns = row["messages"]
    (ids,) = prompt_ids(TOKENIZER, [Prompt(tuple(turns[:-1]))])
    assert asked.prompt == ids
    assert packs.train.rows.ids[: len(ids)].tolist() == ids
    assert text_of(TOKENIZER, asked.wanted) == turns[-1]["content"].strip()
    assert spread(10, 3) == [0, 3, 6]
    assert spread(2, 5) == [0, 1]


def test_raw_text_asks_nothing(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "Once upon a time."}\n')
    rows = prepare(DataConfig(train=str(tmp_path / "texts.jsonl"), validation_share=0), TOKENIZER, None).train.rows
    with pytest.raises(DataError, match=r"texts\.jsonl:1.*raw text"):
        last_questions(rows, [0], [1])


def test_a_taught_token_stays_in_an_answers_text() -> None:
    taught = load_tokenizer("tiny-random", new_tokens=["<|tool|>"])
    ids = taught("<|end|>call <|tool|> now<|end|>", add_special_tokens=False)["input_ids"]
    assert text_of(taught, ids) == "call <|tool|> now"


@pytest.mark.parametrize(
    ("row", "asked", "wanted"),
    [
        ({"prompt": "Hi?"}, "Hi?", None),
        ({"prompt": "Hi?", "completion": "Yes."}, "Hi?", "Yes."),
        ({"messages": [{"role": "user", "content": "a"}]}, "a", None),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a", "b"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "a", None),
        ({"instruction": "Add", "input": "1 1"}, "Add\n\n1 1", None),
    ],
)
def test_rows_with_and_without_an_answer_are_prompts(tmp_path: Path, row: Any, asked: str, wanted: str | None) -> None:
    (tmp_path / "rows.jsonl").write_text("\n" + json.dumps(row) + "\n")
    (prompt,) = read_prompts(tmp_path / "rows.jsonl")
    assert (prompt.messages[-1]["content"], prompt.wanted, prompt.place) == (asked, wanted, "rows.jsonl:2")


def test_files_of_prompts_are_recognised_by_their_first_bytes(tmp_path: Path) -> None:
    """The same files as for training: packed, CSV, Parquet, an array, UTF-16, marks; else one sentence on the file."""
    import pyarrow
    import pyarrow.parquet

    line = b'{"prompt": "Hi?"}\n'
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["Hi?"]}), tmp_path / "a.parquet")
    good = {
        "a.jsonl.gz": gzip.compress(line),
        "b.jsonl": gzip.compress(line),
        "a.csv": b"prompt\nHi?\n",
        "c.jsonl": b'[{"prompt": "Hi?"}]',
        "d.jsonl": line.decode().encode("utf-16"),
        "e.jsonl": b"\xef\xbb\xbf" + line,
        "f.jsonl": b'{\n  "prompt": "Hi?"\n}\n',
        "a.parquet": (tmp_path / "a.parquet").read_bytes(),
    }
    for name, content in good.items():
        (tmp_path / name).write_bytes(content)
        assert [prompt.messages[-1]["content"] for prompt in read_prompts(tmp_path / name)] == ["Hi?"], name
    bad = {
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n": "git lfs pull",
        b'{"prompt": "\xff"}\n': "not UTF-8",
        b'{"prompt": 5}\n': "prompt is a number, not text",
        b'{"prompt": {}}\n': "prompt is an object, not text",
        b'{"instruction": true}\n': "instruction is true or false, not text",
        line + b"[" * 9000 + b"\n": "nested too deep",
    }
    for content, said in bad.items():
        (tmp_path / "rows.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=said) as error:
            read_prompts(tmp_path / "rows.jsonl")
        assert len(error.value.problems) == 1
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(DataError, match="not a plain file"):
            read_prompts(path)


def test_rows_that_ask_nothing_are_named_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{\n{"prompt": "ok"}\n[1]\n{"text": "raw"}\n')
    with pytest.raises(DataError) as error:
        read_prompts(tmp_path / "rows.jsonl")
    assert [problem.where for problem in error.value.problems] == [f"rows.jsonl:{n}" for n in (1, 2, 4, 5)]
    with pytest.raises(DataError, match=r"<\|end\|>"):
        prompt_ids(TOKENIZER, [Prompt.of("a<|end|>")])


# --- opening ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def made(base: Path, folder: Path, *overrides: str) -> Path:
    cfg = load_run(
        REPO / "configs/run/debug.yaml",
        [
            f"model.source={base}", f"data.train={REPO / 'configs/run/debug_chats.jsonl'}", "model.precision=fp32",
            "train.max_steps=4", "train.global_batch=2",
            "train.micro_batch=1", "data.max_rows=12", "data.pack_length=260", "save.every=2", "save.keep=9",
            "log.trackers=[]", f"save.folder={folder}", f"data.cache={folder.parent / 'cache'}", *overrides,
        ],
    )  # fmt: skip
    whole_run.train(cfg, probe(), LaunchFacts())
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(base, tmp_path_factory.mktemp("run") / "mine", "data.validation_share=0.3")


@pytest.mark.full
@pytest.mark.demo_base
@pytest.mark.timeout(900)
def test_greedy_answers_of_a_real_base_are_transformers_own(tmp_path: Path) -> None:
    """The demo's base under an adapter that changes its answers, in batches of three that rows leave and join."""
    from phi3_dist.config.schema import LoraConfig
    from phi3_dist.demo.base import build_base
    from phi3_dist.modeling.base import find_base, load_full
    from phi3_dist.modeling.lora import add_lora

    folder = build_base(REPO / ".cache" / "demo-base")
    fresh = load_full(find_base(str(folder)), torch.float32, torch.device("cpu"))
    model, tokenizer = add_lora(fresh, LoraConfig(dropout=0.1), str(folder)), load_tokenizer(str(folder))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.01)
    model.save_pretrained(tmp_path / "adapter")
    with quiet_peft():
        plain = PeftModel.from_pretrained(Phi3ForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    opened, stops = open_model(tmp_path / "adapter"), stop_ids(plain, tokenizer)
    texts = (
        "Hi!",
        "What is the capital of France?",
        "Count from one to ten, please.",
        "Say yes.",
        "Why is the sky blue?",
    )
    prompts = prompt_ids(tokenizer, [Prompt.of(text) for text in texts])
    found = dict(answers(opened.model, prompts, stops, max_new_tokens=24, batch_size=3))
    assert [found[i].ids for i in range(5)] == [of_transformers(plain, prompt, stops, 24) for prompt in prompts]


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def test_a_run_an_adapter_and_its_last_checkpoint_are_one_model(run: Path, base: Path) -> None:
    with quiet_peft():
        plain = PeftModel.from_pretrained(Phi3ForCausalLM.from_pretrained(base), run / "adapter").eval()
    wanted = logits(plain)
    opened = [open_model(path) for path in (run, run / "adapter", run / "checkpoints" / "step_000004")]
    for one in opened:
        assert torch.allclose(logits(one.model), wanted, atol=1e-6)
        assert one.precision == "fp32"
    before = open_model(run / "checkpoints" / "step_000002")
    assert not torch.allclose(logits(before.model), wanted, atol=1e-4)
    with opened[0].base_alone():
        assert torch.equal(logits(opened[0].model), logits(open_model(base).model))
    stops = stop_ids(plain, opened[0].tokenizer)
    prompts = prompt_ids(opened[0].tokenizer, [Prompt.of(text) for text in ("Hi.", "Two lattes, please", "x")])
    found = dict(answers(opened[0].model, prompts, stops, max_new_tokens=12))
    assert [found[i].ids for i in range(3)] == [of_transformers(plain, prompt, stops, 12) for prompt in prompts]


@pytest.mark.parametrize("init", [pytest.param("pissa", id="pissa"), pytest.param("loftq", marks=pytest.mark.full)])
def test_checkpoints_of_computed_starts_and_quantised_bases_open(base: Path, tmp_path: Path, init: str) -> None:
    more = ("model.quantization=nf4",) if init == "loftq" else ("lora.freeze_a=true", "model.new_tokens=[LATTE]")
    folder = made(base, tmp_path / "run", f"lora.init={init}", "lora.dropout=0", *more)
    ended, last = open_model(folder), open_model(folder / "checkpoints" / "step_000004")
    assert torch.allclose(logits(ended.model), logits(last.model), atol=1e-4)
    assert bool(getattr(ended.causal_lm, "is_loaded_in_4bit", False)) == (init == "loftq")


def refused(target: Path, options: Options | None = None) -> Phi3DistError:
    with pytest.raises(Phi3DistError) as error:
        open_model(target, options)
    assert all(problem.where for problem in error.value.problems)
    assert any(problem.fix for problem in error.value.problems)
    return error.value


def test_a_run_that_never_finished_names_its_last_checkpoint(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    error = refused(tmp_path / "run")
    assert isinstance(error, RunFolderError)
    assert "has not finished" in str(error)
    assert "checkpoints/step_000004" in str(error)
    (tmp_path / "run/checkpoints/step_000004/state.safetensors").write_bytes(b"torn")
    assert "not a checkpoint that can be used" in str(refused(tmp_path / "run/checkpoints/step_000004"))


def test_an_adapter_of_another_base_is_refused(run: Path, base: Path, tmp_path: Path) -> None:
    """Of another shape by its tensors, of the same shape by the weights that the run has noted."""
    small = tmp_path / "small"
    small_phi3(vocab_size=320).save_pretrained(small)
    TOKENIZER.save_pretrained(small)
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    error = refused(tmp_path / "adapter", Options(base=str(small)))
    assert isinstance(error, AdapterError)
    assert "does not fit the base" in str(error)
    shutil.copytree(base, tmp_path / "other")
    model = Phi3ForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    error = refused(run, Options(base=str(tmp_path / "other")))
    assert "was trained on a base with the weights" in str(error)
    assert isinstance(open_model(run, Options(base=str(base))), Opened)


def test_fewer_layers_than_the_adapters_are_refused(run: Path, base: Path, tmp_path: Path) -> None:
    model = Phi3ForCausalLM.from_pretrained(base)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.config.layer_types = None
    model.save_pretrained(tmp_path / "shorter")
    TOKENIZER.save_pretrained(tmp_path / "shorter")
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    assert "does not fit the base" in str(refused(tmp_path / "adapter", Options(base=str(tmp_path / "shorter"))))


def test_a_base_that_has_gone_a_damaged_adapter_and_other_folders_are_told(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "base_model_name_or_path": str(tmp_path / "gone")}))
    error = refused(tmp_path / "adapter")
    assert "which is not there" in str(error)
    assert "--base-model" in str(error)
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"torn")
    assert "damaged" in str(refused(tmp_path / "adapter"))
    (tmp_path / "nothing").mkdir()
    assert "neither a run folder" in str(refused(tmp_path / "nothing"))
    assert "no such folder" in str(refused(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="--precision"):
        open_model(run, Options(precision="fp8"))
