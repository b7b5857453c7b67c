"""The plan: batch arithmetic, choices with reasons, and every problem at once."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import PlanError
from phi3_dist.family.variants import FAMILIES
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.layer_passes import COLD_S, gain_s, pays_from
from phi3_dist.planning.memory import layer_gib
from phi3_dist.planning.plan import RunPlan, check_reality, make_plan

PACKAGES = {"torch": "2.13.0", "deepspeed": "0.19.8", "bitsandbytes": "0.50.2"}
CPU = MachineFacts("cpu", "a CPU", 1, 16.0, 16.0, 2, False, "no AMX here", PACKAGES)
GPU = MachineFacts("cuda", "a GPU", 8, 80.0, 512.0, 64, True, "a GPU has bf16", {**PACKAGES, "flash-attn": "2.8.3"})
MINI = FAMILIES[0]


def run(**sections: dict[str, Any]) -> RunConfig:
    base: dict[str, Any] = {"model": {"source": "x"}, "data": {"train": "rows.jsonl"}}
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return RunConfig.model_validate(base)


def why(plan: RunPlan, name: str) -> tuple[str, str]:
    choice = next(choice for choice in plan.choices if choice.name == name)
    return choice.value, choice.why


def memory_of(plan: RunPlan, place: str = "device") -> dict[str, float]:
    assert plan.memory is not None
    return {term.name: term.gib for term in plan.memory if term.place == place}


def problems(cfg: RunConfig, machine: MachineFacts, launch: LaunchFacts, **options: Any) -> dict[str, tuple[str, str]]:
    with pytest.raises(PlanError) as caught:
        make_plan(cfg, machine, launch, **options)
    return {problem.where: (problem.what, problem.fix) for problem in caught.value.problems}


def test_accumulation_and_choices() -> None:
    cfg = run(train={"global_batch": 16, "micro_batch": 2, "max_steps": 7})
    plan = make_plan(cfg, CPU, LaunchFacts(2, 1, "ddp", 2, "cpu_2.yaml"))
    assert (plan.accumulation, plan.global_batch, plan.steps, plan.memory) == (4, 16, 7, None)
    assert why(plan, "accumulation") == ("4", "global_batch 16 / (micro_batch 2 × 2 ranks)")
    assert why(plan, "precision") == ("fp32", "no AMX here")
    assert why(plan, "attention")[0] == "sdpa"
    assert "needs CUDA" in why(plan, "attention")[1]
    assert all(choice.why for choice in plan.choices)
    assert json.loads(json.dumps(plan.to_dict()))["choices"][0]["name"] == "precision"


@given(batch=st.integers(1, 200), micro=st.integers(1, 8), world=st.integers(1, 8))
def test_accumulation_is_whole_or_the_nearest_values_work(batch: int, micro: int, world: int) -> None:
    launch = LaunchFacts(world, 1, "ddp" if world > 1 else "single")
    try:
        plan = make_plan(run(train={"global_batch": batch, "micro_batch": micro}), CPU, launch)
    except PlanError as error:
        (problem,) = error.problems
        assert problem.where == "train.global_batch"
        near = problem.fix.removeprefix("nearest: train.global_batch=").partition(",")[0].split(" or ")
        for value in near:
            make_plan(run(train={"global_batch": int(value), "micro_batch": micro}), CPU, launch)
        if "micro_batch=" in problem.fix:
            other = int(problem.fix.rpartition("=")[2])
            make_plan(run(train={"global_batch": batch, "micro_batch": other}), CPU, launch)
    else:
        assert plan.accumulation * plan.micro_batch * plan.world_size == batch


def test_on_a_gpu() -> None:
    plan = make_plan(run(), GPU, LaunchFacts(8, 1, "zero3"), family_or_shape=MINI)
    assert (plan.precision, plan.attention, plan.device) == ("bf16", "flash_attention_2", "cuda")
    assert plan.memory is not None
    assert {"base weights", "gathered weights"} <= {term.name for term in plan.memory}
    no_flash = dataclasses.replace(GPU, packages=PACKAGES)
    value, reason = why(make_plan(run(), no_flash, LaunchFacts(8, 1, "ddp")), "attention")
    assert value == "varlen"
    assert "flash_attention_2: flash-attn is not installed (pip install flash-attn" in reason
    hopper = dataclasses.replace(GPU, capability=(9, 0), packages={**PACKAGES, "flash-attn-4": "4.0.0b36"})
    value, reason = why(make_plan(run(), hopper, LaunchFacts(8, 1, "ddp"), family_or_shape=MINI), "attention")
    assert (value, reason) == ("flash_attention_4", "head size 96 in bf16 on CUDA, window of 2,047 positions")
    fp32 = make_plan(run(model={"precision": "fp32"}), GPU, LaunchFacts(8, 1, "ddp"))
    assert fp32.attention == "sdpa"
    old = dataclasses.replace(GPU, fast_bf16=False, fast_bf16_reason="old")
    assert make_plan(run(), old, LaunchFacts(8, 1, "ddp")).precision == "fp32"


def test_explicit_choices_are_kept_or_refused() -> None:
    slow = make_plan(run(model={"precision": "bf16"}), CPU, LaunchFacts())
    assert why(slow, "precision") == ("bf16", "as the run file says; slow: no AMX here")
    found = problems(run(model={"attention": "flash_attention_2"}), CPU, LaunchFacts())
    assert found["model.attention"] == (
        "is flash_attention_2: needs CUDA, and the device is cpu",
        "model.attention=sdpa",
    )
    found = problems(run(model={"attention": "flash_attention_3"}), GPU, LaunchFacts(), family_or_shape=MINI)
    assert "that is not known here" in found["model.attention"][0]
    hopper = dataclasses.replace(GPU, capability=(9, 0))
    what, fix = problems(run(model={"attention": "flash_attention_3"}), hopper, LaunchFacts())["model.attention"]
    assert "flash-attn-3 is not installed" in what
    assert fix.startswith("pip install --no-build-isolation 'git+https")
    odd = {
        "num_hidden_layers": 2,
        "hidden_size": 400,
        "intermediate_size": 8,
        "num_attention_heads": 4,
        "vocab_size": 9,
    }
    what, _ = problems(run(model={"attention": "varlen"}), GPU, LaunchFacts(), family_or_shape=odd)["model.attention"]
    assert "multiples of 8 up to 256, and this is 100" in what


def test_pissa_is_refused_on_weights_that_hold_no_rest_of_it() -> None:
    for model, nearest in (
        ({"fp8": True}, "default"),
        ({"quantization": "nf4"}, "loftq"),
        ({"quantization": "int8"}, "default"),
    ):
        found = problems(run(model=model, lora={"init": "pissa"}), CPU, LaunchFacts())
        assert "quantised again" in found["lora.init"][0]
        assert found["lora.init"][1] == f"nearest: {nearest}"


def test_fp8_is_refused_where_it_has_not_been_proven() -> None:
    assert make_plan(run(model={"fp8": True}), CPU, LaunchFacts()).strategy == "single"
    ada = dataclasses.replace(GPU, capability=(8, 9))
    small = make_plan(run(model={"fp8": True}), ada, LaunchFacts(), family_or_shape=MINI)
    make_plan(run(model={"fp8": True}), dataclasses.replace(ada, packages={"torch": "2.11.0+cu130"}), LaunchFacts())
    whole = make_plan(run(), ada, LaunchFacts(), family_or_shape=MINI)
    assert small.memory is not None
    assert whole.memory is not None
    assert small.memory[0].gib < 0.56 * whole.memory[0].gib
    for machine, launch, model, reason in (
        (dataclasses.replace(GPU, capability=(8, 0)), LaunchFacts(), {}, "compute capability 8.9, and this is 8.0"),
        (ada, LaunchFacts(2, 1, "zero3"), {}, "under zero3"),
        (ada, LaunchFacts(), {"quantization": "nf4"}, "in nf4 already"),
        (dataclasses.replace(CPU, packages={"torch": "2.12.1+cpu"}), LaunchFacts(), {}, "needs torch 2.13 on cpu"),
        (dataclasses.replace(ada, packages={"torch": "2.9.1"}), LaunchFacts(), {}, "needs torch 2.11 on cuda"),
    ):
        found = problems(run(model={"fp8": True, **model}), machine, launch)
        assert reason in found["model.fp8"][0]


def test_one_process_where_two_were_asked_for() -> None:
    launch = LaunchFacts(1, 1, "single", 2, "accelerate launch --num_processes 2")
    what, fix = problems(run(), CPU, launch)["world size"]
    assert what == ("2 processes were asked for by accelerate launch --num_processes 2, but this process is one of 1")
    assert "MULTI_GPU with use_cpu: true" in fix
    assert "--multi_gpu" in problems(run(), GPU, launch)["world size"][1]


def test_every_problem_at_once() -> None:
    cfg = run(
        model={"source": "x", "quantization": "int8", "attention": "flash_attention_2"},
        optim={"name": "paged_adamw_8bit"},
        train={"global_batch": 5},
        lora={"dora": True},
    )
    launch = LaunchFacts(2, 1, "zero3", 4, "x.yaml", {"optimizer": {}, "train_batch_size": 8})
    found = problems(cfg, CPU, launch)
    assert set(found) == {
        "world size",
        "DeepSpeed config: train_batch_size",
        "DeepSpeed config: optimizer",
        "model.attention",
        "strategy",
        "optim.name",
        "lora.dora",
        "train.global_batch",
    }
    assert found["strategy"][1] == "nearest: zero2"


def test_deepspeed_file_may_hold_auto_only() -> None:
    auto = {"train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
    make_plan(run(), CPU, LaunchFacts(2, 1, "zero2", zero_settings={**auto, "zero_optimization": {"stage": 2}}))
    make_plan(run(), CPU, LaunchFacts(2, 1, "zero2", zero_settings={"fp16": {"enabled": False}}))
    found = problems(run(), CPU, LaunchFacts(2, 1, "zero2", zero_settings={"bf16": {"enabled": True}}))
    assert "model.precision" in found["DeepSpeed config: bf16.enabled"][0]


def test_shards_of_another_kind_are_refused() -> None:
    zero = {"stage": 3, "zero_quantized_weights": True, "zero_hpz_partition_size": 1}
    found = problems(run(), CPU, LaunchFacts(2, 1, "zero3", 2, "x.yaml", {"zero_optimization": zero}))
    assert "neither fills nor gathers" in found["DeepSpeed config: zero_optimization.zero_quantized_weights"][0]
    assert not any("hpz" in key for key in found)


def test_topology_that_cannot_be() -> None:
    assert "evenly" in problems(run(), CPU, LaunchFacts(3, 2, "ddp"))["nodes"][0]
    too_many = problems(run(train={"global_batch": 32}), GPU, LaunchFacts(16, 1, "ddp"))
    assert "16 processes on a node with 8 GPUs" in too_many["world size"][0]
    make_plan(run(), GPU, LaunchFacts(16, 2, "ddp"))


def test_missing_packages() -> None:
    bare = dataclasses.replace(CPU, packages={})
    assert "DeepSpeed is not installed" in problems(run(), bare, LaunchFacts(2, 1, "zero2"))["strategy"][0]
    assert "bitsandbytes" in problems(run(optim={"name": "adamw_8bit"}), bare, LaunchFacts())["optim.name"][0]


def test_memory_that_cannot_fit_is_refused_and_an_estimate_only_warns() -> None:
    small = dataclasses.replace(GPU, device_memory_gib=6.0)
    found = problems(run(), small, LaunchFacts(1, 1, "single"), family_or_shape=MINI)
    assert "of a device with 6.0 GiB" in found["memory"][0]
    tight = dataclasses.replace(GPU, device_memory_gib=12.0)
    plan = make_plan(run(), tight, LaunchFacts(1, 1, "single"), family_or_shape=MINI)
    assert why(plan, "memory")[0] == "may not fit"
    host = dataclasses.replace(GPU, host_memory_gib=4.0)
    assert "offload" in problems(run(), host, LaunchFacts(2, 1, "zero3_offload"), family_or_shape=MINI)["memory"][0]


def test_shape_is_read_from_a_config_json() -> None:
    config = {
        "num_hidden_layers": 32,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "vocab_size": 32064,
    }
    as_file = make_plan(run(), GPU, LaunchFacts(), family_or_shape=config)
    assert as_file.memory == make_plan(run(), GPU, LaunchFacts(), family_or_shape=MINI).memory
    assert as_file.memory == make_plan(run(), GPU, LaunchFacts(), family_or_shape=MINI.shape).memory


def test_reality() -> None:
    plan = make_plan(run(), CPU, LaunchFacts(2, 1, "ddp"))
    check_reality(plan, world_size=2, strategy="ddp", device="cpu")
    with pytest.raises(PlanError) as caught:
        check_reality(plan, world_size=1, strategy="single", device="cuda")
    whats = [problem.what for problem in caught.value.problems]
    assert whats == [
        "2 was planned, and 1 came up",
        "ddp was planned, and single came up",
        "cpu was planned, and cuda came up",
    ]


def test_compiling_is_planned_where_the_run_is_long_enough_to_gain_by_it() -> None:
    start = pays_from(MINI.shape, 2)
    assert gain_s(MINI.shape, start, 2) == pytest.approx(COLD_S, rel=1e-4)
    assert pays_from(MINI.shape, 1) * 2 == pytest.approx(start, rel=1e-4)
    counted_later = make_plan(run(), CPU, LaunchFacts(), family_or_shape=MINI)
    assert counted_later.compile_from == start
    assert why(counted_later, "compile") == (
        "in a long run",
        f"pays from {start:,} tokens a rank on, which are counted with the data",
    )
    packs = {"global_batch": 2, "max_steps": start // 2048}  # one rank's share, in packs of 2,048
    two_ranks = LaunchFacts(2, 1, "ddp")  # with a thread each, which gains twice as much
    long = make_plan(run(train=packs), CPU, two_ranks, family_or_shape=MINI)
    assert (long.compile_from, why(long, "compile")[0]) == (0, "yes")
    packs["max_steps"] = packs["max_steps"] // 2 - 1
    shorter = make_plan(run(train=packs), CPU, two_ranks, family_or_shape=MINI)
    assert (shorter.compile_from, why(shorter, "compile")[0]) == (None, "no")
    assert "and takes 13 s" in why(shorter, "compile")[1]


def test_compiling_is_off_where_nothing_is_known_for_it_and_refused_without_a_compiler() -> None:
    bare = dataclasses.replace(CPU, no_compiler="there is no compiler (g++)")
    for cfg, machine, reason in (
        (run(), GPU, "has not been measured"),
        (run(), bare, "no compiler"),
        (run(model={"fused_layers": False}), CPU, "model.fused_layers"),
        (run(model={"compile": False}), CPU, "as the run file says"),
    ):
        plan = make_plan(cfg, machine, LaunchFacts(), family_or_shape=MINI)
        assert plan.compile_from is None
        assert reason in why(plan, "compile")[1]
    asked = run(model={"compile": True})
    assert make_plan(asked, GPU, LaunchFacts()).compile_from == 0
    found = problems(asked, bare, LaunchFacts())
    assert found["model.compile"] == ("is true: there is no compiler (g++)", "install it, or model.compile=auto")


def test_tritons_kernels_are_taken_where_they_run_and_refused_by_name_elsewhere() -> None:
    have = dataclasses.replace(GPU, packages={**GPU.packages, "triton": "3.6.0"}, capability=(9, 0))
    gains = dataclasses.replace(have, measured={"kernels": "triton", "kernels_gain": 1.5, "compile_gain": 0.7})
    loses = dataclasses.replace(have, measured={"kernels": "torch", "kernels_gain": 0.9, "compile": True})
    for cfg, machine, kernels, reason in (
        (run(), have, "torch", "were not timed on this card (make card"),
        (run(), gains, "triton", "measured on this card: a step with Triton's kernels has 1.50 times the speed"),
        (run(), loses, "torch", "measured on this card: a step with Triton's kernels has 0.90 times the speed"),
        (run(model={"kernels": "triton"}), have, "triton", "as the run file says"),
        (run(model={"kernels": "torch"}), have, "torch", "as the run file says"),
        (run(), GPU, "torch", "triton is not installed"),
        (run(), CPU, "torch", "need CUDA, and the device is cpu"),
        (run(model={"fused_lora": False}), have, "torch", "model.fused_lora"),
        (run(model={"compile": True}), have, "torch", "model.compile"),
        (run(), dataclasses.replace(have, capability=(7, 5)), "torch", "8.0, and this is 7.5"),
    ):
        plan = make_plan(cfg, machine, LaunchFacts())
        assert plan.kernels == kernels
        assert why(plan, "kernels")[0] == kernels
        assert reason in why(plan, "kernels")[1]
    assert why(make_plan(run(), loses, LaunchFacts(), family_or_shape=MINI), "compile")[0] == "yes"
    asked = {"model": {"kernels": "triton"}}
    assert problems(run(**asked), GPU, LaunchFacts())["model.kernels"][1].startswith("pip install triton")
    what, fix = problems(run(**asked), CPU, LaunchFacts())["model.kernels"]
    assert (what, fix) == ("is triton: Triton's kernels need CUDA, and the device is cpu", "model.kernels=torch")


def test_fp8_takes_two_bytes_a_weight_where_it_is_kept_along_both_sides() -> None:
    have = dataclasses.replace(GPU, packages={**GPU.packages, "triton": "3.6.0"}, capability=(9, 0))
    both, one, plain = (
        memory_of(make_plan(run(model=model), have, LaunchFacts(), family_or_shape=MINI))
        for model in ({"fp8": True, "kernels": "triton"}, {"fp8": True, "kernels": "torch"}, {})
    )
    name = next(iter(plain))
    assert both[name] == plain[name]
    assert one[name] < 0.56 * plain[name]


def test_nf4_weights_are_kept_where_they_are_asked_for() -> None:
    def planned(**model: Any) -> RunPlan:
        cfg = run(model={"quantization": "nf4", **model}, data={"train": "x", "pack_length": 4096})
        return make_plan(cfg, GPU, LaunchFacts(), family_or_shape=MINI)

    each = layer_gib(MINI.shape, "bf16")
    assert each * 2**30 * 32 == MINI.shape.linear_parameters * 2
    lora = make_plan(run(data={"train": "x", "pack_length": 4096}), GPU, LaunchFacts(), family_or_shape=MINI)
    qlora, all_kept, some = planned(), planned(dequantized_layers=32), planned(dequantized_layers=3)
    assert (qlora.kept_layers, all_kept.kept_layers, some.kept_layers) == (0, 32, 3)
    assert "take back what NF4 saves" in why(qlora, "weights for backward")[1]
    sizes = [sum(memory_of(plan).values()) for plan in (qlora, some, lora, all_kept)]
    assert sizes == sorted(sizes)
    assert memory_of(all_kept)["dequantised weights"] == pytest.approx(32 * each, rel=0.05)
    assert sizes[1] - sizes[0] == pytest.approx(3 * each, rel=0.1)


def test_a_recomputed_layer_keeps_its_nf4_weights_and_a_cpu_keeps_no_others() -> None:
    cpu = dataclasses.replace(CPU, host_memory_gib=64.0)
    plain = make_plan(run(model={"quantization": "nf4"}), cpu, LaunchFacts(), family_or_shape=MINI)
    assert plain.kept_layers == 0
    assert "no longer" in why(plain, "weights for backward")[1]
    recomputed = run(model={"quantization": "nf4", "activation_checkpointing": True})
    kept = make_plan(recomputed, cpu, LaunchFacts(), family_or_shape=MINI)
    assert kept.kept_layers == 32
    assert "one layer's at a time" in why(kept, "weights for backward")[1]
    one_layer = layer_gib(MINI.shape, "fp32")
    assert memory_of(kept, "host")["dequantised weights"] == pytest.approx(one_layer)
    asked = run(model={"quantization": "nf4", "dequantized_layers": 40})
    assert make_plan(asked, cpu, LaunchFacts(), family_or_shape=MINI).kept_layers == 32
    for changes in ({"model": {"fused_lora": False}}, {"lora": {"dora": True}}):
        sections = {"model": {"quantization": "nf4"}}
        for name, values in changes.items():
            sections[name] = {**sections.get(name, {}), **values}
        assert make_plan(run(**sections), GPU, LaunchFacts(), family_or_shape=MINI).kept_layers == 0
    assert not [c for c in make_plan(run(), GPU, LaunchFacts(), family_or_shape=MINI).choices if "backward" in c.name]


def test_ligers_kernel_is_refused_by_name_with_the_reason_and_auto_says_why_it_is_not_taken() -> None:
    have = dataclasses.replace(GPU, packages={**GPU.packages, "triton": "3.9.0", "liger-kernel": "0.8.5"})
    asked = {"model": {"loss": "liger"}}
    plan = make_plan(run(**asked), have, LaunchFacts())
    assert (plan.loss, why(plan, "loss kernel")[0]) == ("liger", "liger")
    auto = make_plan(run(), have, LaunchFacts())
    assert auto.loss == "chunked"
    assert "not timed" in why(auto, "loss kernel")[1]
    assert "the device is cpu" in why(make_plan(run(), CPU, LaunchFacts()), "loss kernel")[1]
    for machine, more, reason, fix in (
        (CPU, {}, "need CUDA, and the device is cpu", "model.loss=chunked"),
        (GPU, {}, "liger-kernel is not installed", "pip install 'phi3-dist[kernels]'"),
        (have, {"lora": {"targets": ["qkv_proj", "lm_head"]}}, "has an adapter", "model.loss=chunked"),
        (have, {"lora": {"modules_to_save": ["lm_head"]}}, "lm_head trains", "model.loss=chunked"),
        (have, {"model": {"loss": "liger", "new_tokens": ["<|x|>"]}}, "model.new_tokens", "model.loss=chunked"),
    ):
        what, found_fix = problems(run(**{**asked, **more}), machine, LaunchFacts())["model.loss"]
        assert reason in what
        assert found_fix == fix
