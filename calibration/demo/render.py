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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Array = npt.NDArray[np.float32]
Distance = Callable[[Array, Array, Array], Array]
Color = tuple[float, float, float]

SIZE = 256
"""Side of a picture in pixels."""

SEED_STRIDE = 1_000_000
"""Picture i of a class in the set with seed s is rendered with the seed s * SEED_STRIDE + i."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part in its own coordinates, inside the unit sphere, its axis along z.

    Attributes:
        distance: The SDF.
        step: Share of the distance that is safe to march, since some SDFs are only bounds.
        tilt: Largest angle in degrees between the part's axis and the viewing direction,
            or for a `long` part between its axis and the picture plane.
        long: The part lies on its side.
        accent: Where the second material is (1) and where not (0), or None.
        plastic: The part is also made of plastic or painted.
        flip: The part also lies on its upper face.
        spin: Largest turn in degrees about the part's own axis, either way.
    """

    distance: Distance
    step: float = 0.9
    tilt: float = 50.0
    long: bool = False
    accent: Distance | None = None
    plastic: bool = False
    flip: bool = True
    spin: float = 180.0


# --- Helpers for distances ----------------------------------------------------------------------


def _box(u: Array, v: Array, half_u: float, half_v: float, rounding: float = 0.0) -> Array:
    """Distance to a rectangle with rounded corners around the origin."""
    du = np.abs(u) - (half_u - rounding)
    dv = np.abs(v) - (half_v - rounding)
    outside = np.hypot(np.maximum(du, 0), np.maximum(dv, 0))
    return outside + np.minimum(np.maximum(du, dv), 0) - rounding


def _segment(u: Array, v: Array, a: tuple[float, float], b: tuple[float, float]) -> Array:
    """Distance to the line segment from a to b."""
    bu, bv = b[0] - a[0], b[1] - a[1]
    h = np.clip(((u - a[0]) * bu + (v - a[1]) * bv) / (bu * bu + bv * bv), 0, 1)
    return np.hypot(u - a[0] - h * bu, v - a[1] - h * bv)


def _hexagon(x: Array, y: Array, apothem: float) -> Array:
    a, b = 0.5 * x, np.float32(0.8660254) * y
    return np.maximum(np.abs(x), np.maximum(np.abs(a + b), np.abs(a - b))) - apothem


def _triangle_wave(phase: Array) -> Array:
    """From -1 to 1 and back once in a unit of phase."""
    return 4 * np.abs(phase - np.floor(phase) - 0.5) - 1


def _thread(x: Array, y: Array, z: Array, pitch: float) -> Array:
    """Height of a screw thread, from -1 to 1."""
    return _triangle_wave(z / pitch - np.arctan2(y, x) * np.float32(0.15915494))


def _length(*parts: Array) -> Array:
    return np.sqrt(sum(p * p for p in parts))  # type: ignore[no-any-return]


# --- The ten parts ------------------------------------------------------------------------------


def _nut(rng: np.random.Generator) -> Part:
    apothem = 0.72
    height = rng.uniform(0.26, 0.42)
    bore = apothem * rng.uniform(0.48, 0.64)
    pitch = rng.uniform(0.10, 0.18)
    flange = rng.random() < 0.2
    chamfer = rng.uniform(0.78, 0.84)

    def distance(x: Array, y: Array, z: Array) -> Array:
        r = np.hypot(x, y)
        d = np.maximum(_hexagon(x, y, apothem), np.abs(z) - height)
        d = np.maximum(d, (r + 0.6 * (np.abs(z) - height) - chamfer) * 0.85)
        if flange:
            d = np.minimum(d, np.maximum(r - 0.9, np.abs(z + height - 0.06) - 0.06))
        hole = (
            bore + 0.03 * _thread(x, y, z, pitch) + 0.5 * np.maximum(np.abs(z) - height + 0.05, 0)
        )
        return np.maximum(d, (hole - r) * 0.85)

    return Part(distance=distance, step=0.85, tilt=62, flip=not flange)


def _washer(rng: np.random.Generator) -> Part:
    outer = 0.92
    inner = outer * rng.uniform(0.36, 0.62)
    height = rng.uniform(0.03, 0.075)
    dish = rng.uniform(0.0, 0.12) if rng.random() < 0.25 else 0.0

    def distance(x: Array, y: Array, z: Array) -> Array:
        r = np.hypot(x, y)
        z = z + dish * (r - inner)
        return _box(r - (outer + inner) / 2, z, (outer - inner) / 2, height, 0.02)

    return Part(distance=distance, tilt=58)


def _bolt(rng: np.random.Generator) -> Part:
    shank = rng.uniform(0.13, 0.2)
    apothem = shank * rng.uniform(1.6, 1.9)
    head = shank * rng.uniform(1.1, 1.5)
    length = rng.uniform(0.62, 0.95)
    top = length
    seat = top - head
    threaded = -length + 2 * length * rng.uniform(0.4, 0.78)
    pitch = shank * rng.uniform(0.36, 0.55)
    flange = rng.random() < 0.25

    def distance(x: Array, y: Array, z: Array) -> Array:
        r = np.hypot(x, y)
        middle = (top + seat) / 2
        d = np.maximum(_hexagon(x, y, apothem), np.abs(z - middle) - head / 2)
        d = np.maximum(d, (r + 0.6 * (z - top) - apothem * 1.06) * 0.85)
        if flange:
            d = np.minimum(d, np.maximum(r - apothem * 1.35, np.abs(z - seat) - 0.03))
        cut = np.where(z < threaded, 0.12 * shank * (_thread(x, y, z, pitch) - 1), 0)
        rod = r - shank - cut + np.maximum(0.7 * (-length + shank * 0.5 - z), 0)
        rod = np.maximum(rod * 0.8, np.maximum(-length - z, z - seat))
        return np.minimum(d, rod)

    return Part(distance=distance, step=0.8, tilt=48, long=True)


def _screw(rng: np.random.Generator) -> Part:
    shank = rng.uniform(0.11, 0.16)
    head_radius = shank * rng.uniform(2.1, 2.6)
    length = rng.uniform(0.68, 0.95)
    pitch = shank * rng.uniform(0.75, 1.1)
    point = rng.uniform(0.3, 0.5)
    pan = rng.random() < 0.45
    slot = rng.random() < 0.35
    height = head_radius * (0.62 if pan else 0.72)
    seat = length - height

    def distance(x: Array, y: Array, z: Array) -> Array:
        r = np.hypot(x, y)
        if pan:
            dome = _length(r, (z - seat) * (head_radius / height)) - head_radius
            d = np.maximum(dome * 0.6, seat - z)
        else:
            cone = (r - head_radius - (z - length + 0.03) * 0.95) * 0.72
            d = np.maximum(np.maximum(cone, r - head_radius), z - length)
            d = np.maximum(d, seat - 0.1 - z)
        width = head_radius * 0.13
        groove = np.maximum(np.abs(x) - width, length - height * 0.55 - z)
        if not slot:
            cross = np.minimum(
                np.maximum(np.abs(x) - width, np.abs(y) - head_radius * 0.62),
                np.maximum(np.abs(y) - width, np.abs(x) - head_radius * 0.62),
            )
            groove = np.maximum(cross, length - height * 0.6 - z)
        d = np.maximum(d, -groove)
        taper = np.clip((z + length) / point, 0, 1)
        core = shank * taper * (0.72 + 0.0 * z)
        ridge = np.maximum(_thread(x, y, z, pitch), -0.2) + 0.2
        rod = r - core - 0.3 * shank * np.sqrt(taper) * ridge * (z < seat - 0.06)
        return np.minimum(d, np.maximum(rod * 0.6, np.maximum(-length - z, z - seat)))

    return Part(distance=distance, step=0.75, tilt=48, long=True)


def _gear(rng: np.random.Generator) -> Part:
    teeth = int(rng.integers(10, 27))
    depth = min(0.16, 1.35 / teeth) * rng.uniform(0.9, 1.1)
    middle = 0.95 - depth
    height = rng.uniform(0.09, 0.26)
    bore = rng.uniform(0.13, 0.3)
    steepness = rng.uniform(1.6, 2.6)
    hub = bore + rng.uniform(0.1, 0.18) if rng.random() < 0.6 else 0.0
    holes = int(rng.integers(3, 7)) if rng.random() < 0.4 else 0
    web = rng.uniform(0.4, 0.7) if rng.random() < 0.5 else 1.0
    keyway = rng.random() < 0.5
    twist = rng.uniform(-0.6, 0.6) if rng.random() < 0.3 else 0.0

    def distance(x: Array, y: Array, z: Array) -> Array:
        r = np.hypot(x, y)
        angle = np.arctan2(y, x)
        wave = np.clip(steepness * np.cos(teeth * (angle + twist * z)), -1, 1)
        d = np.maximum((r - middle - depth * wave) * 0.6, np.abs(z) - height)
        if web < 1 or holes:
            rim = middle - depth - 0.1
            inner = max(hub, bore + 0.08)
            ring = np.maximum(r - rim, inner - r)
            if web < 1:
                d = np.maximum(d, -np.maximum(ring, height * web - np.abs(z)))
            if holes:
                sector = 2 * np.pi / holes
                folded = angle - sector * np.round(angle / sector)
                centre = (rim + inner) / 2
                hole = _length(r * np.cos(folded) - centre, r * np.sin(folded))
                d = np.maximum(d, min((rim - inner) * 0.4, centre * sector * 0.33) - hole)
        if hub:
            d = np.minimum(d, np.maximum(r - hub, np.abs(z) - height * 1.35))
        d = np.maximum(d, bore - r)
        if keyway:
            d = np.maximum(d, -np.maximum(np.abs(y) - bore * 0.25, np.abs(x - bore) - bore * 0.35))
        return d

    return Part(distance=distance, step=0.8, tilt=58, plastic=True)


def _spring(rng: np.random.Generator) -> Part:
    hooks = rng.random() < 0.3
    radius = rng.uniform(0.2, 0.4)
    half = rng.uniform(0.55, 0.85) if not hooks else rng.uniform(0.4, 0.58)
    wire = radius * rng.uniform(0.13, 0.2)
    pitch = wire * rng.uniform(2.1, 2.4) if hooks else wire * rng.uniform(3.2, 5.0)
    cone = rng.uniform(-0.25, 0.25) if not hooks and rng.random() < 0.3 else 0.0
    slope = 1 / np.sqrt(1 + (pitch / (2 * np.pi * radius)) ** 2)

    def distance(x: Array, y: Array, z: Array) -> Array:
        turn = np.arctan2(y, x) * np.float32(0.15915494)
        r = np.hypot(x, y) - radius * (1 + cone * z)
        along = z - pitch * (turn + np.round(z / pitch - turn))
        d = np.maximum(_length(r, along * np.float32(slope)) - wire, np.abs(z) - half)
        if hooks:
            loop = np.abs(z) - half - radius * 0.9
            ring = _length(_length(x, loop) - radius * 0.9, y) - wire
            d = np.minimum(d, ring)
        return d

    return Part(distance=distance, step=0.6, tilt=42, long=True)


def _bearing(rng: np.random.Generator) -> Part:
    inner = rng.uniform(0.36, 0.5)
    height = rng.uniform(0.17, 0.28)
    wall = (0.95 - inner) * rng.uniform(0.24, 0.3)
    groove_in, groove_out = inner + wall, 0.95 - wall
    middle, gap = (groove_in + groove_out) / 2, (groove_out - groove_in) / 2
    ball = gap * rng.uniform(1.15, 1.3)
    count = int(2 * np.pi * middle / (ball * rng.uniform(2.3, 2.9)))
    shield = rng.random() < 0.35
    sector = 2 * np.pi / count

    def distance(x: Array, y: Array, z: Array) -> Array:
        r = np.hypot(x, y)
        d = np.minimum(
            _box(r - (inner + groove_in) / 2, z, wall / 2, height, 0.025),
            _box(r - (0.95 + groove_out) / 2, z, wall / 2, height, 0.025),
        )
        if shield:
            return np.minimum(d, np.maximum(np.abs(r - middle) - gap, np.abs(z) - height * 0.78))
        angle = np.arctan2(y, x)
        folded = angle - sector * np.round(angle / sector)
        balls = _length(r * np.cos(folded) - middle, r * np.sin(folded), z) - ball
        cage = np.maximum(np.abs(r - middle) - gap * 0.45, np.abs(z) - ball * 0.55)
        return np.minimum(d, np.minimum(balls, cage))

    def accent(x: Array, y: Array, z: Array) -> Array:
        r = np.hypot(x, y)
        between = (np.abs(r - middle) < gap * (1.0 if shield else 0.5)).astype(np.float32)
        if shield:
            return between
        angle = np.arctan2(y, x)
        folded = angle - sector * np.round(angle / sector)
        off = _length(r * np.cos(folded) - middle, r * np.sin(folded), z) > ball * 1.06
        return between * off

    return Part(distance=distance, step=0.85, tilt=55, accent=accent)


def _elbow(rng: np.random.Generator) -> Part:
    tube = rng.uniform(0.26, 0.36)
    bore = tube * rng.uniform(0.7, 0.86)
    bend = tube * rng.uniform(1.15, 1.6)
    straight = rng.uniform(0.3, 0.55)
    collar = tube * rng.uniform(1.1, 1.28)
    collar_length = straight * rng.uniform(0.5, 0.9)
    threaded = rng.random() < 0.35
    scale = 0.95 / np.hypot(bend + collar, straight + 0.5 * bend)
    centre = 0.5 * (bend - straight)

    def distance(x: Array, y: Array, z: Array) -> Array:
        x, y, z = x / scale + centre, y / scale + centre, z / scale
        # The bend is a quarter of a torus; a straight end joins it along -x and one along -y.
        past = np.maximum(-x, -y)
        around = np.where(
            past <= 0,
            _length(np.hypot(x, y) - bend, z),
            np.where(-y >= -x, np.hypot(x - bend, z), np.hypot(y - bend, z)),
        )
        reach = past - straight
        wall = np.where(past > straight - collar_length, collar, tube)
        if threaded:
            ends = past > straight - collar_length
            wall = np.where(ends, tube + 0.06 * tube * _triangle_wave(past / 0.09), wall)
        d = np.maximum(around - wall, bore - around)
        return np.maximum(d * 0.8, reach) * np.float32(scale)

    return Part(distance=distance, step=0.7, tilt=70, plastic=True)


def _cotter_pin(rng: np.random.Generator) -> Part:
    wire = rng.uniform(0.05, 0.085)
    eye = wire * rng.uniform(2.2, 3.2)
    length = rng.uniform(1.55, 1.8)
    top = length / 2
    near, far = wire * 1.02, wire * rng.uniform(1.05, 2.6)
    short = rng.uniform(0.05, 0.2)
    bent = rng.random() < 0.3
    hook = rng.uniform(0.15, 0.3)

    def distance(x: Array, y: Array, z: Array) -> Array:
        z = z - (top - eye)
        foot = -(length - 1.5 * eye)
        ring = np.abs(_length(x, z) - eye)
        ring = np.maximum(ring, -(z + eye * 0.75))
        neck = (eye * 0.66, -eye * 0.75)
        d = ring
        for side, end in ((1.0, foot), (-1.0, foot + short)):
            d = np.minimum(d, _segment(x, z, (side * neck[0], neck[1]), (side * near, -eye * 1.7)))
            d = np.minimum(d, _segment(x, z, (side * near, -eye * 1.7), (side * far, end)))
            if bent:
                d = np.minimum(
                    d, _segment(x, z, (side * far, end), (side * (far + hook), end + hook * 0.3))
                )
        return _length(d, y) - wire

    return Part(distance=distance, step=0.85, tilt=38, long=True, spin=50)


def _snap_ring(rng: np.random.Generator) -> Part:
    outward = rng.random() < 0.5
    outer = 0.8 if outward else 0.94
    width = rng.uniform(0.12, 0.2)
    shift = width * rng.uniform(0.12, 0.3)
    gap = rng.uniform(0.16, 0.5)
    height = rng.uniform(0.03, 0.06)
    lug = rng.uniform(0.11, 0.15)
    eye = lug * rng.uniform(0.4, 0.52)
    place = outer - width * 0.5 + (lug * 0.75 if outward else -lug * 0.75)
    angle = gap + lug / place
    lug_x, lug_y = place * np.cos(angle), place * np.sin(angle)

    def distance(x: Array, y: Array, z: Array) -> Array:
        r = np.hypot(x, y)
        side = np.abs(y)
        d = np.maximum(r - outer, (outer - width) - np.hypot(x - shift, y))
        cut = side * np.cos(gap) - x * np.sin(gap)
        d = np.maximum(d, np.where(x > 0, -cut, -r))
        ear = np.hypot(x - lug_x, side - lug_y)
        d = np.maximum(np.minimum(d, ear - lug), eye - ear)
        return np.maximum(d, np.abs(z) - height)

    return Part(distance=distance, step=0.9, tilt=55)


PARTS: dict[str, Callable[[np.random.Generator], Part]] = {
    "bearing": _bearing,
    "bolt": _bolt,
    "cotter_pin": _cotter_pin,
    "elbow": _elbow,
    "gear": _gear,
    "nut": _nut,
    "screw": _screw,
    "snap_ring": _snap_ring,
    "spring": _spring,
    "washer": _washer,
}

CLASSES = tuple(PARTS)
"""Class names in index order."""


# --- Materials and light ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Material:
    """How a surface answers to light: metal mirrors its surroundings, paint scatters."""

    color: Color
    metal: float
    gloss: float
    rust: float = 0.0
    grain: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Light:
    """The lamps of one scene; directions are unit vectors towards the lamp, z to the camera."""

    key: Array
    lamps: tuple[tuple[Array, float, float], ...]
    ambient: float
    tint: Array


_METALS: tuple[tuple[float, Material], ...] = (
    (0.30, Material(color=(0.72, 0.73, 0.75), metal=0.9, gloss=0.75)),  # bright steel
    (0.18, Material(color=(0.58, 0.60, 0.62), metal=0.65, gloss=0.35, grain=0.1)),  # galvanised
    (0.14, Material(color=(0.83, 0.65, 0.32), metal=0.85, gloss=0.65)),  # brass
    (0.06, Material(color=(0.80, 0.48, 0.33), metal=0.85, gloss=0.6)),  # copper
    (0.16, Material(color=(0.13, 0.13, 0.14), metal=0.45, gloss=0.5)),  # blackened
    (0.16, Material(color=(0.42, 0.38, 0.35), metal=0.4, gloss=0.2, rust=0.75, grain=0.15)),
)
_PLASTICS = (
    Material(color=(0.85, 0.85, 0.82), metal=0.0, gloss=0.3, grain=0.02),
    Material(color=(0.35, 0.36, 0.38), metal=0.0, gloss=0.35, grain=0.02),
    Material(color=(0.60, 0.12, 0.10), metal=0.0, gloss=0.45, grain=0.03),
    Material(color=(0.12, 0.25, 0.50), metal=0.0, gloss=0.4, grain=0.03),
)


def _unit(vector: Array) -> Array:
    return (vector / np.sqrt(np.sum(vector * vector))).astype(np.float32)


def _choose_material(rng: np.random.Generator, part: Part) -> Material:
    if part.plastic and rng.random() < 0.25:
        base = _PLASTICS[int(rng.integers(len(_PLASTICS)))]
    else:
        weights = np.array([weight for weight, _ in _METALS])
        base = _METALS[int(rng.choice(len(_METALS), p=weights / weights.sum()))][1]
    shade = rng.uniform(0.8, 1.15)
    color = tuple(float(c * shade * rng.uniform(0.95, 1.05)) for c in base.color)
    return Material(
        color=(color[0], color[1], color[2]),
        metal=base.metal * rng.uniform(0.75, 1.1),
        gloss=float(np.clip(base.gloss * rng.uniform(0.6, 1.25), 0.05, 0.95)),
        rust=base.rust * rng.uniform(0.4, 1.2) if base.rust else max(0.0, rng.uniform(-0.6, 0.35)),
        grain=base.grain,
    )


def _choose_light(rng: np.random.Generator) -> Light:
    def direction(low: float, high: float) -> Array:
        azimuth, elevation = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(low, high))
        return np.array(
            [
                np.cos(azimuth) * np.cos(elevation),
                np.sin(azimuth) * np.cos(elevation),
                np.sin(elevation),
            ],
            np.float32,
        )

    key = direction(28, 68)
    lamps = [(key, rng.uniform(0.8, 0.93), rng.uniform(0.9, 1.6))]
    for _ in range(int(rng.integers(1, 4))):
        lamps.append((direction(10, 75), rng.uniform(0.7, 0.95), rng.uniform(0.2, 0.7)))
    warmth = rng.uniform(-0.1, 0.12)
    return Light(
        key=key,
        lamps=tuple(lamps),
        ambient=rng.uniform(0.15, 0.4),
        tint=np.array([1 + warmth, 1.0, 1 - warmth], np.float32),
    )


def _cloud(rng: np.random.Generator, size: int, cells: int, octaves: int = 3) -> Array:
    """Smooth noise of shape (size, size), about 0 mean and within -1..1."""
    total = np.zeros((size, size), np.float32)
    weight = 1.0
    for _ in range(octaves):
        coarse = rng.random((cells + 2, cells + 2), np.float32) * 2 - 1
        fine = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        total += weight * np.asarray(fine)
        weight *= 0.55
        cells = min(cells * 2, size)
    return total * np.float32(0.6)


# --- Tracing ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Hits:
    """Pixels a part covers: flat indices, coverage, and points in the part's coordinates."""

    index: npt.NDArray[np.int64]
    alpha: Array
    point: tuple[Array, Array, Array]
    height: Array


def _trace(part: Part, turn: Array, centre: tuple[float, float], scale: float) -> _Hits:
    """Follow one parallel ray a pixel into the scene, from the unit sphere inwards.

    Args:
        part: What to hit.
        turn: Rotation of shape (3, 3) from the part's coordinates to the camera's.
        centre: Where the part's origin is, in pixels.
        scale: Pixels a unit.
    """
    low_x, high_x = (int(np.clip(centre[0] + s * scale, 0, SIZE)) for s in (-1, 1))
    low_y, high_y = (int(np.clip(centre[1] + s * scale, 0, SIZE)) for s in (-1, 1))
    rows, columns = np.mgrid[low_y:high_y, low_x:high_x]
    u = ((columns.ravel() + 0.5 - centre[0]) / scale).astype(np.float32)
    v = ((centre[1] - rows.ravel() - 0.5) / scale).astype(np.float32)
    index = (rows * SIZE + columns).ravel()
    inside = u * u + v * v < 0.998
    u, v, index = u[inside], v[inside], index[inside]
    enter = np.sqrt(1 - u * u - v * v)

    pixel = np.float32(1 / scale)
    back = turn.T  # camera to part
    start = [back[i, 0] * u + back[i, 1] * v for i in range(3)]
    depth = enter.copy()
    nearest = np.full(len(u), 9, np.float32)
    nearest_depth = depth.copy()
    active = np.arange(len(u))
    a_start, a_depth, a_exit = start, depth, -enter
    a_best, a_best_depth = nearest, nearest_depth
    for number in range(64):
        x, y, z = (a_start[i] + back[i, 2] * a_depth for i in range(3))
        d = part.distance(x, y, z)
        better = d < a_best
        a_best = np.where(better, d, a_best)
        a_best_depth = np.where(better, a_depth, a_best_depth)
        a_depth = a_depth - np.maximum(d * np.float32(part.step), pixel * 0.15)
        if number % 3 == 2 or number == 63:
            nearest[active], nearest_depth[active] = a_best, a_best_depth
            keep = (a_best > pixel * 0.12) & (a_depth > a_exit)
            if not keep.any():
                break
            active, a_depth, a_exit = active[keep], a_depth[keep], a_exit[keep]
            a_best, a_best_depth = a_best[keep], a_best_depth[keep]
            a_start = [s[keep] for s in a_start]

    alpha = np.clip(1.15 - nearest / pixel, 0, 1).astype(np.float32)
    hit = alpha > 0.02
    height = nearest_depth[hit]
    point = tuple(start[i][hit] + back[i, 2] * height for i in range(3))
    return _Hits(
        index=index[hit],
        alpha=alpha[hit],
        point=(point[0], point[1], point[2]),
        height=height,
    )


def _normals(part: Part, point: tuple[Array, Array, Array], size: float) -> list[Array]:
    """Gradient of the SDF by four taps on a tetrahedron, in the part's coordinates."""
    total = [np.zeros_like(point[0]) for _ in range(3)]
    for tap in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        d = part.distance(*(p + np.float32(size * k) for p, k in zip(point, tap, strict=True)))
        for axis in range(3):
            total[axis] += tap[axis] * d
    norm = 1 / np.sqrt(total[0] ** 2 + total[1] ** 2 + total[2] ** 2 + 1e-12)
    return [t * norm for t in total]


def _shade(
    rng: np.random.Generator, part: Part, hits: _Hits, turn: Array, scale: float, light: Light
) -> Array:
    """Linear RGB of shape (n, 3) for the hit pixels."""
    material = _choose_material(rng, part)
    normal = _normals(part, hits.point, 0.9 / scale)
    noise = _cloud(rng, 128, 6, 4)
    fine = rng.random((128, 128), np.float32) - 0.5
    x, y, z = hits.point
    # Texture coordinates mix all three axes so that no face shows stretched stripes.
    i = ((x + 0.73 * z) * 60).astype(np.int64) % 128
    j = ((y + 0.61 * z) * 60).astype(np.int64) % 128
    stain, speck = noise[i, j], fine[i, j]

    shadow = np.ones_like(x)
    part_key = turn.T @ light.key
    for distance in (0.06, 0.13, 0.25, 0.42):
        near = part.distance(
            *(
                p + n * 0.02 + np.float32(distance * k)
                for p, n, k in zip(hits.point, normal, part_key, strict=True)
            )
        )
        shadow = np.minimum(shadow, np.clip(0.5 + near * (6.0 * 0.1 / distance + 2), 0, 1))
    open_sky = np.ones_like(x)
    for distance in (0.05, 0.14):
        near = part.distance(*(p + n * distance for p, n in zip(hits.point, normal, strict=True)))
        open_sky *= np.clip(0.25 + 0.75 * near / distance, 0.15, 1)

    bump = np.float32(0.03 + 0.45 * material.grain)
    view = [sum(turn[a, b] * normal[b] for b in range(3)) for a in range(3)]
    view[0] = view[0] + bump * (speck + 0.4 * stain)
    view[1] = view[1] + bump * (speck - 0.4 * stain)
    norm = 1 / np.sqrt(view[0] ** 2 + view[1] ** 2 + view[2] ** 2)
    nx, ny, nz = (n * norm for n in view)
    facing = np.clip(nz, 0, 1)
    # The camera looks along -z, so the mirrored ray is 2 (n . z) n - z.
    mx, my, mz = 2 * facing * nx, 2 * facing * ny, 2 * facing * nz - 1

    diffuse = shadow * np.clip(nx * light.key[0] + ny * light.key[1] + nz * light.key[2], 0, 1)
    mirror = light.ambient * (0.6 + 0.7 * mz + 0.3 * my)
    mirror = mirror + 0.35 * light.ambient * np.tanh(6 * (mz - 0.25 + 0.3 * stain))
    soft = 0.02 + 0.4 * (1 - material.gloss) ** 2
    highlight = np.zeros_like(x)
    for number, (direction, edge, power) in enumerate(light.lamps):
        toward = mx * direction[0] + my * direction[1] + mz * direction[2]
        glow = np.clip((toward - edge + soft) / (2 * soft), 0, 1)
        glow = glow * glow * (3 - 2 * glow) * np.float32(power / (1 + 2.5 * soft))
        highlight += glow * shadow if number == 0 else glow
    mirror = np.clip(mirror, 0.02, None) * open_sky + highlight

    color = np.broadcast_to(np.array(material.color, np.float32), (len(x), 3))
    if part.accent is not None:
        accents = ((0.05, 0.05, 0.06), (0.75, 0.55, 0.25), (0.5, 0.5, 0.52), (0.35, 0.12, 0.08))
        second = np.array(accents[int(rng.integers(len(accents)))], np.float32)
        share = part.accent(x, y, z)[:, None]
        color = color * (1 - share) + second * share
    metal = np.full(len(x), material.metal, np.float32)
    if material.rust > 0:
        rust = np.clip((stain + 1.6 * material.rust - 0.9) * 3, 0, 1)
        brown = np.array([0.36, 0.17, 0.08], np.float32) * (1 + 0.6 * speck)[:, None]
        color = color * (1 - rust[:, None]) + brown * rust[:, None]
        metal = metal * (1 - 0.9 * rust)
    color = color * (1 + material.grain * (2 * speck + stain))[:, None]
    ambient = light.ambient * (0.6 + 0.4 * nz) * open_sky
    scattered = (ambient + 0.9 * diffuse) * (1 - 0.75 * metal)
    shine = 0.04 + 0.16 * material.gloss
    reflected = mirror * metal
    rgb = color * (scattered + reflected)[:, None]
    rgb = rgb + (highlight * (1 - metal) * shine * (0.4 + material.gloss))[:, None]
    return rgb * light.tint


def _rotation(rng: np.random.Generator, part: Part) -> Array:
    """A resting pose: spin about the part's axis, tilt, then any direction on the ground."""
    heading = rng.uniform(0, 2 * np.pi)
    spin = np.radians(part.spin) * rng.uniform(-1, 1)
    tilt = np.radians(part.tilt) * rng.uniform(0, 1) ** 0.8
    if part.long:
        tilt = np.pi / 2 - tilt * rng.choice((-1.0, 1.0))
    elif part.flip and rng.random() < 0.5:
        tilt = np.pi - tilt

    def about(axis: int, angle: float) -> Array:
        c, s = np.cos(angle), np.sin(angle)
        other = [i for i in range(3) if i != axis]
        matrix = np.eye(3, dtype=np.float32)
        matrix[other[0], other[0]] = matrix[other[1], other[1]] = c
        matrix[other[0], other[1]], matrix[other[1], other[0]] = -s, s
        return matrix

    return about(2, heading) @ about(0, tilt) @ about(2, spin)


def _place(
    rng: np.random.Generator,
    scene: Array,
    part: Part,
    centre: tuple[float, float],
    scale: float,
    light: Light,
) -> None:
    """Lay one part with its shadow into the linear RGB scene of shape (SIZE * SIZE, 3)."""
    turn = _rotation(rng, part)
    hits = _trace(part, turn, centre, scale)
    if len(hits.index) == 0:
        return
    mask = np.zeros(SIZE * SIZE, np.float32)
    mask[hits.index] = hits.alpha
    low = float(hits.height.min())
    coarse = Image.fromarray((mask.reshape(SIZE, SIZE) * 255).astype(np.uint8))
    coarse = coarse.resize((SIZE // 2, SIZE // 2), Image.Resampling.BOX)
    reach = scale * min(0.5, 0.25 + 0.5 * abs(low)) / max(0.45, float(light.key[2]))
    cast = np.zeros((SIZE // 2, SIZE // 2), np.float32)
    for share in (0.15, 0.45, 0.8):
        shift = (-light.key[0] * reach * share / 2, light.key[1] * reach * share / 2)
        moved = coarse.transform(
            coarse.size, Image.Transform.AFFINE, (1, 0, -shift[0], 0, 1, -shift[1])
        )
        moved = moved.filter(ImageFilter.GaussianBlur(0.6 + 3.5 * share * scale / 100))
        cast = np.maximum(cast, np.asarray(moved, np.float32) * (1 - 0.35 * share))
    contact = np.asarray(coarse.filter(ImageFilter.GaussianBlur(4)), np.float32)
    dark = np.clip(0.7 * cast + 0.35 * contact, 0, 255).astype(np.uint8)
    full = Image.fromarray(dark).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    strength = 0.85 - 0.6 * light.ambient
    scene *= 1 - strength * np.asarray(full, np.float32).reshape(-1, 1) / 255

    rgb = _shade(rng, part, hits, turn, scale, light)
    alpha = hits.alpha[:, None]
    scene[hits.index] = scene[hits.index] * (1 - alpha) + rgb * alpha


# --- Ground, clutter and camera -----------------------------------------------------------------


def _ground(rng: np.random.Generator) -> Array:
    """Linear RGB of shape (SIZE * SIZE, 3): a belt or a bench without light or shadow."""
    kind = int(rng.integers(8))
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    u = columns * np.float32(np.cos(angle)) + rows * np.float32(np.sin(angle))
    v = rows * np.float32(np.cos(angle)) - columns * np.float32(np.sin(angle))
    speck = rng.random((SIZE, SIZE), np.float32) - 0.5
    blotch = _cloud(rng, SIZE, 4)
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
        rings = np.sin((v + 14 * _cloud(rng, SIZE, 3, 2)) * np.float32(2 * np.pi / pitch))
        pattern = 1 + 0.22 * rings + 0.12 * np.sin(v * 1.7 + 3 * blotch) + 0.1 * speck
    elif kind == 4:  # cardboard or paper
        color = (0.48, 0.36, 0.23) if rng.random() < 0.6 else (0.6, 0.59, 0.56)
        pattern = 1 + 0.06 * np.sin(u * (2 * np.pi / 9)) + 0.12 * speck
    elif kind == 5:  # concrete
        color = (0.26, 0.255, 0.245)
        pattern = 1 + 0.35 * speck + 0.3 * _cloud(rng, SIZE, 24, 2)
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
    light = _choose_light(rng)
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
        _place(rng, scene, other, where, size, light)

    part = PARTS[class_name](rng)
    scale = SIZE * rng.uniform(0.26, 0.5)
    free = max(0.0, SIZE * 0.5 - scale * 0.8)
    centre = (
        SIZE / 2 + rng.uniform(-free, free) * 0.8,
        SIZE / 2 + rng.uniform(-free, free) * 0.8,
    )
    _place(rng, scene, part, centre, scale, light)
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
