"""The speed of training: a step against its bare parts, by ten batches of a set.

    python results/benchmark.py --arch resnet_small --out DIR      # writes DIR/benchmark.json

Images per second, the best of three after a warm-up. A ratio is the time of our step over the sum
of its bare parts, measured beside it: 1.0 is a step without overhead.
"""
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
import models
import synthesize
import train


def benchmark(arch, data, device, out, steps=10):
    """A ResNet's name, an ImageSet, a folder for files -> the content of benchmark.json."""
    options = {**train.WEIGHTS, **train.TIERS[arch], "arch": arch, "seed": 0, "epochs": 1,
               "outliers": "diffusion", "contrast": "micl", "oal_lr": 0.0}  # 0: it cannot diverge
    (images, labels), batch = data.splits["train"], options["batch"]
    index = torch.arange(steps * batch) % len(images)  # of a small set again and again
    images, labels = data.splits["train"] = images[index].to(device), labels[index].to(device)
    size, classes = images.shape[-1], len(data.classes)
    net, teacher = (models.to_device(models.build(arch, classes, size), device) for _ in range(2))
    maps, x = synthesize.some_maps(net, images), net.prepare(images[:batch])
    outliers = synthesize.fit_codec(maps)
    outliers["latent"], outliers["inlier"] = torch.randn(2, 200, len(outliers["basis"])).to(device)
    ce, oal = train.CrossEntropy(net), train.OAL(net, teacher, outliers, data, options)
    teach, optimizer = models.frozen(teacher), torch.optim.SGD(net.parameters(), **train.SGD)
    parts = {"bare": lambda: torch.nn.functional.cross_entropy(net(x), labels[:batch]),
             "teacher_forward": lambda: teach(images[:batch])[0],
             "outliers": lambda: net.classify(net.upper(maps[:batch // 4])).mean(),
             "test_pass": lambda: models.predict(net, images)[0]}
    seconds = {name: [] for name in (*parts, "ce_step", "oal_step")}
    for _ in range(4):
        for name, part in parts.items():
            begun = time.perf_counter()
            for _ in range(1 if name == "test_pass" else steps):
                with models.autocast(device):
                    result = part()
                if result.requires_grad:
                    optimizer.zero_grad()
                    result.backward()
                if name == "bare":
                    optimizer.step()
            result.sum().item()  # waits for the device
            seconds[name].append(time.perf_counter() - begun)
        for stage, objective in (("ce", ce), ("oal", oal)):
            with TemporaryDirectory(dir=out) as folder:
                run = train.Run(options=options, digest="", out=Path(folder), seconds={stage: 0.0})
                train.train(stage, objective, data, run)
            seconds[f"{stage}_step"].append(run.seconds[stage])  # of its steps alone
    best = {name: min(times[1:]) for name, times in seconds.items()}
    bare_oal = best["bare"] + best["teacher_forward"] + best.pop("outliers")
    return {"images_per_second": {name: len(images) / time for name, time in best.items()},
            "ratio": {"ce": best["ce_step"] / best["bare"], "oal": best["oal_step"] / bare_oal}}


def main():
    parser = evaluate.common_parser(__doc__)
    parser.add_argument("--arch", choices=models.RESNETS, default="resnet_small")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    data = evaluate.load_set(args.dataset, args.data_root, args.size or 32, ["train"])
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(benchmark(args.arch, data, args.device, args.out), indent=1)
    evaluate.write(args.out / "benchmark.json", text)
    print(text)


if __name__ == "__main__":
    evaluate.guarded(main)
