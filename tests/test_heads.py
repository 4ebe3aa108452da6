"""Heads are taken over by name: which row is which class, in every family."""

from __future__ import annotations

import torch
from transformers import BeitConfig, BeitForSemanticSegmentation

from vlm_itl.data.labels import LabelSpace
from vlm_itl.model.pretrained import class_rows, match_names
from vlm_itl.model.segmenter import load_model

SEVEN = LabelSpace(tuple("abcdefg"))
VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 64}


def test_fault_13_every_family_carries_its_head(tmp_path):
    """Whatever the layer is called, and an auxiliary head besides."""
    torch.manual_seed(0)
    names = dict(enumerate("gfedcba"))
    config = BeitConfig(
        **VIT, patch_size=8, num_labels=7, out_indices=[1, 2, 3, 4], auxiliary_channels=8, pool_scales=[1]
    )
    config.id2label, config.label2id = names, {n: i for i, n in names.items()}
    net = BeitForSemanticSegmentation(config)
    net.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), SEVEN)
    assert len(class_rows(config)) == 4
    for name in class_rows(config):
        assert torch.equal(model.net.state_dict()[name], net.state_dict()[name].flip(0))


def test_names_are_matched_by_what_they_say():
    assert match_names(["Dining Table", "TV/monitor"], ["tvmonitor", "diningtable", "cat"]) == [1, 0, None]
    assert match_names(["labrador", "label maker"], ["cat", "dog"]) == [None, None]
    assert match_names(["LABEL_0", "LABEL_1"], ["cat", "dog"]) == [0, 1]
    assert match_names(["1", "0"], ["0", "1"]) == [1, 0]
    assert match_names(["a", "A", "b"], ["A", "a", "b"]) == [1, 0, 2]
    assert match_names(["+", "-"], ["-", "+"]) == [1, 0]
