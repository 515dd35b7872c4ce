"""Row-sparse SGD against torch.optim.SGD on the same gradients, made dense."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechbrain_qmargin.head import QMarginHead, RowSparseSGD, classifier, optim


@settings(max_examples=60, deadline=None)
@given(
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    decay=st.sampled_from([0.0, 1e-4, 0.1]),
    nesterov=st.booleans(),
    dense_at=st.integers(0, 60),
    save_at=st.integers(0, 60),
    max_idle=st.sampled_from([4096, 7]),
    seed=st.integers(0, 1000),
)
def test_equals_dense_sgd(momentum, decay, nesterov, dense_at, save_at, max_idle, seed):
    options = dict(
        lr=0.1, momentum=momentum, weight_decay=decay, nesterov=nesterov and momentum > 0
    )
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(20, 3, generator=generator)
    rows, dense = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine, theirs = RowSparseSGD([rows], **options), torch.optim.SGD([dense], **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "_MAX_IDLE", max_idle)
        patch.setattr(optim, "_ROWS_AT_ONCE", 4)
        for step in range(50):
            chosen = torch.randint(20, (3,), generator=generator)  # some twice: not coalesced
            grad = torch.sparse_coo_tensor(
                chosen[None], torch.randn(3, 3, generator=generator), (20, 3), check_invariants=True
            )
            dense.grad = grad.to_dense()
            rows.grad = dense.grad.clone() if step == dense_at else grad
            for optimizer in (mine, theirs):
                optimizer.param_groups[0]["lr"] = 0.2 / (1 + step)
                optimizer.step()
            if step == save_at:  # a resumed run, and a state that dense SGD can read
                state = mine.state_dict()
                torch.optim.SGD([torch.nn.Parameter(start.clone())], **options).load_state_dict(
                    state
                )
                rows = torch.nn.Parameter(rows.detach().clone())
                mine = RowSparseSGD([rows], **options)
                mine.load_state_dict(state)
        mine.catch_up()
    torch.testing.assert_close(rows, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_the_head(momentum, monkeypatch):
    """Without momentum the trajectory is dense SGD's; with it, it learns as well."""
    monkeypatch.setattr(classifier, "_SCREEN_FROM", 1)
    torch.manual_seed(0)
    head = QMarginHead(8, 400)
    twin = QMarginHead(8, 400)
    twin.load_state_dict(head.state_dict())
    options = dict(lr=0.2 * (1 - momentum), momentum=momentum, weight_decay=1e-3)
    encoder, encoder_twin = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    encoder_twin.load_state_dict(encoder.state_dict())
    mine = RowSparseSGD([*encoder.parameters(), *head.parameters()], **options)
    theirs = torch.optim.SGD([*encoder_twin.parameters(), *twin.parameters()], **options)
    centres = torch.randn(400, 8)
    first = None
    for _ in range(150):
        labels = torch.randint(400, (32,))
        inputs = centres[labels] + 0.1 * torch.randn(32, 8)
        loss, loss_twin = head(encoder(inputs), labels), twin(encoder_twin(inputs), labels)
        for optimizer, value in ((mine, loss), (theirs, loss_twin)):
            optimizer.zero_grad()
            value.backward()
        twin.weight.grad = twin.weight.grad.to_dense()
        mine.step()
        theirs.step()
        first = loss.item() if first is None else first
    if momentum == 0:
        torch.testing.assert_close(loss, loss_twin, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            head.state_dict()["weight"], twin.state_dict()["weight"], rtol=1e-2, atol=1e-3
        )
    assert loss.item() < 0.8 * first
    assert abs(loss.item() - loss_twin.item()) < 0.2 * loss_twin.item()


def test_rows_are_refreshed_and_saving_catches_up(monkeypatch):
    monkeypatch.setattr(classifier, "_SCREEN_FROM", 1)
    torch.manual_seed(0)
    head = QMarginHead(8, 3000)
    optimizer = RowSparseSGD(head.parameters(), lr=0.5, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        head(torch.randn(4, 8), torch.randint(3000, (4,))).backward()
        optimizer.step()
        built = head._cache
        kept = head.prototypes()
        assert kept is built  # no step rebuilds all the rows
        fresh = QMarginHead(8, 3000)
        fresh.weight.data.copy_(head.weight.data)
        torch.testing.assert_close(kept.inverse_norm, fresh.prototypes().inverse_norm)
        assert torch.equal(kept.screen, fresh.prototypes().screen)
    seen = head.weight.detach().clone()
    head.state_dict()
    assert not torch.equal(seen, head.weight)
    assert not optimizer._idle[head.weight].pending
