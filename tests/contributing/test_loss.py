"""A loss of one's own: one file outside the package, no other change."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hyperpyyaml import load_hyperpyyaml

from speechbrain_qmargin import QMarginHead, make_loss

FILE = '''
"""Hard samples get the larger margin: cos(theta) moves to cos(theta) - margin (1 - cos(theta))."""

from speechbrain_qmargin import Loss, Objective


class HardMarginLoss(Loss):
    settings = ("scale", "margin")

    def __init__(self, scale=16.0, margin=0.3):
        super().__init__(scale=scale, margin=margin)

    def objective(self, scores, targets):
        return Objective(
            scale=self.scale,
            move_target=lambda cosines: cosines - self.margin * (1 - cosines),
        )
'''


@pytest.fixture
def loss(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    yield make_loss("my_losses:HardMarginLoss", margin=0.2)
    sys.modules.pop("my_losses", None)


def test_it_is_found_by_name_and_in_a_yaml(loss):
    assert repr(loss) == "HardMarginLoss(scale=16, margin=0.2)"
    assert type(make_loss("my_losses.HardMarginLoss")) is type(loss)
    text = "cost: !new:my_losses.HardMarginLoss\n    margin: 0.5\n"
    assert load_hyperpyyaml(text)["cost"].margin == 0.5
    loss.set(margin=0.4)  # as a schedule does
    assert loss.value("margin") == 0.4
    assert make_loss("my_losses:HardMarginLoss", margin="large").margin == 0.5
    with pytest.raises(ValueError, match="has no alpha"):
        make_loss("my_losses:HardMarginLoss", alpha=1.5)
    with pytest.raises(ValueError, match=r"No module named 'his_losses'.*PYTHONPATH"):
        make_loss("his_losses:HardMarginLoss")
    with pytest.raises(ValueError, match="not a subclass of"):
        make_loss("torch.nn:Linear")


def test_it_trains_a_step_on_the_dense_and_on_the_sparse_head(loss):
    """The same step, and that of the formula written out."""
    torch.manual_seed(0)
    head = QMarginHead(8, 30)
    x, labels = torch.randn(5, 1, 8), torch.randint(30, (5, 1))
    sparse, dense, naive = (x.clone().requires_grad_() for _ in range(3))
    weight = head.weight.detach().clone().requires_grad_()
    loss(head.train()(sparse), labels).backward()

    def cosines(x):
        return F.normalize(x[:, 0], dim=1) @ F.normalize(weight, dim=1).T

    loss(cosines(dense).unsqueeze(1), labels).backward()
    of_dense, weight.grad = weight.grad, None
    logits = cosines(naive)
    own = logits.gather(1, labels)
    logits = 16 * logits.scatter(1, labels, own - 0.2 * (1 - own))
    F.cross_entropy(logits, labels[:, 0]).backward()
    of_sparse = head.weight.grad
    assert of_sparse is not None
    for found, gradient in ((dense, of_dense), (sparse, of_sparse.to_dense())):
        torch.testing.assert_close(found.grad, naive.grad)
        torch.testing.assert_close(gradient, weight.grad)
