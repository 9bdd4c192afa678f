"""Questions and answers about Python's standard library. The program makes them from the docstrings.

    python demos/natural_text.py FOLDER

    pairs.jsonl    for tuning: "What does heapq.heappush do?", "Is heapq.heappush a function or a class?"
    kinds.jsonl    the second question about other modules, with two answers to choose from
    does.jsonl     the first question about other modules, with four answers to choose from

The program parses the sources and does not import them. One module in five is in no pair for tuning. The
wrong answers are also from such modules, so tuning has taught none of the four answers. Nothing is
downloaded. `natural_text.md` has the commands before and after this one, and the results.
"""

import ast
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

KINDS = {ast.FunctionDef: "a function", ast.AsyncFunctionDef: "a function", ast.ClassDef: "a class"}


def definitions(library: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yields (module, name, kind, first sentence of the docstring) for each public function and class."""
    for path in sorted([*library.glob("*.py"), *library.glob("*/*.py")]):
        module = ".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
        if re.search(r"test|idlelib|lib2to3|turtledemo|packages|\b_", module):
            continue
        for node in ast.parse(path.read_bytes()).body:
            if type(node) in KINDS and not node.name.startswith("_") and ast.get_docstring(node):
                paragraph = " ".join(ast.get_docstring(node).split("\n\n")[0].split())
                sentence = re.match(r"[A-Z][ -~]{10,90}?[a-z)]\.(?= |$)", paragraph)
                if sentence and "e.g" not in sentence[0]:
                    yield module, node.name, KINDS[type(node)], sentence[0]


def main(folder: Path) -> None:
    rows, rng = list(definitions(Path(sysconfig.get_path("stdlib")))), random.Random(0)
    modules = sorted({module for module, *_ in rows})
    held_out = set(rng.sample(modules, len(modules) // 5))
    sentences = [sentence for module, *_, sentence in rows if module in held_out]
    files = {"pairs": [], "kinds": [], "does": []}
    for module, name, kind, sentence in rows:
        does = {"prompt": f"What does {module}.{name} do?", "completion": sentence}
        is_a = {"prompt": f"Is {module}.{name} a function or a class?", "completion": f"It is {kind}."}
        if module not in held_out:
            files["pairs"] += [does, is_a]
            continue
        others = rng.sample([other for other in sentences if other != sentence], 3)
        files["does"].append(does | {"choices": [sentence, *others]})
        files["kinds"].append(is_a | {"choices": ["It is a function.", "It is a class."]})
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        rng.shuffle(lines)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(lines):,} lines")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
