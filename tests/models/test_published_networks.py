"""CAM++, ECAPA-TDNN, ERes2Net, ResNets and MobileFaceNet against their published definitions.

The definitions themselves (WeSpeaker dfa7419, 3D-Speaker, arcface_torch) were run beside ours with
common random weights: embeddings differed by at most 6e-7 of their length at the published sizes,
and every entry had the same name and shape. Here small networks with weights from a formula must
give the numbers that the definitions gave for it.
"""

import pytest
import torch
from published_layouts import randomised

from speechbrain_qmargin.models.campplus import CAMPPlus
from speechbrain_qmargin.models.ecapa import WeSpeakerEcapa
from speechbrain_qmargin.models.eres2net import ERes2Net, ERes2NetV2
from speechbrain_qmargin.models.mbf import MBF
from speechbrain_qmargin.models.resnet import ResNet


def by_formula(model):
    """Weights and statistics that anybody can make again, in float64."""
    state = model.double().state_dict()
    for number, (key, value) in enumerate(sorted(state.items())):
        if not value.is_floating_point():
            continue
        wave = torch.sin(1.7 * torch.arange(value.numel(), dtype=torch.float64) + number)
        wave = wave.view(value.shape)
        if key.endswith("running_var"):
            value.copy_(1 + 0.5 * wave)
        elif value.ndim == 1:
            value.copy_((0 if key.endswith(("bias", "running_mean")) else 1) + 0.2 * wave)
        else:
            value.copy_(wave * (2 / value[0].numel()) ** 0.5)
    return model.eval()


def frames(length=130, bands=80):
    return torch.sin(torch.arange(2 * length * bands, dtype=torch.float64) ** 1.1).view(
        2, -1, bands
    )


NETWORKS = {
    "wespeaker CAMPPlus": (lambda: CAMPPlus(80, 6), frames),
    "3D-Speaker CAMPPlus": (lambda: CAMPPlus(80, 6, least_variance=0.0), frames),
    "wespeaker ECAPA_TDNN glob": (lambda: WeSpeakerEcapa(80, 16, 6), frames),
    "wespeaker ECAPA_TDNN": (lambda: WeSpeakerEcapa(80, 16, 6, context=False), frames),
    "wespeaker ERes2Net": (lambda: ERes2Net(80, 8, 6), frames),
    "3D-Speaker ERes2NetV2": (lambda: ERes2NetV2(80, 8, 6), frames),
    "wespeaker ResNet50": (lambda: ResNet(80, 4, 6, 50), frames),
    "arcface_torch mbf": (
        lambda: MBF(6, 1, (1, 1, 1, 1)),
        lambda: torch.sin(torch.arange(2 * 3 * 112 * 112) ** 1.1).view(2, 3, 112, 112).double(),
    ),
}
# The first row of the embeddings, of the definitions themselves
WANTED = {
    "wespeaker CAMPPlus": [
        -9.83421838, -13.0115887, -9.50296171, -3.98282058, -0.913814444, 4.5983744],
    "3D-Speaker CAMPPlus": [
        -9.83418815, -13.0115413, -9.50291876, -3.9827965, -0.913797783, 4.59838181],
    "wespeaker ECAPA_TDNN glob": [
        -15.1975915, -8.92127662, 6.66115755, 15.5245453, 8.11877165, -8.00180409],
    "wespeaker ECAPA_TDNN": [
        -15.1975915, -8.92127673, 6.66115742, 15.5245453, 8.11877176, -8.00180396],
    "wespeaker ERes2Net": [
        0.197063455, 0.43963056, -0.608030104, 0.163292293, 0.304792472, -0.361018222],
    "3D-Speaker ERes2NetV2": [
        -2.03709248, 0.11086432, 1.77975925, -2.48288591, 1.48501282, 0.726309296],
    "wespeaker ResNet50": [
        -0.208226234, -0.0232542532, 0.102854316, 0.0571266195, -0.0818222939, -0.141192982],
    "arcface_torch mbf": [
        5.18804622, -5.46149457, 4.40520651, -4.67277067, 7.57739942, -5.95366699],
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_the_published_definitions(name):
    make, inputs = NETWORKS[name]
    with torch.no_grad():
        found = by_formula(make())(inputs())[0, 0]
    wanted = torch.tensor(WANTED[name], dtype=torch.float64)
    assert (found - wanted).norm() < 4e-9 * wanted.norm()


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: CAMPPlus(80, 512), 7_176_224),  # WeSpeaker's table: 7.18 M
        (lambda: CAMPPlus(80, 192), 6_848_544),
        (lambda: WeSpeakerEcapa(80, 512, 192), 6_190_720),  # 6.19 M
        (lambda: WeSpeakerEcapa(80, 1024, 192), 14_657_088),  # 14.65 M
        (lambda: ERes2NetV2(80, 64, 192), 17_859_632),  # 3D-Speaker: 17.86 M
        (lambda: ERes2NetV2(80, 64, 192, 24, 4, 4), 53_513_632),
        (lambda: ERes2Net(80, 32, 512), 9_887_808),
        (lambda: ResNet(depth=152), 19_814_880),
        (lambda: ResNet(depth=221), 23_792_224),  # 23.79 M
        (lambda: ResNet(depth=293), 28_626_016),  # 28.62 M
        (MBF, 2_059_520),
        (lambda: MBF(512, 4, (2, 8, 12, 4)), 6_314_880),
    ],
)
def test_parameters_are_as_many_as_published(make, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == count


def test_parameters_have_the_published_names():
    names = {
        CAMPPlus: ["head.layer1.0.shortcut.0.weight", "xvector.tdnn.nonlinear.batchnorm.weight",
                   "xvector.block3.tdnnd16.cam_layer.linear2.bias",
                   "xvector.transit2.linear.weight",
                   "xvector.out_nonlinear.batchnorm.running_var",
                   "xvector.dense.nonlinear.batchnorm.running_mean"],
        WeSpeakerEcapa: ["layer1.bn.weight", "layer4.se_res2block.1.convs.6.bias", "bn.running_var",
                         "layer2.se_res2block.3.linear2.weight", "pool.linear2.bias"],
        ERes2Net: ["layer3.0.conv2_1.weight", "layer4.2.fuse_models.0.local_att.4.running_mean",
                   "layer2_downsample.weight", "fuse_mode123.local_att.3.bias"],
        ERes2NetV2: ["layer1.0.shortcut.1.bias", "layer4.0.convs.1.weight", "layer3_ds.weight",
                     "fuse34.local_att.1.running_var", "seg_1.bias"],
        MBF: ["layers.1.layers.2.weight", "layers.7.layers.1.layers.2.layers.1.bias",
              "conv_sep.layers.0.weight", "features.layers.3.running_mean"],
    }  # fmt: skip
    with torch.device("meta"):
        for network, wanted in names.items():
            assert set(wanted) <= set(network().state_dict()), network


SMALL = {
    "CAM++": lambda: CAMPPlus(16, 8, growth=4, channels=16, layers=(1, 2, 1), least_variance=0.0),
    "ECAPA": lambda: WeSpeakerEcapa(16, 8, 6, pooled=12),
    "ERes2Net": lambda: ERes2Net(16, 8, 6),
    "ERes2NetV2": lambda: ERes2NetV2(16, 8, 6),
    "ResNet50": lambda: ResNet(16, 2, 6, 50),
}


@pytest.mark.parametrize("name", SMALL)
def test_padding_and_the_batch_move_no_embedding(name):
    torch.manual_seed(0)
    model, x = randomised(SMALL[name]()), torch.randn(2, 300, 16)
    for kept in (230, 117, 31):
        with torch.no_grad():
            alone = model(x[:1, :kept])
            among = model(x, torch.tensor([kept / 300, 1.0]))[:1]
            unmasked = model(x[:1])
        assert (alone - among).norm() < 1e-5 * alone.norm()
        assert (alone - unmasked).norm() > 1e-4 * alone.norm()


@pytest.mark.parametrize("name", SMALL)
def test_a_constant_recording_has_finite_gradients(name):
    model = SMALL[name]().train()
    x = torch.zeros(2, 40, 16, requires_grad=True)
    embeddings = model(x)
    embeddings.square().sum().backward()
    assert torch.isfinite(embeddings).all()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_bands_that_do_not_halve_three_times_are_refused():
    for network in (CAMPPlus, ERes2NetV2):
        with pytest.raises(ValueError, match="input_size: 20 bands; a multiple of 8"):
            network(20)
