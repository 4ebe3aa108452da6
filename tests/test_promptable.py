"""The proposer `hf`: a tiny random model of each family, one real checkpoint, what is kept, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_vlms import tokenizer

import vlm_itl.proposals.promptable as room
from vlm_itl.core.checks import ConfigError
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.masks import MaskStore, row_ids
from vlm_itl.data.sources import load_data, toy_images
from vlm_itl.model.metrics import image_iou
from vlm_itl.proposals.promptable import class_table, concept_map, paint, query_maps
from vlm_itl.proposals.proposers import make_proposer

NAMES = {0: "background", 1: "Red", 2: "tree"}
CLASSES: dict[str, Any] = {"id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 310, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
QUERIES: dict[str, Any] = {"num_attention_heads": 2, "encoder_feedforward_dim": 16, "dim_feedforward": 16}
QUERIES |= {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 5}


def swin() -> Any:
    sizes = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 4}
    return tf.SwinConfig(image_size=32, patch_size=4, **sizes, out_features=["stage1", "stage2", "stage3", "stage4"])


def segformer() -> Any:
    sizes = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]}
    sizes |= {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    return tf.SegformerForSemanticSegmentation(tf.SegformerConfig(**sizes, decoder_hidden_size=16, **CLASSES))


def mask2former() -> Any:
    config = tf.Mask2FormerConfig(
        backbone_config=swin(), hidden_dim=32, feature_size=32, mask_feature_size=32, **QUERIES, **CLASSES
    )
    return tf.Mask2FormerForUniversalSegmentation(config)


def maskformer() -> Any:
    sides = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    detr = tf.DetrConfig(d_model=32, encoder_layers=1, decoder_layers=1, num_queries=5, **sides)
    config = tf.MaskFormerConfig(
        backbone_config=swin(), fpn_feature_size=32, mask_feature_size=32, decoder_config=detr, **CLASSES
    )
    return tf.MaskFormerForInstanceSegmentation(config)


def oneformer() -> Any:
    text = {"text_encoder_width": 16, "text_encoder_num_layers": 1, "text_encoder_vocab_size": 310}
    config = tf.OneFormerConfig(
        backbone_config=swin(),
        hidden_dim=32,
        conv_dim=32,
        mask_dim=32,
        query_dec_layers=1,
        **QUERIES,
        **text,
        **CLASSES,
    )
    return tf.OneFormerForUniversalSegmentation(config)


def eomt() -> Any:
    sizes = {"num_blocks": 1, "num_queries": 5, "num_upscale_blocks": 1, "num_hidden_layers": 2}
    config = tf.EomtConfig(image_size=64, patch_size=16, hidden_size=16, num_attention_heads=2, **sizes, **CLASSES)
    return tf.EomtForUniversalSegmentation(config)


def clipseg() -> Any:
    seen = {**SMALL, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    decoder = {"reduce_dim": 8, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
    text = {**TEXT, "max_position_embeddings": 16}
    config = tf.CLIPSegConfig(
        text_config=text, vision_config=seen, projection_dim=16, extract_layers=[0, 1, 2], **decoder
    )
    return tf.CLIPSegForImageSegmentation(config)


def sam3() -> Any:
    vit = {**SMALL, "num_hidden_layers": 2, "image_size": 56, "patch_size": 14, "window_size": 2}
    vit |= {"global_attn_indexes": [1], "pretrain_image_size": 56, "model_type": "sam3_vit_model"}
    grids = [[16, 16], [8, 8], [4, 4]]
    detr = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_layers": 1}
    config = tf.Sam3Config(
        vision_config=tf.Sam3VisionConfig(backbone_config=vit, fpn_hidden_size=16, backbone_feature_sizes=grids),
        text_config={**TEXT, "max_position_embeddings": 32, "projection_dim": 16},
        geometry_encoder_config=detr,
        detr_encoder_config=detr,
        detr_decoder_config={**detr, "num_queries": 5},
        mask_decoder_config={"hidden_size": 16, "num_attention_heads": 2},
    )
    return tf.Sam3Model(config)


FAMILIES: dict[str, tuple[Callable[[], Any], int]] = {  # a builder, and the side that it is shown
    "segformer": (segformer, 32),
    "mask2former": (mask2former, 64),
    "maskformer": (maskformer, 64),
    "oneformer": (oneformer, 64),
    "eomt": (eomt, 64),
    "clipseg": (clipseg, 32),
    "sam3": (sam3, 56),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_ITL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random checkpoint of each family."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, (build, _) in FAMILIES.items():
        torch.manual_seed(1)
        build().save_pretrained(folder / name)
        if name in ("oneformer", "clipseg", "sam3"):
            tokenizer().save_pretrained(folder / name)
    return folder


TOY = toy_images()
POOL = TOY.train.remove_columns("mask")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_proposes(family: str, checkpoints: Path, tmp_path: Path):
    """Masks of native size with our classes only; the same alone and in a batch, and again from the cache."""
    size = FAMILIES[family][1]
    low = {"threshold": 0.01} if family == "sam3" else {}  # a random one is sure of nothing
    masks = [MaskStore(tmp_path / name, TOY.labels) for name in "abc"]
    hf = make_proposer("hf", model=str(checkpoints / family), image_size=size, **low)
    hf.prepare(POOL, TOY.labels)
    proposals = hf.propose(POOL, masks[0])
    assert list(proposals) == row_ids(POOL) and hf.source == f"hf:{family}" and hf.fixed
    for row in POOL:
        mask = masks[0][row["id"]]
        assert mask.shape == row["image"].size[::-1] and set(np.unique(mask)) <= {0, 1, 2}
        assert set(proposals[row["id"]].class_scores) == set(np.unique(mask).tolist()) - {0}
        assert all(0 <= score <= 1.001 for score in proposals[row["id"]].class_scores.values())
    assert hf.propose(POOL, masks[1]) == proposals  # from the cache
    assert len(list((tmp_path / "cache" / "proposals").iterdir())) == 1
    single = make_proposer("hf", model=str(checkpoints / family), image_size=size, batch_size=1, **low)
    (tmp_path / "cache" / "proposals").rename(tmp_path / "other")
    alone = single.propose(POOL.select([2]), masks[2])
    (only,) = alone.values()
    assert (masks[2][only.id] == masks[0][only.id]).mean() > 0.95
    assert only.class_scores == pytest.approx(proposals[only.id].class_scores, abs=0.02)


def test_a_killed_proposer_asks_for_the_rest_only(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hf = make_proposer("hf", model=str(checkpoints / "segformer"), image_size=32, batch_size=1)
    whole = MaskStore(tmp_path / "whole", TOY.labels)
    shown: list[int] = []
    plain = room._shown

    def counted(pixels: torch.Tensor, norm: Any) -> torch.Tensor:
        if len(shown) == 2:
            raise KeyboardInterrupt
        shown.append(len(pixels))
        return plain(pixels, norm)

    monkeypatch.setattr(room, "_shown", counted)
    with pytest.raises(KeyboardInterrupt):
        hf.propose(POOL, whole)
    monkeypatch.setattr(room, "_shown", lambda pixels, norm: shown.append(len(pixels)) or plain(pixels, norm))
    resumed = hf.propose(POOL, whole)
    assert len(shown) == len(POOL)  # nobody was asked twice
    (tmp_path / "cache" / "proposals").rename(tmp_path / "gone")
    fresh = MaskStore(tmp_path / "fresh", TOY.labels)
    assert hf.propose(POOL, fresh) == resumed and all((fresh[i] == whole[i]).all() for i in resumed)


def test_other_weights_and_other_options_are_kept_apart(checkpoints: Path, tmp_path: Path):
    masks = MaskStore(tmp_path / "masks", TOY.labels)
    torch.manual_seed(2)
    segformer().save_pretrained(tmp_path / "retrained")
    for model, more in [
        (checkpoints / "segformer", {}),
        (checkpoints / "segformer", {"threshold": 0.5}),
        (checkpoints / "segformer", {"classes": {"tree": "blue"}}),
        (tmp_path / "retrained", {}),
    ]:
        make_proposer("hf", model=str(model), image_size=32, **more).propose(POOL.select([0]), masks)
    assert len(list((tmp_path / "cache" / "proposals").iterdir())) == 4


def test_queries_by_hand():
    """Two queries, one of a class and one of nothing: what they cover is as sure as they are."""
    maps = query_maps(torch.tensor([[[0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]]), torch.tensor([[[[9.0, -9.0]], [[9.0, 9.0]]]]))
    assert maps.shape == (1, 2, 1, 2) and maps[0, 1, 0, 0] > 0.99 and maps[0, :, 0, 1].max() < 0.01


def test_concepts_by_hand():
    out = concept_map(torch.tensor([[4.0, 2.0]]), None, torch.tensor([[[[1.0, -1.0, -1.0]], [[1.0, 1.0, -1.0]]]]))
    expected = torch.tensor([4.0, 2.0]).sigmoid().tolist()
    assert out[0, 0].tolist() == pytest.approx([*expected, 0.0])


def test_what_we_do_not_have_competes():
    """A class of theirs wins a pixel for the background, also where ours is sure enough."""
    labels = LabelSpace(("background", "cat"))
    maps = torch.tensor([[[0.6, 0.6]], [[0.3, 0.9]]])
    table = class_table(["cat", "sky"], labels, {})
    assert table == [1, None] and paint(maps, table, labels, 0.5)[0].tolist() == [[1, 0]]
    assert paint(maps, table, LabelSpace(("dog", "cat")), 0.5)[0].tolist() == [[1, 255]]


def test_several_of_theirs_are_one_of_ours():
    labels = LabelSpace(("background", "cat"))
    table = class_table(["tabby", "Cat", "background"], labels, {"tabby": "cat"})
    assert table == [1, 1, 0]
    mask, sure = paint(torch.tensor([[[0.6, 0.1]], [[0.2, 0.1]], [[0.2, 0.8]]]), table, labels)
    assert mask.tolist() == [[1, 0]] and sure == pytest.approx({1: 0.6})


def test_prompts_are_ours_to_say(checkpoints: Path, tmp_path: Path):
    """Prompts may be many to a class, and a class without a prompt is not looked for."""
    said = {"a red thing": "red", "a tomato": "red"}
    hf = make_proposer("hf", model=str(checkpoints / "clipseg"), image_size=32, classes=said, threshold=0.0)
    masks = MaskStore(tmp_path / "masks", TOY.labels)
    assert all(set(p.class_scores) <= {1} for p in hf.propose(POOL, masks).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nobody/nothing"}, "no model folder, nor reachable"),
        ({"threshold": 2}, "threshold must be a number >= 0 and <= 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"resize": "crop"}, "resize"),
        ({"prompt": "a cat"}, "prompt must hold {}"),
        ({"classes": {"Tree": "red"}}, "Did you mean 'tree'"),
        ({"classes": {"tree": "reed"}}, "Did you mean 'red'"),
        ({"modle": "x"}, "Did you mean 'model'"),
    ],
)
def test_bad_options_get_one_clear_line(options: dict[str, Any], message: str, checkpoints: Path):
    with pytest.raises(ConfigError, match=message) as caught:
        make_proposer("hf", **{"model": str(checkpoints / "segformer"), **options}).prepare(POOL, TOY.labels)
    assert "\n" not in str(caught.value)


def test_no_shared_class_is_refused(checkpoints: Path):
    with pytest.raises(ConfigError, match="knows none of our classes"):
        make_proposer("hf", model=str(checkpoints / "eomt")).prepare(POOL, LabelSpace(("background", "cat")))


def test_code_pickles_and_torn_checkpoints_are_refused(checkpoints: Path, tmp_path: Path):
    def refused(message: str, model: Path) -> None:
        with pytest.raises(ConfigError, match=message):
            make_proposer("hf", model=str(model)).propose(POOL, MaskStore(tmp_path / "masks", TOY.labels))

    coded = tmp_path / "coded"
    coded.mkdir()
    (coded / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "evil.Config"}}))
    (coded / "evil.py").write_text("raise SystemExit('it ran')")
    refused("no model folder, nor reachable", coded)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((checkpoints / "segformer" / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    refused("may run code", pickled)
    torn = tmp_path / "torn"
    tf.SegformerModel.from_pretrained(checkpoints / "segformer").save_pretrained(torn)
    config = json.loads((checkpoints / "segformer" / "config.json").read_text())
    (torn / "config.json").write_text(json.dumps(config))
    refused("is not whole", torn)


def test_a_real_checkpoint(shared: Path, tmp_path: Path):
    """DeepLabV3-MobileNetV2 as published (it has seen VOC) proposes good masks of photographs of VOC."""
    weights = shared / "weights" / "deeplabv3-mobilenetv2-voc"
    data = load_data(str(shared / "data" / "VOCdevkit" / "VOC2012"), leaks="off")
    rows = data.test.select(range(0, 120, 10))
    hf = make_proposer("hf", model=str(weights), image_size=257)
    hf.prepare(rows, data.labels)
    masks = MaskStore(tmp_path / "masks", data.labels)
    proposals = hf.propose(rows.remove_columns("mask"), masks)
    ious = [image_iou(masks[row["id"]], row["mask"], len(data.labels)) for row in rows]
    assert np.mean(ious) > 0.5 and np.mean([p.score for p in proposals.values() if p.score]) > 0.6
