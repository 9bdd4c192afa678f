"""A stage is one file: a toy that is none of the project's, from the command line to a resumed run."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tinygpt.core.config import PRESETS, GPTConfig
from tinygpt.core.model import GPT
from tinygpt.core.option import option
from tinygpt.core.train import Batch
from tinygpt.folders import checkpoint
from tinygpt.shell import registry
from tinygpt.shell.cli import Commands
from tinygpt.stages import stage
from tinygpt.stages.stage import Stage
from tinygpt.text.tokenizer import CharTokenizer


@dataclasses.dataclass(frozen=True)
class Settings(stage.Settings):
    stage: str = "copying"
    data: tuple[str, ...] = option(("abc",), help="Letters that are copied.", metavar="TEXT")
    block_size: int = option(8, "[2, inf)", "Letters of a row.")
    delay: int = option(1, "[1, 4]", "How much later a letter comes again.")


class Copying(Stage):
    """Learn to say a letter again."""

    name, Settings, unused = "copying", Settings, ("adapter", "merge_every")
    defaults = {"max_iters": 3, "eval_interval": 2, "warmup_iters": 0}

    def prepare(self, data: str) -> None:
        self.letters = self.tokenizer.encode(data)
        self.depends_on(data)

    @classmethod
    def read(cls, settings, store) -> str:
        return "".join(settings.data)

    @classmethod
    def start(cls, settings, data, store):
        tokenizer = CharTokenizer.train(data)
        model = GPT(GPTConfig(tokenizer.vocab_size, 8, 1, 1, 8), np.random.default_rng(settings.train.seed))
        return dataclasses.replace(settings, model=model.config), model, tokenizer

    def update(self, n, rng) -> list[Batch]:
        T, delay = self.settings.block_size, self.settings.delay
        ids = rng.choice(self.letters, (self.settings.batch_size, T)).astype(np.int32)
        weights = np.full(ids.shape, 1 / ids.size, np.float32)
        return [Batch(ids, np.roll(ids, delay, 1), weights)]

    def evaluate(self) -> dict[str, float]:
        return {"val_loss": 1.0}


@pytest.fixture
def tinygpt(monkeypatch, tmp_path):
    """The command line with the toy, which is one more line in the registry."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "nano", GPTConfig(3, 8, 1, 1, 8))
    monkeypatch.setattr(registry, "STAGES", [*registry.STAGES, Copying])
    program = Commands("tinygpt")

    def run(*words: str, status: int = 0) -> str:
        result = CliRunner().invoke(program, [*map(str, words)])
        assert result.exit_code == status, (result.output, result.exception)
        return result.output

    return run


def test_a_fifth_stage_has_a_command_a_folder_and_can_go_on(tinygpt):
    assert "copying" in tinygpt("--help")
    text = tinygpt("copying", "--help")
    assert "Learn to say a letter again." in text and "--delay" in text and "--adapter" not in text
    assert "--merge-every" not in text and "[default: 3]" in text
    assert "Saved in whole." in tinygpt("copying", "--out", "whole", "--max-iters", 6)
    tinygpt("copying", "--out", "cut", "--max-iters", 6, "--delay", 5, status=2)
    assert "--delay is 5: it must be at least 1 and at most 4" in tinygpt("copying", "--delay", 5, status=2)
    whole = Path("whole")
    assert checkpoint.read_run(whole, Settings)[0].delay == 1
    assert "6/6" in tinygpt("copying", "--out", "again", "--max-iters", 6)
    same = [checkpoint.load(name)[0].flat.tobytes() for name in ("whole", "again")]
    assert same[0] == same[1]
    assert "All 6 updates of this run are made." in tinygpt("copying", "--resume", whole)
    assert "not the data that this run began with" in tinygpt(
        "copying", "--resume", "whole", "--data", "cab", status=2
    )
