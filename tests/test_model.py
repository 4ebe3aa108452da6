"""The one door to segmenters: built in, from a folder, of any architecture; what was fresh or is wrong is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    BeitConfig,
    BeitForSemanticSegmentation,
    BertConfig,
    BertModel,
    Data2VecVisionConfig,
    Data2VecVisionForSemanticSegmentation,
    DPTConfig,
    DPTForSemanticSegmentation,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileNetV2ForSemanticSegmentation,
    MobileViTConfig,
    MobileViTForSemanticSegmentation,
    MobileViTV2Config,
    MobileViTV2ForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from vlm_itl.core.checks import ConfigError, RunError
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.sources import toy_images
from vlm_itl.data.transforms import EvalTransform, predicted_classes
from vlm_itl.experiment.config import make_config
from vlm_itl.experiment.loop import run_baseline
from vlm_itl.model.pixels import processor_of, watch_processor
from vlm_itl.model.predict import Inference, predict_batches, predict_folder
from vlm_itl.model.pretrained import fix_batchnorm
from vlm_itl.model.segmenter import (
    MODELS,
    Segmenter,
    freeze_batchnorm,
    load_model,
    parameter_groups,
    register_model,
    save_model,
    watch_last_layer,
)

pytestmark = pytest.mark.usefixtures("undrawn")

VOC = LabelSpace.voc()
SEVEN = LabelSpace(tuple("abcdefg"))
BATCH = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def tiny_segformer(classes: int = 7, names: tuple[str, ...] | None = None) -> SegformerForSemanticSegmentation:
    """A SegFormer of a few thousand weights."""
    settings: dict[str, Any] = {"num_labels": classes}
    if names:
        settings = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    config = SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=16,
        **settings,
    )
    return SegformerForSemanticSegmentation(config)


def write_processor(folder: Path, **settings: Any) -> None:
    """A processor file as a checkpoint brings it."""
    content = {"image_processor_type": "SegformerImageProcessor", "do_normalize": True, "do_rescale": True, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def segformer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of seven classes with a normalisation of its own."""
    folder = tmp_path_factory.mktemp("segformer")
    torch.manual_seed(0)
    tiny_segformer(7).save_pretrained(folder)
    write_processor(folder, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    return folder


def same_weights(one: nn.Module, two: nn.Module) -> bool:
    """Are all tensors equal, bit for bit?"""
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- built in ---------------------------------------------------------------------------------------------------------


def test_nano_is_small_and_seeded():
    model = load_model("segformer-nano", VOC, seed=3)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert not model.pretrained and not model.training and "random" in model.notes[0]
    assert same_weights(model, load_model("segformer-nano", VOC, seed=3))
    assert not same_weights(model, load_model("segformer-nano", VOC, seed=4))


def test_loading_leaves_the_global_generator_alone(segformer_folder):
    for name in ("segformer-nano", str(segformer_folder)):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        load_model(name, VOC, seed=9)
        assert torch.equal(torch.rand(3), expected)


def test_forward_of_nano():
    model = load_model("segformer-nano", SEVEN)
    with torch.inference_mode():
        logits, features = model(BATCH, features=True)
        assert torch.equal(model(BATCH), logits)
    assert logits.shape == (2, 7, 16, 16) and logits.dtype == torch.float32
    assert features.shape == (2, 160, 2, 2) and features.dtype == torch.float32
    assert torch.isfinite(logits).all() and "7 classes" in repr(model) and "random" in repr(model)


def test_a_registered_model_is_one_line():
    register_model("one-layer")(lambda labels: nn.Conv2d(3, len(labels), 1))
    try:
        assert load_model("one-layer", SEVEN).net.out_channels == 7
    finally:
        del MODELS["one-layer"]


# --- saving and reading back ------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    model = load_model("segformer-nano", VOC, seed=1)
    folder = save_model(model, tmp_path / "deep" / "model")
    again = load_model(str(folder), VOC)
    assert same_weights(model, again) and again.pretrained and len(again.notes) == 1 and "head 42,709" in again.notes[0]
    assert again.norm == model.norm
    with torch.inference_mode():
        assert torch.equal(model(BATCH), again(BATCH))


def test_others_read_our_folder(tmp_path, segformer_folder):
    for name in ("segformer-nano", str(segformer_folder)):
        model = load_model(name, VOC, seed=1)
        folder = save_model(model, tmp_path / "model")
        net = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
        assert net.config.id2label == VOC.id2label and same_weights(net, model.net)
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        pixels = processor(Image.fromarray(BATCH[0].permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            theirs, ours = net(pixel_values=pixels).logits, model(BATCH[:1])
        assert torch.allclose(theirs, ours, atol=1e-4)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError) as caught:
        save_model(load_model("segformer-nano", SEVEN), tmp_path / "file" / "model")
    assert "file" in str(caught.value) and "\n" not in str(caught.value)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_head_of_another_size_is_fresh_and_said_so(segformer_folder):
    checkpoint = AutoModelForSemanticSegmentation.from_pretrained(segformer_folder)
    model = load_model(str(segformer_folder), VOC)
    assert model.pretrained and model.net.config.num_labels == 21
    assert same_weights(model.net.segformer, checkpoint.segformer)
    (note,) = [n for n in model.notes if "re-initialised" in n]
    assert "decode_head.classifier" in note
    assert model(BATCH).shape[1] == 21
    assert same_weights(model, load_model(str(segformer_folder), VOC))
    other = load_model(str(segformer_folder), VOC, seed=1).net.decode_head.classifier.weight
    assert not torch.equal(model.net.decode_head.classifier.weight, other)


def test_head_of_equal_size_is_kept(segformer_folder, tmp_path):
    model = load_model(str(segformer_folder), SEVEN)
    checkpoint = AutoModelForSemanticSegmentation.from_pretrained(segformer_folder)
    assert same_weights(model.net, checkpoint) and not any("re-initialised" in n for n in model.notes)
    assert any("no names" in n for n in model.notes)


def test_normalisation_comes_from_the_checkpoint(segformer_folder, tmp_path):
    model = load_model(str(segformer_folder), SEVEN)
    assert model.norm.mean == pytest.approx((0.1, 0.2, 0.3)) and model.norm.std == pytest.approx((0.4, 0.5, 0.6))
    seen = []
    model.net.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True)
    model(BATCH)
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5, 0.6])
    expected = (BATCH.numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    assert np.allclose(seen[0].numpy(), expected, atol=1e-6)
    assert processor_of(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("settings", "zero", "full"),  # what black and white become
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, -1.0, 1.0),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 127.5}, -1.0, 3.0),
        ({"image_mean": [127.5] * 3, "image_std": [127.5] * 3, "do_rescale": False}, -1.0, 1.0),
        ({"do_normalize": False}, 0.0, 1.0),
        ({"do_normalize": False, "do_rescale": False}, 0.0, 255.0),
    ],
)
def test_any_processor_setting_is_followed(tmp_path, settings, zero, full):
    write_processor(tmp_path, **settings)
    norm = watch_processor(processor_of(str(tmp_path)), str(tmp_path))
    assert -norm.mean[0] / norm.std[0] == pytest.approx(zero, abs=1e-9)
    assert (1 - norm.mean[0]) / norm.std[0] == pytest.approx(full)


def test_a_checkpoint_without_processor_says_so(tmp_path):
    tiny_segformer(7).save_pretrained(tmp_path)
    assert any("ImageNet normalisation is assumed" in n for n in load_model(str(tmp_path), SEVEN).notes)


# --- BatchNorm and parameters -----------------------------------------------------------------------------------------


def test_tensorflow_momentum_is_mended(tmp_path):
    config = MobileNetV2Config(depth_multiplier=0.35, num_labels=7)
    MobileNetV2ForSemanticSegmentation(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), SEVEN)
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert layers and {m.momentum for m in layers} == {0.1}
    assert any(f"in {len(layers)} layers" in n for n in model.notes)
    assert fix_batchnorm(model.net) == 0


def test_momentum_that_is_fine_stays():
    net = nn.Sequential(nn.BatchNorm2d(2, momentum=0.03), nn.BatchNorm2d(2, momentum=None), nn.BatchNorm2d(2))
    assert fix_batchnorm(net) == 0 and [m.momentum for m in net] == [0.03, None, 0.1]


def test_parameter_groups_cover_everything_once(segformer_folder):
    for model in (load_model("segformer-nano", VOC), load_model(str(segformer_folder), VOC)):
        groups = parameter_groups(model, 1e-3, head_scale=10, weight_decay=0.05)
        ids = [id(p) for group in groups for p in group["params"]]
        assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
        names = {id(p): n for n, p in model.net.named_parameters()}
        modules = dict(model.net.named_modules())
        norms = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
        for group in groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                bare = name.endswith("bias") or isinstance(modules[name.rpartition(".")[0]], norms)
                assert group["weight_decay"] == (0.0 if bare else 0.05), name
                in_head = not name.startswith("segformer.")
                assert group["lr"] == pytest.approx(1e-2 if in_head else 1e-3), name
        assert len(groups) == 4


def test_frozen_parameters_are_left_out():
    model = load_model("segformer-nano", SEVEN)
    model.encoder.requires_grad_(False)
    groups = parameter_groups(model, 1.0)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.head_parameters}


def test_freeze_batchnorm_modes(tmp_path):
    MobileNetV2ForSemanticSegmentation(MobileNetV2Config(depth_multiplier=0.35, num_labels=7)).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), SEVEN)

    def frozen(mode: str) -> tuple[int, int, int]:
        model.train()
        said = freeze_batchnorm(model, mode)
        inside = {id(m) for m in model.encoder.modules()}
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        encoder = sum(not m.training for m in norms if id(m) in inside)
        return said, encoder, sum(not m.training for m in norms) - encoder

    n_encoder = sum(isinstance(m, nn.BatchNorm2d) for m in model.encoder.modules())
    n_head = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) - n_encoder
    assert n_encoder > 20 and n_head > 1
    assert frozen("train") == (0, 0, 0)
    assert frozen("freeze_encoder") == (n_encoder, n_encoder, 0)
    assert frozen("freeze") == (n_encoder + n_head, n_encoder, n_head)
    assert frozen("auto") == frozen("freeze_encoder")
    model.pretrained = False
    assert frozen("auto") == (0, 0, 0)
    with pytest.raises(ConfigError, match="freeze_encoder"):
        freeze_batchnorm(model, "frozen")


# --- one clear line ---------------------------------------------------------------------------------------------------


def refused(name: str, **options: Any) -> str:
    """The message with which a name is refused."""
    with pytest.raises(ConfigError) as caught:
        load_model(name, SEVEN, options=options or None)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def test_bad_names_get_one_clear_line(tmp_path, segformer_folder):
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(str(tmp_path / "empty"))
    assert "segformer-nano" in refused("segformer-nan")
    assert "segformer-nano" in refused(str(tmp_path / "nowhere"))
    assert "some/model-that-is-not-there" in refused("some/model-that-is-not-there")
    small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=20)
    BertModel(small).save_pretrained(tmp_path / "bert")
    assert "cannot be loaded as a segmenter" in refused(str(tmp_path / "bert"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{not json")
    assert "broken" in refused(str(tmp_path / "broken"))
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_text((segformer_folder / "config.json").read_text())
    assert "weightless" in refused(str(tmp_path / "weightless"))


def test_damaged_weights_get_one_clear_line(tmp_path, segformer_folder):
    for part in segformer_folder.iterdir():
        content = part.read_bytes()
        (tmp_path / part.name).write_bytes(content[: len(content) // 2] if part.suffix == ".safetensors" else content)
    assert "cannot be loaded" in refused(str(tmp_path))


def test_unknown_options_get_one_clear_line(segformer_folder):
    assert "'dropout'" in refused(str(segformer_folder), dropout=0.1)
    assert "takes none" in refused("segformer-nano", drop_path_rate=0.1)


# --- other architectures ----------------------------------------------------------------------------------------------

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 64,
    "patch_size": 8,
    "num_labels": 7,
}


def upernet() -> nn.Module:
    """UperNet over a tiny Swin."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, out_features=stages)
    config = UperNetConfig(
        backbone_config=swin, hidden_size=16, use_auxiliary_head=False, num_labels=7, pool_scales=[1, 2]
    )
    return UperNetForSemanticSegmentation(config)


ARCHITECTURES = {
    "beit": lambda: BeitForSemanticSegmentation(BeitConfig(**VIT, out_indices=[1, 2, 3, 4], use_auxiliary_head=False)),
    "data2vec": lambda: Data2VecVisionForSemanticSegmentation(
        Data2VecVisionConfig(**VIT, out_indices=[1, 2, 3, 4], use_auxiliary_head=False)
    ),
    "dpt": lambda: DPTForSemanticSegmentation(
        DPTConfig(
            **VIT,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
            use_auxiliary_head=False,
        )
    ),
    "mobilevit": lambda: MobileViTForSemanticSegmentation(
        MobileViTConfig(
            hidden_sizes=[8, 8, 8], neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 16], aspp_out_channels=8, num_labels=7
        )
    ),
    "mobilevitv2": lambda: MobileViTV2ForSemanticSegmentation(
        MobileViTV2Config(width_multiplier=0.1, aspp_out_channels=8, num_labels=7)
    ),
    "mobilenet_v2": lambda: MobileNetV2ForSemanticSegmentation(MobileNetV2Config(depth_multiplier=0.35, num_labels=7)),
    "upernet": upernet,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures(name, tmp_path):
    torch.manual_seed(0)
    ARCHITECTURES[name]().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), SEVEN)
    assert isinstance(model, Segmenter) and not any("re-initialised" in n for n in model.notes), model.notes
    with torch.inference_mode():
        with watch_last_layer(model) as last:
            logits, features = model(BATCH, features=True)
            hidden, output = last.passed(logits)  # BADGE works with every family
            classifier = last.find(logits)
    assert output.shape[1] == 7 and hidden.shape[-2:] == output.shape[-2:]
    assert logits.shape[:2] == (2, 7) and logits.shape[2] == logits.shape[3] >= 2 and torch.isfinite(logits).all()
    assert features.dim() == 4 and features.shape[0] == 2 and torch.isfinite(features).all()
    groups = parameter_groups(model, 1.0, 10.0)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted({id(p) for p in model.parameters()})
    assert {group["lr"] for group in groups} == {1.0, 10.0}  # fault 11: every family has an encoder and a head
    assert any("encoder" in n and "head" in n for n in model.notes)
    assert id(classifier.weight) in {id(p) for p in model.head_parameters}
    fresh = load_model(str(tmp_path), VOC)
    assert any("re-initialised" in n for n in fresh.notes) and fresh(BATCH).shape[1] == 21


def test_an_image_classifier_becomes_a_segmenter(tmp_path):
    config = MobileNetV2Config(depth_multiplier=0.35, num_labels=10)
    MobileNetV2ForImageClassification(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), SEVEN)
    assert model.net.config.output_stride == 16 and model(BATCH).shape == (2, 7, 4, 4)
    assert any("re-initialised" in n and "segmentation_head" in n for n in model.notes)
    coarse = load_model(str(tmp_path), SEVEN, options={"output_stride": 32})
    assert coarse(BATCH).shape == (2, 7, 2, 2)


# --- real weights -----------------------------------------------------------------------------------------------------


def test_real_mobilenet(weights):
    model = load_model(str(weights / "mobilenet-v2-imagenet"), VOC)
    assert model.pretrained and model(BATCH).shape == (2, 21, 4, 4)
    (note,) = [n for n in model.notes if "re-initialised" in n]
    assert "segmentation_head" in note
    assert any("BatchNorm momentum" in n for n in model.notes)
    assert model.norm.mean == pytest.approx((0.5,) * 3) and model.norm.std == pytest.approx((0.5,) * 3)
    assert len(list(model.encoder.parameters())) + len(model.head_parameters) == len(list(model.parameters()))


def test_real_deeplab(weights):
    model = load_model(str(weights / "deeplabv3-mobilenetv2-voc"), VOC)
    assert model.pretrained and not any("re-initialised" in n for n in model.notes)
    assert not any("other classes" in n for n in model.notes)
    with torch.inference_mode():
        logits, features = model(BATCH, features=True)
    assert logits.shape == (2, 21, 4, 4) and features.shape == (2, 320, 4, 4)
    other = load_model(str(weights / "deeplabv3-mobilenetv2-voc"), SEVEN)
    assert any("re-initialised" in n and "classifier" in n for n in other.notes)


# --- faults: checkpoints used otherwise than their own files say ------------------------------------------------------


def seen_by(model: Segmenter, picture: Image.Image) -> torch.Tensor:
    """What the network is given of a picture."""
    seen: list[torch.Tensor] = []
    hook = model.net.register_forward_pre_hook(lambda _, a, given: seen.append(given["pixel_values"]), with_kwargs=True)
    with torch.no_grad():
        model(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])
    hook.remove()
    return seen[0]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
PROCESSORS: dict[str, dict[str, Any]] = {
    "MobileViTImageProcessor": {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "EfficientNetImageProcessor": {"rescale_factor": 1 / 127.5, "rescale_offset": True, "include_top": True},
    "BeitImageProcessor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_reduce_labels": True},
    "DPTImageProcessor": {"do_pad": True, "size_divisor": 32},
    "SegformerImageProcessor": {"do_normalize": False, "do_rescale": False},
    "ConvNextImageProcessor": {"crop_pct": 0.9},
    "MobileNetV2ImageProcessor": {},
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_fault_10_pixels_are_those_of_the_checkpoints_own_processor(kind, segformer_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((segformer_folder / name).read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind, **PROCESSORS[kind]}))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    off = {flag: False for flag in ("do_resize", "do_center_crop", "do_pad") if getattr(processor, flag, None)}
    theirs = processor(NOISE, return_tensors="pt", **off)["pixel_values"].float()
    model = load_model(str(tmp_path), SEVEN)
    assert torch.allclose(seen_by(model, NOISE), theirs, atol=1e-4 * float(theirs.abs().max()))
    assert torch.allclose(seen_by(load_model(str(save_model(model, tmp_path / "s")), SEVEN), NOISE), theirs, atol=1e-2)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_processor_type": "ImageGPTImageProcessor"},  # colours become clusters
        {"image_processor_type": "TvpImageProcessor"},  # blue first, and a mean: nobody could be told
        {"image_processor_type": "NoSuchProcessor"},
        {"image_processor_type": "SegformerImageProcessor", "image_std": [0, 0, 0]},
        {"image_processor_type": "SegformerImageProcessor", "image_mean": "x"},
        ["a list"],
    ],
    ids=lambda settings: str(settings)[:50],
)
def test_fault_10_a_processor_that_cannot_be_honoured_is_refused(settings, segformer_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((segformer_folder / name).read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert "rocessor" in refused(str(tmp_path))


def test_fault_10_a_processor_of_another_package_is_followed_or_named(segformer_folder, tmp_path):
    """Its class needs torchvision. Found without it, its settings count where they are complete."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((segformer_folder / name).read_bytes())
    plain = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": False, "size": {"height": 64, "width": 64}}
    full = {"image_processor_type": "Tipsv2DptImageProcessor", **plain}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(full))
    model = load_model(str(tmp_path), SEVEN)
    assert (
        model.norm.mean == (0, 0, 0) and model.norm.std == (1, 1, 1) and not any("ImageNet" in n for n in model.notes)
    )


def test_a_checkpoint_without_processor_gets_the_familys_own(tmp_path):
    torch.manual_seed(0)
    ARCHITECTURES["beit"]().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), SEVEN)
    assert model.norm.mean == (0.5,) * 3 and any(
        "BeitImageProcessor normalisation is assumed" in n for n in model.notes
    )


def test_fault_11_the_head_of_upernet_learns_faster_and_is_not_frozen(tmp_path):
    upernet().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), SEVEN)
    assert model.encoder is model.net.backbone
    rates = {id(p): g["lr"] for g in parameter_groups(model, 1.0, 10.0) for p in g["params"]}
    assert {rates[id(p)] for p in model.net.backbone.parameters()} == {1.0}
    assert {rates[id(p)] for p in model.net.decode_head.parameters()} == {10.0}
    freeze_batchnorm(model.train(), "auto")
    assert all(m.training for m in model.net.decode_head.modules() if isinstance(m, nn.BatchNorm2d))


def test_fault_11_what_no_checkpoint_held_learns_with_the_head(segformer_folder, tmp_path):
    weights = load_file(segformer_folder / "model.safetensors")
    fresh = [key for key in weights if "block.0.0.layer_norm_1" in key]
    assert fresh
    (tmp_path / "config.json").write_bytes((segformer_folder / "config.json").read_bytes())
    save_file({k: v for k, v in weights.items() if k not in fresh}, tmp_path / "model.safetensors", {"format": "pt"})
    model, whole = load_model(str(tmp_path), SEVEN), load_model(str(segformer_folder), SEVEN)
    assert len(model.head_parameters) == len(whole.head_parameters) + len(fresh)


def test_fault_11_a_network_without_parts_is_refused_where_they_matter():
    model = Segmenter(nn.Sequential(nn.Conv2d(3, 7, 1), nn.BatchNorm2d(7)), SEVEN, name="own")
    assert len(parameter_groups(model, 1.0)) == 2 and freeze_batchnorm(model, "auto") == 0
    for ask in (lambda: parameter_groups(model, 1.0, 10.0), lambda: freeze_batchnorm(model, "freeze_encoder")):
        with pytest.raises(ConfigError, match="backbone"):
            ask()


def masks_elsewhere(folder: Path, picture: Image.Image) -> torch.Tensor:
    """The mask that anybody gets who loads the folder with transformers alone."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    net = AutoModelForSemanticSegmentation.from_pretrained(folder)
    with torch.inference_mode():
        out = net(**processor(picture, return_tensors="pt"))
    return processor.post_process_semantic_segmentation(out, target_sizes=[picture.size[::-1]])[0]


def our_mask(model: Segmenter, picture: Image.Image, size: int, resize: str) -> torch.Tensor:
    """The mask that evaluation sees."""
    row = EvalTransform(size, resize)({"id": "x", "image": picture})
    with torch.inference_mode():
        return predicted_classes(model(row["pixel_values"][None])[0], row["box"], size, row["native"])


def test_fault_12_a_run_leaves_a_model_that_answers_elsewhere_as_it_was_measured(tmp_path):
    settings = {
        "dataset": "toy",
        "model": "segformer-nano",
        "mixture": {},
        "steps": 4,
        "batch_size": 2,
        "image_size": 64,
        "val_share": 0.25,
        "gallery": 0,
    }
    for resize, share in (("stretch", 0.999), ("keep", 0.9)):
        folder = tmp_path / resize
        list(run_baseline(make_config(**settings, resize=resize, output_dir=str(folder))))
        saved = next(folder.rglob("model.safetensors")).parent
        model = load_model(str(saved), toy_images().labels)
        for row in toy_images().test:
            picture = row["image"].resize((90, 60))
            same = our_mask(model, picture, 64, resize) == masks_elsewhere(saved, picture)
            assert same.float().mean() >= share
        text = (saved / "README.md").read_text()
        assert "64" in text and "of the pixels got the same class" in text


@pytest.mark.parametrize("kind", ["turned", "16 bits"])
def test_the_page_of_a_model_reads_photographs_as_they_were_read_when_it_was_measured(tmp_path, kind):
    """A camera that was held upright writes a lying picture and a word about it; a microscope writes 16 bits."""
    torch.manual_seed(0)
    model = load_model("cnn-nano", SEVEN)
    for parameter in model.net.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    folder = save_model(model, tmp_path / "model", 64, "keep")
    (tmp_path / "photographs").mkdir()
    turned, path = Image.Exif(), tmp_path / "photographs" / "a.png"
    turned[0x0112] = 6
    if kind == "turned":
        NOISE.resize((90, 50)).save(path, exif=turned)
    else:
        Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (90, 50), dtype=np.uint16)).save(path)
    predict_folder(model, path.parent, tmp_path / "out", Inference(64, "keep"))
    code = (folder / "README.md").read_text().split("```")[1].removeprefix("python")
    names: dict[str, Any] = {}
    exec(code.replace('Image.open("...")', f"Image.open({str(path)!r})").replace('"..."', repr(str(folder))), names)
    ours = np.array(Image.open(tmp_path / "out" / "masks" / "a.png"))
    assert ours.shape == (90, 50) and (ours == names["mask"].numpy()).mean() > 0.999


@pytest.mark.parametrize("name", ["mobilevit", "beit", "upernet"])
def test_fault_12_every_family_is_saved_with_its_own_view(name, tmp_path):
    torch.manual_seed(0)
    net = ARCHITECTURES[name]()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    net.save_pretrained(tmp_path / "theirs")
    model = load_model(str(tmp_path / "theirs"), SEVEN)
    picture = NOISE.resize((70, 50))
    ours = our_mask(model, picture, 64, "stretch")
    assert (ours == masks_elsewhere(save_model(model, tmp_path / "ours", 64, "stretch"), picture)).float().mean() > 0.99
    text = (save_model(model, tmp_path / "keep", 64, "keep", [picture]) / "README.md").read_text()
    assert ("squares only" in text) == (name == "beit") and "On 1 validation" in text


def test_fault_12_a_picture_that_is_too_thin_elsewhere_stops_no_run(tmp_path):
    model = load_model("segformer-nano", SEVEN)
    model.net.register_forward_pre_hook(
        lambda _, a, given: 1 / 0 if given["pixel_values"].shape[2] < 30 else None, with_kwargs=True
    )
    text = (save_model(model, tmp_path, 64, "keep", [NOISE.resize((90, 9))]) / "README.md").read_text()
    assert "0.0% of the pixels" in text


def test_fault_12_on_photographs(voc, weights, tmp_path):
    model = load_model(str(weights / "deeplabv3-mobilenetv2-voc"), VOC)
    folder = save_model(model, tmp_path, 128, "stretch")
    for path in sorted((voc / "JPEGImages").glob("*.jpg"))[:4]:
        picture = Image.open(path)
        same = our_mask(model, picture, 128, "stretch") == masks_elsewhere(folder, picture)
        assert same.float().mean() > 0.995


def head_of(classes: tuple[str, ...], folder: Path, **processor: Any) -> nn.Module:
    """A checkpoint of these classes."""
    torch.manual_seed(0)
    net = tiny_segformer(len(classes), classes).eval()
    net.save_pretrained(folder)
    if processor:
        write_processor(folder, **processor)
    return net


FOUR = LabelSpace(("background", "crack", "pothole", "patch"))


def test_fault_13_a_head_in_another_order_is_put_into_ours(tmp_path):
    net = head_of(("Patch", "pot_hole", "CRACK", "background", "extra"), tmp_path)
    model = load_model(str(tmp_path), FOUR)
    with torch.no_grad():
        pixels = (BATCH.float() - model.mean) / model.std
        assert torch.allclose(model(BATCH), net(pixel_values=pixels).logits[:, [3, 2, 1, 0]], atol=1e-5)
    assert any("by name" in n for n in model.notes)
    assert load_model(str(save_model(model, tmp_path / "again")), FOUR).net.config.id2label == FOUR.id2label


def test_fault_13_classes_that_are_not_there_start_anew(tmp_path):
    net = head_of(("sky", "crack", "tree", "car"), tmp_path)
    model = load_model(str(tmp_path), FOUR)
    theirs, own = net.decode_head.classifier.weight, model.net.decode_head.classifier.weight
    assert torch.equal(own[1], theirs[1]) and not any(torch.equal(own[i], theirs[i]) for i in (0, 2, 3))
    assert any("by name: crack; new: background" in n for n in model.notes)
    head_of(("sky", "road", "tree", "car"), tmp_path)
    model = load_model(str(tmp_path), FOUR)
    assert not torch.equal(model.net.decode_head.classifier.weight, theirs)
    assert any("other classes (sky" in n for n in model.notes) and any("re-initialised" in n for n in model.notes)
    assert same_weights(model, load_model(str(tmp_path), FOUR))


def test_fault_13_a_head_that_counts_from_one_is_said(tmp_path):
    head_of(FOUR.names, tmp_path, do_reduce_labels=True)
    assert any("do_reduce_labels" in n and "background" in n for n in load_model(str(tmp_path), FOUR).notes)


BROKEN: dict[str, dict[str, Any]] = {
    "a negative size": {"hidden_sizes": [-8, 8, 16, 16]},
    "no class": {"id2label": ["a"]},
    "a text": {"hidden_sizes": ["a", 8, 16, 16]},
    "another shape": {"hidden_sizes": [8, 8, 16, 32]},
    "layers without end": {"depths": [10**7] * 4},
    "larger than the memory": {"hidden_sizes": [90_000] * 4},
    "as many classes as there are people": {"num_labels": 8 * 10**9, "id2label": None},
    "one channel": {"num_channels": 1},
    "another task": {"model_type": "bert"},
    "heads by zero": {"num_attention_heads": [0] * 4},
    "number for a name": {"model_type": 5},
}


@pytest.mark.parametrize("what", BROKEN)
def test_fault_35_broken_configurations_get_one_line(what, segformer_folder, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((segformer_folder / "model.safetensors").read_bytes())
    config = {**json.loads((segformer_folder / "config.json").read_text()), **BROKEN[what]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert str(tmp_path) in refused(str(tmp_path))


@pytest.mark.parametrize("what", ["nan", "module.", "nothing", "statistics"])
def test_fault_35_weights_that_are_none_are_refused(what, segformer_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((segformer_folder / "config.json").read_bytes())
    weights = load_file(segformer_folder / "model.safetensors")
    changed = {
        "nan": {**weights, "decode_head.classifier.bias": torch.full((7,), torch.nan)},
        "module.": {f"module.{key}": value for key, value in weights.items()},
        "nothing": {"x": torch.zeros(1)},
        "statistics": {**weights, "decode_head.batch_norm.running_var": torch.full((16,), torch.inf)},
    }[what]
    save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
    assert str(tmp_path) in refused(str(tmp_path))


def test_half_precision_and_tuples_load_as_they_are_used(tmp_path):
    torch.manual_seed(0)
    tiny_segformer(7).to(torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "return_dict": False}))
    model = load_model(str(tmp_path), SEVEN)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model(BATCH).shape == (2, 7, 16, 16)


def test_options_do_not_decide_what_the_data_decides(segformer_folder):
    assert "classes come from the data" in refused(str(segformer_folder), id2label={0: "a"})
    assert "no size of a network" in refused(str(segformer_folder), depths=[10**7] * 4)


def test_a_walk_left_unfinished_keeps_gradients_on():
    """An exception keeps the frame of a walk alive in a notebook, and the next training must learn all the same."""
    data = toy_images()
    walk = predict_batches(load_model("segformer-nano", data.labels), data.train, Inference(32, batch_size=1))
    next(walk)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    walk.close()
