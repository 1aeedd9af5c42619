"""Tables over seeds, in Markdown, from the results.json of train.py and evaluate.py.

    python results/tables.py results/cifar100/*.json --less kd

A row is a file's name without its seed (kd-0.json, kd-1.json: `kd`) or, of 0.json and results.json,
its folder's. `start` is what runs started from. Of a file of evaluate.py each network is a row.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
import models


def tables(paths, less=None, scores=None):
    """Files -> lines. less: the row that others are compared with; scores: those of a cell."""
    rows, files = {}, [read(path, scores) for path in paths]  # {row: {seed: figures}}
    facts = files[0][0]
    for path, (own_facts, name, seed, networks) in zip(paths, files):
        differ = ", ".join(key for key in facts if own_facts[key] != facts[key])
        if differ:
            raise models.Mistake(f"{path} and {paths[0]} differ in {differ}: make a table of each")
        for row, figures in networks.items():
            known = rows.get(row, {}).get(seed, figures)
            if known is not figures and row != "start":
                raise models.Mistake(f"{path} is a second {row} of seed {seed}: leave one out")
            if {**known, "minutes": 0} != {**figures, "minutes": 0}:
                row = f"start of {name}"
            else:  # the same, given by --ce
                figures["minutes"] = known["minutes"] or figures["minutes"]
            rows.setdefault(row, {})[seed] = figures
    if less and less not in rows:
        raise models.Mistake(f"no row {less}: name one of {', '.join(rows)}")
    sets, title = facts["sets"], ", ".join(filter(None, [facts["dataset"], facts["arch"]]))
    groups = [column for column in figures if column not in ("minutes", "accuracy", *sets)]
    lines = [f"cells: {' / '.join(facts['scores'])}; minutes: of this training alone"]
    lines += table([title, "runs"], ["minutes", "accuracy", *groups], rows)
    lines += table(["AUROC", "runs"], sets, rows) if sets else []
    if less:
        lines += table([f"less {less}, mean±standard error", "pairs"],
                       ["accuracy", *(groups or sets)], rows, rows.pop(less))
    missing = facts["missing"]
    return lines + ["", f"missing, in no mean: {', '.join(missing)}"] * bool(missing)


def read(path, scores):
    """A file -> (facts of its data, its name, seed, {row: {column: [a number by each score]}})."""
    try:
        run, networks = json.loads(Path(path).read_bytes()), {}
        facts = {key: run.get(key) for key in ("dataset", "arch", "size", "id", "missing")}
        others = ["micl", "micl_knn"] if facts["arch"] == models.PRETRAINED else ["fdbd", "micl"]
        facts["scores"], seed = scores or ["ebo", *others], run.get("seed", path)
        *_, folder, name = Path(path).absolute().with_suffix("").parts
        name = (folder if name in ("results", str(seed)) else name).removesuffix(f"-{seed}")
        for model, entry in run["models"].items():
            row = {"ce": "start", "oal": name}.get(model, model) if "seed" in run else model
            parts = [entry["scores"][score] for score in facts["scores"]]
            facts["sets"] = {f"{key} ({part['n']})": key for key, part in parts[0]["sets"].items()}
            spent = [run["seconds"][model] / 60] if run["seconds"].get(model) else []
            figures = networks[row] = {"minutes": spent, "accuracy": [entry["id_acc"]]}
            for group in ("near", "far"):
                for metric in ("auroc", "fpr95") if group in parts[0] else ():
                    figures[f"{group} {metric.upper()}"] = [part[group][metric] for part in parts]
            for column, key in facts["sets"].items():
                figures[column] = [part["sets"][key]["auroc"] for part in parts]
        return facts, name, seed, networks
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise models.Mistake(f"{path} is no results.json of this program ({problem!r})")


def table(head, columns, rows, base=None):
    """{row: {seed: figures}} -> lines; base, {seed: figures}: what is subtracted, seed by seed."""
    lines = ["", f"| {' | '.join([*head, *columns])} |", "|---" * (2 + len(columns)) + "|"]
    for row, by_seed in rows.items():
        seeds = [seed for seed in by_seed if base is None or seed in base]
        cells = [row, str(len(seeds))]
        for column in columns:
            numbers = [np.subtract(by_seed[seed][column], base[seed][column] if base else 0)
                       for seed in seeds]  # of each seed, by each score
            cells.append(" / ".join(text(each, base) for each in zip(*filter(len, numbers))))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def text(numbers, paired):
    """Mean±standard deviation; of paired differences ±standard error."""
    digits, n, sign = (2, len(numbers), "+") if paired else (1, 1, "")
    spread = f"±{np.std(numbers, ddof=1) / n ** 0.5:.{digits}f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):{sign}.{digits}f}{spread}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = evaluate.fail
    parser.add_argument("paths", nargs="+", metavar="FILE", help="results.json files")
    parser.add_argument("--less", metavar="ROW", help="show each row minus this one, seed by seed")
    parser.add_argument("--scores", nargs="+", choices=evaluate.SCORES, help="those of a cell")
    print("\n".join(tables(**vars(parser.parse_args()))))


if __name__ == "__main__":
    evaluate.guarded(main)
