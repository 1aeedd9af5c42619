"""Histograms of confidences, from the folder of a run: its results.json and scores.npz.

    python results/plot.py runs/cifar100 scores.png

Left the start by energy, right OAL by its detector's score (of evaluate.py: the first and the last
network); above near-OOD, below far-OOD. The line keeps 95 % of the ID test images.
"""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
import models


def main():
    if len(sys.argv) != 3:
        raise models.Mistake("start it as: python results/plot.py RUN FILE.png")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise models.Mistake("plot.py needs matplotlib: pip install matplotlib")
    _, run, out = sys.argv
    results = json.loads(Path(run, "results.json").read_bytes())
    confidences = np.load(Path(run, "scores.npz"))  # {model/score/set: [N]}
    own = "micl_knn" if results.get("arch") == models.PRETRAINED else "micl"
    networks = list(results["models"])
    sets = results["models"][networks[-1]]["scores"][own]["sets"]
    near, far, yours = ([name for name in sets if sets[name]["group"] == group]
                        for group in ("near", "far", "yours"))
    names = [*near[:1], *far[:1], *yours][:2]
    if not names:
        raise models.Mistake(f"{run} has no OOD set: there is nothing to draw")
    titles = {"ce/ebo": "start, energy", f"oal/{own}": f"OAL, {own}"}
    figure = Figure(figsize=(8, 2.4 * len(names)), layout="constrained")
    for row, name in zip(figure.subplots(len(names), 2, squeeze=False), names):
        for axis, key in zip(row, (f"{networks[0]}/ebo", f"{networks[-1]}/{own}")):
            pair = confidences[f"{key}/test"], confidences[f"{key}/{name}"]  # [N], [M]
            axis.hist(pair, 60, range=np.quantile(np.concatenate(pair), [0.001, 0.999]),
                      density=True, histtype="stepfilled", alpha=0.6,
                      label=["ID", f"{sets[name]['group']}: {name}"])
            axis.axvline(np.quantile(pair[0], 0.05), color="black", linewidth=1)
            auroc = evaluate.detection_metrics(*pair)["auroc"]
            axis.set(title=f"{titles.get(key, key)}: AUROC {auroc:.1f}", yticks=[])
            axis.legend()
    figure.savefig(out, format="png", dpi=90)


if __name__ == "__main__":
    evaluate.guarded(main)
