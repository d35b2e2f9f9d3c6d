"""Materials, lamps and the tracing of a part: what turns a distance function into light.

Parallel rays meet a part by sphere tracing (J. C. Hart, "Sphere tracing", The Visual Computer 12,
1996).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from parts import Array, Part
from PIL import Image, ImageFilter

Color = tuple[float, float, float]

SIZE = 256
"""Side of a picture in pixels."""


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


def choose_light(rng: np.random.Generator) -> Light:
    """The lamps of one scene: a key light, a few weaker ones, and the light all around."""

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


def cloud(rng: np.random.Generator, size: int, cells: int, octaves: int = 3) -> Array:
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


def trace(part: Part, turn: Array, centre: tuple[float, float], scale: float) -> _Hits:
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
    noise = cloud(rng, 128, 6, 4)
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


def place(
    rng: np.random.Generator,
    scene: Array,
    part: Part,
    centre: tuple[float, float],
    scale: float,
    light: Light,
) -> None:
    """Lay one part with its shadow into the linear RGB scene of shape (SIZE * SIZE, 3)."""
    turn = _rotation(rng, part)
    hits = trace(part, turn, centre, scale)
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
