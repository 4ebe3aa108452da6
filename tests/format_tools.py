"""Masks as a tool reads or writes them; run by the Python of another environment, which has the tools.

python format_tools.py read-datumaro LAYOUT PATH OUT.npz      each region as an array "id|name"
python format_tools.py write-datumaro LAYOUT MASKS.npz OUT    MASKS: "id" -> class indices, and "names"
python format_tools.py read-labelstudio FOLDER OUT.npz
python format_tools.py write-labelstudio MASKS.npz OUT.json
python format_tools.py read-cvat XML OUT.npz
"""

from __future__ import annotations

import json
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np


def save(regions: dict[str, np.ndarray], path: str) -> None:
    np.savez_compressed(path, **regions)


def masks_of(path: str) -> tuple[dict[str, np.ndarray], list[str]]:
    read = np.load(path)
    return {name: read[name] for name in read.files if name != "names"}, [str(name) for name in read["names"]]


def read_datumaro(layout: str, path: str, out: str) -> None:
    import datumaro as dm

    dataset = dm.Dataset.import_from(path, layout)
    names = [label.name for label in dataset.categories()[dm.AnnotationType.label]]
    regions: dict[str, np.ndarray] = {}
    for item in dataset:
        for part in item.annotations:
            if part.type.name == "mask":
                key = f"{item.id.split('/')[-1]}|{names[part.label]}"
                assert key not in regions
                regions[key] = np.asarray(part.image, bool)
    save(regions, out)


def write_datumaro(layout: str, masks: str, out: str) -> None:
    import datumaro as dm

    arrays, names = masks_of(masks)
    items = []
    for name, mask in arrays.items():
        parts = [dm.Mask(mask == i, label=i, id=i + 1, group=i + 1) for i in range(1, len(names)) if (mask == i).any()]
        media = dm.Image.from_numpy(data=np.zeros((*mask.shape, 3), np.uint8))
        items.append(dm.DatasetItem(id=name, subset="train", annotations=parts, media=media))
    dm.Dataset.from_iterable(items, categories=names).export(out, layout, save_media=True)


def read_labelstudio(folder: str, out: str) -> None:
    from label_studio_sdk.converter import Converter
    from label_studio_sdk.converter.converter import Format

    tasks = json.loads((Path(folder) / "tasks.json").read_text(encoding="utf-8"))
    names = {task["id"]: Path(task["data"]["image"]).stem for task in tasks}
    converter = Converter((Path(folder) / "label_config.xml").read_text(encoding="utf-8"), project_dir=folder)
    regions: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as aside:
        converter.convert(str(Path(folder) / "tasks.json"), aside, Format.BRUSH_TO_NUMPY, is_dir=False)
        for path in Path(aside).glob("*.npy"):
            number = int(path.stem.split("-")[1])
            label = path.stem.rpartition("-0")[0].split("-label-", 1)[1]
            regions[f"{names[number]}|{label}"] = np.load(path) > 0
    save(regions, out)


def write_labelstudio(masks: str, out: str) -> None:
    from label_studio_sdk.converter import brush

    arrays, names = masks_of(masks)
    tasks: list[dict[str, Any]] = []
    for name, mask in arrays.items():
        height, width = mask.shape
        size = {"original_width": width, "original_height": height, "from_name": "label", "to_name": "image"}
        results = [
            {
                "id": f"r{i}",
                "type": "brushlabels",
                **size,
                "value": {"format": "rle", "rle": rle, "brushlabels": [names[i]]},
            }
            for i in range(1, len(names))
            if (mask == i).any() and (rle := brush.mask2rle((mask == i).astype(np.uint8) * 255))
        ]
        by = {"email": "anna@example.org", "id": 1}
        said = {"result": results, "lead_time": 31.5, "completed_by": by, "was_cancelled": False}
        tasks.append(
            {"id": len(tasks) + 1, "data": {"image": f"/data/upload/1/0a1b2c3d-{name}.jpg"}, "annotations": [said]}
        )
    Path(out).write_text(json.dumps(tasks), encoding="utf-8")


def read_cvat(path: str, out: str) -> None:
    from cvat_sdk.masks import decode_mask

    regions = {}
    for image in ElementTree.parse(path).getroot().iter("image"):
        width, height = int(image.attrib["width"]), int(image.attrib["height"])
        for mask in image.iter("mask"):
            left, top, wide, high = (int(mask.attrib[name]) for name in ("left", "top", "width", "height"))
            points = [int(count) for count in mask.attrib["rle"].split(",")]
            points += [left, top, left + wide - 1, top + high - 1]
            region = decode_mask(points, image_width=width, image_height=height)
            regions[f"{Path(image.attrib['name']).stem}|{mask.attrib['label']}"] = region
    save(regions, out)


if __name__ == "__main__":
    globals()[sys.argv[1].replace("-", "_")](*sys.argv[2:])
