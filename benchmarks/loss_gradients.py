"""What each loss pulls and pushes, over the target's and the hardest wrong class's cosine.

    python benchmarks/loss_gradients.py docs/losses.png

One panel for each loss of the registry (but for qmargin_f, which is slow) at its own settings:
colour is the pull on the target, -dL/dcos / s, lines are the push on the hardest wrong class at 0.1
and 0.5, and hatched is where both are exactly zero. The other 998 wrong classes are where random
prototypes of 192 dimensions are. Losses by the embedding's norm see one of middle quality.
"""

import argparse
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from speechbrain_qmargin import LOSSES, Loss, make_loss
from speechbrain_qmargin.files import replacing
from speechbrain_qmargin.loss.dense import DenseScores

CLASSES, DIM, ACROSS = 1000, 192, 6
AT_ONCE = 500  # points
SLOW = "qmargin_f"  # seconds for every few hundred points: drawn where it is asked for
TARGETS, HARDEST = torch.linspace(-0.2, 1, 121), torch.linspace(0.25, 1, 76)
GREY, REST = "#767676", "#9a9a9a"  # read on white and on black
CMAP = ListedColormap(colormaps["magma"](torch.linspace(0.05, 0.88, 256).numpy()))
NORMS = {"magface": 60.0, "qmargin_magnitude": 60.0}  # 20 is the middle of the others at first
MORE = {"curricularface": "t 0.4", "qmargin_prior": "a class 10 times rarer"}
SHORT = {"alpha": "α", "scale": "s", "margin": "m", "m1": "m1", "m2": "m2", "m3": "m3"}


def grid() -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines [N, C] of every point, and targets [N]: class 0 is the target, 1 the hardest."""
    shares = (torch.arange(CLASSES - 2) + 0.5) / (CLASSES - 2)
    others = torch.special.ndtri(shares) / DIM**0.5
    own, hardest = torch.meshgrid(TARGETS, HARDEST, indexing="ij")
    points = torch.stack((own.flatten(), hardest.flatten()), 1)
    cosines = torch.cat((points, others.expand(len(points), -1)), 1)
    return cosines, torch.zeros(len(points), dtype=torch.int64)


def prepared(name: str) -> Loss:
    """A loss at its own settings, as it is late in training where that matters."""
    cls = LOSSES[name]
    loss = make_loss(name, num_classes=CLASSES, embedding_dim=DIM).eval()
    if cls.needs_counts:
        counts = torch.full((CLASSES,), 10.0)
        counts[0] = 1.0
        loss.count_classes(counts, DIM)
    if name == "curricularface":
        loss.t = torch.tensor(0.4, dtype=torch.float64)
    return loss


def gradients(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(pull on the target, push on the hardest), both over s, [targets, hardest]."""
    loss, found = prepared(name), []
    for cosines, targets in zip(*(part.split(AT_ONCE) for part in grid()), strict=True):
        cosines = cosines.clone().requires_grad_()
        embeddings = torch.zeros(len(cosines), DIM)
        embeddings[:, 0] = NORMS.get(name, 20.0)
        loss.rows(DenseScores(cosines, embeddings), targets).loss.sum().backward()
        assert cosines.grad is not None
        found.append(cosines.grad[:, :2].clone())
    found = torch.cat(found) / loss.value("scale")
    shape = len(TARGETS), len(HARDEST)
    return -found[:, 0].view(shape), found[:, 1].view(shape)


def caption(name: str) -> str:
    loss = prepared(name)
    shown = [f"{SHORT[key]} {loss.value(key):.3g}" for key in loss.settings if key in SHORT]
    return ", ".join([*shown[:4], *([MORE[name]] if name in MORE else [])])


def picture(names: list[str]) -> Figure:
    down = -(-len(names) // ACROSS)
    figure = Figure(figsize=(2.1 * ACROSS, 1.85 * down + 0.6), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(down, ACROSS, sharex=True, sharey=True, squeeze=False)
    image = None
    for axis, name in zip(axes.flat, names, strict=False):
        pull, push = (part.T.numpy() for part in gradients(name))
        axis.set_facecolor(REST)
        axis.fill_between([-0.2, 1], 0.25, 1, hatch="////", facecolor=REST, edgecolor="#c8c8c8")
        rest = (pull == 0) & (push == 0)
        shown = pull.copy()
        shown[rest] = float("nan")
        extent = (-0.2, 1, 0.25, 1)
        image = axis.imshow(
            shown, origin="lower", extent=extent, aspect="auto", cmap=CMAP, vmin=0, vmax=1, zorder=2
        )
        axis.contour(
            TARGETS.numpy(),
            HARDEST.numpy(),
            push,
            levels=[0.1, 0.5],
            colors="white",
            linewidths=[0.7, 1.4],
            zorder=3,
        )
        axis.plot([0.25, 1], [0.25, 1], color="white", linestyle=":", linewidth=0.8, zorder=3)
        axis.set_title(f"{name}\n", color=GREY, fontsize=9, fontweight="bold", pad=2)
        axis.text(
            0.5, 1.02, caption(name), color=GREY, fontsize=7, ha="center", transform=axis.transAxes
        )
        axis.tick_params(colors=GREY, labelsize=7)
        for side in axis.spines.values():
            side.set_color(GREY)
    for place, axis in enumerate(axes.flat):
        if place >= len(names):
            axis.set_axis_off()
        axis.tick_params(labelbottom=place + ACROSS >= len(names))
    figure.supxlabel("cosine of the target", color=GREY, fontsize=9)
    figure.supylabel("cosine of the hardest wrong class", color=GREY, fontsize=9)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=0.5, extend="max", pad=0.01)
        bar.set_label("pull on the target / s", color=GREY, fontsize=9)
        bar.ax.tick_params(colors=GREY, labelsize=7)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path)
    drawn = [name for name in LOSSES if name != SLOW]
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=drawn)
    args = parser.parse_args()
    with replacing(args.picture) as partial:
        picture(args.losses).savefig(partial, dpi=110, format="png", transparent=True)


if __name__ == "__main__":
    main()
