"""A seed's world and the models that are trained in it.

Each stage's model is made at its first use, and saved in a folder. Variants (`tune`, `teach`, `steer`) are
trained at each call, and not saved. An interrupted pre-training continues. A measurement is saved under its
name and not repeated. `claims.py` and `story.py` use this module to compare models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np

from ..core.config import PRESETS, GPTConfig
from ..core.model import GPT
from ..core.train import Record, TrainConfig
from ..errors import UserError
from ..files.atomic import lock, make_folder, remove, replacing
from ..files.jsonfile import read_object, read_text
from ..folders import adapters, checkpoint, runs
from ..stages import evaluate, fewshot, recall, reward, rlhf, sft, variants
from ..stages.adapter import AdapterConfig
from ..stages.pretrain import Pretrain
from ..stages.recipes import FULL, Recipe
from ..stages.stage import Settings, Stage
from ..stages.variants import build
from ..text import instructions
from ..text.tokenizer import BPETokenizer
from ..world import VERSION, Person, corpus, tasks

SNAPSHOTS = 20  # models that are kept during pre-training


class Lab:
    """Makes a seed's models by a recipe. The model of a stage is made at its first use, and kept.

    The folder's name depends on the seed and on the options of the recipe's stages.

    say: gets a line before each training and each measurement.
    progress: gets a number of updates, and returns a function that gets the record of each update.
    """

    def __init__(
        self, folder: Path, seed: int, recipe: Recipe = FULL, say: Callable[[str], None] = lambda text: None,
        progress: Callable[[int], Callable[[Record], None]] = lambda updates: lambda record: None,
    ) -> None:  # fmt: skip
        self.seed, self.recipe, self.say, self.progress = seed, recipe, say, progress
        stages = [recipe.pretrain, recipe.sft, recipe.reward, recipe.rlhf]
        how = stages, PRESETS["nano"], rlhf.Config(), SNAPSHOTS
        self.mark = f"world-{VERSION}-recipe-{sha256(repr(how).encode()).hexdigest()[:6]}"
        self.folder = folder / f"{self.mark}-seed-{seed}"
        make_folder(self.folder)
        lock(self.folder)
        self.source = f"world:{seed}" + f":{recipe.world}" * bool(recipe.world)
        self.world = corpus.world_of(self.source)

    # --- training -------------------------------------------------------------------------------------------

    def _train(
        self, title: str, stage: type[Stage], options: dict, model: GPTConfig,
        make: Callable[[Settings], Stage],
        report: Callable[[Stage, Record], None] = lambda stage, record: None, **own,
    ) -> Stage:  # fmt: skip
        """Makes a stage from its settings and trains it, in memory or in the folder of a run.

        options: name -> value; each goes to the part of the settings that has the name. own: other settings.
        """
        options = {"seed": self.seed, "min_lr": options["learning_rate"] / 10} | options
        train = TrainConfig(**_part(TrainConfig, options))
        sizes = {"model": model, "train": train, "block_size": model.block_size}
        own = _part(stage.Settings, options) | sizes | own
        self.say(f"seed {self.seed}: {title.format(train.max_iters)}")
        trained, progress = make(stage.Settings(**own)), self.progress(train.max_iters)
        self.records = []

        def tell(record: Record) -> None:
            self.records.append(record)
            report(trained, record)
            progress(record)

        trained.train(**runs.saving(trained, tell) if trained.folder else {"report": tell})
        return trained

    def pretrained(
        self, name: str, source: str = "", adapter: AdapterConfig | None = None, **changes
    ) -> tuple[GPT, BPETokenizer]:
        """A model that the recipe trains on a source, by default this seed's world. Folder `name` keeps it.

        changes: other options of the recipe, or sizes of the model such as n_layer.
        """
        folder, options = self.folder / name, self.recipe.pretrain | changes

        def begin_or_resume(settings: Settings) -> Stage:
            there = (folder / checkpoint.TRAINER).exists()
            return runs.resume(Pretrain, folder) if there else runs.begin(Pretrain, folder, settings)

        def snapshot(stage: Stage, record: Record) -> None:
            if name == "base" and record["iter"] % self._every == 0:
                at = folder / f"update-{record['iter']}"
                at.mkdir(exist_ok=True)
                checkpoint.save(at, stage.model, stage.tokenizer)

        def training() -> dict:
            model = dataclasses.replace(PRESETS["nano"], **_part(GPTConfig, options))
            self._train(f"pre-training {name}", Pretrain, options, model, begin_or_resume, snapshot,
                        data=(source or self.source,), adapter=adapter)  # fmt: skip
            records = [json.loads(line) for line in read_text(folder / runs.METRICS, 1 << 28).splitlines()]
            if not records:
                raise UserError(f"{folder}: has no {runs.METRICS}: remove the folder, and run this again")
            return {"seconds": records[-1]["elapsed_s"], "records": records}

        return checkpoint.load(self._once(name, training))

    def tune(
        self, items: Sequence[tasks.Item], adapter: AdapterConfig | None = None, base: GPT | None = None,
        **changes,
    ) -> GPT:  # fmt: skip
        """A copy of the base, or the base with an adapter, tuned to these items.

        changes: other options of the recipe.
        """
        model, options = self._with(adapter, base or self.base), {"warmup_iters": 10} | self.recipe.sft
        examples = tasks.conversations(self.world, items)
        self._train(
            "{} updates of tuning", sft.SFT, options | changes, model.config,
            lambda settings: sft.in_memory(model, self.tokenizer, examples, settings),
            block_size=model.context,
        )  # fmt: skip
        return model

    def teach(self, comparisons: Sequence[reward.Comparison], most_passes: int = 3) -> reward.Judge:
        """A judge that the recipe trains on these comparisons. Each comparison is used `most_passes` times at
        most."""
        options = dict(self.recipe.reward)
        passes = most_passes * len(comparisons) // options["batch_size"] + 1
        options["max_iters"] = min(options["max_iters"], passes)
        return self._train(
            "a judge, {} updates", reward.Reward, options, self.tuned.config,
            lambda settings: reward.in_memory(self.tuned, self.tokenizer, comparisons, settings),
        ).judge  # fmt: skip

    def steer(
        self, judge: reward.Judge, adapter: AdapterConfig | None = None, **changes
    ) -> tuple[GPT, list[Record]]:
        """The model after RLHF by this judge, and the records of the updates.

        The model is a copy of the tuned model, or the tuned model with an adapter.
        changes: other options of the recipe.
        """
        model, options = self._with(adapter, self.tuned), self.recipe.rlhf | changes
        material = rlhf.Material(self.tuned, judge, rlhf.read_prompts(self.source), [],
                                 rlhf.ptx_examples([self.source]), self.world)  # fmt: skip
        self._train(
            "{} updates of RLHF", rlhf.RLHF, options, model.config,
            lambda settings: rlhf.RLHF(settings, settings.train.optimizer(model), self.tokenizer, material),
            block_size=model.context, rl=rlhf.Config(**_part(rlhf.Config, options)),
        )  # fmt: skip
        return model, self.records

    def _with(self, adapter: AdapterConfig | None, model: GPT) -> GPT:
        if adapter is None:
            return model.copy()
        return variants.create(model, adapter, np.random.default_rng([self.seed, 0, 3]))

    def comparisons(self, people: Sequence[Person], count: int, **how) -> list[reward.Comparison]:
        """See `reward.collect`."""
        return reward.collect(self.tuned, self.tokenizer, self.world, people, count, seed=self.seed, **how)

    # --- the models of the recipe ---------------------------------------------------------------------------

    @cached_property
    def base(self) -> GPT:
        return self.pretrained("base")[0]

    @cached_property
    def tokenizer(self) -> BPETokenizer:
        _, tokenizer = self.pretrained("base")
        tokenizer.chat_template = instructions.TEMPLATE  # all models that are saved from here are tuned
        return tokenizer

    @property
    def _every(self) -> int:
        """The number of updates between two snapshots."""
        return max(1, self.recipe.pretrain["max_iters"] // SNAPSHOTS)

    def snapshots(self, places: Iterable[int]) -> list[tuple[float, GPT]]:
        """(share of pre-training, the base at that time), for some numbers of snapshots and for the end."""
        base, folder = self.base, self.folder / "base"
        models = [(n / SNAPSHOTS, checkpoint.load(folder / f"update-{n * self._every}")[0]) for n in places]
        return [*models, (1.0, base)]

    @cached_property
    def random(self) -> GPT:
        """The base before its first update."""
        return build(self.base.config, np.random.default_rng(self.seed))

    @cached_property
    def tuned(self) -> GPT:
        """The base after instruction tuning."""
        return checkpoint.load(self._saved("sft", lambda: self.tune(tasks.tuning(self.world))))[0]

    @cached_property
    def judge(self) -> reward.Judge:
        """A judge that begins as the tuned model and learns from simulated people."""
        people, count = reward.taught_by(self.world), self.recipe.reward["comparisons"]
        folder = self._saved("judge", lambda: self.teach(self.comparisons(people, count)).model)
        return reward.Judge(checkpoint.load(folder, judge=True)[0], self.tuned, self.tokenizer)

    @cached_property
    def steered(self) -> GPT:
        """The tuned model after RLHF by its judge."""
        return checkpoint.load(self._saved("rlhf", lambda: self.steer(self.judge)[0]))[0]

    def beside(self, name: str, adapter: AdapterConfig, items: Sequence[tasks.Item], **changes) -> GPT:
        """The base with an adapter that is tuned to these items. The folder `name` keeps the adapter."""
        folder = self._saved(name, lambda: self.tune(items, adapter, **changes))
        return adapters.load_model(self.folder / "base", folder)[0]

    def _saved(self, name: str, make: Callable[[], GPT]) -> Path:
        """The folder of a model or an adapter. A missing model is made."""
        folder = self.folder / name

        def training() -> dict:
            make_folder(folder)
            start, model = time.perf_counter(), make()
            seconds = time.perf_counter() - start
            if model.trained is model:
                checkpoint.save(folder, model, self.tokenizer)
            else:
                adapters.save(folder, model, self.tokenizer, str((self.folder / "base").resolve()))
            return {"seconds": seconds, "records": self.records}

        return self._once(name, training)

    def _once(self, name: str, train: Callable[[], dict]) -> Path:
        """The folder of a model. A missing model is trained. training.json has the result of `train`."""
        folder = self.folder / name
        if not any((folder / file).exists() for file in (checkpoint.CONFIG, checkpoint.ADAPTER_CONFIG)):
            remove(folder / "training.json")
        self.measurement(f"{name}/training", train)
        return folder

    def seconds(self, name: str) -> float:
        """The seconds that the training of a model took, in this run or an earlier one."""
        return self.training(name)["seconds"]

    def training(self, name: str) -> dict:
        """The seconds and the records of the training of a model, in this run or an earlier one."""
        return kept(self.folder, f"{name}/training")

    # --- measuring ------------------------------------------------------------------------------------------

    def measurement(self, name: str, measure: Callable[[], dict]) -> dict:
        """The result of `measure`, kept in a file of this name. It is measured once.

        The file has a checksum. A damaged file is measured again.
        """
        if (values := kept(self.folder, name)) is not None:
            return values
        if not name.endswith("/training"):  # `_train` says more
            self.say(f"seed {self.seed}: {name}")
        values = json.loads(json.dumps(measure()))
        with replacing(self.folder / f"{name}.json") as beside:
            text = json.dumps({"sha256": _sha256(values), "values": values}, indent=1)
            beside.write_text(text + "\n", encoding="utf-8")
        return values

    def count(self, full: int) -> int:
        """The recipe's share of a claim's full number of questions, prompts or documents."""
        return max(1, full // self.recipe.part)

    @cached_property
    def sets(self) -> dict[str, list[tasks.Item]]:
        """Like `named_tasks`, but known people are asked in every wording, because the intervals here are
        over seeds."""
        items, count = tasks.questions(self.world, self.world.people("known", "eval")), self.count(1000)
        sets = evaluate.named_tasks(self.world, count)
        return sets | {"questions, known": tasks.some(self.world, items, count)}

    def length(self, item: tasks.Item) -> int:
        """The number of tokens of a question with its answer."""
        messages = instructions.pair(item["prompt"], item["completion"])
        return len(instructions.encode(self.tokenizer, messages)[0])

    def score(self, model: GPT, items: str | list[tasks.Item]) -> evaluate.Score:
        items = self.sets[items] if isinstance(items, str) else items
        return evaluate.score(self.world, items, evaluate.ask(model, self.tokenizer, items))

    def gaps(self, model: GPT, count: int = 2000) -> dict[str, evaluate.Gap]:
        """Loss above the floor, by kind of document."""
        return evaluate.gaps(model, self.tokenizer, self.world, self.count(count))

    def recall(self, model: GPT, people: Iterable[Person]) -> float:
        """The share of sentences about facts that the model completes right."""
        return evaluate.recall(model, self.tokenizer, self.world, people).rate().rate

    def mappings(self, shots: int, count: int = 1000, control: str = "") -> list[fewshot.Prompt]:
        return fewshot.mappings(self.world, shots, self.count(count), control)

    def accuracy(self, model: GPT, prompts: Sequence[fewshot.Prompt], style: str = "table") -> float:
        return fewshot.accuracy(model, self.tokenizer, prompts, style).rate

    def memories(self, model: GPT, people: Sequence[Person], *repeats: int, **how) -> recall.Memories:
        """See `recall.memories`: does the prompt answer, or do the weights?"""
        return recall.memories(model, self.tokenizer, self.world, people, *repeats, **how)

    def heads(self, model: GPT, count: int = 50) -> np.ndarray:
        """The induction scores of a model's heads, (n_layer, H), on the words of the world."""
        return recall.induction_scores(model, self.words, count)

    @cached_property
    def words(self) -> list[int]:
        """The first token of each thing of the world."""
        return [int(self.tokenizer.encode(f" {word}")[0]) for word in self.world.things]


def _part(cls: type, options: dict) -> dict:
    """The options that are fields of a dataclass."""
    return {name: options[name] for name in cls.__dataclass_fields__.keys() & options.keys()}


def kept(folder: Path, name: str) -> dict | None:
    """A measurement that a Lab has kept in its folder, or None: also where the file is damaged."""
    with contextlib.suppress(UserError, KeyError, TypeError):
        record = read_object(folder / f"{name}.json")
        if record["sha256"] == _sha256(record["values"]):
            return record["values"]
    return None


def _sha256(values: object) -> str:
    return sha256(json.dumps(values).encode()).hexdigest()
