"""The ten machine parts as signed distance functions (SDF) in three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Distance = Callable[[Array, Array, Array], Array]


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
