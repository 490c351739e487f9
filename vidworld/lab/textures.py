"""Procedural surfaces of the lab, as pictures that MuJoCo takes as textures."""

from typing import Any

import numpy as np

from vidworld.lab.gl import mujoco


def fractal_noise(rng: np.random.Generator, size: int, octaves: int = 5, coarsest: int = 4) -> np.ndarray:
    """Tileable value noise [size, size] in [-1, 1], from `coarsest` cells a side up."""
    total = np.zeros((size, size))
    for octave in range(octaves):
        cells = coarsest * 2**octave
        if cells > size:
            break
        knots = np.pad(rng.standard_normal((cells, cells)), ((0, 1), (0, 1)), mode="wrap")
        place = np.linspace(0, cells, size, endpoint=False)
        low = place.astype(int)
        share = place - low
        share = share * share * (3 - 2 * share)
        upper = knots[low][:, low] * (1 - share) + knots[low][:, low + 1] * share
        lower = knots[low + 1][:, low] * (1 - share) + knots[low + 1][:, low + 1] * share
        total += (upper * (1 - share)[:, None] + lower * share[:, None]) * 0.6**octave
    return total / max(float(np.abs(total).max()), 1e-9)


def mottled(rng: np.random.Generator, size: int, colour_3: Any, strength: float) -> np.ndarray:
    """A colour (0..1) with soft blotches: uint8 [size, size, 3]."""
    noise = fractal_noise(rng, size)[..., None]
    return (np.clip(np.asarray(colour_3) * (1 + strength * noise), 0, 1) * 255).astype(np.uint8)


def planks(rng: np.random.Generator, size: int, colour_3: Any, boards: int = 4) -> np.ndarray:
    """Boards of wood with grain along x: uint8 [size, size, 3]."""
    stretched = fractal_noise(rng, size, octaves=4, coarsest=16)
    rows = np.arange(size)
    grain = np.stack(
        [np.convolve(np.tile(row, 3), np.ones(31) / 31, "same")[size : 2 * size] for row in stretched]
    )
    board = rows * boards // size
    shade = 1 + 0.06 * rng.standard_normal(boards)[board][:, None] + 0.35 * grain
    shade[np.diff(board, prepend=board[-1]) != 0] *= 0.72
    return (np.clip(np.asarray(colour_3) * shade[..., None], 0, 1) * 255).astype(np.uint8)


def tiles(rng: np.random.Generator, size: int, colour_3: Any, count: int = 4) -> np.ndarray:
    """Square tiles with joints: uint8 [size, size, 3]."""
    picture = mottled(rng, size, colour_3, 0.06).astype(float)
    place = np.arange(size) * count % size
    joint = (place < count * 2)[:, None] | (place < count * 2)[None, :]
    picture[joint] *= 0.8
    return picture.astype(np.uint8)


def add_material(
    spec: Any,
    name: str,
    picture_HWC: np.ndarray,
    *,
    repeat: tuple[float, float] = (1.0, 1.0),
    specular: float = 0.1,
    shininess: float = 0.1,
) -> None:
    """Add a texture and a material, both called `name`, to a `mujoco.MjSpec`."""
    height, width = picture_HWC.shape[:2]
    texture = spec.add_texture(
        name=name, type=mujoco.mjtTexture.mjTEXTURE_2D, width=width, height=height, nchannel=3
    )
    texture.data = np.ascontiguousarray(picture_HWC).tobytes()
    material = spec.add_material(name=name)
    material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = name
    material.texrepeat = list(repeat)
    material.specular, material.shininess = specular, shininess


def add_lathe(spec: Any, name: str, profile_N2: Any, segments: int = 28) -> None:
    """Add a mesh of revolution about z from (radius, height) pairs in metres, outside first."""
    profile = np.asarray(profile_N2, float)
    angle = np.linspace(0, 2 * np.pi, segments, endpoint=False)
    vertices = np.concatenate(
        [np.stack([r * np.cos(angle), r * np.sin(angle), np.full(segments, z)], axis=1) for r, z in profile]
    )
    here = np.arange(segments)
    after = (here + 1) % segments
    faces = []
    for ring in range(len(profile) - 1):
        a, b = ring * segments + here, ring * segments + after
        c, d = b + segments, a + segments
        faces += [np.stack([a, b, c], axis=1), np.stack([a, c, d], axis=1)]
    mesh = spec.add_mesh(name=name)
    mesh.uservert = vertices.astype(np.float32).ravel()
    mesh.userface = np.concatenate(faces).astype(np.int32).ravel()
    mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL
    mesh.smoothnormal = False
