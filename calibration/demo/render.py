"""Render machine parts as a sorting camera above a conveyor belt or a bench would see them.

Every part is a signed distance function (SDF) in three dimensions, met by parallel rays with
sphere tracing (J. C. Hart, "Sphere tracing", The Visual Computer 12, 1996), shaded as metal under
lamps, laid on a drawn ground, and then photographed: clutter, occlusion, blur, exposure, sensor
noise. Only numpy and Pillow are needed. The same class and seed give the same picture.

    python calibration/demo/render.py OUT --per-class 50 --seed 2
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from parts import CLASSES, PARTS, Array
from PIL import Image, ImageDraw, ImageFilter
from scene import SIZE, Color, choose_light, cloud, place

SEED_STRIDE = 1_000_000
"""Picture i of a class in the set with seed s is rendered with the seed s * SEED_STRIDE + i."""


# --- Ground, clutter and camera -----------------------------------------------------------------


def _ground(rng: np.random.Generator) -> Array:
    """Linear RGB of shape (SIZE * SIZE, 3): a belt or a bench without light or shadow."""
    kind = int(rng.integers(8))
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    u = columns * np.float32(np.cos(angle)) + rows * np.float32(np.sin(angle))
    v = rows * np.float32(np.cos(angle)) - columns * np.float32(np.sin(angle))
    speck = rng.random((SIZE, SIZE), np.float32) - 0.5
    blotch = cloud(rng, SIZE, 4)
    pitch = rng.uniform(7, 26)
    if kind == 0:  # ribbed rubber belt
        color: Color = (0.045, 0.046, 0.05)
        pattern = 1 + 0.5 * np.tanh(3 * np.sin(u * (2 * np.pi / pitch))) + 0.25 * speck
    elif kind == 1:  # woven belt, green or blue
        color = (0.05, 0.14, 0.09) if rng.random() < 0.5 else (0.04, 0.1, 0.2)
        fine = np.float32(2 * np.pi / rng.uniform(5, 9))
        pattern = 1 + 0.25 * np.sin(u * fine) * np.sin(v * fine) + 0.2 * speck
    elif kind == 2:  # brushed steel
        color = (0.3, 0.31, 0.32)
        streak = rng.random((SIZE, 1), np.float32) - 0.5
        streak = streak if rng.random() < 0.5 else streak.T
        pattern = 1 + 0.35 * streak + 0.1 * speck
    elif kind == 3:  # wooden bench
        color = (0.36, 0.22, 0.11)
        rings = np.sin((v + 14 * cloud(rng, SIZE, 3, 2)) * np.float32(2 * np.pi / pitch))
        pattern = 1 + 0.22 * rings + 0.12 * np.sin(v * 1.7 + 3 * blotch) + 0.1 * speck
    elif kind == 4:  # cardboard or paper
        color = (0.48, 0.36, 0.23) if rng.random() < 0.6 else (0.6, 0.59, 0.56)
        pattern = 1 + 0.06 * np.sin(u * (2 * np.pi / 9)) + 0.12 * speck
    elif kind == 5:  # concrete
        color = (0.26, 0.255, 0.245)
        pattern = 1 + 0.35 * speck + 0.3 * cloud(rng, SIZE, 24, 2)
    elif kind == 6:  # cutting mat with a grid
        color = (0.03, 0.14, 0.1) if rng.random() < 0.5 else (0.1, 0.11, 0.13)
        pitch = rng.uniform(22, 48)
        line = np.minimum(np.abs((u + 999 * pitch) % pitch), np.abs((v + 999 * pitch) % pitch))
        pattern = 1 + 1.6 * np.clip(1.4 - line, 0, 1) + 0.15 * speck
    else:  # perforated tray
        color = (0.34, 0.35, 0.36) if rng.random() < 0.5 else (0.1, 0.17, 0.32)
        pitch = rng.uniform(20, 40)
        du, dv = u % pitch - pitch / 2, v % pitch - pitch / 2
        hole = np.hypot(du, dv) - pitch * rng.uniform(0.2, 0.3)
        pattern = (
            1 - 0.75 * np.clip(0.5 - hole, 0, 1) + 0.35 * np.exp(-((hole - 1) ** 2)) * (dv > 0)
        )
        pattern = pattern + 0.08 * speck
    wear = 1 + rng.uniform(0.1, 0.45) * blotch
    base = np.array(color, np.float32) * rng.uniform(0.7, 1.4, 3).astype(np.float32).mean()
    tone = base * (1 + rng.uniform(-0.12, 0.12, 3)).astype(np.float32)
    flat = np.clip(pattern * wear, 0.05, 4).reshape(-1, 1).astype(np.float32) * tone
    return flat.astype(np.float32)


def _litter(rng: np.random.Generator, image: Image.Image, amount: float) -> None:
    """Draw scratches, oil drops and metal shavings on an 8-bit picture."""
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(int(rng.poisson(5 * amount))):  # scratches
        x, y = rng.uniform(0, SIZE, 2)
        a, length = rng.uniform(0, 2 * np.pi), rng.uniform(15, 120)
        tone = int(rng.choice((20, 210)))
        end = (x + length * np.cos(a), y + length * np.sin(a))
        draw.line([(x, y), end], fill=(tone, tone, tone, int(rng.uniform(20, 80))), width=1)
    for _ in range(int(rng.poisson(1.2 * amount))):  # oil
        x, y = rng.uniform(0, SIZE, 2)
        w, h = rng.uniform(6, 40, 2)
        draw.ellipse([x - w, y - h, x + w, y + h], fill=(18, 14, 8, int(rng.uniform(30, 110))))
    for _ in range(int(rng.poisson(4 * amount))):  # curled shavings
        x, y = rng.uniform(0, SIZE, 2)
        r, start = rng.uniform(3, 13), rng.uniform(0, 360)
        tone = np.array(((205, 205, 210), (200, 165, 90), (110, 110, 115))[int(rng.integers(3))])
        for turn in range(int(rng.integers(1, 5))):
            box = [x - r, y - r * 0.7, x + r, y + r * 0.7]
            dark = [box[0] + 1, box[1] + 2, box[2] + 1, box[3] + 2]
            draw.arc(dark, start, start + 230, fill=(0, 0, 0, 130), width=2)
            shade = tuple(int(t * (0.7 + 0.1 * turn)) for t in tone)
            draw.arc(box, start, start + 230, fill=(*shade, 255), width=int(rng.integers(1, 3)))
            x, y = x + r * 0.7, y + rng.uniform(-1, 3)


def _occlude(
    rng: np.random.Generator, image: Image.Image, centre: tuple[float, float], reach: float
) -> None:
    """Cover a piece of the part: a cable, a strip of tape, a rod or a spot of grease."""
    draw = ImageDraw.Draw(image, "RGBA")
    kind = int(rng.integers(4))
    a = rng.uniform(0, 2 * np.pi)
    off = reach * rng.uniform(-0.55, 0.55)
    x, y = centre[0] - off * np.sin(a), centre[1] + off * np.cos(a)
    far = 2.0 * SIZE
    if kind in (0, 2):  # a cable or a rod right across
        width = rng.uniform(5, 15)
        tone = ((25, 25, 28), (150, 25, 20), (30, 60, 140), (170, 172, 175))[int(rng.integers(4))]
        bow = rng.uniform(-40, 40) if kind == 0 else 0.0
        t = np.linspace(-1, 1, 25)
        px = x + far / 2 * t * np.cos(a) - bow * t * t * np.sin(a)
        py = y + far / 2 * t * np.sin(a) + bow * t * t * np.cos(a)
        for shift, share, light, alpha in (
            (0.5, 1.15, 0.0, 110),
            (0.0, 1.0, 0.6, 255),
            (-0.1, 0.7, 1.0, 255),
            (-0.2, 0.25, 1.6, 255),
        ):
            color = tuple(int(min(255, c * light + (40 if light > 1 else 0))) for c in tone)
            path = list(zip(px + shift * width * 0.6, py + shift * width, strict=True))
            draw.line(path, fill=(*color, alpha), width=max(1, int(width * share)), joint="curve")
    elif kind == 1:  # tape
        half, thick = reach * rng.uniform(0.5, 1.4), rng.uniform(8, 22)
        c, s = np.cos(a), np.sin(a)
        corners = [
            (x + i * half * c - j * thick * s, y + i * half * s + j * thick * c)
            for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))
        ]
        tone = ((205, 190, 140), (225, 225, 220), (40, 90, 60))[int(rng.integers(3))]
        draw.polygon(corners, fill=(*tone, int(rng.uniform(200, 255))))
    else:  # grease
        for _ in range(int(rng.integers(3, 9))):
            gx, gy = x + rng.normal(0, reach * 0.15), y + rng.normal(0, reach * 0.15)
            w, h = rng.uniform(reach * 0.06, reach * 0.2, 2)
            draw.ellipse([gx - w, gy - h, gx + w, gy + h], fill=(28, 22, 14, 225))


def _photograph(rng: np.random.Generator, image: Image.Image, hardness: float) -> Image.Image:
    """Blur, exposure, vignette and sensor noise."""
    blur = min(0.35 + hardness * rng.gamma(1.2, 0.75), 2.7)
    values = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), np.float32)
    if blur < 1.6 and rng.random() < 0.3 * hardness:
        values = _drag(values, rng.uniform(0, np.pi), rng.uniform(3, 13))
    rows, columns = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j].astype(np.float32)
    values *= (1 - rng.uniform(0, 0.22) * (rows * rows + columns * columns))[..., None]
    gain = np.exp(rng.normal(0, 0.28 * hardness))
    white = np.exp(rng.normal(0, 0.04, 3)).astype(np.float32)
    contrast = rng.uniform(0.75, 1.15)
    values = (values - 110) * np.float32(contrast) + 110
    values = np.clip(values * np.float32(gain) * white, 0, None)
    # The camera's exposure control is poor, but it exists.
    mean = float(values.mean())
    values *= np.float32(np.clip(mean, 45, 165) / max(mean, 1))
    sigma = hardness * rng.gamma(1.5, 2.4)
    noise = rng.standard_normal((SIZE, SIZE, 3), np.float32)
    noise += rng.standard_normal((SIZE, SIZE, 1), np.float32)
    values += noise * (np.float32(sigma * 0.06) * np.sqrt(values + 10))
    return Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8))


def _drag(values: Array, angle: float, length: float) -> Array:
    """Motion blur along a line of `length` pixels."""
    steps = max(3, int(length))
    total = np.zeros_like(values)
    for t in np.linspace(-0.5, 0.5, steps):
        dx, dy = round(t * length * np.cos(angle)), round(t * length * np.sin(angle))
        total += np.roll(values, (dy, dx), (0, 1))
    return total / steps


def render(class_name: str, seed: int) -> Image.Image:
    """Render one picture, the same for the same class and seed.

    Args:
        class_name: One of `CLASSES`.
        seed: Any non-negative integer.

    Returns:
        An RGB picture of SIZE x SIZE pixels.
    """
    rng = np.random.default_rng([seed, CLASSES.index(class_name)])
    light = choose_light(rng)
    scene = _ground(rng) * (light.ambient * 0.9 + 0.85 * light.key[2]) * light.tint
    hardness = float(rng.uniform(0.35, 1.35))

    image = _develop(scene)
    _litter(rng, image, hardness)
    scene = (np.asarray(image, np.float32).reshape(-1, 3) / 255) ** 2.2

    for _ in range(int(rng.choice(3, p=(0.5, 0.33, 0.17)))):
        # Neighbours lie at the border, mostly outside, so that one part stays the subject.
        other = PARTS[CLASSES[int(rng.integers(len(CLASSES)))]](rng)
        a, size = rng.uniform(0, 2 * np.pi), rng.uniform(45, 90)
        far = SIZE * 0.5 + size * rng.uniform(0.25, 0.7)
        side = max(abs(np.cos(a)), abs(np.sin(a)))
        where = (SIZE / 2 + far * np.cos(a) / side, SIZE / 2 + far * np.sin(a) / side)
        place(rng, scene, other, where, size, light)

    part = PARTS[class_name](rng)
    scale = SIZE * rng.uniform(0.26, 0.5)
    free = max(0.0, SIZE * 0.5 - scale * 0.8)
    centre = (
        SIZE / 2 + rng.uniform(-free, free) * 0.8,
        SIZE / 2 + rng.uniform(-free, free) * 0.8,
    )
    place(rng, scene, part, centre, scale, light)
    image = _develop(scene)
    if rng.random() < 0.22:
        _occlude(rng, image, centre, scale)
    return _photograph(rng, image, hardness)


def _develop(scene: Array) -> Image.Image:
    """Linear light to 8-bit sRGB with a soft shoulder."""
    values = scene / (1 + 0.25 * scene)
    values = np.clip(values, 0, 1) ** np.float32(1 / 2.2)
    return Image.fromarray((values * 255 + 0.5).astype(np.uint8).reshape(SIZE, SIZE, 3))


# --- Sets ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One picture of a set."""

    path: Path
    class_name: str
    seed: int
    quality: int


def plan(out: Path, counts: Iterable[int], seed: int, quality: int) -> list[Job]:
    """The pictures of a set: `counts` says how many of each class, in the order of `CLASSES`."""
    return [
        Job(out / f"{name}_{i:04d}.jpg", name, seed * SEED_STRIDE + i, quality)
        for name, count in zip(CLASSES, counts, strict=True)
        for i in range(count)
    ]


def share_out(total: int) -> list[int]:
    """As equal counts as `total` allows, the first classes taking the remainder."""
    each, rest = divmod(total, len(CLASSES))
    return [each + (i < rest) for i in range(len(CLASSES))]


def make(job: Job) -> Job:
    """Render one job and write its JPEG."""
    image = render(job.class_name, job.seed)
    image.save(job.path, "JPEG", quality=job.quality, optimize=True)
    return job


def write_set(out: Path, jobs: list[Job], processes: int) -> None:
    """Render the jobs and write `labels.csv` and `classes.txt` beside the pictures."""
    out.mkdir(parents=True, exist_ok=True)
    for number, _ in enumerate(_run(jobs, processes), 1):
        if sys.stderr.isatty() or number % 500 == 0 or number == len(jobs):
            print(f"\r{number} of {len(jobs)} pictures", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    with (out / "labels.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("file", "label"))
        writer.writerows((job.path.name, CLASSES.index(job.class_name)) for job in jobs)
    (out / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")


def _run(jobs: list[Job], processes: int) -> Iterator[Job]:
    if processes == 1:
        yield from map(make, jobs)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(make, jobs, chunksize=16)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Render a labelled set of machine parts.")
    parser.add_argument("out", type=Path, help="folder to write")
    number = parser.add_mutually_exclusive_group(required=True)
    number.add_argument("--per-class", type=int, help="pictures of each class")
    number.add_argument("--total", type=int, help="pictures in all, shared out over the classes")
    parser.add_argument("--seed", type=int, required=True, help="seed of the set")
    parser.add_argument("--quality", type=int, default=85, help="JPEG quality (default 85)")
    parser.add_argument("--processes", type=int, default=1, help="parallel processes (default 1)")
    options = parser.parse_args()
    if options.per_class is not None:
        counts = [options.per_class] * len(CLASSES)
    else:
        counts = share_out(options.total)
    jobs = plan(options.out, counts, options.seed, options.quality)
    write_set(options.out, jobs, options.processes)


if __name__ == "__main__":
    main()
