"""What a step of each loss costs: forward and backward on given cosines, side by side in one run.

    python benchmarks/loss.py [--repetitions 15] [--cpu_time]
    python benchmarks/loss.py --family --batch 128 --classes 5994       every loss beside ArcFace
    python benchmarks/loss.py --sparse qmargin qmargin_f --batch 128    these on the sparse head

Contenders take turns, so a drift of the machine's speed meets all of them; medians are printed.
"Near" embeddings lie about their prototype (a trained network), "far" ones are independent of it
(the first steps). On a machine that is not idle use --cpu_time: one thread, and only the time it
had the processor.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from entmax import entmax_bisect_loss
from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper
from torch import Tensor

from speechbrain_qmargin import LOSSES, Loss, QMarginHead, QMarginLoss, make_loss
from speechbrain_qmargin.head import RowSparseSGD
from speechbrain_qmargin.loss.dense import DenseScores

# alpha: scale, as the paper pairs them
SCALES = {1.0: 32.0, 1.25: 32.0, 1.5: 10.0, 1.75: 5.0, 2.0: 5.0}


def family(classes: int) -> dict:
    """Every loss of the registry, with embeddings for those that look at them."""
    embeddings: dict[int, Tensor] = {}

    def step(loss: Loss):
        def value(cosines: Tensor, labels: Tensor) -> Tensor:
            batch = len(labels)
            if batch not in embeddings:
                embeddings[batch] = 20 * F.normalize(torch.randn(batch, 192), dim=1)
            return loss(DenseScores(cosines, embeddings[batch]), labels)

        return value

    steps = {}
    for name, cls in LOSSES.items():
        loss = make_loss(name, num_classes=classes, embedding_dim=192)
        if cls.needs_counts:
            loss.count_classes(torch.full((classes,), 100.0), 192)
        steps[name] = step(loss)
    return steps


def contenders(classes: int, everyone: bool) -> dict:
    if everyone:
        return family(classes)
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        f"Q-Margin, alpha {alpha:g}": QMarginLoss(alpha, s) for alpha, s in SCALES.items()
    }
    for alpha in (1.25, 1.5, 1.75, 2.0):
        losses[f"entmax_bisect_loss, alpha {alpha:g}"] = lambda cosines, labels, alpha=alpha: (
            entmax_bisect_loss(SCALES[alpha] * cosines[:, 0], labels[:, 0], alpha).mean()
        )
    for name in ("arcface", "combined", "elasticface", "curricularface", "intertopk"):
        losses[name] = make_loss(name)
    losses["SpeechBrain AdditiveAngularMargin"] = LogSoftmaxWrapper(AdditiveAngularMargin(0.2, 30))
    losses["cross_entropy of log_softmax"] = lambda cosines, labels: F.cross_entropy(
        30 * cosines[:, 0], labels[:, 0]
    )
    return losses


def measure(
    batch: int,
    classes: int,
    noise: float | None,
    repetitions: int,
    clock=time.perf_counter,
    everyone: bool = False,
) -> dict[str, float]:
    """Median milliseconds of a step of each contender."""
    torch.manual_seed(0)
    prototypes = F.normalize(torch.randn(classes, 192), dim=1)
    labels = torch.randint(classes, (batch, 1))
    embeddings = torch.randn(batch, 192)
    if noise is not None:
        embeddings = prototypes[labels[:, 0]] + noise * embeddings
    cosines = (F.normalize(embeddings, dim=1) @ prototypes.T).unsqueeze(1).requires_grad_()
    compared = contenders(classes, everyone)
    times: dict[str, list[float]] = {name: [] for name in compared}
    for repetition in range(repetitions + 1):
        for name, loss in compared.items():
            cosines.grad = None
            start = clock()
            loss(cosines, labels).backward()
            if repetition:
                times[name].append(clock() - start)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def measure_sparse(
    names: list[str], batch: int, classes: int, noise: float | None, repetitions: int, clock
) -> dict[str, float]:
    """As :func:`measure`, of losses on the sparse head, with the step of the prototypes."""
    torch.manual_seed(0)
    heads = [QMarginHead(192, classes, seed=0) for _ in names]
    optimizers = [RowSparseSGD([head.weight], lr=1e-6, head=head) for head in heads]
    losses = [make_loss(name) for name in names]
    labels = torch.randint(classes, (batch,))
    embeddings = torch.randn(batch, 192)
    if noise is not None:
        embeddings = F.normalize(heads[0].weight.detach()[labels], dim=1) + noise * embeddings
    embeddings = 60 * F.normalize(embeddings, dim=1)  # between the norms of qmargin_magnitude
    times: list[list[float]] = [[] for _ in names]
    for repetition in range(repetitions + 1):
        for each, head, optimizer, loss in zip(times, heads, optimizers, losses, strict=True):
            x = embeddings.clone().requires_grad_()
            start = clock()
            loss(head(x), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if repetition:
                each.append(clock() - start)
    return {name: 1000 * statistics.median(each) for name, each in zip(names, times, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--classes", type=int, nargs="+", default=[5994, 17982])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--family", action="store_true", help="every loss of the registry")
    parser.add_argument("--sparse", nargs="+", metavar="LOSS", help="these on the sparse head")
    parser.add_argument("--cpu_time", action="store_true", help="processor time of one thread")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)

    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, B = {args.batch}"
    )
    settings = [(c, noise) for c in args.classes for noise in (0.05, None)]
    columns = [
        measure_sparse(args.sparse, args.batch, c, noise, args.repetitions, clock)
        if args.sparse
        else measure(args.batch, c, noise, args.repetitions, clock, args.family)
        for c, noise in settings
    ]
    heads = [f"C = {c:,}, {'far' if noise is None else 'near'}" for c, noise in settings]
    unit = "arcface" if args.family else "SpeechBrain AdditiveAngularMargin"
    against = "arcface" if args.family else "AAM; over entmax at the same alpha"
    if args.sparse:
        unit = against = args.sparse[0]
    print(f"| ms a step (over {against}) | " + " | ".join(heads) + " |")
    print("|---|" + "---|" * len(heads))
    for name in columns[0]:
        cells = []
        for column in columns:
            ratios = [f"{column[name] / column[unit]:.2f}"]
            rival = f"entmax_bisect_loss,{name.partition(',')[2]}"
            if name.startswith("Q-Margin") and rival in column:
                ratios.append(f"{column[name] / column[rival]:.3f}")
            cells.append(f"{column[name]:.1f} ({'; '.join(ratios)})")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
