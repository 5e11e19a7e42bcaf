"""Loading and running: memory, damaged checkpoints, the reference attention, isolation of one request's failure."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_proc.attention import AttentionBatch, AttentionSpec, PagedAttention
from engine_proc.device import available_cores, available_memory
from engine_proc.loader import block_bytes, count_blocks, enough_memory, load_runner
from engine_proc.plan import PlanItem, StepPlan
from pipeline.config import EngineConfig, ModelConfig
from pipeline.errors import StartError
from pipeline.exits import CONFIG, MEMORY, MODEL_LOAD
from pipeline.messages import Finish
from tests.engine_proc.tiny import Driver, load, make_checkpoint, prompts, sequence

GIB = 2**30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", "llama", num_hidden_layers=2)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def read_all(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that is about to be overwritten: copies, not mappings of it."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


# ---- loading -----------------------------------------------------------------------------------------------------

def test_damaged_checkpoints_give_one_sentence(copy: Path) -> None:
    weights = copy / "model.safetensors"
    data = weights.read_bytes()
    tensors = read_all(weights)
    name = "model.layers.1.mlp.down_proj.weight"

    def refused(match: str) -> None:
        with pytest.raises(StartError, match=match) as caught:
            load(copy)
        assert caught.value.exit_code == MODEL_LOAD and "\n" not in caught.value.message

    weights.write_bytes(data[:-100])
    refused("truncated")
    weights.write_bytes(data[:5])
    refused("truncated")
    weights.write_bytes(b"\x10" + b"\0" * 7 + b"x" * 16)
    refused("broken header")
    save_file({k: v for k, v in tensors.items() if k != name}, weights)
    refused(f"lacks the tensor '{name}'")
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, weights)
    refused("has the shape")
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, weights)
    refused("no finite probabilities")
    save_file({**tensors, "model.layers.0.self_attn.sinks": torch.zeros(4)}, weights)
    with pytest.raises(StartError, match="does not use the tensor"):
        load(copy, backend="own")
    weights.unlink()
    refused("no safetensors weights")
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    refused("pickle weights")
    (copy / "config.json").write_text("{")
    refused("not valid JSON")
    (copy / "config.json").unlink()
    refused("cannot be read")


def test_sharded_checkpoints_load_through_their_index(copy: Path) -> None:
    expected = Driver(load(copy)).run(sequence(1, [5, 6, 7], 8))
    tensors = read_all(copy / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, copy / file)
    (copy / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))

    assert Driver(load(copy)).run(sequence(1, [5, 6, 7], 8)) == expected
    (copy / "b.safetensors").unlink()
    with pytest.raises(StartError, match=r"lacks the weights file 'b\.safetensors'"):
        load(copy)
    index["weight_map"][names[1]] = "../b.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(StartError, match="outside"):
        load(copy)


def test_dtype_follows_the_checkpoint(tiny: Path, tmp_path: Path) -> None:
    half = make_checkpoint(tmp_path / "half", "llama", dtype=torch.float16, num_hidden_layers=1)
    assert load(tiny).facts["dtype"] == "float32"
    assert load(half).facts["dtype"] == "bfloat16"
    assert load(half, dtype="float32").facts["dtype"] == "float32"
    with pytest.raises(StartError) as caught:
        load(half, dtype="float8")
    assert caught.value.exit_code == CONFIG


def test_loading_needs_no_transformers(tiny: Path) -> None:
    """Its import would double the start-up time."""
    program = f"""
import sys
from engine_proc.loader import load_runner
from pipeline.config import EngineConfig, ModelConfig
load_runner(ModelConfig(names=("m",), path={str(tiny)!r}, max_model_len=64, engine=EngineConfig(threads=1)), print)
assert not {{"transformers", "huggingface_hub", "tokenizers", "sanic"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "loading weights 0" in done.stdout and "ready 100" in done.stdout


def test_dynamic_rope_is_served_up_to_its_trained_length(copy: Path) -> None:
    edit(copy, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert load(copy, max_model_len=256).facts["backend"] == "own"
    with pytest.raises(StartError, match="up to 256 positions"):
        load(copy, max_model_len=257)


@pytest.mark.parametrize("family, config", [
    ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    ("mixtral", {"num_local_experts": 4, "sliding_window": 24}), ("cohere2", {"sliding_window": 24}),
])
def test_other_models_run_through_transformers(family: str, config: dict[str, object], tmp_path: Path) -> None:
    from tests.engine_proc.tiny import Reference
    directory = make_checkpoint(tmp_path / "m", family, **config)
    runner = load(directory)
    assert runner.facts["backend"] == "transformers" and "no description" in runner.facts["own_backend"]
    given, expected = map(list, zip(*Reference(directory).clear((1, 40, 60), 20)))
    seqs = [sequence(i, prompt, 20) for i, prompt in enumerate(given)]
    assert Driver(runner, max_step_tokens=24, max_prefill_chunk=7).run(*seqs) == expected


@pytest.mark.parametrize("family, config, why", [
    ("bloom", {"n_layer": 2, "n_head": 4}, "no attention interface"),
    ("gpt_oss", {"num_local_experts": 4, "head_dim": 16}, "attention sinks"),
    ("llama4_text", {}, "chunked_attention"),
])
def test_what_the_paged_cache_cannot_hold_is_refused(family: str, config: dict[str, object], why: str,
                                                     tmp_path: Path) -> None:
    with pytest.raises(StartError, match=why) as caught:
        load(make_checkpoint(tmp_path / "m", family, **config))
    assert caught.value.exit_code == MODEL_LOAD


# ---- memory ------------------------------------------------------------------------------------------------------

def test_the_kv_cache_takes_a_quarter_of_the_memory_and_4_gib_at_most() -> None:
    engine, per_block = EngineConfig(), 2**20
    assert count_blocks(engine, 2048, per_block, 8 * GIB) == 2 * 1024
    assert count_blocks(engine, 2048, per_block, 64 * GIB) == 4 * 1024
    assert count_blocks(engine, 65536, per_block, 6 * GIB) == 4097     # one sequence of full length, and block 0
    assert count_blocks(EngineConfig(kv_cache_bytes=GIB), 2048, per_block, 2 * GIB) == 1024
    assert count_blocks(EngineConfig(num_kv_blocks=7), 2048, per_block, 0) == 7


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("device"), RuntimeError("can't allocate")])
def test_memory_that_ran_out_while_loading_is_said_with_its_exit_code(error: Exception) -> None:
    with pytest.raises(StartError, match="not enough memory to load m") as caught, enough_memory(Path("m")):
        raise error
    assert caught.value.exit_code == MEMORY
    with pytest.raises(RuntimeError, match="other"), enough_memory(Path("m")):
        raise RuntimeError("other")


@pytest.mark.parametrize("engine, available", [
    (EngineConfig(), 100 * 2**20), (EngineConfig(kv_cache_bytes=100 * 2**20), 8 * GIB),
    (EngineConfig(kv_cache_bytes=4 * GIB), 2 * GIB)])
def test_too_little_memory_is_said_with_its_exit_code(engine: EngineConfig, available: int) -> None:
    with pytest.raises(StartError) as caught:
        count_blocks(engine, 2048, 2**20, available)
    assert caught.value.exit_code == MEMORY


def test_block_bytes_count_keys_and_values_of_all_layers() -> None:
    assert block_bytes({"layers": 3, "kv_heads": 2, "head_dim": 8}, 16, "bfloat16") == 2 * 3 * 16 * 2 * 8 * 2


def test_an_unwritten_cache_costs_no_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    before = resident()
    cache = PagedAttention(4, 4096, 16, 4, 64, torch.bfloat16, torch.device("cpu"))     # 256 MiB
    assert resident() - before < 64 * 2**20
    assert not cache.k[0][::64].any()


def test_limits_of_control_groups_are_seen(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   1048576 kB\n")
    assert available_memory(tmp_path) == GIB
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("500\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("200\n")
    assert available_memory(tmp_path) == 300
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert available_memory(tmp_path) == GIB
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("100000 100000\n")
    assert available_cores(tmp_path) == 1


# ---- attention ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spec", [
    AttentionSpec(scale=0.3), AttentionSpec(scale=0.3, window=5), AttentionSpec(scale=0.3, softcap=2.0),
    AttentionSpec(scale=0.3, window=5, softcap=2.0)], ids=str)
def test_reference_attention_equals_the_plain_formula(spec: AttentionSpec) -> None:
    """Decode rows and chunks together, over scattered blocks full of NaN where nobody wrote."""
    heads, kv_heads, dim, size = 6, 2, 8, 4
    context, counts = np.array([9, 1, 17, 3, 14], np.int32), [1, 1, 1, 3, 6]
    torch.manual_seed(0)
    cache = PagedAttention(1, 40, size, kv_heads, dim, torch.float32, torch.device("cpu"))
    for store in (*cache.k, *cache.v):
        store.fill_(float("nan"))
    order = iter(torch.randperm(39).add(1).tolist())
    tables = np.zeros((5, 5), np.int32)
    keys, values, slots = [], [], []
    for s, length in enumerate(context):
        tables[s, :-(-length // size)] = [next(order) for _ in range(-(-length // size))]
        keys.append(torch.randn(length, kv_heads, dim))
        values.append(torch.randn(length, kv_heads, dim))
        slots.append([int(tables[s, p // size]) * size + p % size for p in range(length)])
    for s in range(5):
        cache.write(0, keys[s], values[s], torch.tensor(slots[s]))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    q = torch.randn(int(starts[-1]), heads, dim)
    batch = AttentionBatch(
        query_start=torch.from_numpy(starts), context_len=torch.from_numpy(context), slots=torch.zeros(0),
        block_tables=torch.from_numpy(tables), num_decodes=3, host_query_start=starts, host_context_len=context)

    out = cache.attend(0, q, batch, spec).view(-1, heads, dim)

    for s in range(5):
        for i in range(counts[s]):
            position = int(context[s]) - counts[s] + i
            first = max(0, position - spec.window + 1) if spec.window else 0
            for h in range(heads):
                k, v = (t[s][first:position + 1, h // 3] for t in (keys, values))
                scores = k @ q[starts[s] + i, h] * spec.scale
                if spec.softcap:
                    scores = spec.softcap * torch.tanh(scores / spec.softcap)
                expected = torch.softmax(scores, 0) @ v
                torch.testing.assert_close(out[starts[s] + i, h], expected, atol=1e-5, rtol=1e-5)


# ---- running -----------------------------------------------------------------------------------------------------

def test_a_request_that_is_not_a_number_ends_alone(tiny: Path) -> None:
    """One embedding row is poisoned; who uses it fails, its neighbours and the next user of its blocks do not."""
    runner = load(tiny, num_kv_blocks=12, kernels=False)
    given = prompts([30, 20, 25])
    clean = [Driver(runner).run(sequence(i, prompt, 10))[0] for i, prompt in enumerate(given)]
    embedding = runner.model.embedding  # type: ignore[attr-defined]
    saved = embedding[2].clone()
    embedding[2] = float("nan")
    driver = Driver(runner, enable_prefix_caching=False)
    poisoned = sequence(9, [4, 2, 5] + given[0], 10)
    seqs = [sequence(0, given[0], 10), poisoned, sequence(1, given[1], 10)]
    answers = driver.run(*seqs)
    assert driver.errors(poisoned) == "numerical_error" and len(poisoned.tokens) == poisoned.num_prompt
    assert [answers[0], answers[2]] == clean[:2]
    assert driver.run(*(sequence(20 + i, prompt, 10) for i, prompt in enumerate(given))) == clean
    embedding[2] = saved


def test_a_step_of_nothing_but_chunks_samples_nothing(tiny: Path) -> None:
    runner = load(tiny)
    seq = sequence(1, prompts([20])[0], 4)
    seq.block_table = [1, 2]
    runner.admit(seq)
    (result,) = runner.collect(runner.launch(StepPlan(number=1, items=[
        PlanItem(seq=seq, start=0, count=10, sample=False)])))
    assert result.token is None and result.error is None and result.logprobs is None


def test_copies_come_before_the_step(tiny: Path) -> None:
    runner = load(tiny)
    runner.cache.k[0][3] = 7.0
    runner.cache.v[1][3] = 8.0
    seq = sequence(1, [5], 4)
    seq.block_table = [6]
    runner.admit(seq)
    runner.launch(StepPlan(number=1, copies=[(3, 4), (3, 5)], items=[
        PlanItem(seq=seq, start=0, count=1, sample=True)]))
    assert (runner.cache.k[0][4:6] == 7.0).all() and (runner.cache.v[1][4:6] == 8.0).all()


def test_more_alternatives_than_the_vocabulary_has(tiny: Path) -> None:
    runner = load(tiny)
    driver = Driver(runner)
    seq = sequence(1, [5], 1, logprobs=runner.vocab_size + 5)
    driver.run(seq)
    assert driver.sampled_logprobs(seq)[0].k == runner.vocab_size
    assert seq.finish is Finish.LENGTH


def test_unknown_backends_and_quantisations_are_refused(tiny: Path) -> None:
    for engine in (EngineConfig(backend="magic"), EngineConfig(quantization="int3")):
        with pytest.raises(StartError) as caught:
            load_runner(ModelConfig(names=("m",), path=str(tiny), engine=engine), lambda phase, percent: None)
        assert caught.value.exit_code == CONFIG
