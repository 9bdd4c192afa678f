"""A course: right, wrong and hostile submissions, each graded in a process of its own."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tinygpt.check import course, exercises, submission
from tinygpt.check.gradcheck import Result
from tinygpt.lab import texts
from tinygpt.shell import checks
from tinygpt.shell.cli import main

RIGHT = "    return dout @ w.T, x.T @ dout, dout.sum(0)\n"
BLANK = "    # write dx, dw and db here\n"


def linear(body=RIGHT, before="", after=""):
    """A submission of the exercise `linear`."""
    text = exercises.code("linear")
    assert BLANK in text
    return before + text.replace(BLANK, body) + after


FORWARD_CHANGED = """

def linear_forward(x, w, b):
    return 0 * x @ w + 0 * b, (x, w)
"""
NUMPY_CHANGED = """
import numpy, time, json, sys
numpy.abs = lambda x: 0 * x
numpy.allclose = numpy.array_equal = lambda *a, **k: True
time.time = time.monotonic = time.perf_counter = lambda: 0.0
try:
    import tinygpt.check.gradcheck as checker
    checker.gradcheck = checker._check = lambda *a, **k: []
except ImportError:
    pass
"""
FORGED = """
import json, os, sys
ok = [{"name": "dx", "ok": True, "verdict": "ok", "rel_err": 0}]
print(json.dumps(ok))
sys.stderr.write(json.dumps(ok))
for fd in range(1, 9):
    try:
        os.write(fd, json.dumps(ok).encode())
    except OSError:
        pass
"""
SUBMISSIONS = {  # a file, and its message; "" if the file is right
    "right": (linear(), ""),
    "right_in_its_own_words": (
        "import numpy as np\n\ndef linear_backward(d, c):\n"
        "    return d.dot(c[1].T), np.einsum('ni,no->io', c[0], d), np.ones(len(d)) @ d\n", ""),
    "right_with_prints": (linear(before="print('hello')\n", body="    print(dout)\n" + RIGHT), ""),
    "right_with_another_forward": (linear(after=FORWARD_CHANGED), ""),
    "right_with_numpy_changed": (linear(before=NUMPY_CHANGED), ""),
    "right_in_a_dict": (linear("    return {'b': dout.sum(0), 'x': dout @ w.T, 'w': x.T @ dout}\n"), ""),
    "right_in_a_buffer": (linear(before="import numpy as np\nBUFFER = np.zeros((5, 4))\n",
                                 body="    np.matmul(dout, w.T, out=BUFFER)\n"
                                      "    return BUFFER, x.T @ dout, dout.sum(0)\n"), ""),
    "right_with_a_thread": (linear(before="import threading, time\nthreading.Thread(target=time.sleep, "
                                          "args=(99,)).start()\n"), ""),
    "right_with_huge_output": (linear(before="print('x' * 20_000_000)\n"), ""),
    "right_that_deletes_its_folder_of_temporary_files": (
        linear(before="import glob, os, tempfile\nfor f in glob.glob(tempfile.gettempdir() + '/tinygpt*'):\n"
                      "    os.remove(f)\n"), ""),
    "sign": (linear("    return dout @ w.T, -x.T @ dout, dout.sum(0)\n"), "dw: relative error"),
    "factor": (linear("    return dout @ w.T, x.T @ dout, 1.0001 * dout.sum(0)\n"), "db: relative error"),
    "mean": (linear("    return dout @ w.T, x.T @ dout, dout.mean(0)\n"), "db: relative error"),
    "zeros": (linear("    return 0 * x, 0 * w, np.zeros(w.shape[1])\n"), "dx: relative error"),
    "shape": (linear("    return dout @ w.T, x.T @ dout, dout\n"), "db: its shape is (5, 3), that of b is"),
    "nan": (linear("    return dout @ w.T, x.T @ dout * np.nan, dout.sum(0)\n"), "dw: backward says nan"),
    "writes": (linear("    dout *= 2\n    return dout @ w.T / 2, x.T @ dout / 2, dout.sum(0) / 2\n"),
               "dout: backward writes to it"),
    "adds_up": (linear(before="TOTAL = 0\n", body="    global TOTAL\n    TOTAL = TOTAL + dout.sum(0)\n"
                                                  "    return dout @ w.T, x.T @ dout, TOTAL\n"),
                "db: backward called twice gives two answers"),
    "keeps": (linear(before="KEPT = []\n", body="    KEPT.append(x)\n"
                                                "    return dout @ w.T, KEPT[0].T @ dout, dout.sum(0)\n"),
              "dw: relative error"),
    "missing": (linear("    return dout @ w.T, None, dout.sum(0)\n"), "dw: backward returns no gradient"),
    "one_gradient": (linear("    return dout\n"), "backward returns 1 gradient"),
    "blank": (linear(BLANK), "backward returns None"),
    "empty": ("", "has no attribute 'linear_backward'"),
    "syntax": (linear("    return dout @@ w\n"), "SyntaxError"),
    "indentation": (linear("  return 1\n"), "IndentationError"),
    "import": (linear(before="import nothing\n"),
               "ModuleNotFoundError: No module named 'nothing' (line 1)"),
    "raises": (linear("    return dout @ w, x, w\n"), "ValueError"),
    "no_array": (linear("    return object(), x, w\n"), "no array"),
    "strings": (linear("    return np.full(x.shape, 'a'), x.T @ dout, dout.sum(0)\n"), "an array of <U1"),
    "objects": (linear("    return np.full(x.shape, None), x.T @ dout, dout.sum(0)\n"), "of object"),
    "exit_at_import": ("import os\nos._exit(0)\n", "no answer (exit status 0)"),
    "exit_in_the_call": (linear("    import os\n    os._exit(0)\n"), "no answer (exit status 0)"),
    "sys_exit": ("raise SystemExit(0)\n", "SystemExit: 0"),
    "kills_itself": (linear(before="import os\nos.kill(os.getpid(), 9)\n"), "exit status -9"),
    "loops": ("while True:\n    pass\n", "it does not end within 5 s"),
    "loops_and_ignores": ("import signal\nfor n in (1, 2, 3, 13, 15):\n    signal.signal(n, signal.SIG_IGN)\n"
                          "while True:\n    pass\n", "it does not end within 5 s"),
    "reads_input": ("x = input()\n", "EOFError"),
    "forged": (linear("    return 0 * x, 0 * w, np.zeros(3)\n", before=FORGED), ""),
    "closes": (linear(before="import os\nos.closerange(0, 99)\n"), "no answer"),
    "forks": (linear(before="import os\nos.fork()\n"), ""),
    "daemon": ("import os, time\nif os.fork():\n    os._exit(0)\nos.setsid()\ntime.sleep(20)\n",
               "no answer (exit status 0)"),
    "endless_output": ("while True:\n    print('x' * 100_000)\n", "it does not end within 5 s"),
    "huge_answer": (linear("    return dout @ w.T, np.zeros((600, 300)), dout.sum(0)\n"), "8 MiB"),
    "deep_json": ("import os\nos.write(3, b'[' * 1_000_000)\nos._exit(0)\n", ""),
}  # fmt: skip
MAY_BE_EITHER = {"forks"}  # two processes write into one file, which is readable or not
HOSTILE = {"forged", "forks", "deep_json"}  # wrong or unreadable, with any message
PYTHONS = {"syntax", "indentation", "import", "raises", "no_array", "reads_input"}  # a message of Python


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "handed_in").mkdir()
    for name, (text, _) in SUBMISSIONS.items():
        (tmp_path / "handed_in" / f"{name}.py").write_text(text, encoding="utf-8")
    return "handed_in"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="hostile files need POSIX")
def test_a_folder_is_graded_in_one_call(folder):
    """Guards: a hang, a print in the middle of the JSON, and above all a wrong submission that passes."""
    assert len(SUBMISSIONS) >= 40
    arguments = ["exercise", "linear", "--check", folder, "--json", "--time-limit", "5"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1, result.output
    rows = json.loads(result.stdout)
    assert [row["file"] for row in rows] == sorted(f"{name}.py" for name in SUBMISSIONS)
    for row in rows:
        name = row["file"].removesuffix(".py")
        message, problems = SUBMISSIONS[name][1], [g for g in row["gradients"] if not g["ok"]]
        if name in MAY_BE_EITHER:
            continue
        assert row["ok"] == name.startswith("right"), (name, problems)
        assert row["ok"] == (not problems)
        lines = [f"{g['name']}: {g['problem'] or 'relative error'}" for g in problems]
        assert name in HOSTILE or row["ok"] or any(message in line for line in lines), (name, lines)
        for result in (Result(**{n: x for n, x in g.items() if n != "ok"}) for g in row["gradients"]):
            korean = [texts.translated("ko", line) for line in checks._text(result).splitlines()]
            english = re.search("[a-z]{2,} [a-z]{2,}", re.sub("`.*?`", "", str(korean)))
            assert name in HOSTILE | PYTHONS or not english, korean


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
def test_an_endless_loop_ends_when_the_grader_was_killed(tmp_path):
    """Guards: a loop that runs for days after a closed terminal."""
    file, note = tmp_path / "loop.py", tmp_path / "pid"
    code = f"import os\nopen({str(note)!r}, 'w').write(str(os.getpid()))\nwhile True:\n    pass\n"
    file.write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "tinygpt", "exercise", "linear", "--check", file, "--time-limit", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as grader:
        while not (note.exists() and note.read_text(encoding="utf-8")):
            assert grader.poll() is None
            time.sleep(0.01)
        grader.kill()
    loop = int(note.read_text(encoding="utf-8"))
    end = time.monotonic() + 60
    while is_running(loop):
        assert time.monotonic() < end
        time.sleep(0.1)


def is_running(process: int) -> bool:
    """Whether a process uses the processor. An ended process may stay as a zombie."""
    status = Path(f"/proc/{process}/stat")
    try:
        os.kill(process, 0)
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_one_file_has_a_row_for_each_gradient(folder):
    for name, status in ("right", 0), ("factor", 1), ("syntax", 1):
        result = CliRunner().invoke(main, ["exercise", "linear", "--check", f"{folder}/{name}.py", "--json"])
        rows = json.loads(result.stdout)
        assert result.exit_code == status and all(row["ok"] for row in rows) == (status == 0)
        keys = {"name", "ok", "rel_err", "index", "backward", "differences", "problem", "diagnosis"}
        assert all(keys <= row.keys() for row in rows)
        if name == "factor":
            assert [row["name"] for row in rows] == ["dx", "dw", "db"]
            assert rows[2]["diagnosis"] == "it is 1.0001 times the right one" and len(rows[2]["index"]) == 1
            assert rows[2]["backward"] == pytest.approx(1.0001 * rows[2]["differences"], rel=1e-6)
    result = CliRunner().invoke(main, ["exercise", "linear", "--check", f"{folder}/factor.py"])
    assert "WRONG  db: relative error 1.0e-04 at [" in result.stdout
    assert result.stdout.endswith("likely it is 1.0001 times the right one\n")


def test_a_folder_of_right_ones_is_right(tmp_path):
    (tmp_path / "one").mkdir()
    for name in "a.py", "one/b.py":
        (tmp_path / name).write_text(linear(), encoding="utf-8")
    result = CliRunner().invoke(main, ["exercise", "linear", "--check", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (0, "ok     a.py\nok     one/b.py\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs links and a newline in a name")
def test_a_strange_name_has_a_row_too(tmp_path):
    """Guards: a row of two lines, and an AttributeError for a file that is not there."""
    (tmp_path / "a\nb.py").write_text(linear(), encoding="utf-8")
    (tmp_path / "link.py").symlink_to("nowhere")
    result = CliRunner().invoke(main, ["exercise", "linear", "--check", str(tmp_path)])
    first, second = result.stdout.splitlines()
    assert first == "ok     a\\nb.py"
    assert second.startswith("WRONG  link.py  linear_backward: FileNotFoundError: ") and "nowhere" in second


@pytest.mark.parametrize("path, says", [("nowhere.py", "there is no such file"), (".", "no .py file in it")])
def test_nothing_to_grade_is_one_line(tmp_path, monkeypatch, path, says):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["exercise", "linear", "--check", path])
    assert result.exit_code == 2 and says in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("text", [
    b"", b"{}", b"[1]", b"[[", b"nan", b"[" * 100_000, b"\xff", b'[{"returned": 1}]', b"9" * 100_000,
    b'[{"array": [1], "dtype": "O", "shape": [1]}]',
], ids=lambda text: text[:20].decode(errors="replace"))  # fmt: skip
def test_answers_that_are_no_answers(tmp_path, text):
    """Guards: an exception in the grader's process."""
    file = tmp_path / "mine.py"
    file.write_text(f"import os\nos.write(3, {text!r})\nos._exit(0)\n", encoding="utf-8")
    (result,) = course.grade("linear", file, 20)
    assert not result.ok and result.problem


def test_arrays_come_back_as_they_were():
    """Guards: a number that JSON rounds, and an array without elements."""
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((2, 3)), np.zeros((0, 3)), np.array(1e-310), np.array([np.nan, np.inf]),
              rng.integers(9, size=4), np.array([True]), np.full(2, 0.1, np.float32)]  # fmt: skip
    text = json.dumps(values, default=submission.encode)
    decoded = json.loads(text, object_hook=submission.decode, parse_int=float)
    for before, after in zip(values, decoded, strict=True):
        assert before.dtype == after.dtype and before.shape == after.shape
        np.testing.assert_array_equal(before, after)


def test_the_child_does_not_import_what_lies_beside_it(tmp_path):
    """Guards: a module of the checker that hides a file of the same name beside the submission."""
    Path(tmp_path, "helper.py").write_text("HALF = 0.5", encoding="utf-8")
    Path(tmp_path, "contract.py").write_text("TWO = 2", encoding="utf-8")
    file = tmp_path / "mine.py"
    imports = "from helper import HALF\nfrom contract import TWO\nassert HALF * TWO == 1\n"
    file.write_text(linear(before=imports), encoding="utf-8")
    assert all(result.ok for result in course.grade("linear", file, 20))
