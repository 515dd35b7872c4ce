"""ResNet34 against WeSpeaker's definition: parameters counted from it, pooling recomputed."""

import pytest
import torch

from speechbrain_qmargin.models.frames import temporal_statistics
from speechbrain_qmargin.models.resnet import ResNet


def published_count(channels=32, bands=80, dim=256):
    """Convolutions without bias, BatchNorms with two numbers a channel, one linear layer."""
    count, inputs = 9 * channels + 2 * channels, channels
    for stage, blocks in enumerate((3, 4, 6, 3)):
        outputs = channels * 2**stage
        for block in range(blocks):
            count += 9 * inputs * outputs + 9 * outputs * outputs + 4 * outputs
            if block == 0 and (stage > 0 or inputs != outputs):
                count += inputs * outputs + 2 * outputs
            inputs = outputs
    return count + 2 * inputs * (bands // 8) * dim + dim


def test_parameters_are_the_published_ones():
    count = sum(p.numel() for p in ResNet().parameters())
    assert count == published_count() == 6_634_336
    assert {"conv1.weight", "layer2.0.shortcut.0.weight", "seg_1.weight"} <= set(
        ResNet(channels=4).state_dict()
    )


def test_statistics_are_the_naive_ones_of_the_frames_that_count():
    frames = torch.randn(3, 2, 4, 10, dtype=torch.float64)
    lengths = torch.tensor([1.0, 0.5, 0.1])
    got = temporal_statistics(frames, lengths)
    for row, item, kept in zip(got, frames, (10, 5, 1), strict=True):
        part = item[..., :kept]
        std = part.std(2) if kept > 1 else torch.zeros(2, 4)
        wanted = torch.cat((part.mean(2).flatten(), (std.square() + 1e-7).sqrt().flatten()))
        torch.testing.assert_close(row, wanted)
    torch.testing.assert_close(
        temporal_statistics(frames),
        got.new_tensor(
            torch.cat(
                (frames.mean(3).flatten(1), (frames.var(3) + 1e-7).sqrt().flatten(1)), 1
            ).tolist()
        ),
    )


def test_padding_does_not_move_an_embedding():
    torch.manual_seed(0)
    model = ResNet(input_size=16, channels=4, lin_neurons=8).eval()
    short = torch.randn(1, 80, 16)
    padded = torch.cat((short, torch.zeros(1, 80, 16)), 1)
    with torch.no_grad():
        alone, among = model(short), model(padded, torch.tensor([0.5]))
        unmasked = model(padded)
    assert (alone - among).norm() < 1e-5 * alone.norm()
    assert (alone - unmasked).norm() > 1e-3 * alone.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_recording_has_finite_gradients(dtype):
    model = ResNet(input_size=16, channels=4, lin_neurons=8)
    x = torch.zeros(2, 40, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        embeddings = model(x)
    embeddings.float().square().sum().backward()
    assert torch.isfinite(embeddings).all()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_evaluation_does_not_depend_on_the_batch():
    model = ResNet(input_size=16, channels=4, lin_neurons=8).eval()
    x = torch.randn(3, 50, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)
