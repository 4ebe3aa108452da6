"""Tiny random vision-language models, built and saved without network in a fraction of a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

KINDS = ("llava", "idefics3", "paligemma", "blip")
ODD = ("qwen2_vl", "smolvlm", "pixtral", "blip2", "instructblip", "florence2", "kosmos2", "git")  # each in its own way
TEXT = ["The coloured regions mark a cat and a dog.", "Does each region cover its object?", "Answer the question."]
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer(words: tuple[str, ...] = ("Yes", "No")) -> Any:
    """A byte-level BPE tokenizer of 300 tokens, with one token for each word."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    raw.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=["<image>"]
    )
    made.add_tokens(list(words))
    return made


def _vision(config: type, **extra: Any) -> Any:
    return config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        **extra,
    )


def _text(config: type, size: int, **extra: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return config(**sizes, vocab_size=size, max_position_embeddings=1024, **extra)


def _llava(words: tuple[str, ...]) -> tuple[Any, Any]:
    tok = tokenizer(words)
    processor = tf.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    config = tf.LlavaConfig(
        vision_config=_vision(tf.CLIPVisionConfig, projection_dim=32),
        text_config=_text(tf.LlamaConfig, len(tok), num_key_value_heads=4, pad_token_id=tok.pad_token_id),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    return tf.LlavaForConditionalGeneration(config), processor


def _idefics3(words: tuple[str, ...]) -> tuple[Any, Any]:
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    processor = tf.Idefics3Processor(images, tokenizer(words), image_seq_len=4, chat_template=CHAT)
    tok = processor.tokenizer
    config = tf.Idefics3Config(
        vision_config=_vision(tf.models.idefics3.configuration_idefics3.Idefics3VisionConfig).to_dict(),
        text_config=_text(tf.LlamaConfig, len(tok), num_key_value_heads=4, pad_token_id=tok.pad_token_id),
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tok.pad_token_id,
    )
    return tf.Idefics3ForConditionalGeneration(config), processor


def _paligemma(words: tuple[str, ...]) -> tuple[Any, Any]:
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = tf.PaliGemmaProcessor(images, tokenizer(words), chat_template=CHAT)
    tok = processor.tokenizer
    config = tf.PaliGemmaConfig(
        vision_config=_vision(tf.SiglipVisionConfig, vision_use_head=False, projection_dim=32),
        text_config=_text(tf.GemmaConfig, len(tok), num_key_value_heads=1, head_dim=8, pad_token_id=tok.pad_token_id),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    return tf.PaliGemmaForConditionalGeneration(config), processor


def _blip(words: tuple[str, ...]) -> tuple[Any, Any]:
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *letters, *("##" + letter for letter in letters)]
    vocab += [word.lower() for word in words] + ["##no", "##yes"]
    tok = tf.BertTokenizerFast(vocab={word: index for index, word in enumerate(vocab)})
    processor = tf.BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tok)
    config = tf.BlipConfig(
        vision_config=_vision(tf.BlipVisionConfig).to_dict(),
        text_config=_text(
            tf.BlipTextConfig, len(vocab), encoder_hidden_size=32, bos_token_id=5, pad_token_id=0, sep_token_id=3
        ).to_dict(),
        projection_dim=32,
    )
    return tf.BlipForQuestionAnswering(config), processor


# ---- families that cannot be put together here (no torchvision), or are asked in a way of their own ----

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EYES = {**SIZES, "image_size": 32, "patch_size": 8}
WORDS = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0}
SQUARE = {"size": {"height": 32, "width": 32}}
CROPPED = {**SQUARE, "crop_size": {"height": 32, "width": 32}}


class Parts:
    """An image processor and a tokenizer, written as a checkpoint of the Hub has them: with a part for films."""

    def __init__(self, kind: str, images: Any, words: Any, template: str, film: bool = True, **settings: Any):
        self.images, self.tokenizer, self.template = images, words, template
        self.settings = {"processor_class": kind, **settings}
        if film:
            self.settings["video_processor"] = {"video_processor_type": kind.replace("Processor", "VideoProcessor")}

    def save_pretrained(self, folder: Path) -> None:
        """Write the folder."""
        self.images.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / "processor_config.json").write_text(json.dumps(self.settings))
        (folder / "chat_template.jinja").write_text(self.template)


def _marked(words: tuple[str, ...], *marks: str) -> tuple[Any, list[int]]:
    """The tokenizer with marks of a family, and their ids."""
    tok = tokenizer(words)
    tok.add_special_tokens({"additional_special_tokens": [m for m in marks if m not in tok.get_vocab()]})
    return tok, tok.convert_tokens_to_ids(list(marks))


def _lower(words: tuple[str, ...]) -> Any:
    """A piecewise tokenizer of small letters and the words."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    return tf.BertTokenizerFast(vocab={w: i for i, w in enumerate([*vocab, *(word.lower() for word in words)])})


def _qwen2_vl(words: tuple[str, ...]) -> tuple[Any, Any]:
    tok, (image, film, start, end) = _marked(
        words, "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
    )
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 4)
    processor = Parts(
        "Qwen2VLProcessor", images, tok, CHAT.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    )
    axes = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = tf.Qwen2VLConfig(
        text_config={**WORDS, "vocab_size": len(tok), "rope_parameters": axes},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2},
        image_token_id=image,
        video_token_id=film,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return tf.Qwen2VLForConditionalGeneration(config), processor


def _smolvlm(words: tuple[str, ...]) -> tuple[Any, Any]:
    tok, (image, *_) = _marked(
        words, "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>"
    )
    images = SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Parts("SmolVLMProcessor", images, tok, CHAT, image_seq_len=4)
    text = {**WORDS, "model_type": "llama", "vocab_size": len(tok)}
    config = tf.SmolVLMConfig(
        vision_config=EYES, text_config=text, image_token_id=image, scale_factor=2, pad_token_id=0
    )
    return tf.SmolVLMForConditionalGeneration(config), processor


def _pixtral(words: tuple[str, ...]) -> tuple[Any, Any]:
    tok, (image, *_) = _marked(words, "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    images = PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size=8)
    processor = Parts("PixtralProcessor", images, tok, CHAT.replace("<image>", "[IMG]"), film=False, patch_size=8)
    config = tf.LlavaConfig(
        vision_config={**EYES, "model_type": "pixtral", "head_dim": 8},
        text_config={**WORDS, "model_type": "mistral", "vocab_size": len(tok), "head_dim": 8},
        image_token_index=image,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return tf.LlavaForConditionalGeneration(config), processor


def _blip2(words: tuple[str, ...], reads: bool = False) -> tuple[Any, Any]:
    tok, (image,) = _marked(words, "<image>")
    asker = _lower(words)
    between = {**SIZES, "encoder_hidden_size": 32, "vocab_size": len(asker)}
    text = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"word_embed_proj_dim": 32, "max_position_embeddings": 512, "vocab_size": len(tok), "pad_token_id": 0}
    parts = {"vision_config": EYES, "qformer_config": between, "text_config": text}
    kind = "InstructBlip" if reads else "Blip2"
    config = getattr(tf, f"{kind}Config")(**parts, num_query_tokens=4, image_token_index=image)
    owners = (BlipImageProcessorPil(**SQUARE), tok, *((asker,) if reads else ()))
    processor = getattr(tf, f"{kind}Processor")(*owners, num_query_tokens=4)
    return getattr(tf, f"{kind}ForConditionalGeneration")(config), processor


def _florence2(words: tuple[str, ...]) -> tuple[Any, Any]:
    tok, (image,) = _marked(words, "<image>")
    named = tf.PreTrainedTokenizerFast(
        tokenizer_object=tok.backend_tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"height": 64, "width": 64}, crop_size={"height": 64, "width": 64})
    stages = {"embed_dim": [8, 8, 16, 16], "num_heads": [2] * 4, "num_groups": [2] * 4, "depths": [1] * 4}
    half = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
    text = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in half.items()}
    text |= {"model_type": "bart", "d_model": 32, "vocab_size": len(tok), "pad_token_id": 0, "bos_token_id": 1}
    text |= {"eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    config = tf.Florence2Config(
        vision_config={**stages, "projection_dim": 32, "window_size": 2}, text_config=text, image_token_id=image
    )
    return tf.Florence2ForConditionalGeneration(config), tf.Florence2Processor(images, named)


def _kosmos2(words: tuple[str, ...]) -> tuple[Any, Any]:
    processor = tf.Kosmos2Processor(CLIPImageProcessorPil(**CROPPED), tokenizer(words), num_patch_index_tokens=4)
    text = {"embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 4, "max_position_embeddings": 512}
    text |= {"vocab_size": len(processor.tokenizer), "pad_token_id": 0}
    config = tf.Kosmos2Config(text_config=text, vision_config=EYES, latent_query_num=16)
    return tf.Kosmos2ForConditionalGeneration(config), processor


def _git(words: tuple[str, ...]) -> tuple[Any, Any]:
    tok = _lower(words)
    config = tf.GitConfig(
        vision_config=EYES, **SIZES, vocab_size=len(tok), pad_token_id=0, bos_token_id=2, eos_token_id=3
    )
    return tf.GitForCausalLM(config), tf.GitProcessor(CLIPImageProcessorPil(**CROPPED), tok)


BUILDERS = {
    "llava": _llava,
    "idefics3": _idefics3,
    "paligemma": _paligemma,
    "blip": _blip,
    "qwen2_vl": _qwen2_vl,
    "smolvlm": _smolvlm,
    "pixtral": _pixtral,
    "blip2": _blip2,
    "instructblip": lambda words: _blip2(words, reads=True),
    "florence2": _florence2,
    "kosmos2": _kosmos2,
    "git": _git,
}


def build(kind: str, folder: Path, words: tuple[str, ...] = ("Yes", "No"), seed: int = 0, spread: float = 6) -> Path:
    """Save a tiny model of a kind with its processor; random weights, times `spread` so that answers differ."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model, processor = BUILDERS[kind](words)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(spread)
    torch.set_rng_state(state)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def text_only(folder: Path) -> Path:
    """A tiny Llama: no image input."""
    tok = tokenizer()
    tf.LlamaForCausalLM(_text(tf.LlamaConfig, len(tok), num_key_value_heads=4)).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder
