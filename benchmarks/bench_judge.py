"""What a local judge costs, side by side with `generate`, on two tiny models.

Run as `python benchmarks/bench_judge.py [rounds]` (default 5; three minutes): one thread, CPU time, everything from
photograph and mask to the verdict. All ways take turns within a round; the medians over rounds are compared. One JSON
row a line with the keys {part, ours, peer, unit, ratio, goal, holds}, all of them in results/bench_judge.json.

The models have random weights, 26 and 29 million of them: a LLaVA (CLIP, 256 tokens a picture, all read by the language
model) and an Idefics3 like SmolVLM (64 tokens a picture; a deep, narrow language model; a large vocabulary). Their
tokenizer is trained on the questions, so that a question has as many tokens as with a real one: 48 to 98, legend
included. Where looking and reading are nearly all the work, as in this LLaVA, two more tokens cost little, and one
question a picture gains little over `generate`; an Idefics3 of 25 million weights that saw 512-pixel pictures (1,024
patches) gained nothing there (ratio 1.0), so that figure tells more about the shape of a model than about the judge.
The comparison of both passes on the first batches (see `SharedPrefix`) happens once a run and is not in the medians.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vlm_itl.data.labels import LabelSpace
from vlm_itl.vlm.answers import QUESTIONS
from vlm_itl.vlm.handler import JudgeQuery, make_handler
from vlm_itl.vlm.local import HFJudge
from vlm_itl.vlm.local_model import vlm_inputs
from vlm_itl.vlm.render import instruct, render

VOC = LabelSpace.voc()
RESULTS = Path(__file__).resolve().parent.parent / "results" / "bench_judge.json"
ASKED = [
    "quality",
    "exhaustive",
    "Does the mask stay inside the {class_names}? Answer yes or no.",
    "Is any part of the {class_names} missing? Answer yes or no.",
]
CHAT = (
    "{% for m in messages %}USER: {% for part in m['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
)


def tokenizer() -> Any:
    "A byte-level BPE tokenizer that knows the questions."
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    texts = [
        *QUESTIONS.values(),
        ", ".join(VOC.names),
        "Coloured regions are the mask. Legend: maroon = aeroplane.",
    ] * 5
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4000, special_tokens=special, initial_alphabet=alphabet)
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=["<image>"]
    )
    made.add_tokens(["Yes", "No"])
    return made


def save_llava(folder: str) -> int:
    "26 million weights, 256 tokens a picture."
    words = tokenizer()
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    processor = transformers.LlavaProcessor(
        images, words, 14, "default", num_additional_image_tokens=1, chat_template=CHAT
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        image_size=224,
        patch_size=14,
        projection_dim=256,
    )
    text = transformers.LlamaConfig(
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=9,
        num_attention_heads=6,
        num_key_value_heads=6,
        vocab_size=4096,
        max_position_embeddings=2048,
        pad_token_id=0,
    )
    mark = words.convert_tokens_to_ids("<image>")
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=mark, image_seq_length=256
    )
    return save(transformers.LlavaForConditionalGeneration(config), processor, folder)


def save_idefics(folder: str) -> int:
    "29 million weights, 64 tokens a picture."
    images = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 256}, max_image_size={"longest_edge": 256}, do_image_splitting=False
    )
    processor = transformers.Idefics3Processor(images, tokenizer(), image_seq_len=64, chat_template=CHAT)
    vision = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 256,
        "patch_size": 16,
    }
    text = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=20,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=32768,
        max_position_embeddings=2048,
        pad_token_id=0,
    )
    config = transformers.Idefics3Config(
        vision_config=vision,
        text_config=text,
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return save(transformers.Idefics3ForConditionalGeneration(config), processor, folder)


def save(net: Any, processor: Any, folder: str) -> int:
    "Write model and processor; the number of weights."
    net.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(weight.numel() for weight in net.parameters())


def queries(count: int, asked: list[str]) -> list[JudgeQuery]:
    "Photographs of VOC's size with a mask of two classes."
    found = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        photograph = small.resize((500, 375), Image.Resampling.BICUBIC)
        mask = np.zeros((375, 500), np.uint8)
        mask[100:300, 100:300] = 8 + seed % 4
        mask[50:90, 50:90] = 15
        found += [JudgeQuery(f"im{seed}", photograph, mask, question=q, labels=VOC) for q in asked]
    return found


def generate(judge: HFJudge, asked: list[JudgeQuery], tokens: int = 3) -> None:
    "What most loops do: draw, let the model write a few words, one item at a time."
    for query in asked:
        inputs = vlm_inputs(judge.vlm, [render(query, judge.style, judge.max_side)], [instruct(query, judge.style)])
        with torch.inference_mode():
            judge.vlm.net.generate(
                **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )


def in_turn(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    "Median CPU seconds of each, after one call to warm up (which includes the comparison of both passes)."
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if turn:
                times[name].append(time.process_time() - start)
    return {name: median(values) for name, values in times.items()}


def row(part: str, ours: float, peer: float, goal: float) -> dict[str, Any]:
    "One comparison, milliseconds a question."
    found = {"part": part, "ours": round(1e3 * ours, 1), "peer": round(1e3 * peer, 1), "unit": "CPU ms a question"}
    return {**found, "ratio": round(peer / ours, 2), "goal": f">= {goal}", "holds": peer >= goal * ours}


def main(rounds: int = 5) -> None:
    "All rows."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    one, four = queries(8, ASKED[:1]), queries(4, ASKED)
    rows: list[dict[str, Any]] = []
    for name, build in (("LLaVA", save_llava), ("Idefics3", save_idefics)):
        with tempfile.TemporaryDirectory() as folder:
            label = f"{name} of {build(folder) / 1e6:.0f} M weights"
            plain = make_handler("hf", model=folder, min_mass=0, share_images=False)
            shared = make_handler("hf", model=folder, min_mass=0)
        times = in_turn(
            {
                "generate one": lambda p=plain: generate(p, one),
                "ours one": lambda s=shared: s.judge(one),
                "generate four": lambda p=plain: generate(p, four),
                "plain four": lambda p=plain: p.judge(four),
                "ours four": lambda s=shared: s.judge(four),
            },
            rounds,
        )
        one_by_one, ours_one = times["generate one"] / len(one), times["ours one"] / len(one)
        by_generate, by_pass, ours = (times[k] / len(four) for k in ("generate four", "plain four", "ours four"))
        rows.append(row(f"{label}, 1 question a picture: 3-token generate one by one", ours_one, one_by_one, 1.3))
        rows.append(row(f"{label}, 4 questions a picture: 3-token generate one by one", ours, by_generate, 2))
        rows.append(row(f"{label}, 4 questions a picture: batched pass without sharing", ours, by_pass, 2))
        gap = max(abs(a.p_yes - b.p_yes) for a, b in zip(shared.judge(four), plain.judge(four), strict=True))
        found = {"part": f"{label}, 4 questions a picture: P(yes) with and without sharing", "ours": gap, "peer": 0.0}
        rows.append({**found, "unit": "largest difference", "ratio": None, "goal": "<= 1e-05", "holds": gap <= 1e-5})
        for line in rows[-4:]:
            print(json.dumps(line), flush=True)
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(line) for line in rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:2]))
