"""Wrong backward functions, which a program makes from right ones. The checker must reject all of them.

    python tests/check/mutants.py SEEDS [NAME...]    judges every mutant at every seed; 2 seeds: 10 minutes
    python tests/check/mutants.py --right SEEDS      judges the right ones, in both backends; 300 seeds: 25
                                                     minutes

The program compares each diagnosis with the right gradients, at points that the checker did not use.

A mutant is the source of a backward with one change: operands swapped, a term or a factor dropped, a sign,
a factor of 1.0001, a transpose, another axis, a sum that is missing, `dout` exchanged with another array,
two gradients exchanged, a statement dropped, one element of a gradient set to 0.
"""

import ast
import copy
import inspect
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

import numpy as np
from rows import all_pairs
from solutions import solution

from tinygpt.check import course, exercises
from tinygpt.check.contract import Pair, leaves, like, moved, vector
from tinygpt.check.gradcheck import KEPT, STREAMS, gradcheck
from tinygpt.core import kernels, ops
from tinygpt.errors import UserError

CONDITIONS = {(ast.If, "test"), (ast.IfExp, "test")}  # whether a gradient is computed


def mutants(function: Callable) -> Iterator[tuple[str, Callable]]:
    """The change, as "before -> after" of the expression around the change, and the changed function."""
    source = textwrap.dedent(inspect.getsource(function))
    tree = ast.parse(source)
    seen = {ast.unparse(tree)}
    names = sorted({n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)})
    for path, node in _nodes(tree.body[0]):
        for after in _changes(node, names):
            changed = copy.deepcopy(tree)
            _replace(changed.body[0], path, after)
            ast.fix_missing_locations(changed)
            if (text := ast.unparse(changed)) in seen:
                continue
            seen.add(text)
            scope = dict(function.__globals__, ZERO_ONE=_zero_one)
            exec(compile(changed, f"<mutant of {function.__name__}>", "exec"), scope)
            around = next(n for n in range(len(path) - 1, -1, -1) if n == 0 or path[n][0] != "elts")
            before, now = (ast.unparse(_at(t.body[0], path[: max(around, 1)])) for t in (tree, changed))
            yield f"{before} -> {now}", scope[function.__name__]


def _nodes(function: ast.FunctionDef) -> Iterator[tuple[list, ast.AST]]:
    """Every statement and expression of the body with its path; not the docstring and the conditions."""

    def walk(node, path):
        yield path, node
        for field, value in ast.iter_fields(node):
            if isinstance(value, list):
                for i, child in enumerate(value):
                    if isinstance(child, ast.AST):
                        yield from walk(child, [*path, (field, i)])
            elif isinstance(value, ast.AST) and (type(node), field) not in CONDITIONS:
                yield from walk(value, [*path, (field, None)])

    start = 1 if ast.get_docstring(function) is not None else 0
    for i, statement in enumerate(function.body[start:], start):
        yield from walk(statement, [("body", i)])


def _at(node: ast.AST, path: list) -> ast.AST:
    for field, i in path:
        node = getattr(node, field) if i is None else getattr(node, field)[i]
    return node


def _replace(node: ast.AST, path: list, after: ast.AST | None) -> None:
    node, (field, i) = _at(node, path[:-1]), path[-1]
    if i is None:
        setattr(node, field, after)
    else:
        getattr(node, field)[i] = after or ast.Pass()


def _changes(node: ast.AST, names: list[str]) -> Iterator[ast.AST | None]:
    """Wrong versions of a node; None drops a statement."""
    if isinstance(node, ast.AugAssign | ast.Expr):
        yield None
    if isinstance(node, ast.Return):
        tuple_ = isinstance(node.value, ast.Tuple)
        values = node.value.elts if tuple_ else [node.value]
        for i, value in enumerate(values):
            for j in range(i):
                order = values.copy()
                order[i], order[j] = order[j], order[i]
                yield ast.Return(ast.Tuple(order, ast.Load()))
            for where in (0, -1):
                zero = ast.Call(ast.Name("ZERO_ONE", ast.Load()), [value, ast.Constant(where)], [])
                order = ast.Tuple([*values[:i], zero, *values[i + 1 :]], ast.Load())
                yield ast.Return(order if tuple_ else zero)
    if isinstance(node, ast.BinOp):
        yield node.left
        yield node.right
        if isinstance(node.op, ast.Sub | ast.Div | ast.MatMult):
            yield ast.BinOp(node.right, node.op, node.left)
        other = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}.get(type(node.op))
        if other:
            yield ast.BinOp(node.left, other(), node.right)
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Mult | ast.Div):
        op = ast.Div() if isinstance(node.op, ast.Mult) else ast.Mult()
        yield ast.AugAssign(node.target, op, node.value)
    if isinstance(node, ast.Compare):
        for op in (ast.Gt, ast.Lt, ast.Eq, ast.NotEq):
            if not isinstance(node.ops[0], op):
                yield ast.Compare(node.left, [op()], node.comparators)
    if isinstance(node, ast.Call):
        yield from _call_changes(node)
    loads = isinstance(getattr(node, "ctx", ast.Load()), ast.Load)
    if isinstance(node, ast.Name | ast.BinOp | ast.Call | ast.Subscript | ast.Attribute) and loads:
        yield ast.UnaryOp(ast.USub(), node)
        yield ast.BinOp(ast.Constant(1.0001), ast.Mult(), node)
        yield ast.Attribute(node, "T", ast.Load())
        swap = ast.Attribute(node, "swapaxes", ast.Load())
        yield ast.Call(swap, [ast.Constant(-1), ast.Constant(-2)], [])
    if isinstance(node, ast.Name) and loads and node.id in ("dout", "dnll", "dloss"):
        yield from (ast.Name(name, ast.Load()) for name in names)
    if isinstance(node, ast.Attribute) and node.attr == "T":
        yield node.value


def _call_changes(node: ast.Call) -> Iterator[ast.AST]:
    method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    if method in ("sum", "mean", "swapaxes"):  # x.sum(...) or np.sum(x, ...)
        numpy = isinstance(node.func.value, ast.Name) and node.func.value.id == "np"
        yield node.args[0] if numpy else node.func.value
        if method != "swapaxes":
            other = ast.Attribute(node.func.value, {"sum": "mean", "mean": "sum"}[method], ast.Load())
            yield ast.Call(other, node.args, node.keywords)
    for i, argument in enumerate(node.args):
        if isinstance(argument, ast.Constant | ast.UnaryOp):  # an axis
            for axis in (0, 1, -1, -2):
                arguments = [*node.args[:i], ast.Constant(axis), *node.args[i + 1 :]]
                yield ast.Call(node.func, arguments, node.keywords)
    for i, keyword in enumerate(node.keywords):
        rest = node.keywords[:i] + node.keywords[i + 1 :]
        if keyword.arg == "axis":
            for axis in (0, 1, -1, None):
                yield ast.Call(node.func, node.args, [*rest, ast.keyword("axis", ast.Constant(axis))])
        elif keyword.arg in ("add", "dw", "db"):
            yield ast.Call(node.func, node.args, rest)


def _zero_one(gradient, where: int):
    """The gradient with its first or its last element set to 0."""
    gradient = np.array(gradient)
    gradient.flat[where] = 0
    return gradient


EQUAL = {  # changes, as patterns, that change no result, and the reason
    r"bfloat16=(-|1\.0001 \* )bfloat16": "a factor does not change False",
    r"^dout\.reshape -> factor\.reshape": "without bfloat16 the factor is dout",
    r"\.(shape|ndim|dtype)\b.* -> .*\.(shape|ndim|dtype)": "the shape or the type is the same",
    r"swapaxes\(2, 3\).* -> .*swapaxes\((-2, 3|2, -1)\)": "the same two axes, counted from the end",
    r"reshape\(-1, .* -> .*reshape\(-2, ": "any negative size is the one that NumPy works out",
    r"(dg|db|g|advantages|dloss)( = .*|\b.*) -> .*\.T\b": "a vector or a number is its own transpose",
    r"axis=0, out=db\) -> .*out=db, axis=0\)": "the order of named arguments",
    r"= np\.zeros\(.* -> dw = (-|1\.0001 \* )np\.zeros": "zero times a factor",
    r"^dw\[:\] -> dw\.(T|swapaxes\(-1, -2\))\[:\]": "all elements are set to 0, in whatever order",
    r"cache\[0\] > 0.* -> .*cache\[0\] != 0": "relu's output is never negative",
    r"cache\[0\] > 0 -> 1\.0001 \* cache\[0\] > 0": "a positive factor does not change a sign",
    r"np\.square\(cache\[0\]\) -> np\.square\(-cache\[0\]\)": "a square has no sign",
    r"^dnll == 0 -> (-|1\.0001 \* )dnll == 0": "a weight of 0 stays 0",
    r"(return dout \* |dropout_forward\().* -> .*ZERO_ONE": "at this seed this element is 0, or nearly",
    r"linear_backward\(.*, db=False.* -> .*": "lora: nobody reads this gradient, or this x",
    r"(\b[wmv]\.copy|return \(w, m, v\)|\.bias'\]\) for p).* -> .*\.T\b": "a vector is its own transpose",
    r"concatenate.*, 1\).* -> .*, -2\)": "the same axis, counted from the end",
    r"rewards\.size -> .*\.size": "the size is the same",
    r"^-nll -> ": "of the log-probabilities only the shape is read",
}


def reason(change: str) -> str | None:
    """The reason why a change has no effect on any result, or None."""
    return next((why for pattern, why in EQUAL.items() if re.search(pattern, change)), None)


# --- the checker's verdicts --------------------------------------------------------------------------------


def targets() -> dict[str, Callable]:
    """Every backward of `ops.py`, and the solution of every exercise, by name."""
    operations = {name: function for name, function in vars(ops).items() if name.endswith("_backward")}
    return operations | {f"exercise {name}": solution(name) for name in exercises.EXERCISES}


def own_pairs(name: str, function: Callable, seed: int) -> list[tuple]:
    """The pairs of a target in `tinygpt gradcheck` and rows.py, with `function` in the target's place."""
    if name.startswith("exercise "):
        return [course.pair(name.removeprefix("exercise "), function)]
    changed = SimpleNamespace(**vars(ops) | {name: function})
    rows = all_pairs(changed, np.random.default_rng(seed))
    pairs = [pair for row, pair in rows if row.split(",")[0] == name.removesuffix("_backward")]
    assert pairs, f"{name} has no row"
    return pairs


def gradients(pair: tuple, seed: int) -> list[np.ndarray]:
    """The gradients from the backward of a pair, for random douts, at the points of the checker."""
    forward, backward, inputs = pair
    points, rng = np.random.default_rng([seed, STREAMS[0]]), np.random.default_rng([seed, 1])
    draw = lambda o: rng.standard_normal(np.shape(o))[()]  # noqa: E731
    grads = []
    for point in (inputs(points), inputs(points)) if callable(inputs) else (inputs,):
        out, cache = forward(**point)
        answer = backward(tuple(map(draw, out)) if isinstance(out, tuple) else draw(out), cache)
        grads += [np.array(g) for _, g in leaves(answer, "grad")]
    return grads


def changes_a_result(right: list[tuple], wrong: list[tuple], seed: int) -> bool:
    """Whether a mutant's gradients differ from the right ones by more than rounding."""
    for pairs in zip(right, wrong, strict=True):
        expected, grads = (gradients(pair, seed) for pair in pairs)
        if len(expected) != len(grads):
            return True
        for a, b in zip(expected, grads, strict=True):
            if a.shape != b.shape or not np.allclose(a, b, 1e-9, 1e-12 * np.abs(a).max(), equal_nan=True):
                return True
    return False


def judge(name: str, mutant: Callable, seed: int) -> tuple[str, list[str]]:
    """The verdict, and the diagnoses. A diagnosis that is not true begins with "wrong: ".

    The verdict is "caught" or "missed", "raises" if the mutant raises an exception, or "equal" if its results
    are right.
    """
    right, wrong = (own_pairs(name, function, seed) for function in (targets()[name], mutant))
    with np.errstate(all="ignore"):
        try:
            for pair in wrong:
                gradients(pair, seed)
        except Exception:
            return "raises", []
        if not changes_a_result(right, wrong, seed):
            return "equal", []
    verdicts, sentences = set(), []
    try:
        for pairs in zip(right, wrong, strict=True):
            for result in gradcheck(*pairs[1], 1e-7, seed=seed):
                verdicts.add(result.verdict)
                if result.diagnosis:
                    true = all(holds(result.diagnosis, result.name, *pairs, [seed, n]) for n in range(3))
                    sentences.append("wrong: " * (not true) + f"{result.name}: {result.diagnosis}")
    except UserError:  # no gradient at all, such as a complex number
        return "caught", []
    return ("caught" if "wrong" in verdicts else "missed"), sentences


def named_gradients(pair: tuple, seed: list[int], dout_seed: int = 0) -> tuple[dict, dict]:
    """The gradients of a pair at two new points, by the names that the checker gives them."""
    forward, backward, inputs = pair
    rng, douts, grads = np.random.default_rng([*seed, 2]), np.random.default_rng([*seed, 3, dout_seed]), []
    for _ in range(2):
        pair = Pair(forward, backward)
        values = pair.point(inputs(rng) if callable(inputs) else inputs)
        values |= {} if callable(inputs) else moved(values, rng, still=[])
        out, cache = pair(values)
        dout = like(out, douts.standard_normal(vector(out).size))
        grads.append({pair.label(n): np.float64(g) for n, g in pair.answer(dout, cache, values).items()})
    return tuple(grads)


def holds(sentence: str, name: str, right: tuple, wrong: tuple, seed: list[int]) -> bool:
    """Whether a diagnosis of the gradient `name` is true at two points and for a dout that the checker did
    not use."""
    rights, wrongs = named_gradients(right, seed), named_gradients(wrong, seed)
    if sentence == "dout is ignored":
        others = named_gradients(wrong, seed, dout_seed=1)
        return all(np.array_equal(a[name], b[name]) for a, b in zip(wrongs, others, strict=True))
    if sentence == KEPT:
        return np.allclose(wrongs[0][name], wrongs[1][name])
    points = zip(rights, wrongs, strict=True)
    return all(_is_true(sentence, wrong[name], right[name], right) for right, wrong in points)


def _is_true(sentence: str, g: np.ndarray, R: np.ndarray, right: dict) -> bool:
    close = lambda a, b, rtol=1e-8: np.allclose(a, b, rtol, 1e-9 * np.abs(b).max())  # noqa: E731
    numbers = [int(n) for n in re.findall(r"\d+", sentence)]
    if sentence == "it is 0 everywhere":
        return not g.any()
    if sentence == "its sign is wrong":
        return close(g, -R)
    if match := re.fullmatch(r"it is (\S+) times the right one", sentence):
        return close(g, float(match[1]) * R, 1e-5)
    if sentence == "it is transposed":
        return close(g.swapaxes(-1, -2), R)
    if re.fullmatch(r"its axes \d and \d are exchanged", sentence):
        return close(g.swapaxes(*numbers), R)
    if match := re.fullmatch(r"it is the gradient of (.+)", sentence):
        return close(g, right[f"d{match[1]}"])
    if sentence.startswith("a sum over axis"):
        return close(g.sum(tuple(numbers)).reshape(R.shape), R)
    if sentence == "the numbers are right, not the shape":
        return close(g.reshape(R.shape), R)
    place = re.fullmatch(r"it is wrong at \[(.+)\] only", sentence)[1]
    index = tuple(slice(None) if i == ":" else int(i) for i in place.split(", "))
    g[index] = R[index]
    return close(g, R)


def false_alarms(seeds: Iterable[int], models: bool = True) -> Iterator[str]:
    """The complaints of the checker about right backwards: operations, models (at 10 seeds), exercises."""
    for seed in seeds:
        pairs = [(name, course.pair(name, solution(name))) for name in exercises.EXERCISES]
        for backend in kernels.available():
            pairs += all_pairs(kernels.backend(backend), np.random.default_rng(seed))
        for name, pair in pairs:
            if "model" not in name or (models and seed < 10):
                for result in gradcheck(*pair, 1e-7, seed=seed, small=4 if "model" in name else 256):
                    if not result.ok:
                        yield f"seed {seed}: {name}: {result}"


def judged_elsewhere(name: str) -> bool:
    """Whether an exercise's solution is an operation, of which it may not need all lines."""
    return name.startswith("exercise ") and targets()[name] in vars(ops).values()


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--right"]:
        alarms = list(false_alarms(range(int(arguments[1]))))
        print(*alarms, f"{len(alarms)} false alarms at {arguments[1]} seeds", sep="\n")
        return bool(alarms)
    seeds, total, diagnoses = range(int(arguments[0])), Counter(), Counter()
    for name in arguments[1:] or targets():
        counts = Counter()
        for change, mutant in mutants(targets()[name]):
            judged = [judge(name, mutant, seed) for seed in seeds]
            verdicts = {verdict for verdict, _ in judged}
            for verdict, sentences in judged:
                diagnoses["diagnosed" if sentences else "not diagnosed"] += verdict == "caught"
                for sentence in sentences:
                    if sentence.startswith("wrong: "):
                        diagnoses["wrongly"] += 1
                        print(f"{name}: {change}: {sentence}")
            verdict = next(v for v in ("missed", "caught", "raises", "equal") if v in verdicts)
            if "equal" in verdicts and not (reason(change) or judged_elsewhere(name)):
                verdict = "unexplained"
            if verdict in ("missed", "unexplained"):
                print(f"{name}: {verdict}: {change}")
            counts[verdict] += 1
        print(f"{name:36}", *(f"{count} {verdict}" for verdict, count in sorted(counts.items())), flush=True)
        total += counts
    print(f"all, at {len(seeds)} seeds:", *(f"{count} {verdict}" for verdict, count in sorted(total.items())))
    print("of the caught, at all seeds:", *(f"{count} {what}" for what, count in sorted(diagnoses.items())))
    return bool(total["missed"] or total["unexplained"] or diagnoses["wrongly"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
