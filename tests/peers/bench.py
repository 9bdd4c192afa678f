"""tinygpt beside its peers: all in turn, each in a process of its own, and the ratio of their times.

    python tests/peers/bench.py [JOB ...] [--rounds 3] [--seconds 5] [--no-compile]

JOB is one of `tinygpt bench`: train/nano, lora/small, generate/small/64 ...; without a JOB, all of nano's and
small's. tinygpt runs in float32 and in bfloat16. The peers:

    train/SIZE      the same model and optimizer in PyTorch, float32 and bf16 autocast, eager and compiled
    lora/SIZE       PEFT, float32
    rlhf/small      TRL's RLOO, float32
    generate/...    transformers, float32; llama.cpp, float32 and bfloat16, for GPT-2 and one text
    processes/SIZE  PyTorch's DistributedDataParallel with gloo: an update of two batches, by 2 processes of 1
                    thread each. tinygpt runs by mpiexec, and once more as 1 process of 2 threads

All sides use all processors. Needs torch, transformers, peft, trl, datasets, llama-cpp-python with gguf, and
mpi4py with mpich, each for its own jobs.

A machine may be shared, so only ratios within a round mean something. The median of these ratios is printed.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tinygpt.check.bench import CONTEXT, GENERATE, LORA, NEW, PROMPT, RLHF, TRAIN, median_ms, run
from tinygpt.core import parallel
from tinygpt.core.config import PRESETS
from tinygpt.core.model import GPT
from tinygpt.core.train import Batch, TrainConfig, gradients

OURS = ("float32", "bfloat16")
COMPILED = ("fp32 compiled", "bf16 compiled")
PROCESSES = 2


def peers(job: str) -> tuple[str, ...]:
    """The peers of a job, as they are printed."""
    kind = job.split("/")[0]
    if job == "generate/gpt2/1":
        return "transformers", "llama.cpp fp32", "llama.cpp bf16"
    return {"train": ("fp32", "bf16", *COMPILED), "lora": ("PEFT",), "rlhf": ("TRL",),
            "generate": ("transformers",), "processes": ("1 process", "DDP")}[kind]  # fmt: skip


def torch_step(size: str, variant: str) -> Callable[[], object]:
    """A training step of PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional

    config, (B, T) = PRESETS[size], TRAIN[size]
    C, H, V = config.n_embd, config.n_head, config.vocab_size

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
            self.c_attn, self.attn_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
            self.c_fc, self.mlp_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

        def forward(self, x):
            q, k, v = (t.view(B, T, H, C // H).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).split(C, 2))
            a = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.attn_proj(a.transpose(1, 2).reshape(B, T, C))
            return x + self.mlp_proj(functional.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(T, C)
            self.h = nn.Sequential(*(Block() for _ in range(config.n_layer)))
            self.ln_f = nn.LayerNorm(C)

        def forward(self, ids, targets):
            x = self.ln_f(self.h(self.wte(ids) + self.wpe.weight))
            logits = functional.linear(x, self.wte.weight).float()
            return functional.cross_entropy(logits.view(-1, V), targets.view(-1))

    torch.manual_seed(0)
    model = Model()
    nn.init.normal_(model.wte.weight, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if "compiled" in variant else model
    if variant == "DDP":
        forward = nn.parallel.DistributedDataParallel(model)
    ids, targets = torch.randint(0, V, (2, B, T))

    def step():
        with torch.autocast("cpu", torch.bfloat16) if "bf16" in variant else contextlib.nullcontext():
            loss = forward(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def together_ms(step: Callable[[], object], seconds: float, largest: Callable[[float], float]) -> float:
    """The median time of a step that several processes make together, in ms: all make as many steps.

    largest(x): the largest x of all processes."""
    for _ in range(3):
        step()
    began = time.perf_counter()
    step()
    times = [largest(time.perf_counter() - began)]
    for _ in range(max(5, int(seconds / times[0]))):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def ddp(size: str, seconds: float) -> None:
    """One of PROCESSES processes of DistributedDataParallel; the first prints the measurement."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")

    def largest(x: float) -> float:
        distributed.all_reduce(tensor := torch.tensor(x, dtype=torch.float64), distributed.ReduceOp.MAX)
        return tensor.item()

    report(together_ms(torch_step(size, "DDP"), seconds, largest), largest)
    distributed.destroy_process_group()


def processes(size: str, seconds: float) -> None:
    """Updates of two batches by tinygpt, as one process or one of those of mpiexec."""
    group, (B, T) = parallel.join(), TRAIN[size]
    rng = np.random.default_rng(0)
    model = GPT(dataclasses.replace(PRESETS[size], block_size=T), rng)
    optimizer = TrainConfig().optimizer(model, group=group)
    ids, targets = rng.integers(0, model.config.vocab_size, (2, B, T)).astype(np.int32)
    compute = gradients(optimizer)
    batches = [Batch(ids, targets, np.full((B, T), 1 / (B * T), np.float32))] * group.share_size(PROCESSES)

    def largest(x: float) -> float:
        return float(group.stack(np.array(x)).max())

    def step() -> None:
        group.reduce(optimizer.flat, optimizer.bounds, compute(batches))
        optimizer.step(1e-3)

    report(together_ms(step, seconds, largest), largest, group.rank)


def report(ms: float, largest: Callable[[float], float] = float, rank: int | None = None) -> None:
    """Prints the time and the largest memory of a process as JSON, once."""
    peak = largest(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    if int(os.environ.get("RANK", "0") if rank is None else rank) == 0:
        print(json.dumps({"ms": ms, "peak_rss_mib": peak}))


def peft_lora(size: str, seconds: float) -> float:
    """The median training step of PEFT's LoRA, in ms."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    p, (B, T) = PRESETS[size], TRAIN[size]
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0)
    config = GPT2Config(
        n_layer=p.n_layer, n_head=p.n_head, n_embd=p.n_embd, n_positions=T, vocab_size=p.vocab_size,
        bos_token_id=0, eos_token_id=0, use_cache=False, **off,
    )  # fmt: skip
    everywhere = ["c_attn", "c_proj", "c_fc"]
    lora = LoraConfig(r=8, lora_alpha=8, target_modules=everywhere, fan_in_fan_out=True)
    model = get_peft_model(GPT2LMHeadModel(config), lora)
    trained = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3, (0.9, 0.99), weight_decay=0.1, fused=True)
    ids = torch.randint(0, p.vocab_size, (B, T))

    def step():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return median_ms(step, seconds)


def trl_rloo(size: str, seconds: float) -> float:
    """The median time from the end of one of TRL's RLOO steps to the end of the next, in ms."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    p, (prompts, answers, length, new) = PRESETS[size], RLHF[size]
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(p.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "w1", "eos_token": "w2", "unk_token": "w0", "padding_side": "left"}
    config = GPT2Config(
        n_layer=p.n_layer, n_head=p.n_head, n_embd=p.n_embd, n_positions=128, vocab_size=p.vocab_size,
        bos_token_id=2, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    asked = [" ".join(f"w{3 + (7 * i + j) % 1000}" for j in range(length)) for i in range(512)]
    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(config).save_pretrained(folder)  # TRL reads its reference from there
        args = RLOOConfig(
            output_dir=f"{folder}/out", per_device_train_batch_size=prompts * answers,
            num_generations=answers, max_completion_length=new, max_steps=max(8, int(seconds)),
            logging_steps=1000, save_strategy="no", report_to=[], use_cpu=True, bf16=False, beta=0.05,
            learning_rate=1e-5, disable_tqdm=True,
        )  # fmt: skip
        trainer = RLOOTrainer(
            model=GPT2LMHeadModel.from_pretrained(folder), args=args,
            reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
            train_dataset=Dataset.from_list([{"prompt": text} for text in asked]),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, **special),
        )  # fmt: skip
        trainer.add_callback(Clock())
        trainer.train()
    gaps = sorted(b - a for a, b in zip(marks[1:], marks[2:], strict=False))
    return 1e3 * gaps[len(gaps) // 2]


def transformers_generation(size: str, batch: int, seconds: float) -> float:
    """The time of a step of `generate`, in ms."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    p = PRESETS[size]
    config = GPT2Config(
        n_layer=p.n_layer, n_head=p.n_head, n_embd=p.n_embd, n_positions=max(CONTEXT, p.block_size),
        vocab_size=p.vocab_size, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(1, p.vocab_size, (batch, PROMPT))
    settings = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        return median_ms(lambda: model.generate(ids, max_new_tokens=NEW, **settings), seconds) / NEW


def llama_generation(size: str, dtype: str, seconds: float) -> float:
    """The time of a token of llama.cpp, in ms, with random weights of GPT-2's shapes."""
    import gguf
    import llama_cpp

    p, V = PRESETS[size], PRESETS[size].vocab_size
    rng = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.BF16 if dtype == "bf16" else gguf.GGMLQuantizationType.F32
    with tempfile.TemporaryDirectory() as folder:
        file = gguf.GGUFWriter(f"{folder}/model.gguf", "gpt2")
        file.add_context_length(p.block_size)
        file.add_embedding_length(p.n_embd)
        file.add_feed_forward_length(4 * p.n_embd)
        file.add_block_count(p.n_layer)
        file.add_head_count(p.n_head)
        file.add_layer_norm_eps(1e-5)
        file.add_tokenizer_model("gpt2")
        file.add_tokenizer_pre("gpt-2")
        file.add_token_list([f"w{i}" for i in range(V)])
        file.add_token_types([gguf.TokenType.NORMAL] * V)
        file.add_token_merges(["w 0"])

        def add(name: str, *shape: int) -> None:
            weights = rng.normal(0, 0.02, shape).astype(np.float32)
            if len(shape) == 2 and name != "position_embd.weight":
                file.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
            else:
                file.add_tensor(name, weights)

        C = p.n_embd
        add("token_embd.weight", V, C)
        add("position_embd.weight", p.block_size, C)
        maps = {"attn_qkv": (3 * C, C), "attn_output": (C, C), "ffn_up": (4 * C, C), "ffn_down": (C, 4 * C)}
        norms = ["output_norm"]
        for layer in range(p.n_layer):
            norms += [f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm"]
            for name, shape in maps.items():
                add(f"blk.{layer}.{name}.weight", *shape)
                add(f"blk.{layer}.{name}.bias", shape[0])
        for name in norms:
            add(f"{name}.weight", C)
            add(f"{name}.bias", C)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
        threads = len(os.sched_getaffinity(0))
        model = llama_cpp.Llama(f"{folder}/model.gguf", n_ctx=CONTEXT, n_threads=threads,
                                n_threads_batch=threads, use_mmap=False, verbose=False)  # fmt: skip
    prompt = rng.integers(1, V, PROMPT).tolist()

    def step() -> None:
        model.reset()
        tokens = model.generate(prompt, top_k=0, top_p=1.0, min_p=0.0, temp=1.0, repeat_penalty=1.0)
        for _ in range(NEW):
            next(tokens)

    return median_ms(step, seconds) / NEW


def peer(job: str, variant: str, seconds: float) -> None:
    """Measures one peer in this process and prints the measurement as JSON."""
    kind, size, *batch = job.split("/")
    if variant == "DDP":
        return ddp(size, seconds)
    if variant == "1 process":
        return processes(size, seconds)
    if variant.startswith("llama"):
        return report(llama_generation(size, variant.split()[1], seconds))
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if kind == "train":
        ms = median_ms(torch_step(size, variant), seconds)
    elif kind == "lora":
        ms = peft_lora(size, seconds)
    elif kind == "rlhf":
        ms = trl_rloo(size, seconds)
    else:
        ms = transformers_generation(size, int(*batch), seconds)
    return report(ms)


def ours(job: str, dtype: str, seconds: float) -> None:
    """Measures tinygpt in this process, or as one of several, and prints the measurement as JSON."""
    if job.startswith("processes"):
        return processes(job.split("/")[1], seconds)
    return print(json.dumps(next(run([job], seconds, dtype))))


def measured(role: str, job: str, variant: str, seconds: float) -> dict:
    """What a process prints that measures tinygpt (role "--ours") or a peer."""
    command = [sys.executable, __file__, role, job, variant, str(seconds)]
    environments, threads = [{}], {"OMP_NUM_THREADS": "1", "TINYGPT_THREADS": "1"}
    if variant == "DDP":
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29507", "WORLD_SIZE": str(PROCESSES)}
        environments = [{**threads, **rendezvous, "RANK": str(rank)} for rank in range(PROCESSES)]
    elif job.startswith("processes") and role == "--ours":
        command = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(PROCESSES), *command]
        environments = [threads]
    running = [
        subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env={**os.environ, **more})
        for more in environments
    ]
    outputs = [process.communicate() for process in running]
    for process, (_, errors) in zip(running, outputs, strict=True):
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}\n{errors}")
    return json.loads(outputs[0][0].strip().splitlines()[-1])


def compare(job: str, rounds: int, seconds: float, compiled: bool) -> None:
    """Prints a line for each dtype of tinygpt and each peer: its median, and the medians of the ratios of the
    rounds to tinygpt's times."""
    own = OURS[:1] if job.startswith("processes") else OURS
    variants = [v for v in peers(job) if compiled or v not in COMPILED]
    rows = {name: [] for name in (*own, *variants)}
    for _ in range(rounds):
        for name, results in rows.items():
            results.append(measured("--ours" if name in own else "--peer", job, name, seconds))
    for name, results in rows.items():
        ms = statistics.median(row["ms"] for row in results)
        line = f"{job:16} {name if name not in own else 'tinygpt ' + name:18} {ms:9.3f} ms"
        line += f"  {max(row['peak_rss_mib'] for row in results):5.0f} MiB"
        if share := statistics.median(row.get("share_of_peak") or 0 for row in results):
            line += f"  {share:.0%} of the float32 peak"
        for dtype in own:
            if name != dtype:
                pairs = zip(results, rows[dtype], strict=True)
                line += f"  {statistics.median(row['ms'] / base['ms'] for row, base in pairs):.2f} x {dtype}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("jobs", nargs="*", metavar="JOB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--no-compile", action="store_true", help="Leave torch.compile out, which is slow.")
    for role in ("--ours", "--peer"):
        parser.add_argument(role, nargs=3, metavar=("JOB", "VARIANT", "SECONDS"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if role := a.ours or a.peer:
        return (ours if a.ours else peer)(role[0], role[1], float(role[2]))
    every = [f"train/{size}" for size in TRAIN]
    every += [f"processes/{size}" for size in TRAIN]
    every += [f"lora/{size}" for size in LORA]
    every += [f"rlhf/{size}" for size in RLHF]
    every += [f"generate/{size}/{batch}" for size, batches in GENERATE.items() for batch in batches]
    if unknown := [job for job in a.jobs if job not in every]:
        parser.error(f"{unknown[0]} is not a job; there are {', '.join(every)}")
    for job in a.jobs or [job for job in every if job.split("/")[1] in ("nano", "small")]:
        compare(job, a.rounds, a.seconds, not a.no_compile)
    return None


if __name__ == "__main__":
    main()
