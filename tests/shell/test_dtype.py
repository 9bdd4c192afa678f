"""--dtype, from the command line to the models that compute."""

import warnings

import numpy as np
import pytest
from click.testing import CliRunner

from tinygpt.core import kernels
from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT
from tinygpt.core.train import TrainConfig
from tinygpt.folders import checkpoint, runs
from tinygpt.shell.chat import speaker
from tinygpt.shell.cli import main
from tinygpt.stages import reward, rlhf, sft
from tinygpt.stages.pretrain import Pretrain
from tinygpt.text.tokenizer import BPETokenizer

PAIR = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "red"}]
CONFIG = GPTConfig(vocab_size=258, block_size=64, n_layer=1, n_head=1, n_embd=8)
TRAIN = TrainConfig(max_iters=1, dtype="bfloat16")


def test_a_stage_tells_all_its_models():
    """Guards: a policy in bfloat16 beside a reference in float32, whose ratio is then never 1."""
    model, author, tokenizer = GPT(CONFIG), GPT(CONFIG), BPETokenizer.train(["What is it? red"], 258)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a processor without such products
        tuning = sft.Settings(model=CONFIG, train=TRAIN, block_size=64)
        assert sft.in_memory(model, tokenizer, [PAIR] * 3, tuning).model.bfloat16
        judging = reward.Settings(model=CONFIG, train=TRAIN, block_size=64)
        comparisons = [reward.Comparison("What is it?", "red", "blue")] * 3
        assert reward.in_memory(author, tokenizer, comparisons, judging).model.bfloat16 and author.bfloat16
    judge = reward.Judge(GPT(CONFIG), author, tokenizer)
    material = rlhf.Material(model, judge, [], [], [])
    assert list(rlhf.RLHF.others(None, material)) == [model, judge.model, author]


@pytest.mark.skipif("c" not in kernels.available(), reason="needs the C core")
def test_training_and_generation_from_the_command_line(tmp_path):
    """Guards: an option that is accepted and ignored, and a run that goes on in another dtype."""
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 40)
    sizes = {"n-layer": 1, "n-head": 1, "n-embd": 16, "block-size": 16, "batch-size": 2, "eval-interval": 2}
    sizes = [word for name, size in sizes.items() for word in (f"--{name}", size)]

    def run(*words) -> str:
        result = CliRunner().invoke(main, list(map(str, words)))
        assert result.exit_code == 0, result.output
        return result.output

    def pretrained(name: str, *more) -> np.ndarray:
        run("pretrain", "--data", text, "--out", tmp_path / name, *sizes, "--warmup-iters", 1, *more)
        return checkpoint.load(tmp_path / name)[0].flat

    dtypes = ("float32", "bfloat16")
    weights = {dtype: pretrained(dtype, "--max-iters", 4, "--dtype", dtype) for dtype in dtypes}
    assert 0 < abs(weights["float32"] - weights["bfloat16"]).max() < 0.1
    stage = runs.resume(Pretrain, tmp_path / "bfloat16")
    assert stage.settings.train.dtype == "bfloat16" and stage.model.bfloat16
    for dtype in dtypes:
        model, _, _ = speaker(tmp_path / dtype, None, 1, dtype)
        assert model.bfloat16 == (dtype == "bfloat16")
        new = ("--prompt", "one", "--max-new-tokens", 12, "--dtype", dtype)
        assert len(run("generate", tmp_path / dtype, *new)) > 12
