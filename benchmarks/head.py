"""What a training step of the head costs at a million classes, contender by contender.

    python benchmarks/head.py                                   the table, C = 1,000,000, D = 192
    python benchmarks/head.py --dim 512 --contenders qmargin    the face size
    python benchmarks/head.py --sweep --contenders qmargin      C from 1e4 to 1e7, with a picture

A step is forward, backward and the update of the prototypes by SGD (no momentum, no decay). Every
contender runs in a process of its own, in which its steps and the bare float32 product x W^T take
turns, so that a drift of the machine's speed meets both; medians are printed. Memory is the peak of
the resident set during a step beyond what is resident before it: weights, and the bf16 copy where
there is one.

Prototypes are random. Embeddings are their prototype plus noise of the given standard deviation in
every coordinate; "none": embeddings independent of the prototypes, as in an untrained network.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from speechbrain_qmargin.head import QMarginHead, RowSparseSGD
from speechbrain_qmargin.head.search import search

LR = 0.01
SETTINGS = {192: [(1.25, 32, 0.05), (1.25, 32, 0.3), (1.5, 10, 0.05), (1.25, 32, None)]}
SETTINGS[512] = [(1.25, 32, 0.03), (1.25, 32, 0.3), (1.25, 32, None)]


def prototypes(classes: int, dim: int) -> torch.Tensor:
    weight = torch.empty(classes, dim)
    for rows in weight.split(8192):
        rows.copy_(F.normalize(torch.randn_like(rows), dim=1))
    return weight


# ------------------------------------------------------------------ contenders: step(x, labels)


class QMargin:
    """This package: exact."""

    def __init__(self, classes, dim, alpha, scale):
        self.head = QMarginHead(dim, classes, alpha, scale, 0.2)
        self.weight = self.head.weight
        self.optimizer = RowSparseSGD(self.head.parameters(), lr=LR)
        self.head.prototypes()

    def step(self, x, labels):
        self.optimizer.zero_grad()
        loss = self.head(x, labels)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def check(self, x, labels):
        """Support, and the largest relative error of two samples' losses against float64."""
        head, own = self.head, self.head.prototypes()
        unit = F.normalize(x.detach(), dim=1)
        target = torch.linalg.vecdot(unit, own.unit(labels))
        parameters = head.alpha, head.scale, head.margin
        found = search(unit, labels, target, own, *parameters)
        candidates, tau = found
        active = candidates.cosines * head.scale > (tau - 1 / (head.alpha - 1)).unsqueeze(1)
        counts = active.sum(1)
        rows = torch.stack((counts.argmin(), counts.argmax()))
        got = head(x[rows].detach()).q_margin_loss(labels[rows], *parameters, reduction="none")
        error, same = 0.0, True
        for row, value in zip(rows.tolist(), got.tolist(), strict=True):
            theta = torch.cat(
                [part.double() @ unit[row].double() for part in self.weight.detach().split(65536)]
            )
            norms = torch.cat([p.double().norm(dim=1) for p in self.weight.detach().split(65536)])
            theta = head.scale * theta / norms
            wanted, support = loss64(theta, int(labels[row]), *parameters)
            error = max(error, abs(value - wanted) / max(wanted, 1e-6))
            mine = set(candidates.classes[row][active[row]].tolist())
            same = same and mine == support - {int(labels[row])}
        return {
            "support_mean": counts.double().mean().item(),
            "support_max": int(counts.max()),
            "loss_error": error,
            "same_support": same,
        }


def loss64(theta, label, alpha, scale, margin):
    """Q-Margin of one sample by bisection, in float64, and its support."""
    log_q = torch.zeros_like(theta)
    log_q[label] = -scale * margin
    low = float((theta - torch.expm1(log_q * (1 - alpha)) / (alpha - 1)).max())
    high = float(theta.max()) + len(theta) ** (alpha - 1) / (alpha - 1)

    def posterior(tau):
        return log_q.exp() * (1 + (alpha - 1) * (theta - tau)).clamp(min=0) ** (1 / (alpha - 1))

    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if float(posterior(middle).sum()) > 1 else (low, middle)
    p = posterior(low)
    power = (log_q * (1 - alpha)).exp()
    loss = float(p @ theta - theta[label])
    loss += float(power[label] - (power * p**alpha).sum()) / (alpha * (alpha - 1))
    return loss, set(p.nonzero().squeeze(1).tolist())


class LeanCosFace:
    """CosFace's cross-entropy with the fewest passes autograd allows; unit prototypes."""

    def __init__(self, classes, dim, alpha, scale):
        self.weight = prototypes(classes, dim).requires_grad_()
        self.scale = scale

    def loss(self, x, labels):
        logits = F.linear(F.normalize(x, dim=1), self.weight) * self.scale
        index = torch.arange(len(labels))
        margins = torch.zeros_like(logits.detach()[:, :1]).fill_(self.scale * 0.2)
        logits = logits.index_put((index, labels), -margins.squeeze(1), accumulate=True)
        return F.cross_entropy(logits, labels)

    def step(self, x, labels):
        self.weight.grad = None
        loss = self.loss(x, labels)
        loss.backward()
        with torch.no_grad():
            self.weight.add_(self.weight.grad, alpha=-LR)
        return float(loss.detach())


class SpeechBrainAAM(LeanCosFace):
    """SpeechBrain's Classifier arithmetic, AdditiveAngularMargin and torch.optim.SGD."""

    def __init__(self, classes, dim, alpha, scale):
        from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper

        super().__init__(classes, dim, alpha, scale)
        self.cost = LogSoftmaxWrapper(AdditiveAngularMargin(margin=0.2, scale=scale))
        self.optimizer = torch.optim.SGD([self.weight], lr=LR)

    def step(self, x, labels):
        self.optimizer.zero_grad()
        cosines = F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))
        loss = self.cost(cosines.unsqueeze(1), labels.unsqueeze(1))
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


class PartialFC(LeanCosFace):
    """Partial FC at rate 0.1: the positives and random negatives; CosFace on them. Not exact."""

    def step(self, x, labels):
        classes = self.weight.shape[0]
        count = max(classes // 10, len(labels))
        draw = torch.rand(classes)
        draw[labels] = 2.0
        rows = draw.topk(count, sorted=False).indices.sort().values
        whole = self.weight
        with torch.no_grad():
            self.weight = whole.index_select(0, rows)
        self.weight.requires_grad_()
        loss = self.loss(x, torch.searchsorted(rows, labels))
        loss.backward()
        with torch.no_grad():
            self.weight.add_(self.weight.grad, alpha=-LR)
            whole.index_copy_(0, rows, self.weight)
        self.weight = whole
        return float(loss.detach())


class PaperTopK(LeanCosFace):
    """Q-Margin as its paper computes it: logits, the largest 5 %, bisection, dense backward."""

    def __init__(self, classes, dim, alpha, scale):
        super().__init__(classes, dim, alpha, scale)
        self.alpha = alpha

    def step(self, x, labels):
        unit = F.normalize(x, dim=1)
        with torch.no_grad():
            logits = unit @ self.weight.T
            logits *= self.scale
            own = logits.gather(1, labels.unsqueeze(1))
            kept, classes = logits.topk(max(logits.shape[1] // 20, 2), 1, sorted=False)
            is_own = classes == labels.unsqueeze(1)
            kept = torch.cat([kept.masked_fill(is_own, -torch.inf), own], 1)
            log_q = torch.zeros_like(kept)
            log_q[:, -1] = -self.scale * 0.2
            k = 1 / (self.alpha - 1)
            q = log_q.exp()
            low = (kept - torch.expm1(log_q * (1 - self.alpha)) * k).amax(1, keepdim=True)
            high = kept.amax(1, keepdim=True) + k
            for _ in range(30):
                middle = (low + high) / 2
                p = q * (1 + (kept - middle) / k).clamp_(min=0) ** k
                above = p.sum(1, keepdim=True) > 1
                low, high = torch.where(above, middle, low), torch.where(above, high, middle)
            p /= p.sum(1, keepdim=True)
            grad = logits.zero_()
            grad.scatter_(1, classes, p[:, :-1])
            grad.scatter_(1, labels.unsqueeze(1), p[:, -1:] - 1)
            grad *= self.scale / len(labels)
            self_grad = grad @ self.weight
            weight_grad = grad.T @ unit
        unit.backward(self_grad)
        with torch.no_grad():
            self.weight.add_(weight_grad, alpha=-LR)


CONTENDERS = {
    "qmargin": QMargin,
    "partial_fc": PartialFC,
    "cosface": LeanCosFace,
    "paper": PaperTopK,
    "speechbrain": SpeechBrainAAM,
}


# ------------------------------------------------------------------ measuring


def _status(key: str) -> float:
    """A line of /proc/self/status in MB; NaN elsewhere than on Linux."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) / 1000 for line in file if line.startswith(key))
    except (OSError, StopIteration):
        return float("nan")


def work(name, classes, dim, batch, alpha, scale, noise, repetitions, bare) -> dict:
    torch.manual_seed(0)
    contender = CONTENDERS[name](classes, dim, alpha, scale)
    labels = torch.randint(classes, (batch,))
    centres = contender.weight.detach()[labels].clone()
    disturbance = torch.randn(batch, dim)
    inputs = disturbance if noise is None else centres + noise * disturbance
    times, products, peak = [], [], 0.0
    result = {}
    if name == "qmargin":
        result = contender.check(inputs, labels)
    for repetition in range(repetitions + 1):
        x = inputs.clone().requires_grad_()
        gc.collect()
        before = _status("VmRSS")
        try:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")  # the peak starts anew
        except OSError:
            before = float("nan")
        start = time.perf_counter()
        contender.step(x, labels)
        seconds = time.perf_counter() - start
        peak = max(peak, _status("VmHWM") - before)
        if bare:
            start = time.perf_counter()
            product = x.detach() @ contender.weight.detach().T
            seconds_product = time.perf_counter() - start
            del product
        if repetition:
            times.append(seconds)
            if bare:
                products.append(seconds_product)
    result |= {"seconds": statistics.median(times), "peak_mb": peak}
    if bare:
        result["bare"] = statistics.median(products)
        ratios = [a / b for a, b in zip(times, products, strict=True)]
        result["ratio"] = statistics.median(ratios)
    return result


def measure(args, name, classes, alpha, scale, noise) -> dict:
    """`work` in a process of its own."""
    noise_text = "none" if noise is None else str(noise)
    command = [sys.executable, __file__, "--worker", name, "--classes", str(classes)]
    command += ["--dim", str(args.dim), "--batch", str(args.batch)]
    command += ["--setting", str(alpha), str(scale), noise_text]
    command += ["--repetitions", str(args.repetitions if name == "qmargin" else args.others)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"ended by signal {-done.returncode}"]
        return {"failed": reason[0]}
    return json.loads(done.stdout.splitlines()[-1])


def picture(records: list[dict], path: str) -> None:
    """Seconds and memory against the number of classes, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, key, label in (
        (axes[0], "seconds", "seconds a step"),
        (axes[1], "peak_mb", "MB beyond the resident weights"),
    ):
        for name in dict.fromkeys(record["name"] for record in records):
            points = [(r["classes"], r[key]) for r in records if r["name"] == name and key in r]
            axis.loglog(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xlabel="classes", ylabel=label)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--others", type=int, default=3, help="repetitions of the slow contenders")
    parser.add_argument("--sweep", action="store_true", help="C = 1e4 .. --largest instead")
    parser.add_argument("--largest", type=int, default=10_000_000)
    parser.add_argument("--largest-other", type=int, default=1_000_000)
    parser.add_argument("--picture", default="head.png")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--setting", nargs=3, help="alpha scale noise; one instead of the list")
    args = parser.parse_args()
    settings = SETTINGS.get(args.dim, SETTINGS[192])
    if args.setting:
        alpha, scale, noise = args.setting
        noise = None if noise == "none" else float(noise)
        settings = [(float(alpha), float(scale), noise)]
    if args.worker:
        bare = args.classes <= 2_000_000
        print(
            json.dumps(
                work(
                    *(args.worker, args.classes, args.dim, args.batch),
                    *(*settings[0], args.repetitions, bare),
                )
            )
        )
        return

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, B = {args.batch}")
    print("| contender | C | D | alpha, s, noise | step | over x W^T | peak MB | support, check |")
    print("|---|---|---|---|---|---|---|---|")
    records = []
    sizes = [10_000, 100_000, 1_000_000, 10_000_000] if args.sweep else [args.classes]
    for classes in sizes:
        for name in args.contenders:
            limit = args.largest if name == "qmargin" else args.largest_other
            if args.sweep and classes > limit:
                continue
            # the others' arithmetic does not depend on the data
            whole = name == "qmargin" and not args.sweep
            for alpha, scale, noise in settings if whole else settings[:1]:
                found = measure(args, name, classes, alpha, scale, noise)
                where = f"| {name} | {classes:,} | {args.dim} | {alpha:g}, {scale:g}, {noise} |"
                if "failed" in found:
                    print(where, f"failed: {found['failed']} | | | |", flush=True)
                    continue
                records.append({"name": name, "classes": classes, **found})
                ratio = f"{found['ratio']:.2f}" if "ratio" in found else ""
                check = ""
                if "support_mean" in found:
                    check = f"{found['support_mean']:.0f}, at most {found['support_max']}; "
                    check += "same as float64" if found["same_support"] else "DIFFERS from float64"
                    check += f", loss within {found['loss_error']:.0e}"
                print(
                    where,
                    f"{found['seconds']:.3f} s | {ratio} | {found['peak_mb']:.0f} | {check} |",
                    flush=True,
                )
    if args.sweep:
        picture(records, args.picture)
        print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
