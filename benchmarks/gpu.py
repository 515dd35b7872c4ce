"""What one GPU says of the losses and the head: exactness, the step, whole training.

    benchmarks/gpu.sh OUT          under 8 minutes on an H100 or H200
    benchmarks/gpu.sh OUT --dry    the same code on small tensors, in seconds, on a CPU too

Every result is a line of OUT/gpu.jsonl as soon as it is there, and OUT/gpu.md is the table of
them; a run that is stopped keeps what was done. The parts come in the order of their worth, each
with a share of the time; what is missing (a GPU, Triton, pytest, cut-cross-entropy, liger-kernel)
is said in a line of its own.

Times are medians by CUDA events of a step: forward, backward and the update of the prototypes by
SGD with momentum. Memory is the peak beyond what is there before the step. The roofline is one
reading of the prototypes in bf16 at the bandwidth that a copy reaches here.
"""

import argparse
import gc
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from partial_fc import sampled
from torch import Tensor, nn

from speechbrain_qmargin import CosFaceLoss, QMarginHead, QMarginLoss, RowSparseSGD, q_margin_loss
from speechbrain_qmargin.loss.device import control_flow, kernels_run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

SCALE, MARGIN, ALPHA, LR, MOMENTUM = 32.0, 0.2, 1.25, 0.01, 0.9
TESTS = ["tests/loss/test_kernels.py", "tests/head/test_fused.py", "tests/head/test_row_kernels.py"]
TESTS += ["tests/head/test_kernel_search.py"]
SECONDS = {"exactness": 100, "step": 170, "anatomy": 30, "training": 140, "small": 20}
DRY_SECONDS = dict.fromkeys(SECONDS, 600)
ONE_RESULT = 60  # seconds, at most


class Report:
    """Lines of JSON and their table, on the disk after each."""

    def __init__(self, folder: Path, dry: bool, minutes: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rows = folder, []
        self._lines = (folder / "gpu.jsonl").open("w", encoding="utf-8")
        self._start, self._end = time.monotonic(), float("inf")
        self.dry, self._share = dry, 60 * minutes / sum(SECONDS.values())

    def part(self, name: str) -> None:
        """From now on :meth:`left` counts this part's share."""
        self._part = name
        seconds = DRY_SECONDS[name] if self.dry else self._share * SECONDS[name]
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()

    def add(self, what: str, **values) -> None:
        row = {"part": getattr(self, "_part", "machine"), "what": what, **values}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self._table()

    def _table(self) -> None:
        text = []
        for part in dict.fromkeys(row["part"] for row in self.rows):
            rows = [row for row in self.rows if row["part"] == part]
            names = list(dict.fromkeys(key for row in rows for key in row if key != "part"))
            text += [f"## {part}", "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
            for row in rows:
                cells = (_cell(row.get(name, "")) for name in names)
                text.append("| " + " | ".join(cells) + " |")
            text.append("")
        whole = self.folder / "gpu.md.tmp"
        whole.write_text("\n".join(text), encoding="utf-8")
        whole.replace(self.folder / "gpu.md")


def _cell(value) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds, for a step that would take what the others need."""

    def stop(*_):
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def attempt(report: Report, what: str, run: Callable[[], dict], **values) -> None:
    """A result, or why there is none: a missing package, memory, time, or an error."""
    if report.left() <= 0:
        report.add(what, **values, note="not run: the part's time is over")
        return
    try:
        with at_most(min(report.left() + 5, ONE_RESULT)):
            result = run()
        report.add(what, **values, **result)
    except ImportError as error:
        report.add(what, **values, note=f"not run: {error.name} is not installed")
    except torch.OutOfMemoryError:
        report.add(what, **values, note="out of memory")
    except Exception as error:
        report.add(what, **values, note=f"failed: {type(error).__name__}: {error}"[:300])
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# ------------------------------------------------------------------ measuring


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], object], device: torch.device, repetitions: int) -> list[float]:
    times = []
    for _ in range(repetitions):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
    return times


def measured(step: Callable[[], object], device: torch.device, dry: bool) -> dict:
    """Milliseconds of a step, its peak of memory, launches and host waits."""
    for _ in range(0 if dry else 3):
        step()
    synchronise(device)
    first = seconds_of(step, device, 1)[0]
    if dry:
        return {"ms": 1000 * first}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    repetitions = max(3, min(20, int(1.5 / max(first, 1e-4))))
    result: dict = {"ms": 1000 * statistics.median(seconds_of(step, device, repetitions))}
    if device.type == "cuda":
        result["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        result |= profiled(step)
    return result


def profiled(step: Callable[[], object]) -> dict:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        step()
    counts = {event.key: event.count for event in trace.key_averages()}
    launches = sum(count for key, count in counts.items() if "LaunchKernel" in key)
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
    # the profiler itself waits once
    return {"launches": launches, "waits": max(0, sum(counts.get(key, 0) for key in waits) - 1)}


def bandwidth(device: torch.device, dry: bool) -> float:
    """Bytes a second of a copy, read and written."""
    tensor = torch.empty(2**16 if dry else 2**29, device=device, dtype=torch.uint8)
    other = torch.empty_like(tensor)
    other.copy_(tensor)
    best = min(seconds_of(lambda: other.copy_(tensor), device, 2 if dry else 10))
    return 2 * tensor.numel() / best


def directions(rows: int, dim: int, device: torch.device) -> Tensor:
    weight = torch.empty(rows, dim, device=device)
    for part in weight.split(2**18):
        F.normalize(part.normal_(), dim=1, out=part)
    return weight


# ------------------------------------------------------------------ contenders of a step


class Head(QMarginHead):
    """With prototypes drawn on the device: at 1e7 classes the usual ones take half a minute."""

    def reset_parameters(self, seed: int | None = None) -> None:
        with torch.no_grad():
            rows, dim = self.weight.shape
            self.weight.copy_(directions(rows, dim, self.weight.device))


class Ours:
    def __init__(self, classes: int, dim: int, device: torch.device, group=None) -> None:
        with torch.device(device):
            self.head = Head(dim, classes, ALPHA, SCALE, MARGIN, group=group)
        self.weight = self.head.weight
        self.optimizer = RowSparseSGD(
            self.head.parameters(), lr=LR, momentum=MOMENTUM, head=self.head
        )

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.head(x, labels)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class Dense:
    """CosFace as arcface_torch computes it: cosines in fp16, the cross-entropy in fp32."""

    half = torch.float16

    def __init__(self, classes: int, dim: int, device: torch.device) -> None:
        self.weight = directions(classes, dim, device).requires_grad_()
        self.optimizer = torch.optim.SGD([self.weight], lr=LR, momentum=MOMENTUM)

    def cosines(self, x: Tensor) -> Tensor:
        on = self.half is not None
        with torch.autocast(x.device.type, dtype=self.half or torch.bfloat16, enabled=on):
            return F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1)).float()

    def margin(self, cosines: Tensor, labels: Tensor) -> Tensor:
        return cosines.scatter_add(1, labels.unsqueeze(1), torch.full_like(cosines[:, :1], -MARGIN))

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(SCALE * self.margin(self.cosines(x), labels), labels)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class DenseArcFace(Dense):
    def margin(self, cosines: Tensor, labels: Tensor) -> Tensor:
        index = labels.unsqueeze(1)
        own = cosines.gather(1, index).clamp(-1 + 1e-7, 1 - 1e-7)
        return cosines.scatter(1, index, torch.cos(own.acos() + MARGIN))


class DenseQMargin(Dense):
    """As the recipes have it below millions of classes: all cosines, this package's loss."""

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return QMarginLoss(ALPHA, SCALE, MARGIN)(self.cosines(x).unsqueeze(1), labels.unsqueeze(1))


class DenseTF32(Dense):
    half = None


class DenseArcFaceTF32(DenseArcFace):
    half = None


class PartialFC(Dense):
    """The same on a sample of the classes."""

    def __init__(self, classes: int, dim: int, device: torch.device) -> None:
        super().__init__(classes, dim, device)
        self.momentum = torch.zeros_like(self.weight)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        whole = self.weight
        self.rows, self.weight, labels = sampled(whole, labels)
        loss = super().loss(x, labels)
        self.part, self.weight = self.weight, whole
        return loss

    @torch.no_grad()
    def update(self) -> None:
        assert self.part.grad is not None
        momentum = self.momentum[self.rows].mul_(MOMENTUM).add_(self.part.grad)
        self.momentum[self.rows] = momentum
        self.weight[self.rows] = self.part - LR * momentum


class Paper(Dense):
    """Q-Margin as its paper has it: logits, the largest share, bisection, dense derivatives."""

    share = 0.05

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        cosines = self.cosines(x)
        own = cosines.gather(1, labels.unsqueeze(1))
        index = labels.unsqueeze(1)
        others = cosines.scatter(1, index, -2.0)
        if self.share < 1:
            others = others.topk(max(2, int(self.share * cosines.shape[1])), 1).values
        theta = SCALE * torch.cat([own, others], 1)
        log_q = torch.zeros_like(theta)
        log_q[:, 0] = -SCALE * MARGIN
        rate = ALPHA - 1
        with torch.no_grad():
            low = (theta - torch.expm1(-rate * log_q) / rate).amax(1, keepdim=True)
            high = theta.amax(1, keepdim=True) + 1 / rate
            for _ in range(30):
                middle = (low + high) / 2
                p = log_q.exp() * (1 + rate * (theta - middle)).clamp(min=0) ** (1 / rate)
                above = p.sum(1, keepdim=True) > 1
                low, high = torch.where(above, middle, low), torch.where(above, high, middle)
            p /= p.sum(1, keepdim=True)
            p[:, 0] -= 1
        return (p * theta).sum(1).mean()  # its gradient is the loss's


class PaperFull(Paper):
    share = 1.0


class PaperOnePercent(Paper):
    share = 0.01


class CutCrossEntropy(Dense):
    """cut-cross-entropy. The margin is moved in by hand: it gives the normaliser too, or none."""

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        from cut_cross_entropy import (  # pyright: ignore[reportMissingImports]
            linear_cross_entropy,
        )

        e = (SCALE * F.normalize(x, dim=1)).to(torch.bfloat16)
        c = F.normalize(self.weight, dim=1).to(torch.bfloat16)
        try:
            nll, lse = linear_cross_entropy(e, c, labels, reduction="none", return_lse=True)
        except TypeError:  # of a version without it
            self.note = "without margin"
            return linear_cross_entropy(e, c, labels)
        own = lse - nll
        change = torch.log1p(
            torch.exp(own - lse) * (torch.exp(lse.new_tensor(-SCALE * MARGIN)) - 1)
        )
        return (lse + change - own + SCALE * MARGIN).mean()


class Liger(Dense):
    """liger-kernel's fused linear cross-entropy, which has no place for a margin."""

    note = "without margin"

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearCrossEntropyLoss,
        )

        e = (SCALE * F.normalize(x, dim=1)).to(torch.bfloat16)
        c = F.normalize(self.weight, dim=1).to(torch.bfloat16)
        return LigerFusedLinearCrossEntropyLoss()(c, e, labels)


CONTENDERS: dict[str, Callable] = {
    "Q-Margin, this package": Ours,
    "CosFace, fp16": Dense,
    "CosFace, TF32": DenseTF32,
    "ArcFace, fp16": DenseArcFace,
    "ArcFace, TF32": DenseArcFaceTF32,
    "Partial FC 0.1": PartialFC,
    "Q-Margin as its paper, 5 %": Paper,
    "cut-cross-entropy": CutCrossEntropy,
    "liger-kernel": Liger,
}


TWO_SHARDS = "Q-Margin, this package, two shards on one GPU"


def one_step(contender, x: Tensor, labels: Tensor) -> None:
    with torch.profiler.record_function("forward"):
        loss = contender.loss(x, labels)
    with torch.profiler.record_function("backward"):
        x.grad = None
        loss.backward()
    with torch.profiler.record_function("update"):
        contender.update()


def drawn(name: str, classes: int, dim: int, batch: int, noise: float | None, device):
    """A contender, and embeddings and labels for it."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = "TF32" in name or "paper" in name
    contender = CONTENDERS[name](classes, dim, device)
    labels = torch.randint(classes, (batch,), device=device)
    x = torch.randn(batch, dim, device=device)
    if noise is not None:
        x = contender.weight.detach()[labels] + noise * x
    return contender, x.requires_grad_(), labels


def step_of(name: str, classes: int, dim: int, batch: int, noise, device, dry: bool) -> dict:
    contender, x, labels = drawn(name, classes, dim, batch, noise, device)
    result = measured(lambda: one_step(contender, x, labels), device, dry)
    if isinstance(contender, Ours):  # they are what `peak_mb` has most of, far from the end
        contender.loss(x, labels).backward()
        assert contender.weight.grad is not None
        result["rows_with_gradient"] = contender.weight.grad.coalesce().indices().shape[1]
        contender.optimizer.zero_grad()
    note = getattr(contender, "note", None)
    return result | ({"note": note} if note else {})


def in_two_shards(classes: int, dim: int, batch: int, noise, device, dry: bool) -> dict:
    """Milliseconds of a step of two ranks with half of the classes, and of the samples, each.

    They are threads that share this GPU and one interpreter, and tell each other through memory: an
    upper bound of what two GPUs compute, without what they would send.
    """
    from ranks import on_ranks  # of the tests

    def of_rank(comm) -> list[float]:
        torch.manual_seed(comm.rank)
        ours = Ours(classes, dim, device, group=comm)
        half = batch // 2
        labels = torch.randint(ours.head.start, ours.head.stop, (half,), device=device)
        x = torch.randn(half, dim, device=device)
        if noise is not None:
            x = ours.weight.detach()[labels - ours.head.start] + noise * x
        x.requires_grad_()
        times = []
        for _ in range(2 if dry else 12):
            comm.barrier()
            synchronise(device)
            begin = time.perf_counter()
            one_step(ours, x, labels)
            synchronise(device)
            comm.barrier()
            times.append(time.perf_counter() - begin)
        return times

    torch.backends.cuda.matmul.allow_tf32 = False
    return {"ms": 1000 * statistics.median(on_ranks(2, of_rank, device)[0][-8:])}


# ------------------------------------------------------------------ the parts


def machine(report: Report, device: torch.device) -> None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    report.add(name, torch=torch.__version__, cuda=str(torch.version.cuda))
    if device.type != "cuda":
        report.add("no GPU: nothing below says anything about one")
    for package in ("triton", "pytest", "cut_cross_entropy", "liger_kernel"):
        try:
            module = importlib.import_module(package)
            report.add(package, version=str(getattr(module, "__version__", "?")))
        except ImportError:
            report.add(f"{package} is not installed: what needs it is left out")
    report.add("Triton's kernels of the loss", run=kernels_run(device))


def exactness(report: Report, device: torch.device) -> None:
    """The device against float64 on the CPU."""
    report.part("exactness")
    classes, rows = (300, 8) if report.dry else (17982, 64)
    generator = torch.Generator().manual_seed(0)
    w = F.normalize(torch.randn(classes, 64, generator=generator, dtype=torch.float64), dim=1)
    labels = torch.randint(classes, (rows,), generator=generator)
    x = w[labels] + 0.15 * torch.randn(rows, 64, generator=generator, dtype=torch.float64)

    def dense(alpha, scale, dtype, kernels) -> dict:
        cosines = (F.normalize(x, dim=1) @ w.T).to(dtype)
        found = []
        for at, there in ((cosines.double(), "cpu"), (cosines, device)):
            at = at.detach().to(there, copy=True).requires_grad_()
            with control_flow(kernels=kernels if there is device else False):
                loss = q_margin_loss(at, labels.to(there), alpha, scale, MARGIN, reduction="none")
                loss.sum().backward()
            assert at.grad is not None
            found.append((loss.detach().cpu().double(), at.grad.cpu().double() / scale))
        value = ((found[0][0] - found[1][0]).abs() / (1 + found[0][0])).max()
        return {
            "loss_error": float(value),
            "gradient_error": float((found[0][1] - found[1][1]).abs().max()),
        }

    def head(tf32: bool, autocast) -> dict:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        with torch.device(device):
            ours = Head(64, classes, ALPHA, SCALE, MARGIN)
        with torch.no_grad():
            ours.weight.copy_(w)
        optimizer = RowSparseSGD(ours.parameters(), lr=0.1, head=ours)
        scaler = torch.amp.GradScaler(device.type, enabled=autocast is torch.float16)
        leaf = x.float().to(device).requires_grad_()
        on = nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)
        with on:
            loss = ours(leaf, labels.to(device))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        exact = [x.float().double().requires_grad_(), w.float().double().requires_grad_()]
        cosines = F.normalize(exact[0], dim=1) @ F.normalize(exact[1], dim=1).T
        expected = q_margin_loss(cosines, labels, ALPHA, SCALE, MARGIN)
        expected.backward()
        assert exact[1].grad is not None
        after = exact[1].detach() - 0.1 * exact[1].grad
        return {
            "loss_error": float(
                (loss.detach().cpu().double() - expected.detach()).abs() / (1 + expected)
            ),
            "gradient_error": float((ours.weight.detach().cpu().double() - after).abs().max()),
        }

    for tf32 in (False, True):
        for autocast in (None, torch.float16, torch.bfloat16)[:: 1 + report.dry]:
            attempt(
                report,
                "head, one step",
                lambda t=tf32, a=autocast: head(t, a),
                dtype="float32" if autocast is None else f"autocast {str(autocast)[6:]}",
                tf32=tf32,
            )
    torch.backends.cuda.matmul.allow_tf32 = False

    ways = [False, True] if kernels_run(device) else [False]
    for alpha, scale in (
        (1.0, 32.0),
        (1.05, 32.0),
        (1.25, 32.0),
        (1.5, 10.0),
        (1.75, 5.0),
        (2.0, 5.0),
        (2.5, 4.0),
    ):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)[
            :: 1 + report.dry
        ]:
            for kernels in ways:
                attempt(
                    report,
                    "dense",
                    lambda a=alpha, s=scale, d=dtype, k=kernels: dense(a, s, d, k),
                    alpha=alpha,
                    dtype=str(dtype)[6:],
                    kernels=kernels,
                )

    def tests(path: str) -> dict:
        importlib.import_module("pytest")
        root = Path(__file__).resolve().parent.parent
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path]
        command += [f"--device={device.type}"]
        if importlib.util.find_spec("xdist"):  # most of the time goes into compiling kernels
            command += ["-n", str(min(12, os.cpu_count() or 1))]
        answer = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=max(5, report.left())
        )
        lines = answer.stdout.strip().splitlines() or answer.stderr.strip().splitlines() or [""]
        return {"note": lines[-1][:200]}

    for path in [] if report.dry else TESTS:
        attempt(report, path, lambda path=path: tests(path))


# classes, dimension, batch, and the noise of the embeddings; None: they know nothing yet
Step = tuple[int, int, int, float | None]

DRY_STEPS: list[Step] = [(500, 16, 4, 0.05), (500, 16, 4, None)]
STEPS: list[Step] = [(1_000_000, 512, 128, 0.05), (1_000_000, 512, 1024, 0.05)]
STEPS += [(2_000_000, 512, 128, 0.05), (2_000_000, 512, 1024, 0.05)]
STEPS += [(1_000_000, 512, 128, None), (1_000_000, 512, 1024, None)]
STEPS += [(100_000, 512, 128, 0.05), (100_000, 512, 1024, 0.05)]
STEPS += [(1_000_000, 192, 128, 0.05), (1_000_000, 192, 1024, 0.05)]
STEPS += [(10_000_000, 192, 1024, 0.05), (10_000_000, 512, 128, 0.05), (17_982, 192, 256, None)]


def named(classes: int, dim: int, batch: int, noise: float | None) -> str:
    return f"{classes}x{dim}x{batch}{'far' if noise is None else ''}"


def steps(
    report: Report, device: torch.device, contenders: list[str], wanted: list[str] | None
) -> None:
    report.part("step")
    speed = bandwidth(device, report.dry)
    report.add("bandwidth of a copy", gb_a_second=speed / 1e9)
    dry = report.dry
    sizes = [at for at in (DRY_STEPS if dry else STEPS) if not wanted or named(*at) in wanted]
    if not wanted:
        compute_dense_loss(report, device)
    for classes, dim, batch, noise in sizes:
        roofline = 1000 * 2 * classes * dim / speed
        for name in contenders:
            run = in_two_shards if name == TWO_SHARDS else partial(step_of, name)
            attempt(
                report,
                name,
                partial(run, classes, dim, batch, noise, device, dry),
                classes=classes,
                dim=dim,
                batch=batch,
                noise="far" if noise is None else noise,
                roofline_ms=roofline,
            )


def compute_dense_loss(report: Report, device: torch.device) -> None:
    """Losses on given cosines, beside SpeechBrain's AAM."""
    from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper

    classes, batch = (500, 4) if report.dry else (17982, 256)
    torch.manual_seed(0)
    cosines = torch.rand(batch, 1, classes, device=device) * 0.6 - 0.3
    labels = torch.randint(classes, (batch, 1), device=device)
    losses: dict[str, tuple[Callable, bool]] = {
        "SpeechBrain AAM": (LogSoftmaxWrapper(AdditiveAngularMargin(0.2, 30)), False)
    }
    for alpha, scale in ((1.25, 32.0), (1.5, 10.0), (1.75, 5.0), (2.0, 5.0)):
        loss = QMarginLoss(alpha, scale)
        losses[f"Q-Margin, alpha {alpha}, torch"] = loss, False
        if kernels_run(device):
            losses[f"Q-Margin, alpha {alpha}, Triton"] = loss, True
    losses["CosFace of this package"] = CosFaceLoss(), kernels_run(device)
    for name, (loss, kernels) in losses.items():
        leaf = cosines.clone().requires_grad_()

        def step(loss=loss, leaf=leaf, kernels=kernels):
            leaf.grad = None
            with control_flow(kernels=kernels):
                loss(leaf, labels).backward()

        attempt(
            report,
            f"dense loss: {name}",
            lambda step=step: measured(step, device, report.dry),
            classes=classes,
            batch=batch,
        )


def anatomy(report: Report, device: torch.device) -> None:
    """Where the time of the head's step goes: the kernels that take most of it."""
    from torch.profiler import ProfilerActivity, profile

    report.part("anatomy")
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []

    def add(classes: int, dim: int, batch: int, noise: float | None) -> dict:
        contender, x, labels = drawn("Q-Margin, this package", classes, dim, batch, noise, device)
        for _ in range(1 if report.dry else 4):
            one_step(contender, x, labels)
        synchronise(device)
        start = time.perf_counter()
        one_step(contender, x, labels)
        synchronise(device)
        whole = time.perf_counter() - start
        with profile(activities=activities) as trace:
            one_step(contender, x, labels)
            synchronise(device)
        scores = contender.head(x)
        support = scores.q_margin_loss(labels, ALPHA, SCALE, MARGIN, return_stats=True)[
            1
        ].support_mean
        # an operator and a range have the time of their kernels too
        events = trace.events() or []
        spans = {e.name for e in events if e.device_type.name == "CPU"}
        found = [
            event
            for event in trace.key_averages()
            if event.self_device_time_total > 0 and event.key not in spans
        ]
        found.sort(key=lambda event: -event.self_device_time_total)
        for event in found[:18]:
            report.add(
                event.key[:70],
                classes=classes,
                dim=dim,
                batch=batch,
                noise="far" if noise is None else noise,
                launches=event.count,
                us=event.self_device_time_total,
            )
        return {
            "wall_ms": 1000 * whole,
            "device_ms": sum(event.self_device_time_total for event in found) / 1000,
            "support": float(support),
        }

    sizes = [(500, 16, 4, 0.05)]
    if not report.dry:
        sizes = [(1_000_000, 512, batch, 0.05) for batch in (128, 1024)]
        sizes += [(1_000_000, 512, 1024, None), (100_000, 512, 128, 0.05)]
    for classes, dim, batch, noise in sizes:
        attempt(
            report,
            "a step of the head",
            lambda c=classes, d=dim, b=batch, z=noise: add(c, d, b, z),
            classes=classes,
            dim=dim,
            batch=batch,
            noise="far" if noise is None else noise,
        )


def training(report: Report, device: torch.device, models: list[str]) -> None:
    """Samples a second of a whole step, encoder included."""
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

    from speechbrain_qmargin.models.iresnet import IResNet
    from speechbrain_qmargin.models.resnet import ResNet

    report.part("training")
    dry = report.dry
    half = torch.float16 if device.type == "cuda" else torch.bfloat16

    def rate(make_encoder, contender, dim: int, classes: int, inputs: Callable[[], Tensor]) -> dict:
        torch.manual_seed(0)
        encoder = make_encoder().to(device).train()
        head = contender(classes, dim, device)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-3, momentum=MOMENTUM)
        scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16, init_scale=1024.0)
        x = inputs()
        labels = torch.randint(classes, (len(x),), device=device)

        def step() -> None:
            with torch.autocast(device.type, dtype=half):
                embeddings = encoder(x).flatten(1).float()
            loss = head.loss(embeddings, labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            head.update()

        result = measured(step, device, dry)
        return result | {"samples_a_second": 1000 * len(x) / result["ms"]}

    heads: dict[str, Callable] = {
        "ArcFace": DenseArcFace,
        "Q-Margin, this package": Ours,
        "Q-Margin, this package, dense": DenseQMargin,
        "Q-Margin as its paper, full": PaperFull,
        "Q-Margin as its paper, 5 %": Paper,
        "Q-Margin as its paper, 1 %": PaperOnePercent,
    }
    classes, batch = (300, 2) if dry else (2_000_000, 128)
    for name, contender in heads.items() if "IResNet" in models else ():
        attempt(
            report,
            f"IResNet-{18 if dry else 100}, {name}",
            lambda c=contender: rate(
                lambda: IResNet(18, channels=4) if dry else IResNet(100),
                c,
                512,
                classes,
                lambda: torch.randn(batch, 3, 112, 112, device=device),
            ),
            classes=classes,
            batch=batch,
        )

    class Ecapa(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            wide = 16 if dry else 1024
            self.net = ECAPA_TDNN(80, channels=[wide] * 4 + [3 * wide], lin_neurons=192)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    classes, batch = (300, 4) if dry else (17982, 256)
    for model, make, dim in (
        ("ECAPA", Ecapa, 192),
        ("ResNet34", lambda: ResNet(channels=4 if dry else 32), 256),
    ):
        ours = ("Q-Margin, this package", "Q-Margin, this package, dense")
        for name in ("ArcFace", *ours) if model in models else ():
            attempt(
                report,
                f"{model}, {name}",
                lambda m=make, d=dim, n=name: rate(
                    m,
                    heads[n],
                    d,
                    classes,
                    lambda: torch.randn(batch, 24 if dry else 200, 80, device=device),
                ),
                classes=classes,
                batch=batch,
            )

    def loader() -> dict:
        """The real loader on generated voices; its own table goes to a file."""
        importlib.import_module("espeakng_loader")
        script = Path(__file__).with_name("data_throughput.py")
        answer = subprocess.run(
            [sys.executable, str(script), "--no_models", "--count", "100", "--seconds", "2"],
            capture_output=True,
            text=True,
            timeout=max(5, report.left()),
        )
        (report.folder / "loader.txt").write_text(answer.stdout + answer.stderr, encoding="utf-8")
        return {"note": "loader.txt: crops a second, beside the rates above"}

    if not dry:
        attempt(report, "the loader on generated voices", loader)


def small(report: Report) -> None:
    report.part("small")
    report.add(
        "trainings on real data are not in this script: benchmarks/evidence.py DATA OUT, which "
        "goes on where it was stopped"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry", action="store_true", help="small tensors; a CPU will do")
    parser.add_argument("--parts", nargs="+", default=[*SECONDS])
    parser.add_argument("--minutes", type=float, default=7.5, help="for all parts together")
    known = [*CONTENDERS, TWO_SHARDS]
    parser.add_argument("--contenders", nargs="+", default=known, help="of a step")
    sizes = [named(*at) for at in STEPS]
    parser.add_argument(
        "--sizes", nargs="+", choices=sizes, help="of a step; without it all, and the dense losses"
    )
    models = ["IResNet", "ECAPA", "ResNet34"]
    parser.add_argument("--models", nargs="+", choices=models, default=models, help="to train")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(args.out, args.dry, args.minutes)
    machine(report, device)
    if device.type != "cuda" and not args.dry:
        raise SystemExit("no GPU is here: --dry runs the same code on small tensors")
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # SpeechBrain's import turns it on
    contenders = [name for name in known if name in args.contenders]
    parts = {"exactness": exactness, "anatomy": anatomy}
    parts["training"] = partial(training, models=args.models)
    parts["step"] = partial(steps, contenders=contenders, wanted=args.sizes)
    try:
        for name in args.parts:
            if name == "small":
                small(report)
            else:
                parts[name](report, device)
    except KeyboardInterrupt:
        report.add("stopped; what is above was done")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


if __name__ == "__main__":
    main()
