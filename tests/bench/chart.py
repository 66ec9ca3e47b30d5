"""The picture of the benchmark page: bars that tell at a glance what a mount, an hour and a node cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from tests.bench.results import Results
from tests.bench.targets import AWAY

_SCALE: Final = 2  # drawn larger and reduced, so that edges are smooth
_WIDTH, _MARGIN, _LABELS, _ROW, _BAR, _HEAD = 1000, 28, 330, 32, 20, 58
_PAPER, _INK, _FAINT = "#ffffff", "#1f2933", "#616e7c"
_OURS, _FLOOR, _OTHER = "#2f6fb5", "#b8c4d0", "#d9822b"


@dataclass(frozen=True)
class Bar:
    """One bar; `kind` is "ours", "floor" (what nothing can be below) or "other" (what it is compared with)."""

    label: str
    value: float
    told: str
    kind: str = "ours"


@dataclass(frozen=True)
class Panel:
    """Bars of one unit under a title."""

    title: str
    bars: tuple[Bar, ...]


def panels(results: Results) -> list[Panel]:
    """What the picture shows."""
    floor, ten = results.floor(AWAY), results.single(10, AWAY)
    memory = results.from_memory[0]
    rotations = {one.name: one for one in results.rotations}
    fresh = next(one for name, one in rotations.items() if "lease: fresh" in name)
    kept = next(one for name, one in rotations.items() if "credential, kept" in name)
    read = rotations["10 static objects"]
    rare = next(one for name, one in rotations.items() if "refreshAfter" in name)
    agents = results.agents[-1]

    def ms(label: str, seconds: float, kind: str = "ours") -> Bar:
        return Bar(label, seconds, f"{seconds * 1000:.1f} ms", kind)

    def requests(label: str, count: int, kind: str = "ours") -> Bar:
        return Bar(label, count, f"{count:,}", kind)

    return [
        Panel(
            f"One mount of 10 objects, Vault {AWAY * 1000:g} ms away",
            (
                ms("bare: one login, one read", floor.login.median + floor.read.median, "floor"),
                ms("a pod's first mount", ten.cold.median),
                ms("bare: one read", floor.read.median, "floor"),
                ms("re-mount", ten.warm.median),
                ms("re-mount under refreshAfter", memory.took.median),
            ),
        ),
        Panel(
            f"Requests to Vault, an hour of re-mounts of {read.pods} pods",
            (
                requests("10 static objects, read each time", read.requests.total, "other"),
                requests("the same, refreshAfter: 5m", rare.requests.total),
                requests("a database credential, issued each time", fresh.requests.total, "other"),
                requests("the same, kept and renewed", kept.requests.total),
            ),
        ),
        Panel(
            "Memory on a node",
            (
                Bar(
                    f"an agent in each of {agents.pods} pods",
                    agents.private.median,
                    f"{agents.private.median:.0f} MiB",
                    "other",
                ),
                Bar(
                    f"this provider, for {results.boot.pods} pods",
                    results.boot.after.median,
                    f"{results.boot.after.median:.0f} MiB",
                ),
            ),
        ),
    ]


def text(shown: Sequence[Panel]) -> str:
    """The picture in words, for who cannot see it."""
    return " ".join(f"{panel.title}: {', '.join(f'{bar.label} {bar.told}' for bar in panel.bars)}." for panel in shown)


def draw(shown: Sequence[Panel], path: Path) -> None:
    """Write the picture as PNG."""
    height = _MARGIN + sum(_HEAD + _ROW * len(panel.bars) for panel in shown) + _MARGIN // 2
    image = Image.new("RGB", (_WIDTH * _SCALE, height * _SCALE), _PAPER)
    pen = ImageDraw.Draw(image)
    fonts = {size: ImageFont.load_default(size * _SCALE) for size in (15, 18)}
    colours = {"ours": _OURS, "floor": _FLOOR, "other": _OTHER}

    def write(x: float, y: float, words: str, size: int, colour: str, anchor: str) -> None:
        pen.text((x * _SCALE, y * _SCALE), words, fill=colour, font=fonts[size], anchor=anchor)

    top = _MARGIN
    for panel in shown:
        write(_MARGIN, top + 20, panel.title, 18, _INK, "lm")
        top += _HEAD - 12
        room = _WIDTH - _LABELS - _MARGIN - 110
        most = max(bar.value for bar in panel.bars)
        for bar in panel.bars:
            middle = top + _ROW / 2
            long = max(2.0, room * bar.value / most)
            write(_LABELS - 12, middle, bar.label, 15, _FAINT, "rm")
            box = (_LABELS, middle - _BAR / 2, _LABELS + long, middle + _BAR / 2)
            pen.rectangle([edge * _SCALE for edge in box], fill=colours[bar.kind])
            write(_LABELS + long + 10, middle, bar.told, 15, _INK, "lm")
            top += _ROW
        top += 12
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((_WIDTH, height), Image.Resampling.LANCZOS).save(path, optimize=True)
