"""What the bytes of a sample's parts are: decoders by extension. None of them runs code that the bytes bring."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Decoder = Callable[[bytes], Any]


def decode_text(data: bytes) -> str:
    """UTF-8."""
    return data.decode("utf-8")


def decode_number(data: bytes) -> int:
    """A whole number in digits, such as the class of an image."""
    return int(data)


def decode_json(data: bytes) -> Any:
    """Any JSON."""
    return json.loads(data)


def decode_array(data: bytes) -> Tensor:
    """An array of ``numpy.save`` as a tensor; not one of objects, which would be unpickled."""
    return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))


def decode_arrays(data: bytes) -> dict[str, Tensor]:
    """Arrays of ``numpy.savez`` as tensors, by name."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def decode_tensors(data: bytes) -> Any:
    """What ``torch.save`` wrote: tensors, and containers of them."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def decode_image(data: bytes) -> Tensor:
    """Pixels, ``(channels, height, width)`` uint8: 1 channel of grey, 3 of colours, or 4 with transparency; grey of 16
    bits, as of scans, is uint16.

    Raises:
        ValueError: Pillow is not installed, or the image has values of 32 bits, whose range nothing tells.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ValueError("images are decoded by Pillow, which is not installed; run `pip install pillow`") from None
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.mode.startswith("I;16"):
        return torch.from_numpy(np.array(image).astype(np.uint16))[None]  # which may have the other order of bytes
    if image.mode in ("I", "F"):
        raise ValueError(f"{image.mode} images have values of any range; pass a function of bytes by decoders=")
    if image.mode not in ("L", "RGB", "RGBA"):
        transparent = "transparency" in image.info or image.mode in ("LA", "PA")
        image = image.convert("RGBA" if transparent else "L" if image.mode == "1" else "RGB")
    pixels = np.array(image)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1).contiguous()


DECODERS: Mapping[str, Decoder] = {
    **dict.fromkeys(("txt", "text", "transcript"), decode_text),
    **dict.fromkeys(("cls", "cls2", "index", "inx", "id", "count"), decode_number),
    **dict.fromkeys(("json", "jsn"), decode_json),
    "npy": decode_array,
    "npz": decode_arrays,
    **dict.fromkeys(("pth", "pt"), decode_tensors),
    **dict.fromkeys(("png", "jpg", "jpeg", "ppm", "pgm", "bmp", "webp", "tif", "tiff"), decode_image),
}
"""By extension. What has another one, as ``pkl`` and ``pickle``, stays bytes."""


def decoders_of(given: Mapping[str, Decoder | str | None]) -> dict[str, Decoder | None]:
    """Decoders by extension, or by column: a function, the extension of a decoder here, or None for bytes.

    Raises:
        ValueError: an extension that has none.
    """
    decoders: dict[str, Decoder | None] = {}
    for name, decoder in given.items():
        if isinstance(decoder, str) and decoder not in DECODERS:
            raise ValueError(
                f"decoders={{{name!r}: {decoder!r}}}: there is no decoder {decoder!r}; pass a function of bytes, or "
                f"one of {', '.join(sorted(DECODERS))}"
            )
        decoders[name.lower()] = DECODERS[decoder] if isinstance(decoder, str) else decoder
    return decoders


def decode_parts(sample: dict[str, Any], decoders: Mapping[str, Decoder | None], url: str) -> dict[str, Any]:
    """A sample whose bytes are decoded: by the whole extension (``seg.png``) if that has a decoder, else by its end.

    Raises:
        ValueError: bytes that can't be decoded; the message has the sample and its part.
    """
    decoded = {}
    for name, value in sample.items():
        whole = name.lower()
        decoder = decoders[whole] if whole in decoders else decoders.get(whole.rpartition(".")[2])
        if isinstance(value, dict) and "bytes" in value and decoder is not None:  # an image of Hugging Face's datasets
            value = value["bytes"]
        if decoder is None or not isinstance(value, bytes):
            decoded[name] = value
            continue
        try:
            decoded[name] = decoder(value)
        except Exception as error:
            which = f"{name!r} of sample {sample['__key__']!r} in" if "__key__" in sample else f"{name!r} of a row of"
            raise ValueError(f"{which} {url} can't be decoded ({error!r}); see decoders= and `data check`") from error
    return decoded
