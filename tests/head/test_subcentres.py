"""Several prototypes of each class, dense and sparse, against pytorch-metric-learning."""

import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import SubCenterArcFaceLoss
from speechbrain.lobes.models.ECAPA_TDNN import Classifier

from speechbrain_qmargin import QMarginHead, make_loss, q_margin_loss
from speechbrain_qmargin.head import RowSparseSGD, search
from speechbrain_qmargin.head.sizes import Sizes
from speechbrain_qmargin.models.classifier import CosineClassifier

DIM, K = 8, 3


def batch(classes, rows=7, seed=0, noise=0.3, kind=torch.float32):
    torch.manual_seed(seed)
    weight = torch.randn(classes * K, DIM, dtype=kind)
    labels = torch.randint(classes, (rows,))
    x = weight[labels * K + labels % K] + noise * torch.randn(rows, DIM, dtype=kind)
    return x, weight, labels


def wanted(x, weight, labels, loss):
    """Loss and gradients in float64, the maximum written out."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    cosines = F.normalize(x, dim=1) @ F.normalize(weight, dim=1).T
    nearest = torch.stack([cosines[:, k::K] for k in range(K)]).amax(0)
    value = loss(nearest, labels)
    value.backward()
    return value.detach(), x.grad, weight.grad


def of_head(head, x, weight, labels, loss):
    with torch.no_grad():
        head.weight.copy_(weight)
    x = x.clone().requires_grad_()
    head.weight.grad = None
    value = loss(head.train()(x), labels)
    value.backward()
    grad = head.weight.grad
    return value.detach(), x.grad, grad.to_dense() if grad.is_sparse else grad


def assert_near(found, want, tolerance=2e-5):
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("screened", [False, True])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("arcface", {"scale": 16}),
        ("curricularface", {"scale": 16}),
        ("cosface", {"scale": 16}),
        ("qmargin", {"alpha": 1.25, "scale": 16}),
        ("qmargin", {"alpha": 1.5}),
        ("qmargin", {"alpha": 1.5, "scale": 0.1}),  # everything is active
        ("sparsemax", {}),
    ],
)
def test_the_sparse_head_is_exact(name, settings, screened):
    sizes = Sizes(screen_from=1) if screened else None
    for classes in (1, 2, 50, 601):
        x, weight, labels = batch(classes)
        head = QMarginHead(DIM, classes, subcentres=K, sizes=sizes)
        found = of_head(head, x, weight, labels, make_loss(name, **settings))
        assert_near(found, wanted(x, weight, labels, make_loss(name, **settings)))


@pytest.mark.parametrize("sizes", [None, Sizes(screen_from=1, sample=10, most=2.0)])
def test_rows_of_one_class_do_not_count_twice(sizes):
    """Equal rows, and rows so near that all of a class's are active: tau would be too high."""
    for noise in (0.0, 1e-3):
        torch.manual_seed(0)
        centres = F.normalize(torch.randn(40, DIM), dim=1)
        weight = centres.repeat_interleave(K, 0) + noise * torch.randn(40 * K, DIM)
        labels = torch.arange(7)
        x = centres[labels] + 0.5 * torch.randn(7, DIM)
        head = QMarginHead(DIM, 40, subcentres=K, sparse_grad=True, sizes=sizes)
        with torch.no_grad():
            head.weight.copy_(weight)
        cosines = F.normalize(x.double(), dim=1) @ F.normalize(weight.double(), dim=1).T
        nearest = cosines.unflatten(1, (-1, K)).amax(2)
        rows = q_margin_loss(nearest, labels, 1.5, 10.0, 0.2, reduction="none")
        loss = make_loss("qmargin")
        found = loss.rows(head(x.requires_grad_()), labels, statistics=True)
        torch.testing.assert_close(found.loss.double(), rows, rtol=1e-6, atol=1e-6)
        assert (found.support <= 40).all()
        found.loss.sum().backward()
        touched = head.weight.grad.coalesce().indices()[0]
        assert 7 < len(touched) <= found.support.sum() + 7  # never two rows of a class


def test_one_row_of_a_class_is_kept_in_candidates():
    query = search.Query(
        *[torch.zeros(2, 1)] * 2,
        torch.zeros(2, dtype=torch.long),
        torch.zeros(2),
        None,
        1.0,
        0.0,
        9,
        2,
    )
    cosines = torch.tensor([[0.5, 0.4, 0.3, 0.3], [0.1, 0.2, 0.6, -math.inf]])
    rows = torch.tensor([[2, 3, 4, 5], [3, 2, 7, 0]])
    kept = search.nearest_rows(query, search.Candidates(cosines, rows))
    none = -math.inf
    assert torch.equal(kept.cosines, torch.tensor([[0.5, none, 0.3, none], [none, 0.2, 0.6, none]]))


def test_it_is_pytorch_metric_learnings_sub_center_arcface():
    classes = 20
    x, weight, labels = batch(classes, rows=9)
    x[0] = -weight[labels[0] * K]  # beyond pi - margin of one of its centres
    theirs = SubCenterArcFaceLoss(
        num_classes=classes,
        embedding_size=DIM,
        margin=math.degrees(0.3),
        scale=16,
        sub_centers=K,
    )
    with torch.no_grad():
        theirs.W.copy_(weight.T)
    mine = x.clone().requires_grad_()
    value = theirs(mine, labels)
    value.backward()
    want = value.detach(), mine.grad, theirs.W.grad.T
    loss = make_loss("arcface", scale=16, margin=0.3)
    dense = CosineClassifier(DIM, classes, K)
    for head in (dense, QMarginHead(DIM, classes, subcentres=K)):
        found = of_head(head, x.unsqueeze(1), weight, labels, loss)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a.squeeze(1) if a.ndim == 3 else a, b, rtol=1e-4, atol=1e-5)


def test_with_one_prototype_it_is_speechbrains_classifier():
    torch.manual_seed(1)
    theirs = Classifier(DIM, out_neurons=5)
    torch.manual_seed(1)
    ours = CosineClassifier(DIM, 5)
    x = torch.randn(3, 1, DIM)
    assert torch.equal(ours(x), theirs(x))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with pytest.raises(ValueError, match="subcentres must be a whole number >= 1, got 0"):
        CosineClassifier(DIM, 5, 0)
    with pytest.raises(ValueError, match=rf"takes embeddings of {DIM} dim.* set embedding_dim"):
        ours(torch.randn(2, 1, DIM + 1))
    with pytest.raises(ValueError, match="subcentres must be a positive integer, got 0"):
        QMarginHead(DIM, 5, subcentres=0)


def test_prototypes_start_with_the_coordinates_asked_for():
    torch.manual_seed(0)
    dense, head = CosineClassifier(64, 200, prototype_std=0.02), QMarginHead(64, 200, seed=3)
    assert float(dense.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert float(head.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    longer = QMarginHead(64, 200, seed=3, prototype_std=0.02)
    torch.testing.assert_close(longer.weight, 2 * head.weight, rtol=1e-6, atol=0)
    for wrong in (0, -0.01, math.nan, math.inf):
        for cls in (CosineClassifier, QMarginHead):
            with pytest.raises(ValueError, match=r"prototype_std must be a finite number > 0, got"):
                cls(4, 5, prototype_std=wrong)
    with pytest.raises(ValueError, match=r"prototype_std must be .*, got None"):  # Xavier's, dense
        QMarginHead(4, 5, prototype_std=None)


@pytest.mark.parametrize("subcentres", [1, K])
def test_the_dense_classifier_stays_in_float32_under_autocast(subcentres):
    torch.manual_seed(0)
    classifier = CosineClassifier(DIM, 11, subcentres)
    x = torch.randn(5, 1, DIM, dtype=torch.bfloat16)  # as an encoder gives them there
    wanted = classifier(x.float())
    wanted.sum().backward()
    gradient = classifier.weight.grad.clone()
    classifier.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = classifier(x)
        assert found.dtype == torch.float32
    found.sum().backward()
    assert torch.equal(found, wanted)
    assert torch.equal(classifier.weight.grad, gradient)


def test_evaluation_and_checkpoints(tmp_path):
    head = QMarginHead(DIM, 11, subcentres=K, seed=0)
    optimizer = RowSparseSGD(head.parameters(), lr=0.3, momentum=0.9, head=head)
    x = torch.randn(5, DIM)
    for _ in range(2):
        optimizer.zero_grad()
        head(x, torch.arange(5)).backward()
        optimizer.step()
    cosines = head.eval()(x)
    rows = F.normalize(x, dim=1) @ F.normalize(head.weight, dim=1).T
    torch.testing.assert_close(cosines[:, 0], rows.unflatten(1, (-1, K)).amax(2))
    head.save_shards(tmp_path, optimizer)
    other = QMarginHead(DIM, 11, subcentres=K, seed=1)
    again = RowSparseSGD(other.parameters(), lr=0.3, momentum=0.9, head=other)
    other.load_shards(tmp_path, again)
    assert torch.equal(other.weight, head.weight)
    fewer = QMarginHead(DIM, 4, subcentres=K)
    fewer.load_shards(tmp_path, first_rows=True)
    assert torch.equal(fewer.weight, head.weight[: 4 * K])
    with pytest.raises(ValueError, match=r"subcentres, num_classes\) = \(8, 3, 11\).*\(8, 1, 11\)"):
        QMarginHead(DIM, 11).load_shards(tmp_path)
