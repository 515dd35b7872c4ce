"""What a training step of the head costs at a million classes, contender by contender.

    python benchmarks/head.py --records head.jsonl     the tables, C = 1,000,000, D = 192 and 512
    python benchmarks/head.py --records head.jsonl --sweep --picture docs/head_scaling.png
    python benchmarks/head.py --roofline               what the machine reaches, and the bf16 pass

Measurements are kept in --records and not made again: an interrupted run goes on, and parts that
were run one by one (--dim, --contenders) make one table.

A step is forward, backward and the update of the prototypes by SGD (no momentum, no decay). Every
contender runs in a process of its own, in which its steps and the bare float32 product x W^T take
turns, so that a drift of the machine's speed meets both; medians are printed, and a contender is
compared with ours by these ratios. Memory is the peak of the resident set during a step beyond what
is resident before it: weights, and the bf16 copy where there is one.

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
from pathlib import Path

import torch
import torch.nn.functional as F
from partial_fc import sampled

from speechbrain_qmargin.head import QMarginHead, RowSparseSGD
from speechbrain_qmargin.head.prototypes import int8_product
from speechbrain_qmargin.head.search import Query, Screening, candidate_level, refined, search
from speechbrain_qmargin.loss.solver import Measure, edge

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
        unit = dim**-0.5  # the contenders' prototypes are of length 1
        self.head = QMarginHead(dim, classes, alpha, scale, 0.2, prototype_std=unit)
        self.weight = self.head.weight
        self.optimizer = RowSparseSGD(self.head.parameters(), lr=LR, head=self.head)
        self.head.prototypes()

    def step(self, x, labels):
        self.optimizer.zero_grad()
        loss = self.head(x, labels)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def check(self, x, labels):
        """Supports, and the losses and supports of four samples against float64.

        Smallest and largest support, and two others. The error is relative to the sample's loss.
        """
        head, x = self.head, x.detach()
        parameters = alpha, scale, margin = head.alpha, head.scale, head.margin
        unit, exact = F.normalize(x, dim=1), F.normalize(x.double(), dim=1)
        own = head.prototypes()
        target = scale * torch.linalg.vecdot(exact, own.unit(labels, torch.float64))
        measure = Measure(alpha, torch.full_like(target, -scale * margin))
        spread, classes = scale * margin, len(own.weight)
        query = Query(unit, exact, labels, target, measure, scale, spread, classes)
        candidates, level, *_ = search(query, own, head.comm)
        assert candidates is not None
        candidates, lower = refined(query, candidates, level, own)
        level = candidate_level(query, candidates, lower)
        active = candidates.cosines * scale > edge(level, alpha).unsqueeze(1)
        counts = active.sum(1)
        rows = torch.stack((counts.argmin(), counts.argmax(), *torch.arange(2)))
        got = head(x[rows]).q_margin_loss(labels[rows], *parameters, reduction="none")
        theta = [
            scale * exact[rows] @ F.normalize(part.double(), dim=1).T
            for part in self.weight.detach().split(65536)
        ]
        error, same = 0.0, True
        for row, value, mine in zip(rows.tolist(), got.tolist(), torch.cat(theta, 1), strict=True):
            wanted, support = loss64(mine, int(labels[row]), *parameters)
            error = max(error, abs(value - wanted) / max(wanted, 1e-8))
            found = set(candidates.rows[row][active[row]].tolist())
            same = same and found == support - {int(labels[row])}
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
    # tau >= low: the others are inactive; the target stays, first
    rest = theta > low - 1 / (alpha - 1)
    rest[label] = False
    names = torch.cat([torch.tensor([label]), rest.nonzero().squeeze(1)])
    theta, log_q = theta[names], log_q[names]

    def posterior(tau):
        return log_q.exp() * (1 + (alpha - 1) * (theta - tau)).clamp(min=0) ** (1 / (alpha - 1))

    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if float(posterior(middle).sum()) > 1 else (low, middle)
    p = posterior(low)
    power = (log_q * (1 - alpha)).exp()
    loss = float(p @ (theta - theta[0]))
    loss += float(power[0] - (power * p**alpha).sum()) / (alpha * (alpha - 1))
    return loss, set(names[p > 0].tolist())


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
        assert self.weight.grad is not None
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
    """CosFace on a sample of the classes."""

    def step(self, x, labels):
        whole = self.weight
        rows, self.weight, labels = sampled(whole, labels)
        loss = self.loss(x, labels)
        loss.backward()
        assert self.weight.grad is not None
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


LABELS = {
    "qmargin": "Q-Margin, this package (exact)",
    "partial_fc": "Partial FC at 0.1 (sampled)",
    "cosface": "CosFace, lean",
    "paper": "Q-Margin as in its paper",
    "speechbrain": "SpeechBrain AAM",
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


def median_seconds(action, repetitions: int = 5) -> float:
    action()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def roofline(classes: int, dim: int, batch: int) -> None:
    """The screening pass over the prototypes against the machine's product and memory."""
    torch.manual_seed(0)
    head = QMarginHead(dim, classes, prototype_std=dim**-0.5)  # of length 1
    own = head.prototypes()
    if own.screen is None:
        raise SystemExit("--classes: from 32,768 on there is a pass to measure")
    rows = own.screen.rows
    x = F.normalize(own.weight[:batch] + 0.05 * torch.randn(batch, dim), dim=1)
    columns = (100 * x).to(rows.dtype).T.contiguous()
    product = int8_product if rows.dtype == torch.int8 else torch.mm
    cached = rows[:1024].clone()
    flops, size = 2.0 * classes * dim * batch, rows.numel() * rows.element_size()
    seconds = median_seconds(lambda: [product(cached, columns) for _ in range(64)])
    rate = 64 * 2 * 1024 * dim * batch / seconds
    words = rows.view(torch.int32)
    bandwidth = size / median_seconds(lambda: words.amax())
    products = median_seconds(lambda: [product(part, columns) for part in rows.split(2048)])
    screening = Screening(x, torch.full((batch,), 0.4), own)
    screened = median_seconds(lambda: screening.survivors(slice(0, classes)))
    bare = median_seconds(lambda: x @ own.weight.T)
    print(f"C = {classes:,}, D = {dim}, B = {batch}, {torch.get_num_threads()} threads")
    print(f"{rows.dtype} product, rows in the cache: {rate / 1e9:.0f} GFLOP/s")
    print(f"memory: {bandwidth / 1e9:.1f} GB/s read")
    print(f"the pass: {size / 1e6:.0f} MB, {flops / 1e9:.1f} GFLOP")
    print(f"  at least {flops / rate:.3f} s by the product, {size / bandwidth:.3f} s by memory")
    print(f"  products alone {products:.3f} s, {flops / products / 1e9:.0f} GFLOP/s")
    print(f"  with comparison and survivors {screened:.3f} s, {flops / screened / 1e9:.0f} GFLOP/s")
    print(f"bare float32 product {bare:.3f} s, {flops / bare / 1e9:.0f} GFLOP/s")


def measure(args, name, classes, dim, alpha, scale, noise) -> dict:
    """`work` in a process of its own, or what --records has of it."""
    what = {"name": name, "classes": classes, "dim": dim, "batch": args.batch}
    what |= {"alpha": alpha, "scale": scale, "noise": noise}
    if args.records and args.records.exists():
        for line in args.records.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record.items() >= what.items():
                return record
    noise_text = "none" if noise is None else str(noise)
    command = [sys.executable, __file__, "--worker", name, "--classes", str(classes)]
    command += ["--dim", str(dim), "--batch", str(args.batch)]
    command += ["--setting", str(alpha), str(scale), noise_text]
    quick = name in ("qmargin", "partial_fc")
    command += ["--repetitions", str(args.repetitions if quick else args.others)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"ended by signal {-done.returncode}"]
        return what | {"failed": reason[0]}
    record = what | json.loads(done.stdout.splitlines()[-1])
    if args.records:
        with args.records.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return record


def picture(records: list[dict], path: str) -> None:
    """Seconds and memory against the number of classes, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    for axis, key, label in (
        (axes[0], "seconds", "seconds a step"),
        (axes[1], "peak_mb", "peak MB beyond the resident weights"),
    ):
        for name in dict.fromkeys(record["name"] for record in records):
            points = [(r["classes"], r[key]) for r in records if r["name"] == name and key in r]
            style = dict(linewidth=2.5, zorder=3) if name == "qmargin" else {}
            axis.loglog(*zip(*points, strict=True), marker="o", label=LABELS[name], **style)
        axis.set(xlabel="classes", ylabel=label)
        axis.grid(True, which="major", alpha=0.4)
    low, high = axes[0].get_xlim()
    seconds = [r["seconds"] for r in records if (r["name"], r["classes"]) == ("qmargin", 1_000_000)]
    if seconds:
        ends = [seconds[0] * c / 1e6 for c in (low, high)]
        axes[0].loglog((low, high), ends, "k:", linewidth=1, label="linear in the classes")
        axes[0].set_xlim(low, high)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def line(record: dict, ours: list[float]) -> str:
    """A row of the table; `ours`: our ratios to the product, of the settings to compare with."""
    r = record
    text = f"| {r['name']} | {r['classes']:,} | {r['dim']} "
    text += f"| {r['alpha']:g}, {r['scale']:g}, {r['noise'] or 'untrained'} |"
    if "failed" in r:
        return text + f" failed: {r['failed']} | | | | |"
    times = ""
    if ours and r["name"] != "qmargin" and "ratio" in r:
        times = " / ".join(f"{r['ratio'] / each:.1f}" for each in ours)
    ratio = f"{r['ratio']:.2f}" if "ratio" in r else ""
    check = ""
    if "support_mean" in r:
        check = f"{r['support_mean']:.0f}, at most {r['support_max']}; "
        check += "same" if r["same_support"] else "DIFFERS"
        check += f", loss within {r['loss_error']:.0e}"
    return text + f" {r['seconds']:.3f} s | {ratio} | {times} | {r['peak_mb']:.0f} | {check} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, nargs="+", default=[192, 512])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=9, help="of ours and Partial FC")
    parser.add_argument("--others", type=int, default=3, help="repetitions of the slow contenders")
    parser.add_argument("--records", type=Path, help="JSON lines: measurements made and to reuse")
    parser.add_argument("--sweep", action="store_true", help="C = 1e4 .. 1e7 at D = 192 instead")
    parser.add_argument("--picture", default="head_scaling.png", help="of the sweep")
    parser.add_argument("--roofline", action="store_true", help="what the machine reaches instead")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--setting", nargs=3, help="alpha scale noise; one instead of the list")
    args = parser.parse_args()
    given: tuple[float, float, float | None] | None = None
    if args.setting:
        alpha, scale, noise = args.setting
        given = float(alpha), float(scale), None if noise == "none" else float(noise)
    if args.worker and given:
        bare = args.classes <= 2_000_000
        sizes = args.classes, args.dim[0], args.batch
        print(json.dumps(work(args.worker, *sizes, *given, args.repetitions, bare)))
        return
    if args.roofline:
        for dim in args.dim:
            roofline(args.classes, dim, args.batch)
        return

    plan = []  # ours first: the others are compared with it
    for dim in [192] if args.sweep else args.dim:
        settings = [given] if given else SETTINGS.get(dim, SETTINGS[192])
        for classes in [10**4, 10**5, 10**6, 10**7] if args.sweep else [args.classes]:
            for name in args.contenders:
                if classes > 2_000_000 and name not in ("qmargin", "partial_fc"):
                    continue  # more memory than most machines have
                # the others' arithmetic does not depend on the data; their size is D = 192
                if name == "qmargin" and not args.sweep:
                    plan += [(name, classes, dim, *each) for each in settings]
                elif args.sweep or dim == 192 or name == "partial_fc":
                    plan.append((name, classes, dim, *settings[0]))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, B = {args.batch}")
    print(
        "| contender | C | D | alpha, s, noise | step | over x W^T | over ours | peak MB |", end=""
    )
    print(" support, check |\n|---|---|---|---|---|---|---|---|---|")
    records: list[dict] = []
    for each in plan:
        found = measure(args, *each)
        records.append(found)
        ours = [
            r["ratio"]
            for r in records
            if r["name"] == "qmargin"
            and "ratio" in r
            and (r["classes"], r["dim"]) == (found["classes"], found["dim"])
        ]
        print(line(found, ours), flush=True)
    if args.sweep:
        picture(records, args.picture)
        print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
