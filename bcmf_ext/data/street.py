"""Draws street scenes and their labels.

Every scene is a street in perspective with houses, trees, cars, people, poles and signs, in one of four lights.
Colours come from ranges that classes share (cars and coats of any colour, walls like pavements, leaves from green to
pink) and are then lit, shaded and faded by haze, so that a pixel's colour says little about its class: shape, texture
and place do. Poles are 1 to 3 pixels wide, and edges fall on odd and even positions alike.

A scene is a pure function of its seed, on every platform: choices come from Python's `random`, shapes from Pillow, and
the arithmetic between them is exact (no sines, no powers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from .dataset import IGNORE_INDEX

HEIGHT, WIDTH = 128, 256
FINE = 3  # Scenes are drawn at this many times the size: odd, so that a pixel's centre is one fine pixel.

CLASSES = ("road", "sidewalk", "building", "vegetation", "sky", "car", "person", "pole", "sign")
ROAD, SIDEWALK, BUILDING, VEGETATION, SKY, CAR, PERSON, POLE, SIGN = range(9)
VOID = IGNORE_INDEX

Colour = tuple[float, float, float]
Point = tuple[float, float]
Corner = tuple[float, float, float]
Thing = tuple[float, Callable[[], None]]  # A thing is a distance, and a function that draws it.


@dataclass(frozen=True)
class Light:
    """The light of an hour: what it does to colours."""

    zenith: Colour
    horizon: Colour
    tint: Colour  # It multiplies every colour.
    shadow: int  # This is the opacity of shadows on the ground, 0 to 255.
    sun: bool = False  # The sun stands in the sky.
    lamps: bool = False  # Windows and lamps are lit.


DAY = Light((74, 138, 212), (198, 224, 242), (1.0, 1.0, 1.0), 95)
OVERCAST = Light((142, 152, 166), (210, 212, 214), (0.86, 0.88, 0.92), 35)
EVENING = Light((112, 132, 190), (252, 202, 148), (1.08, 0.92, 0.74), 110, sun=True)
DUSK = Light((44, 54, 112), (228, 146, 132), (0.72, 0.66, 0.80), 60, sun=True, lamps=True)

# fmt: off
WALLS = ((214, 196, 164), (178, 92, 70), (166, 166, 168), (226, 214, 200), (132, 150, 170), (196, 160, 110),
         (160, 176, 192), (236, 226, 170))
ROOFS = ((150, 70, 56), (96, 84, 84), (72, 78, 92), (126, 96, 70))
TARMACS = ((92, 92, 98), (104, 100, 98), (78, 80, 90), (86, 84, 84))
PAVINGS = ((184, 180, 172), (200, 186, 166), (168, 166, 168), (190, 164, 150))
LEAVES = ((84, 128, 56), (62, 108, 58), (120, 148, 60), (92, 140, 76), (72, 122, 70), (102, 136, 48), (206, 136, 50),
          (224, 160, 186))
PAINTS = ((206, 44, 44), (44, 88, 170), (226, 226, 222), (60, 62, 68), (152, 156, 160), (232, 186, 48),
          (60, 124, 96), (126, 64, 54), (122, 178, 206))
CLOTHES = ((198, 56, 60), (52, 84, 148), (228, 196, 70), (70, 128, 92), (232, 228, 220), (58, 54, 66),
           (150, 96, 150), (214, 128, 60), (130, 130, 134), (104, 76, 58))
SKINS = ((236, 194, 164), (206, 152, 116), (152, 102, 72), (98, 66, 50))
HAIRS = ((50, 38, 32), (104, 70, 40), (190, 150, 86), (150, 146, 144))
METALS = ((58, 64, 70), (50, 66, 60), (74, 72, 76))
BARK = (96, 76, 60)
GLASS = (92, 112, 134)
LAMPLIGHT = (255, 222, 140)
SHADOW = (20, 22, 50)
WHITE, BLACK, RED, BLUE = (236, 236, 232), (30, 30, 34), (206, 36, 40), (34, 86, 180)
TRAFFIC_LIGHTS = ((240, 60, 50), (250, 190, 60), (80, 220, 120))
# fmt: on

# For each class these say, in grey levels, how strong the fine grain and the blotches of its surfaces are.
GRAIN = np.zeros(256, np.float32)
GRAIN[: len(CLASSES)] = [9, 4, 4, 18, 1, 2, 3, 3, 2]
BLOTCH = np.zeros(256, np.float32)
BLOTCH[: len(CLASSES)] = [5, 4, 6, 26, 3, 2, 2, 0, 0]


def draw_scene(seed: str) -> tuple[np.ndarray, np.ndarray]:
    """Image (128, 256, 3) and label (128, 256), uint8: class indices and 255."""
    rng = Random(seed)
    image, label = Street(rng).draw()
    return _with_texture(image, label, rng), label


def _with_texture(image: np.ndarray, label: np.ndarray, rng: Random) -> np.ndarray:
    """Adds each class's grain and blotches, and a camera's noise."""
    h, w = label.shape
    noise = np.frombuffer(rng.randbytes(4 * h * w), np.uint8).reshape(h, w, 4).astype(np.float32) / 127.5 - 1
    coarse = Image.frombytes("L", (w // 4, h // 4), rng.randbytes(h * w // 16))
    blotches = np.asarray(coarse.resize((w, h), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
    surface = noise[..., 3] * GRAIN[label] + blotches * BLOTCH[label]
    return np.rint((image + surface[..., None] + 4 * noise[..., :3]).clip(0, 255)).astype(np.uint8)


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """The mixture of two colours: a at t = 0, b at t = 1."""
    return a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t


class Canvas:
    """Draws shapes into a picture and a map of classes, at three times the size; coordinates are final pixels.

    A shape with label None (a window, a shadow) leaves the classes as they are.
    """

    def __init__(self) -> None:
        self._picture = Image.new("RGB", (FINE * WIDTH, FINE * HEIGHT))
        self._classes = Image.new("L", (FINE * WIDTH, FINE * HEIGHT), SKY)
        self._brush = ImageDraw.Draw(self._picture)
        self._glaze = ImageDraw.Draw(self._picture, "RGBA")  # This one is slower, and only for what shines through.
        self._class_brush = ImageDraw.Draw(self._classes)

    def polygon(self, points: Sequence[Point], colour: Colour, label: int | None = None, opacity: int = 255) -> None:
        """Draws a polygon through these points."""
        corners = [(round(FINE * x), round(FINE * y)) for x, y in points]
        self._with(opacity).polygon(corners, _rgba(colour, opacity))
        if label is not None:
            self._class_brush.polygon(corners, label)

    def ellipse(
        self, centre: Point, rx: float, ry: float, colour: Colour, label: int | None = None, opacity: int = 255
    ) -> None:
        """Draws an ellipse about a centre, with two radii."""
        x, y = centre
        box = tuple(round(FINE * edge) for edge in (x - rx, y - ry, x + rx, y + ry))
        self._with(opacity).ellipse(box, _rgba(colour, opacity))
        if label is not None:
            self._class_brush.ellipse(box, label)

    def rectangle(
        self, left: float, top: float, right: float, bottom: float, colour: Colour, label: int | None = None
    ) -> None:
        """Draws a rectangle along the axes."""
        box = (round(FINE * left), round(FINE * top), round(FINE * right) - 1, round(FINE * bottom) - 1)
        if box[0] <= box[2] and box[1] <= box[3]:
            self._brush.rectangle(box, _rgba(colour, 255))
            if label is not None:
                self._class_brush.rectangle(box, label)

    def _with(self, opacity: int) -> ImageDraw.ImageDraw:
        return self._brush if opacity == 255 else self._glaze

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """The picture, (H, W, 3), with the mean colour of each pixel, and the label, (H, W), with the class at its
        centre; both uint8."""
        centre = slice(FINE // 2, None, FINE)
        return np.array(self._picture.reduce(FINE)), np.array(self._classes)[centre, centre].copy()


def _rgba(colour: Colour, opacity: int) -> tuple[int, int, int, int]:
    r, g, b = (min(255, max(0, round(c))) for c in colour)
    return r, g, b, opacity


class Street:
    """A straight street along z, in metres: x to the right, y up from the road, z away from the camera.

    `side` is -1 for the left and 1 for the right. Things are drawn from far to near, each with its own random choices.
    """

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.canvas = Canvas()
        self.light = rng.choice((DAY, OVERCAST, EVENING, DUSK))
        self.zenith, self.horizon = self.near(self.light.zenith), self.near(self.light.horizon)
        self.tint = mix((0, 0, 0), self.light.tint, rng.uniform(0.9, 1.08))
        self.shady_side = rng.choice((-1, 1))
        self.leaves = rng.choice(LEAVES)
        self.focal = rng.uniform(145, 175)  # in pixels
        self.camera = (rng.uniform(-1.2, 1.2), rng.uniform(1.8, 2.3))
        self.vanishing_point = (WIDTH * rng.uniform(0.36, 0.64), HEIGHT * rng.uniform(0.40, 0.50))
        self.kerb = rng.uniform(3.0, 3.9)  # This is half the road's width.
        self.front = self.kerb + rng.uniform(3.0, 4.4)  # Houses and gardens begin here.
        self.end = rng.uniform(26, 42)

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """The picture and its label, see `Canvas.finish`."""
        self.draw_sky()
        self.draw_far_end()
        self.draw_ground()
        things = self.traffic()
        for side in (-1, 1):
            things += self.plots(side) + self.street_furniture(side) + self.walkers(side)
        for _, draw in sorted(things, key=lambda thing: -thing[0]):
            draw()
        if self.rng.random() < 0.35:
            self.draw_bonnet()
        return self.canvas.finish()

    # The next methods decide what stands where: each gives a list of things, with their distances.

    def plots(self, side: int) -> list[Thing]:
        """Houses and gardens in a row, from beside the camera to the end of the street."""
        things: list[Thing] = []
        z = self.rng.uniform(-6, 2)
        while z < self.end:
            stop = z + self.rng.uniform(9, 18)
            stop = self.end if stop > self.end - 4 else stop
            draw = self.draw_garden if self.rng.random() < 0.18 else self.draw_house
            if stop > 4:
                things.append((stop, partial(draw, side, z, stop)))
            z = stop
        return things

    def street_furniture(self, side: int) -> list[Thing]:
        """Lamps, signs, traffic lights, trees and bins along the kerb, about evenly spaced as one sees them."""
        things: list[Thing] = []
        z = self.rng.uniform(5, 7)
        while z < 22:
            kind = self.rng.random()
            if kind < 0.3:
                draw = partial(self.draw_lamp, side, z)
            elif kind < 0.55:
                draw = partial(self.draw_sign, side, z)
            elif kind < 0.7:
                draw = partial(self.draw_traffic_light, side, z)
            elif kind < 0.93:
                draw = partial(self.draw_tree, side * (self.kerb + 0.9), z, self.rng.uniform(5, 8))
            else:
                draw = partial(self.draw_bin, side * (self.kerb + 0.8), z)
            things.append((z, draw))
            z *= self.rng.uniform(1.4, 1.8)
        return things

    def walkers(self, side: int) -> list[Thing]:
        """People on the pavement of that side."""
        things: list[Thing] = []
        for _ in range(self.rng.randint(1, 3)):
            z = self.rng.uniform(5.5, 8.5)
            on_the_road = self.rng.random() < 0.15
            x = self.rng.uniform(0.5, self.kerb) if on_the_road else self.rng.uniform(self.kerb + 0.8, self.front - 0.3)
            things.append((z, partial(self.draw_person, side * x, z)))
        return things

    def traffic(self) -> list[Thing]:
        """Cars parked at both kerbs, and one that drives."""
        things: list[Thing] = []
        for side in (-1, 1):
            z = self.rng.uniform(6.5, 13)
            while z < 22 and self.rng.random() < 0.75:
                things.append((z, partial(self.draw_car, side * (self.kerb - 1.05), z)))
                z += self.rng.uniform(5.4, 10)
        if self.rng.random() < 0.7:
            z = self.rng.uniform(9, 18)
            things.append((z, partial(self.draw_car, self.rng.choice((-1, 1)) * (self.kerb - 3), z)))
        return things

    # The next methods are about geometry, light and chance.

    def at(self, x: float, y: float, z: float) -> Point:
        """The pixel that shows this place."""
        scale = self.focal / z
        return (
            self.vanishing_point[0] + (x - self.camera[0]) * scale,
            self.vanishing_point[1] + (self.camera[1] - y) * scale,
        )

    def near(self, colour: Colour, spread: float = 16) -> Colour:
        """A colour near this one."""
        shift = self.rng.uniform(-spread, spread)
        r, g, b = (c + shift + self.rng.uniform(-spread, spread) / 2 for c in colour)
        return r, g, b

    def one_of(self, colours: Sequence[Colour]) -> Colour:
        """One of these colours, or one near it."""
        return self.near(self.rng.choice(colours))

    def lit(self, colour: Colour, z: float, shade: float = 1) -> Colour:
        """The colour in this light, `shade` times as bright, faded into the haze with distance."""
        r, g, b = (c * t * shade for c, t in zip(colour, self.tint, strict=True))
        return mix((r, g, b), self.horizon, min(0.7, z / 90))

    def face(self, corners: Sequence[Corner], colour: Colour, label: int | None = None, shade: float = 1) -> None:
        """Draws a flat face, given by its corners in space."""
        z = sum(corner[2] for corner in corners) / len(corners)
        self.canvas.polygon([self.at(*corner) for corner in corners], self.lit(colour, z, shade), label)

    def floor(
        self, x: Point, z: Point, colour: Colour, label: int | None = None, shade: float = 1, y: float = 0
    ) -> None:
        """Draws a horizontal face from x[0] to x[1] and z[0] to z[1]."""
        self.face(((x[0], y, z[0]), (x[1], y, z[0]), (x[1], y, z[1]), (x[0], y, z[1])), colour, label, shade)

    def wall(self, x: float, y: Point, z: Point, colour: Colour, label: int | None = None, shade: float = 1) -> None:
        """Draws an upright face along the street."""
        self.face(((x, y[0], z[0]), (x, y[1], z[0]), (x, y[1], z[1]), (x, y[0], z[1])), colour, label, shade)

    def front_face(
        self, x: Point, y: Point, z: float, colour: Colour, label: int | None = None, shade: float = 1
    ) -> None:
        """Draws an upright face across the street."""
        self.face(((x[0], y[0], z), (x[0], y[1], z), (x[1], y[1], z), (x[1], y[0], z)), colour, label, shade)

    def shadow(self, x: float, z: float, rx: float, rz: float) -> None:
        """Draws a shadow on the ground below a thing."""
        centre = self.at(x, 0, z)
        depth = (self.at(x, 0, max(1.5, z - rz))[1] - self.at(x, 0, z + rz)[1]) / 2
        self.canvas.ellipse(centre, rx * self.focal / z, depth, SHADOW, opacity=self.light.shadow + 20)

    # The next methods draw sky and ground.

    def draw_sky(self) -> None:
        """Draws the sky, with clouds or the sun."""
        rng, horizon = self.rng, self.vanishing_point[1]
        rows = round(horizon) + 12
        for row in range(rows):
            t = row / rows
            self.canvas.rectangle(0, row, WIDTH, row + 1, mix(self.zenith, self.horizon, t * (2 - t)))
        if self.light.sun:
            centre = self.vanishing_point[0] + rng.uniform(-40, 40), horizon * rng.uniform(0.2, 0.8)
            for radius, opacity in ((15, 40), (10, 60), (5, 255)):
                self.canvas.ellipse(centre, radius, radius, mix(LAMPLIGHT, WHITE, 0.4), opacity=opacity)
        cloud = mix(self.zenith, self.horizon, 0.6) if self.light.lamps else mix(self.horizon, WHITE, 0.5)
        for _ in range(rng.randint(2, 5)):
            x, y, size = rng.uniform(0, WIDTH), rng.uniform(0, horizon * 0.7), rng.uniform(5, 9)
            for _ in range(rng.randint(3, 6)):
                rx = size * rng.uniform(0.8, 2)
                self.canvas.ellipse((x, y + rng.uniform(-2, 1)), rx, rx * 0.4, cloud, opacity=150)
                x += size * rng.uniform(0.7, 1.4)

    def draw_far_end(self) -> None:
        """Draws trees and houses across the end of the street."""
        rng, z = self.rng, self.end
        x, y = self.at(-25, 0, z)
        self.canvas.rectangle(0, y - 8, WIDTH, y + 1, self.lit(self.leaves, z, 0.8), VEGETATION)
        while x < WIDTH:
            if rng.random() < 0.5:
                r = rng.uniform(12, 20)
                self.canvas.ellipse(
                    (x + r, y - 0.6 * r), 1.2 * r, r, self.lit(self.near(self.leaves), z, 0.8), VEGETATION
                )
                x += 1.5 * r
                continue
            columns, storeys = rng.randint(3, 6), rng.randint(2, 6)
            wall = self.lit(self.one_of(WALLS), z, 0.85)
            pane = LAMPLIGHT if self.light.lamps else mix(wall, self.lit(GLASS, z), 0.7)
            top = y - 6 * storeys - 2
            self.canvas.rectangle(x, top, x + 6 * columns + 2, y + 1, wall, BUILDING)
            for column in range(columns):
                for storey in range(storeys):
                    left, upper = x + 3 + 6 * column, top + 2.5 + 6 * storey
                    self.canvas.rectangle(left, upper, left + 2.5, upper + 3, pane)
            x += 6 * columns + 2

    def draw_ground(self) -> None:
        """Draws the road and what lies beside it."""
        rng, kerb, front = self.rng, self.kerb, self.front
        grass, paving, tarmac = self.near(self.leaves), self.one_of(PAVINGS), self.one_of(TARMACS)
        depths = (self.end, 20, 12, 8, 5, 2.5)
        for far, near in pairwise(depths):
            self.floor((-60, 60), (near, far), grass, VEGETATION)
            self.floor((-front, front), (near, far), paving, SIDEWALK)
            self.floor((-kerb, kerb), (near, far), tarmac, ROAD)
        for side in (-1, 1):
            z = 3.0
            while z < 24:
                self.floor((side * kerb, side * front), (z, 1.012 * z), paving, shade=0.8)
                z += 1.2
            for width, shade in ((0.18, 1.22), (0.05, 0.6)):
                self.floor((side * kerb, side * (kerb + width)), (2.5, self.end), paving, shade=shade)
        self.draw_markings()
        reach = self.shady_side * (front - rng.uniform(1, 6))
        strip = [(self.shady_side * front, 2.5), (reach, 2.5), (reach, self.end), (self.shady_side * front, self.end)]
        self.canvas.polygon([self.at(x, 0, z) for x, z in strip], SHADOW, opacity=self.light.shadow)

    def draw_markings(self) -> None:
        """Draws the markings of the road."""
        paint = self.near((218, 214, 204))
        if self.rng.random() < 0.8:
            z = self.rng.uniform(3, 6)
            while z < self.end - 2:
                self.floor((-0.08, 0.08), (z, z + 2), paint)
                z += 4.5
        if self.rng.random() < 0.3:
            z, x = self.rng.uniform(8, 14), 0.4 - self.kerb
            while x < self.kerb - 0.5:
                self.floor((x, x + 0.5), (z, z + 2.5), paint)
                x += 1

    # The next methods draw houses and gardens.

    def draw_house(self, side: int, z0: float, z1: float) -> None:
        """Draws a house."""
        rng, near, x = self.rng, max(z0, 1.5), side * self.front
        colour, roof, awning = self.one_of(WALLS), self.one_of(ROOFS), self.one_of(PAINTS)
        shade = 0.72 if side == self.shady_side else 1.05
        storeys, storey = rng.randint(2, 5), rng.uniform(2.8, 3.3)
        top, shop = storeys * storey, rng.random() < 0.5
        gable = ((0, 0), (0, top), (3, top + 2.2), (6, top + 2.2), (9, top), (9, 0))
        self.face([(x + side * u, v, near) for u, v in gable], colour, BUILDING, 0.86)
        slope = ((0, top, near), (0, top, z1), (3, top + 2.2, z1), (3, top + 2.2, near))
        self.face([(x + side * u, v, z) for u, v, z in slope], roof, BUILDING, shade)
        self.wall(x, (0, top), (near, z1), colour, BUILDING, shade)
        trim = mix(colour, WHITE, 0.5)
        self.wall(x, (top - 0.35, top), (near, z1), trim, shade=shade)
        columns = round((z1 - z0) / rng.uniform(2.2, 3.0))
        step = (z1 - z0) / columns
        for column in range(columns):
            a, b = z0 + step * (column + 0.25), z0 + step * (column + 0.75)
            for floor in range(storeys) if a > 3 else ():
                sill = 0.1 if floor == 0 and (shop or column == 0) else floor * storey + 0.9
                self.draw_window(x, (sill, floor * storey + 2.3), (a, b), trim, shade)
        if shop:
            out = x - side * 0.9
            self.face(((x, 3, near), (out, 2.5, near), (out, 2.5, z1), (x, 3, z1)), awning, BUILDING, shade)

    def draw_window(self, x: float, y: Point, z: Point, trim: Colour, shade: float) -> None:
        """Draws a window in a wall."""
        (low, high), (near, far) = y, z
        if near < 22:
            self.wall(x, (low - 0.15, high + 0.15), (near - 0.1, far + 0.1), trim, shade=shade)
        if self.light.lamps and self.rng.random() < 0.4:
            self.wall(x, y, z, LAMPLIGHT, shade=1.8)
        else:
            self.wall(x, y, z, mix(GLASS, self.zenith, self.rng.uniform(0, 0.6)), shade=shade)
        if near < 16:
            middle, bar = (near + far) / 2, low + (high - low) * 0.6
            self.wall(x, y, (middle - 0.04, middle + 0.04), trim, shade=shade)
            self.wall(x, (bar, bar + 0.08), z, trim, shade=shade)

    def draw_garden(self, side: int, z0: float, z1: float) -> None:
        """Draws a garden."""
        hedge, height = self.near(self.leaves), self.rng.uniform(1.0, 1.8)
        for z in (z1 - 1.5, (z0 + z1) / 2):
            if z > 3:
                self.draw_tree(side * (self.front + self.rng.uniform(1.5, 4)), z, self.rng.uniform(5, 8))
        x, near = side * self.front, max(z0, 1.5)
        self.wall(x, (0, height), (near, z1), hedge, VEGETATION, 0.8)
        self.floor((x, x + side), (near, z1), hedge, VEGETATION, 1.1, y=height)

    def draw_tree(self, x: float, z: float, height: float) -> None:
        """Draws a tree."""
        rng, scale = self.rng, self.focal / z
        leaves, bark = self.near(self.leaves, 20), self.lit(self.near(BARK), z)
        radius = height * rng.uniform(0.26, 0.34)
        self.shadow(x, z, 0.9 * radius, 0.6 * radius)
        foot, crown, trunk = self.at(x, 0, z), self.at(x, height - radius, z), max(1.0, 0.16 * scale)
        outline = [
            (foot[0] - trunk, foot[1]),
            (foot[0] + trunk, foot[1]),
            (crown[0] + trunk, crown[1]),
            (crown[0] - trunk, crown[1]),
        ]
        self.canvas.polygon(outline, bark, VEGETATION)
        puffs = [(rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0.45, 0.7)) for _ in range(9)]
        r, sunwards = radius * scale, -self.shady_side
        for shade, reach, size, dx, dy in (
            (0.68, 0.62, 1, -0.1, 0.16),
            (0.9, 0.62, 0.95, 0, 0),
            (1.15, 0.4, 0.55, 0.14, -0.2),
        ):
            for u, v, puff in puffs:
                centre = crown[0] + r * (u * reach + dx * sunwards), crown[1] + r * (v * reach + dy)
                self.canvas.ellipse(
                    centre, r * puff * size, 0.9 * r * puff * size, self.lit(leaves, z, shade), VEGETATION
                )

    # The next methods draw street furniture.

    def draw_pole(self, x: float, z: float, height: float) -> Point:
        """Draws a pole, a whole number of pixels wide, 1 to 3; returns the middle of its top."""
        metal = self.lit(self.one_of(METALS), z)
        width = min(3, max(1, round(0.22 * self.focal / z)))
        (px, bottom), top = self.at(x, 0, z), self.at(x, height, z)[1]
        left = round(px - width / 2)
        self.canvas.rectangle(left, top, left + width, bottom, metal, POLE)
        self.canvas.rectangle(left, top, left + width / 2, bottom, mix(metal, WHITE, 0.18))
        return left + width / 2, top

    def draw_lamp(self, side: int, z: float) -> None:
        """Draws a street lamp."""
        scale, x = self.focal / z, side * (self.kerb + 0.35)
        self.shadow(x, z, 0.3, 0.15)
        px, y = self.draw_pole(x, z, self.rng.uniform(4.2, 5.4))
        metal, end = self.lit(METALS[0], z), px - side * 1.1 * scale
        self.canvas.rectangle(min(px, end), y, max(px, end), y + max(1.0, 0.1 * scale), metal, POLE)
        if self.light.lamps:
            self.canvas.ellipse((end, y), 0.9 * scale, 0.9 * scale, LAMPLIGHT, opacity=50)
        head = LAMPLIGHT if self.light.lamps else mix(metal, WHITE, 0.5)
        self.canvas.ellipse((end, y + 0.1 * scale), max(1.5, 0.3 * scale), max(1.0, 0.16 * scale), head, POLE)

    def draw_sign(self, side: int, z: float) -> None:
        """Draws a traffic sign on a pole."""
        r = max(3.0, self.rng.uniform(0.48, 0.6) * self.focal / z)
        x, top = self.draw_pole(side * (self.kerb + 0.4), z, self.rng.uniform(2.8, 3.3))
        y, red, white, blue = top + r, self.lit(RED, z), self.lit(WHITE, z), self.lit(BLUE, z)
        shape = self.rng.choice(("round", "triangle", "square"))
        if shape == "round":
            self.canvas.ellipse((x, y), r, r, red, SIGN)
            self.canvas.ellipse((x, y), 0.68 * r, 0.68 * r, white)
        elif shape == "triangle":
            for s, colour in ((1.15 * r, red), (0.62 * r, white)):
                self.canvas.polygon([(x - s, y + 0.75 * s), (x + s, y + 0.75 * s), (x, y - s)], colour, SIGN)
        else:
            self.canvas.rectangle(x - r, y - r, x + r, y + r, blue, SIGN)
            self.canvas.rectangle(x - 0.45 * r, y - 0.6 * r, x + 0.45 * r, y + 0.6 * r, white)

    def draw_traffic_light(self, side: int, z: float) -> None:
        """Draws a traffic light, which counts as a pole, as lamps do."""
        r = max(3.0, self.rng.uniform(0.48, 0.6) * self.focal / z)
        x, top = self.draw_pole(side * (self.kerb + 0.4), z, self.rng.uniform(3.0, 3.6))
        self.canvas.rectangle(x - 0.62 * r, top, x + 0.62 * r, top + 3 * r, self.lit(BLACK, z), POLE)
        on = self.rng.randrange(3)
        for i, colour in enumerate(TRAFFIC_LIGHTS):
            bulb = colour if i == on else mix(colour, BLACK, 0.75)
            self.canvas.ellipse((x, top + (0.55 + 0.95 * i) * r), 0.38 * r, 0.38 * r, bulb)

    def draw_bin(self, x: float, z: float) -> None:
        """Draws a litter bin, which is ignored."""
        colour = self.one_of(PAINTS)
        self.shadow(x, z, 0.5, 0.3)
        self.front_face((x - 0.35, x + 0.35), (0, 1), z, colour, VOID, 0.8)
        self.front_face((x - 0.4, x + 0.4), (0.9, 1.1), z, colour, VOID)

    # The next methods draw people and cars.

    def draw_person(self, x: float, z: float) -> None:
        """Draws somebody who walks."""
        rng = self.rng
        coat, trousers, skin, hair = (self.one_of(kind) for kind in (CLOTHES, CLOTHES, SKINS, HAIRS))
        height, stride, hem = rng.uniform(0.9, 1.08), rng.uniform(0.05, 0.3), rng.choice((0.6, 0.82, 0.82))

        def part(points: Sequence[Point], colour: Colour, shade: float = 1) -> None:
            self.face([(x + u * height, v * height, z) for u, v in points], colour, PERSON, shade)

        self.shadow(x, z, 0.4, 0.25)
        for foot, shade in ((-stride, 0.85), (stride, 1.0)):
            part(((-0.2, 0.9), (0.2, 0.9), (foot + 0.14, 0), (foot - 0.14, 0)), trousers, shade)
            part(((foot - 0.14, 0.08), (foot + 0.19, 0.08), (foot + 0.19, 0), (foot - 0.14, 0)), BLACK)
        for arm in (-1, 1):
            hand = arm * (0.24 + stride)
            part(((arm * 0.24, 1.48), (arm * 0.36, 1.4), (hand + 0.06, 0.85), (hand - 0.06, 0.85)), coat, 0.8)
        part(((-0.24, 1.5), (0.24, 1.5), (0.31, 1.3), (0.26, hem), (-0.26, hem), (-0.31, 1.3)), coat)
        part(((-0.07, 1.58), (0.07, 1.58), (0.07, 1.46), (-0.07, 1.46)), skin, 0.9)
        scale = height * self.focal / z
        self.canvas.ellipse(self.at(x, 1.68 * height, z), 0.17 * scale, 0.17 * scale, self.lit(hair, z), PERSON)
        self.canvas.ellipse(self.at(x, 1.63 * height, z), 0.13 * scale, 0.12 * scale, self.lit(skin, z), PERSON)

    def draw_car(self, x: float, z: float) -> None:
        """Draws a car from behind or in front, with the flank that faces the middle of the picture."""
        rng = self.rng
        paint, length, top, waist = self.one_of(PAINTS), rng.uniform(3.6, 4.4), rng.uniform(1.4, 1.75), 0.92
        glass = mix(GLASS, self.horizon, 0.25)
        self.shadow(x, z + length / 2, 1.15, length / 2 + 0.2)
        seen = 1 if x < self.camera[0] else -1
        self.draw_flank(x + seen * 0.9, seen, z, length, top, paint, glass)
        self.floor((x - 0.72, x + 0.72), (z + 0.4, z + 0.62 * length), paint, CAR, 1.15, y=top)
        self.front_face((x - 0.9, x + 0.9), (0.28, waist), z, paint, CAR)
        for colour, low, high, slant, inset, shade in (
            (paint, waist, top, 0.4, 0.0, 1.0),
            (glass, waist + 0.04, top - 0.1, 0.35, 0.12, 0.9),
        ):
            wide, narrow = 0.9 - inset, 0.74 - inset
            pane = ((-wide, low, 0), (-narrow, high, slant), (narrow, high, slant), (wide, low, 0))
            self.face([(x + u, v, z + w) for u, v, w in pane], colour, CAR, shade)
        self.front_face((x - 0.9, x + 0.9), (0.28, 0.42), z, BLACK)
        self.front_face((x - 0.26, x + 0.26), (0.48, 0.6), z, rng.choice((WHITE, WHITE, LAMPLIGHT)))
        scale, lamp = self.focal / z, rng.choice(((250, 244, 210), (200, 30, 34), (200, 30, 34)))
        for end in (-1, 1):
            self.front_face((x + end * 0.58, x + end * 0.82), (0, 0.28), z, BLACK, CAR, 0.7)
            colour = lamp if self.light.lamps else self.lit(lamp, z)
            self.canvas.ellipse(self.at(x + end * 0.72, 0.74, z), 0.15 * scale, 0.1 * scale, colour)

    def draw_flank(
        self, x: float, seen: int, z: float, length: float, top: float, paint: Colour, glass: Colour
    ) -> None:
        """Draws the side of a car."""
        waist, cabin = 0.92, x - seen * 0.16
        body = ((0, 0.3), (0, waist), (length, 0.8), (length, 0.3))
        self.face([(x, v, z + w) for w, v in body], paint, CAR, 0.78)
        roof = ((0, waist), (0.4, top), (0.62 * length, top), (0.8 * length, waist))
        self.face([(x if v == waist else cabin, v, z + w) for w, v in roof], paint, CAR, 0.78)
        window = ((0.25, waist + 0.05), (0.5, top - 0.1), (0.6 * length, top - 0.1), (0.74 * length, waist + 0.05))
        self.face([(cabin, v, z + w) for w, v in window], glass, None, 0.75)
        for w in (0.75, length - 0.8):
            wheel = 0.33 * self.focal / (z + w)
            centre = self.at(x, 0.32, z + w)
            narrow = wheel * abs(centre[0] - self.vanishing_point[0]) / 110
            self.canvas.ellipse(centre, max(0.8, narrow), wheel, self.lit(BLACK, z), CAR)

    def draw_bonnet(self) -> None:
        """Draws the bonnet of the car that carries the camera, which is ignored, as in Cityscapes."""
        paint, top = self.one_of(PAINTS), HEIGHT - self.rng.uniform(7, 12)
        x = WIDTH / 2 + self.rng.uniform(-8, 8)
        self.canvas.ellipse((x, top + 22), 112, 22, self.lit(paint, 0, 0.7), VOID)
        self.canvas.ellipse((x - 20, top + 24), 70, 20, self.lit(mix(paint, self.zenith, 0.4), 0, 0.9), VOID)
