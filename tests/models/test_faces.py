"""IResNet and MobileFaceNet against their published definitions."""

import pytest
import torch

from speechbrain_qmargin.models.iresnet import BLOCKS, IResNet, load_arcface_torch
from speechbrain_qmargin.models.mobilefacenet import STAGES, MobileFaceNet


def count(model):
    return sum(p.numel() for p in model.parameters())


def published_iresnet(depth, dim=512):
    """3x3 convolutions, BatchNorms (2 a channel), PReLUs (1 a channel), one linear layer."""
    total, inputs = 27 * 64 + 2 * 64 + 64, 64
    for stage, blocks in enumerate(BLOCKS[depth]):
        outputs = 64 * 2**stage
        for block in range(blocks):
            total += 9 * inputs * outputs + 9 * outputs * outputs
            total += 2 * inputs + 2 * outputs + outputs + 2 * outputs
            if block == 0:
                total += inputs * outputs + 2 * outputs
            inputs = outputs
    return total + 2 * inputs + (inputs * 49 + 1) * dim + 2 * dim


@pytest.mark.parametrize(
    ("depth", "millions"), [(18, 24.02), (34, 34.14), (50, 43.59), (100, 65.15)]
)
def test_iresnet_has_the_published_parameters(depth, millions):
    with torch.device("meta"):
        model = IResNet(depth)
    assert count(model) == published_iresnet(depth)
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.01)


def test_mobilefacenet_has_the_papers_million():
    # table 1 of the paper, layer by layer: convolution, 2 a channel for BN, 1 for PReLU
    def layer(weights, channels, prelu=True):
        return weights + (3 if prelu else 2) * channels

    total, inputs = layer(27 * 64, 64) + layer(9 * 64, 64), 64
    for expansion, channels, blocks, _ in STAGES:
        for _ in range(blocks):
            wide = inputs * expansion
            total += layer(inputs * wide, wide) + layer(9 * wide, wide)
            total += layer(wide * channels, channels, prelu=False)
            inputs = channels
    total += layer(128 * 512, 512) + layer(49 * 512, 512, False) + layer(512 * 128, 128, False)
    assert count(MobileFaceNet()) == total == 1_003_136  # the paper prints 0.99 M


@pytest.mark.parametrize("size", [64, 112])
def test_faces_of_two_sizes_become_embeddings(size):
    x = torch.randn(2, 3, size, size)
    assert IResNet(18, 32, channels=4, image_size=size)(x).shape == (2, 1, 32)
    assert MobileFaceNet(32, image_size=size)(x).shape == (2, 1, 32)


def test_the_last_normalisation_has_no_scale_to_learn():
    model = IResNet(18, 8, channels=4, image_size=32)
    assert torch.equal(model.features.weight, torch.ones(8))
    names = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert names == ["features.weight"]


@pytest.mark.parametrize(
    "make", [lambda: IResNet(18, 8, 4, image_size=32), lambda: MobileFaceNet(8, 32)]
)
def test_evaluation_depends_neither_on_the_batch_nor_on_autocast_much(make):
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        whole = model(x)
        torch.testing.assert_close(whole[1:2], model(x[1:2]), rtol=1e-3, atol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(x)
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(half, whole, dim=2).min() > 0.98


def test_published_checkpoints_fit_by_name(tmp_path):
    torch.manual_seed(0)
    model, other = (IResNet(18, 8, channels=4, image_size=32) for _ in range(2))
    file = tmp_path / "backbone.pth"
    torch.save({f"module.{key}": value for key, value in other.state_dict().items()}, file)
    load_arcface_torch(model, file)
    assert torch.equal(model.fc.weight, other.fc.weight)
    # names of the published definition
    block = ["bn1", "conv1", "bn2", "prelu", "conv2", "bn3", "downsample.0", "downsample.1"]
    names = ["conv1", "bn1", "prelu", "bn2", "fc", "features"]
    names += [f"layer{stage}.0.{part}" for stage in (1, 2, 3, 4) for part in block]
    assert {f"{name}.weight" for name in names} <= set(model.state_dict())
    with pytest.raises(ValueError, match=r"backbone\.pth is not of this network"):
        load_arcface_torch(IResNet(34, 8, channels=4, image_size=32), file)
    with pytest.raises(ValueError, match="depth: 20; choose 18, 34, 50, 100"):
        IResNet(20)
