"""tinygpt beside PyTorch and transformers: the two in turn, each in a process of its own, and the ratio.

    python tests/peers/bench.py [JOB ...] [--rounds 3] [--seconds 5] [--no-compile]

JOB is one of `tinygpt bench`: train/nano, lora/small, generate/small/64 ...; without one, all of nano's and
small's. Training is the same architecture and optimizer in PyTorch, in float32 and in bf16 autocast, each
eager and compiled; LoRA is PEFT's, RLOO TRL's and generation transformers', on its GPT-2. Both sides use all
processors. Needs torch, transformers, peft, and for rlhf trl and datasets.

A machine may be shared: only the ratio within a round means something; printed is its median over the rounds.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys

from tinygpt.check.bench import CONTEXT, GENERATE, LORA, NEW, PROMPT, RLHF, TRAIN, median_ms, run
from tinygpt.core.config import PRESETS

VARIANTS = ("fp32", "fp32 compiled", "bf16", "bf16 compiled")


def torch_training(size: str, variant: str, seconds: float) -> float:
    """The median training step of PyTorch, in ms."""
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
    ids, targets = torch.randint(0, V, (2, B, T))

    def step():
        with torch.autocast("cpu", torch.bfloat16) if "bf16" in variant else contextlib.nullcontext():
            loss = forward(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return median_ms(step, seconds)


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
    import tempfile
    import time

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


def peer(job: str, variant: str, seconds: float) -> None:
    """Measures one peer in this process and prints it as JSON."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    kind, size, *batch = job.split("/")
    if kind == "train":
        ms = torch_training(size, variant, seconds)
    elif kind == "lora":
        ms = peft_lora(size, seconds)
    elif kind == "rlhf":
        ms = trl_rloo(size, seconds)
    else:
        ms = transformers_generation(size, int(*batch), seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"ms": ms, "peak_rss_mib": peak}))


def measured(*command: str) -> dict:
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stderr}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def compare(job: str, rounds: int, seconds: float, compiled: bool) -> None:
    """Prints a line for each peer: its median, ours, and the median of the ratios of the rounds."""
    variants = [v for v in VARIANTS if compiled or "compiled" not in v]
    kind = job.split("/")[0]
    ours, theirs = [], {v: [] for v in (variants if kind == "train" else [kind])}
    for _ in range(rounds):
        ours.append(measured(__file__, "--ours", job, str(seconds)))
        for variant in theirs:
            theirs[variant].append(measured(__file__, "--peer", job, variant, str(seconds)))
    mine = statistics.median(row["ms"] for row in ours)
    share = statistics.median(row["share_of_peak"] or 0 for row in ours)
    share = f"  {share:.0%} of FMA peak" if share else ""
    mib = ours[-1]["peak_rss_mib"]
    print(f"{job:20} {'tinygpt':14} {mine:9.3f} ms  {mib:5.0f} MiB{share}", flush=True)
    for variant, rows in theirs.items():
        ratio = statistics.median(row["ms"] / own["ms"] for row, own in zip(rows, ours, strict=True))
        ms, mib = statistics.median(row["ms"] for row in rows), rows[-1]["peak_rss_mib"]
        print(f"{'':20} {variant:14} {ms:9.3f} ms  {mib:5.0f} MiB  {ratio:.2f}x tinygpt's time", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("jobs", nargs="*", metavar="JOB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--no-compile", action="store_true", help="Leave torch.compile out, which is slow.")
    parser.add_argument("--ours", nargs=2, metavar=("JOB", "SECONDS"), help=argparse.SUPPRESS)
    parser.add_argument("--peer", nargs=3, metavar=("JOB", "VARIANT", "SECONDS"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.peer:
        return peer(a.peer[0], a.peer[1], float(a.peer[2]))
    if a.ours:
        return print(json.dumps(next(run([a.ours[0]], float(a.ours[1])))))
    every = [f"train/{size}" for size in TRAIN]
    every += [f"lora/{size}" for size in LORA]
    every += [f"rlhf/{size}" for size in RLHF]
    every += [f"generate/{size}/{batch}" for size, batches in GENERATE.items() for batch in batches]
    if unknown := [job for job in a.jobs if job not in every]:
        parser.error(f"{unknown[0]} is not a job; there are {', '.join(every)}")
    for job in a.jobs or [job for job in every if "nano" in job or "small" in job]:
        compare(job, a.rounds, a.seconds, not a.no_compile)
    return None


if __name__ == "__main__":
    main()
