"""Decoding, second starts and streaming of image files, measured on this machine.

    python benchmarks/data.py decode --out results/data-cpu/decode.json
    python benchmarks/data.py second-start --out results/data-cpu/second-start.json
    nice -n 19 python benchmarks/data.py stream --out results/data-cpu/stream.json

Everything is made below --folder (tens of GB for `stream`) and removed at the end.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageOps

CLASSES = 10
SOURCE = (375, 500)  # height and width of most images of ImageNet, pixels


def write_photos(root: Path, images: int, size: tuple[int, int] = SOURCE, test: int = 100) -> None:
    """Write JPEG files: parts of scikit-learn's two photos, each another one, scaled to the size."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(each) for each in load_sample_images().images]
    random = np.random.default_rng(0)
    for part, count in (("train", images), ("test", test)):
        for index in range(count):
            photo = photos[index % 2]
            width = int(random.integers(200, photo.width))
            height = width * size[0] // size[1]
            left, top = int(random.integers(photo.width - width)), int(random.integers(max(1, photo.height - height)))
            path = root / part / f"class{index % CLASSES}" / f"{index:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            piece = photo.crop((left, top, left + width, min(photo.height, top + height)))
            piece.resize(size[::-1], Image.Resampling.BILINEAR).save(path, quality=90)


def files_of(root: Path) -> list[Path]:
    """Return the training files of a folder."""
    return sorted((root / "train").glob("*/*.jpg"))


def plain_loop(paths: list[Path], side: int, out: Path) -> float:
    """Decode, scale and pack files as one does with Pillow in one process; return the seconds."""
    started = time.perf_counter()
    with open(out, "wb") as file:
        for path in paths:
            image = Image.open(path).convert("RGB")
            image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
            file.write(np.asarray(image).tobytes())
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - started


def own_store(root: Path, paths: list[Path], side: int, cache: Path) -> float:
    """Decode files into a store, checked; return the seconds."""
    from codistill.data.store import decoded, stored_in

    names = [str(path.relative_to(root)) for path in paths]
    started = time.perf_counter()
    with stored_in(str(cache)):
        found = decoded(root, names, (side, side), resize=True)
    seconds = time.perf_counter() - started
    assert len(found.images) == len(paths)
    return seconds


def decode(folder: Path, images: int, rounds: int) -> dict[str, Any]:
    """Decode and pack JPEG files in turn: a Pillow loop, and a store; both write the same pixels to the disk."""
    root, side, rows = folder / "photos", 224, []
    write_photos(root, images)
    own_store(root, files_of(root)[:2], side, folder / "first")  # imports take their time
    paths, processor = files_of(root), [0.0, 0.0]
    for piece in range(rounds):
        part, seconds = paths[piece::rounds], []
        for way in range(2):
            before = time.process_time()
            if way == 0:
                seconds.append(plain_loop(part, side, folder / "plain"))
            else:
                seconds.append(own_store(root, part, side, folder / "cache"))
            processor[way] += time.process_time() - before
        shutil.rmtree(folder / "cache")
        plain, own = seconds
        rows.append({"plain_seconds": round(plain, 2), "store_seconds": round(own, 2), "factor": round(plain / own, 2)})
    size = sum(path.stat().st_size for path in paths) / len(paths)
    about = {"images": images, "size": list(SOURCE), "bytes_a_file": round(size), "resize": side, "in_turn": rows}
    about |= {"processor_milliseconds_an_image": [round(1000 * each / images, 2) for each in processor]}
    return about | {
        "factor": round(sum(row["plain_seconds"] for row in rows) / sum(row["store_seconds"] for row in rows), 2)
    }


SECOND = """
import sys, time
import torch
import codistill as cd
from codistill.data.stream import on_device
from codistill.data.duplicates import duplicates
from codistill.data.store import stored_in
from codistill.runs.metadata import data_digests
started = time.perf_counter()
with stored_in(sys.argv[2]):
    data = cd.dataset("folder:resize=224", sys.argv[1])
found = time.perf_counter()
data_digests(data), data.statistics, duplicates(data)
facts = time.perf_counter()
images = on_device(data.train, data.statistics, torch.device("cpu"), sys.argv[3])
images.batch(0, 128)
print(found - started, facts - found, time.perf_counter() - facts)
"""


def second_start(folder: Path, images: int, rounds: int) -> dict[str, Any]:
    """Start again on a folder that was decoded before, in a new process; its seconds are those after the imports."""
    root, cache = folder / "photos", folder / "cache"
    write_photos(root, images)
    rows = []
    for number in range(rounds + 1):
        for how in ("on", "off") if number else ("on",):
            line = [sys.executable, "-c", SECOND, str(root), str(cache), how]
            out = subprocess.run(line, check=True, capture_output=True, text=True).stdout
            found, facts, ready = map(float, out.split())
            row = {"start": "second" if number else "first", "stream": how, "data_set": round(found, 3)}
            rows.append(row | {"digests_and_duplicates": round(facts, 3), "first_batch": round(ready, 3)})
            rows[-1]["seconds"] = round(found + facts + ready, 3)
    worst = max(row["seconds"] for row in rows if row["start"] == "second")
    return {"images": images, "resize": 224, "starts": rows, "slowest_second_start": worst}


STREAM = """
import sys
import numpy as np
import codistill as cd
from codistill.networks import Network, PooledLinear
from codistill.networks.layers import conv_bn_act, initialise

images, labels, out, steps, batch = np.load(sys.argv[1], mmap_mode="r"), np.load(sys.argv[2]), *sys.argv[3:6]
test = cd.Split(images[:500], labels[:500])
data = cd.Dataset("large", cd.Split(images, labels), test, tuple("abcdefghij"))
students = [Network([conv_bn_act(3, 8, 7, 8), conv_bn_act(8, 16, 3, 2)], PooledLinear(16, 10), (8, 16)) for _ in "ab"]
for student in students:
    initialise(student)
method = cd.DML(students, num_classes=10, image_size=data.image_size)
limit = int(batch) * int(steps) or None
settings = cd.TrainSettings(batch_size=int(batch), train_limit=limit, learning_rate=0.01)
execution = cd.ExecutionSettings(stream="on", threads=1, compile="off")
cd.train(method, data, epochs=1, settings=settings, execution=execution, out=out)
"""


def measured(line: list[str]) -> dict[str, Any]:
    """Run a command and return its seconds and the most memory that it held, resident, as Linux counts it."""
    started = time.perf_counter()
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(text)
    shown = [each.strip() for each in text.splitlines() if "images/s" in each][-1:]
    seconds, processor = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    times = {"seconds": round(seconds, 1), "processor_seconds": round(processor, 1)}
    return times | {"peak_rss_bytes": usage.ru_maxrss * 1024, "lines": shown}


def stream(folder: Path, images: int, steps: int) -> dict[str, Any]:
    """Train two tiny networks on a memory map of 224 x 224 images for an epoch, and measure the memory it takes.

    The images are of noise, so that they are quick to make; what is measured does not depend on them.
    """
    side, batch, random = 224, 64, np.random.default_rng(0)
    block = random.integers(0, 256, (500, side, side, 3), dtype=np.uint8)
    pixels = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (images, side, side, 3))
    pixels.flush()
    offset = pixels.offset
    del pixels
    with open(folder / "images.npy", "r+b") as file:
        file.seek(offset)
        for start in range(0, images, len(block)):
            file.write(block[: images - start].data)
    np.save(folder / "labels.npy", np.arange(images) % CLASSES)
    line = [sys.executable, "-c", STREAM, str(folder / "images.npy"), str(folder / "labels.npy")]
    found = measured([*line, str(folder / "run"), str(steps), str(batch)])
    about = {"images": images, "size": [side, side], "gigabytes": images * side * side * 3 / 1e9}
    about |= {"images_read": min(images, steps * batch) if steps else images, "batch_size": batch}
    return about | found | {"within_2_GiB": found["peak_rss_bytes"] <= 2 << 30}


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decode", "second-start", "stream"))
    parser.add_argument("--folder", type=Path, default=Path("data-benchmark"), help="made, and removed at the end")
    parser.add_argument("--images", type=int, help="10,000, of stream 100,000")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="of stream; 0: every image once")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    images = asked.images or (100_000 if asked.what == "stream" else 10_000)
    asked.folder.mkdir(parents=True)
    try:
        if asked.what == "decode":
            found = decode(asked.folder, images, asked.rounds)
        elif asked.what == "second-start":
            found = second_start(asked.folder, images, asked.rounds)
        else:
            found = stream(asked.folder, images, asked.steps)
    finally:
        shutil.rmtree(asked.folder)
    found |= {"cores": os.cpu_count(), "load": list(os.getloadavg()), "machine": platform.machine()}
    found |= {"pillow": PIL.__version__, "numpy": np.__version__}
    text = json.dumps(found, indent=2)
    print(text)
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
