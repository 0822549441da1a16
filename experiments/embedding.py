"""Embed pictures in a self-contained page, re-encoded to fit their share of the page's size."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hmn.errors import ArtifactError

QUALITIES = (85, 60, 35)
LOSSLESS_GAIN = 1.5  # about the most that WebP saves over a PNG; beyond it, trying wastes time
SMALLEST = 96  # pixels of the shorter side: smaller pictures show nothing


@dataclass(frozen=True)
class Embedded:
    uri: str
    width: int  # pixels of the file on disk, the size it is shown at whatever was embedded
    height: int
    lossy: bool


def embed(path: Path, bytes_allowed: int) -> Embedded:
    """The picture at ``path`` as a ``data:`` URI of about ``bytes_allowed`` characters.

    A PNG that fits is embedded unchanged. Otherwise the picture becomes a WebP: lossless, then at falling quality, then
    at half the side and so on down to ``SMALLEST`` pixels. Raises ``ArtifactError`` if the file is not a picture.
    """
    try:
        with Image.open(path) as opened:
            kind, picture = opened.format, opened.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:  # Pillow's own errors are OSErrors
        raise ArtifactError(f"{path}: not a picture ({type(error).__name__})") from None
    width, height = picture.size
    original, allowed = path.read_bytes(), bytes_allowed * 3 // 4  # base64 writes 4 characters for 3 bytes
    if len(original) <= allowed and kind == "PNG":
        return Embedded(_uri("png", original), width, height, lossy=False)
    if len(original) <= LOSSLESS_GAIN * allowed and len(encoded := _webp(picture, lossless=True)) <= allowed:
        return Embedded(_uri("webp", encoded), width, height, lossy=False)
    while True:
        for quality in QUALITIES:
            encoded = _webp(picture, quality=quality)
            if len(encoded) <= allowed:
                return Embedded(_uri("webp", encoded), width, height, lossy=True)
        if min(picture.size) < 2 * SMALLEST:
            return Embedded(_uri("webp", encoded), width, height, lossy=True)
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)


def _webp(picture: Image.Image, **settings: int | bool) -> bytes:
    """Encode quickly: a page may hold hundreds, and more effort takes ten times as long for a tenth fewer bytes."""
    stream = io.BytesIO()
    picture.save(stream, "WEBP", method=0, **settings)
    return stream.getvalue()


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
