"""IResNet and MobileFaceNet against their published definitions."""

import pytest
import torch
import torch.nn.functional as F

from speechbrain_qmargin.models.iresnet import BLOCKS, IResNet
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
    ("depth", "millions"), [(18, 24.02), (34, 34.14), (50, 43.59), (100, 65.15), (200, 118.83)]
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


def published_output(state, depth, x, training):
    """arcface_torch's iresnet.py as plain functions of its weights; BN's eps is 1e-5."""

    def norm(name, x):
        mean, var = (state[f"{name}.running_{what}"].clone() for what in ("mean", "var"))
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.batch_norm(x, mean, var, weight, bias, training=training, eps=1e-5)

    x = F.conv2d(x, state["conv1.weight"], stride=1, padding=1)
    x = F.prelu(norm("bn1", x), state["prelu.weight"])
    blocks = {18: [2, 2, 2, 2], 50: [3, 4, 14, 3], 100: [3, 13, 30, 3]}[depth]
    for layer, count in enumerate(blocks, 1):
        for number in range(count):
            at, stride = f"layer{layer}.{number}", 2 if number == 0 else 1
            y = norm(f"{at}.bn1", x)
            y = F.conv2d(y, state[f"{at}.conv1.weight"], stride=1, padding=1)
            y = F.prelu(norm(f"{at}.bn2", y), state[f"{at}.prelu.weight"])
            y = norm(
                f"{at}.bn3", F.conv2d(y, state[f"{at}.conv2.weight"], stride=stride, padding=1)
            )
            if number == 0:
                x = F.conv2d(x, state[f"{at}.downsample.0.weight"], stride=stride)
                x = norm(f"{at}.downsample.1", x)
            x = x + y
    x = torch.flatten(norm("bn2", x), 1)
    return norm("features", F.linear(x, state["fc.weight"], state["fc.bias"]))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("depth", [18, 50, 100])
def test_iresnet_computes_the_published_definition(depth, training):
    torch.manual_seed(depth)
    model = IResNet(depth, 16, channels=4, image_size=48)
    for name, value in model.state_dict().items():  # nothing at its initial value
        if name.endswith(("bias", "running_mean")):
            value.copy_(torch.randn_like(value) * 0.1)
        elif value.ndim == 4:
            value.copy_(torch.randn_like(value) / value[0].numel() ** 0.5)
        elif value.ndim == 1:  # of norms and PReLUs
            value.copy_(torch.rand_like(value) * 0.5 + 0.5)
    model.train(training)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.rand(6, 3, 48, 48) * 2 - 1
    with torch.no_grad():
        wanted = published_output(state, depth, x, training)
        found = model(x)
    assert wanted.std() > 0.1
    torch.testing.assert_close(found[:, 0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "last"),
    [
        (lambda: IResNet(18, 8, 4, image_size=32), lambda model: model.fc),
        (lambda: MobileFaceNet(8, 32), lambda model: model.layers[-2]),
    ],
)
def test_the_last_layer_is_outside_autocast(make, last):
    model, seen = make().train(), []
    last(model).register_forward_hook(lambda module, x, y: seen.append((x[0].dtype, y.dtype)))
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert seen == [torch.bfloat16, (torch.float32, torch.float32)]
    weight = next(last(model).parameters())
    assert weight.grad.dtype == torch.float32


def test_parameters_have_the_published_names():
    model = IResNet(18, 8, channels=4, image_size=32)
    block = ["bn1", "conv1", "bn2", "prelu", "conv2", "bn3", "downsample.0", "downsample.1"]
    names = ["conv1", "bn1", "prelu", "bn2", "fc", "features"]
    names += [f"layer{stage}.0.{part}" for stage in (1, 2, 3, 4) for part in block]
    assert {f"{name}.weight" for name in names} <= set(model.state_dict())
    with pytest.raises(ValueError, match="depth: 20; choose 18, 34, 50, 100"):
        IResNet(20)
