"""Draws the family of the words "learning", "training" and "tuning", with the numbers of a story.

    python demos/learning.py STORY      the folder that `tinygpt story` wrote

The program writes learning.svg and learning.ko.svg (Korean) beside this file.
"""

import json
import sys
from pathlib import Path

from tinygpt.lab.figure import figure


def main(folder: Path) -> None:
    stages = json.loads((folder / "story.json").read_text(encoding="utf-8"))["stages"]
    for language, name in ("en", "learning.svg"), ("ko", "learning.ko.svg"):
        (Path(__file__).parent / name).write_text(figure(stages, language), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
