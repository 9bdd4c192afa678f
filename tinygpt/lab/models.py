"""A seed's world and the models trained in it, each made when it is first asked for and kept in a folder.

Training that was interrupted goes on; what was measured under a name is not measured again. For claims and
stories, which compare models of one world.
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
from ..core.train import TrainConfig
from ..errors import UserError
from ..files.atomic import lock, make_folder, replacing
from ..files.jsonfile import parse, read_object, read_text
from ..folders import adapters, checkpoint, runs
from ..stages import evaluate, recipes, reward, rlhf, sft, variants
from ..stages.adapter import AdapterConfig
from ..stages.pretrain import Pretrain
from ..stages.variants import build
from ..text import instructions
from ..text.tokenizer import BPETokenizer
from ..world import VERSION, Person, World, tasks

Numbers = dict[str, float]
SNAPSHOTS = 20  # models kept on the way of pre-training
SECONDS = "seconds"  # a file beside a model: how long its training took


class Lab:
    """Makes a seed's models when they are first asked for; `say` gets a line when that takes long.

    quick: a small world, and the recipes for it. progress: from a number of updates to what is told of each
    of them.
    """

    def __init__(
        self, folder: Path, seed: int, say: Callable[[str], None] = lambda text: None, quick: bool = False,
        progress: Callable[[int], Callable[[Numbers], None]] = lambda updates: lambda record: None,
    ) -> None:  # fmt: skip
        stages = [recipes.PRETRAIN, recipes.SFT, recipes.REWARD, recipes.RLHF]
        if quick:
            stages = [stage | less for stage, less in zip(stages, recipes.QUICK, strict=True)]
        self.pretraining, self.tuning, self.judging, self.steering = stages
        how = stages, PRESETS["nano"], rlhf.Config(), SNAPSHOTS
        self.recipe = f"world-{VERSION}-recipe-{sha256(repr(how).encode()).hexdigest()[:6]}"
        self.folder = folder / f"{self.recipe}-seed-{seed}"  # nothing of another recipe
        self.seed, self.say, self.quick, self.progress = seed, say, quick, progress
        make_folder(self.folder)
        lock(self.folder)
        self.world, self.source = World(seed, small=quick), f"world:{seed}" + ":small" * quick

    def pretrained(
        self, name: str, source: str = "", adapter: AdapterConfig | None = None, **changes
    ) -> tuple[GPT, BPETokenizer]:
        """A model of the recipe on a source, else this seed's world, kept in the folder of that name.

        changes: of its TrainConfig, such as max_iters, and of its sizes, such as n_layer.
        """
        folder, recipe = self.folder / name, self.pretraining | {"seed": self.seed} | changes
        sizes, how = ({field: recipe[field] for field in cls.__dataclass_fields__.keys() & recipe.keys()}
                      for cls in (GPTConfig, TrainConfig))  # fmt: skip
        block_size = recipe["block_size"]
        settings = Pretrain.Settings(
            model=dataclasses.replace(PRESETS["nano"], **sizes), train=TrainConfig(**how),
            data=(source or self.source,), block_size=block_size, batch_size=recipe["batch_size"],
            adapter=adapter, tokenizer=recipe["tokenizer"], vocab_size=recipe["vocab_size"],
        )  # fmt: skip
        if not (folder / "done").exists():
            self.say(f"seed {self.seed}: pre-training {name}")
            if (folder / checkpoint.TRAINER).exists():
                run = runs.resume(Pretrain, folder)
            else:
                run = runs.begin(Pretrain, folder, settings)
            stage = run.stage
            progress = self.progress(stage.settings.train.max_iters)

            def report(record: dict[str, float]) -> None:
                progress(record)
                if name == "base" and record["iter"] % self._every == 0:
                    at = folder / f"update-{record['iter']}"
                    at.mkdir(exist_ok=True)
                    checkpoint.save(at, stage.model, stage.tokenizer)

            stage.train(**runs.saving(run, report))
            (folder / "done").touch()
        return checkpoint.load(folder)

    @cached_property
    def base(self) -> GPT:
        return self.pretrained("base")[0]

    @cached_property
    def tokenizer(self) -> BPETokenizer:
        _, tokenizer = self.pretrained("base")
        tokenizer.chat_template = instructions.TEMPLATE  # what is saved with it from here on is tuned
        return tokenizer

    @property
    def _every(self) -> int:
        """Updates from one snapshot to the next."""
        return max(1, self.pretraining["max_iters"] // SNAPSHOTS)

    def snapshots(self, places: Iterable[int]) -> list[tuple[float, GPT]]:
        """(share of pre-training, the base as it was then) at these of the SNAPSHOTS, and the base."""
        base, folder = self.base, self.folder / "base"
        models = [(n / SNAPSHOTS, checkpoint.load(folder / f"update-{n * self._every}")[0]) for n in places]
        return [*models, (1.0, base)]

    @cached_property
    def random(self) -> GPT:
        """The base as it was before its first update."""
        return build(self.base.config, np.random.default_rng(self.seed))

    def _model(self, name: str, make: Callable[[], GPT]) -> Path:
        """The folder of a model or its adapter, made if it is not there, with the seconds that it took."""
        folder = self.folder / name
        whole = (folder / file for file in (checkpoint.CONFIG, checkpoint.ADAPTER_CONFIG))  # written last
        if not any(file.exists() for file in whole):
            make_folder(folder)
            began, model = time.perf_counter(), make()
            with replacing(folder / SECONDS) as beside:
                beside.write_text(f"{time.perf_counter() - began}")
            if model.trained is model:
                checkpoint.save(folder, model, self.tokenizer)
            else:
                adapters.save(folder, model, self.tokenizer, str((self.folder / "base").resolve()))
        return folder

    def seconds(self, name: str) -> float:
        """How long the training of a model took, in this run or an earlier one."""
        if (path := self.folder / name / SECONDS).exists():
            try:
                return float(read_text(path))
            except ValueError:
                raise damage(path) from None
        return self.records(name)[-1]["elapsed_s"]

    def records(self, name: str) -> list[Numbers]:
        """Of the updates of a model that `pretrained` made."""
        return read_records(self.folder / name / runs.METRICS, "iter", "train_loss", "elapsed_s")

    def beside(self, name: str, adapter: AdapterConfig, items: Sequence[tasks.Item], **changes) -> GPT:
        """The base with an adapter that is tuned to these items, kept in the folder of that name."""
        folder = self._model(name, lambda: self.tune(items, adapter, **changes))
        return adapters.load_model(self.folder / "base", folder)[0]

    @cached_property
    def tuned(self) -> GPT:
        """The base after instruction tuning."""
        folder = self._model("sft", lambda: self.tune(tasks.tuning(self.world)))
        return checkpoint.load(folder)[0]

    def tune(
        self, items: Sequence[tasks.Item], adapter: AdapterConfig | None = None, base: GPT | None = None,
        **changes,
    ) -> GPT:  # fmt: skip
        """A copy of the base, tuned to these items by the recipe with changes of its TrainConfig."""
        model = self._with(adapter, base or self.base)
        options = self.tuning | {"warmup_iters": 10} | changes
        self.say(f"seed {self.seed}: {options['max_iters']} updates of tuning")
        train = self._training(options)
        settings = sft.Settings(model=model.config, train=train, block_size=model.context, batch_size=8)
        examples = tasks.conversations(self.world, items)
        sft.in_memory(model, self.tokenizer, examples, settings).train(self.progress(train.max_iters))
        return model

    def _with(self, adapter: AdapterConfig | None, model: GPT) -> GPT:
        if adapter is None:
            return model.copy()
        return variants.create(model, adapter, np.random.default_rng([self.seed, 0, 3]))

    def _training(self, options: dict) -> TrainConfig:
        return TrainConfig(**options, min_lr=options["learning_rate"] / 10, seed=self.seed)

    @cached_property
    def judge(self) -> reward.Judge:
        """The tuned model as a judge, taught by simulated people."""

        def make() -> GPT:
            count = self.judging["comparisons"]
            return self.teach(self.comparisons(reward.taught_by(self.world), count)).model

        folder = self._model("judge", make)
        return reward.Judge(checkpoint.load(folder, judge=True)[0], self.tuned, self.tokenizer)

    def comparisons(
        self, people: Sequence[Person], count: int, error: float = 0.1, blind: bool = False
    ) -> list[reward.Comparison]:
        how = {"error": error, "seed": self.seed, "blind": blind}
        return reward.collect(self.tuned, self.tokenizer, self.world, people, count, **how)

    def teach(self, comparisons: Sequence[reward.Comparison], most_passes: int = 3) -> reward.Judge:
        """A judge by the recipe, from these comparisons; few are shown no more than so often."""
        options = {name: value for name, value in self.judging.items() if name != "comparisons"}
        batch_size = options.pop("batch_size")
        options["max_iters"] = min(options["max_iters"], most_passes * len(comparisons) // batch_size + 1)
        self.say(f"seed {self.seed}: a judge, {options['max_iters']} updates")
        train, model = self._training(options), self.tuned
        sizes = {"block_size": model.context, "batch_size": batch_size}
        settings = reward.Settings(model=model.config, train=train, **sizes)
        stage = reward.in_memory(model, self.tokenizer, comparisons, settings)
        stage.train(self.progress(train.max_iters))
        return stage.judge

    @cached_property
    def steered(self) -> GPT:
        """The tuned model after RLHF by its judge."""

        def make() -> GPT:
            model, records = self.steer(self.judge)
            lines = "".join(json.dumps(record) + "\n" for record in records)
            with replacing(self.folder / "rlhf" / "records.jsonl") as beside:
                beside.write_text(lines)
            return model

        return checkpoint.load(self._model("rlhf", make))[0]

    def steer(
        self, judge: reward.Judge, adapter: AdapterConfig | None = None, **changes
    ) -> tuple[GPT, list[Numbers]]:
        """A copy of the tuned model after RLHF by this judge, by the recipe with changes of it; the records
        of its updates."""
        options = self.steering | changes
        fields = rlhf.Config.__dataclass_fields__
        config = rlhf.Config(**{name: options.pop(name) for name in options.keys() & fields.keys()})
        train = self._training(options)
        self.say(f"seed {self.seed}: {train.max_iters} updates of RLHF")
        model = self._with(adapter, self.tuned)
        material = rlhf.Material(self.tuned, judge, rlhf.read_prompts(self.source), [],
                                 rlhf.world_examples(self.world), self.world)  # fmt: skip
        settings = rlhf.Settings(model=model.config, train=train, rl=config, block_size=model.context)
        stage = rlhf.RLHF(settings, train.optimizer(model), self.tokenizer, material)
        records, progress = [], self.progress(train.max_iters)

        def report(record: Numbers) -> None:
            records.append(record)
            progress(record)

        stage.train(report)
        return model, records

    @cached_property
    def words(self) -> list[int]:
        """The first token of each thing of the world."""
        return [int(self.tokenizer.encode(f" {word}")[0]) for word in self.world.things]

    def length(self, item: tasks.Item) -> int:
        """Of a question with its answer, in tokens."""
        messages = instructions.pair(item["prompt"], item["completion"])
        return len(instructions.encode(self.tokenizer, messages)[0])

    @cached_property
    def sets(self) -> dict[str, list[tasks.Item]]:
        """Those of a report, but known people are asked in every wording: here intervals are over seeds."""
        items = tasks.questions(self.world, self.world.people("known", "eval"))
        return evaluate.named_tasks(self.world) | {"questions, known": tasks.some(self.world, items, 1000)}

    def measurement(self, name: str, measure: Callable[[], dict], needed: set[str] = frozenset()) -> dict:
        """What was measured under this name before, with all that is needed, or is now.

        The file has a checksum: a file that is damaged is measured again.
        """
        path = self.folder / f"{name}.json"
        if path.exists():
            with contextlib.suppress(UserError, KeyError, TypeError):
                record = read_object(path)
                if record["sha256"] == _sha256(record["values"]) and needed <= record["values"].keys():
                    return record["values"]
        self.say(f"seed {self.seed}: {name}")
        values = json.loads(json.dumps(measure()))
        with replacing(path) as beside:
            text = json.dumps({"sha256": _sha256(values), "values": values}, indent=1)
            beside.write_text(text + "\n", encoding="utf-8")
        return values

    def score(self, model: GPT, items: str | list[tasks.Item]) -> evaluate.Score:
        items = self.sets[items] if isinstance(items, str) else items
        return evaluate.score(self.world, items, evaluate.ask(model, self.tokenizer, items))

    def recall(self, model: GPT, people: Iterable[Person]) -> float:
        return evaluate.recall(model, self.tokenizer, self.world, people).rate().rate


def _sha256(values: object) -> str:
    return sha256(json.dumps(values).encode()).hexdigest()


def read_records(path: Path, *names: str) -> list[Numbers]:
    """The records of a training, one a line. Each has a number under each of `names`. Raises UserError."""
    try:
        rows = [parse(line) for line in read_text(path, most=1 << 28).splitlines()]
        right = rows and all(abs(row[name]) < 1e300 for row in rows for name in names)
    except (ValueError, TypeError, KeyError):
        right = False
    if not right:
        raise damage(path)
    return rows


def damage(path: Path) -> UserError:
    """The error for a damaged file of a model that a Lab has made."""
    return UserError(f"{path}: is damaged: remove {path.parent}, and the same command makes it again")
