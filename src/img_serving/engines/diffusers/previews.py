"""How unfinished latents look: one linear map from latents to colours, fitted to the model's own VAE as it is loaded.

A VAE's latents are, roughly, a small picture in other colours: a map with an offset shows it well, at the cost of one small
matrix product (see https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204). Instead of a table for
each family, a chart of colours is encoded once and the map found by least squares: it holds for any VAE.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, Final

from img_serving.domain.images import Preview

CHART_SIDE: Final = 256
"""Pixels: 1024 latents where a VAE shrinks by 8, for some tens of unknowns."""

SHARE: Final = 0.03
"""Previews may take so much of the time."""

MIN_SECONDS: Final = 0.2


class Looks:
    """The map of one VAE, or, where it has none to fit, a stand-in: the first three channels, stretched."""

    def __init__(self, channels: int | None = None, matrix: Any = None) -> None:
        """`matrix` of [channels + 1, 3] maps latents, as pipelines hold them, and a one to colours from 0 to 1."""
        self._channels, self._matrix = channels, matrix

    @property
    def is_fitted(self) -> bool:
        """Whether colours are the model's."""
        return self._matrix is not None

    def of(self, latents: Any) -> Any:
        """uint8 [pictures, height, width, 3] of latents [pictures, channels, height, width], on the CPU."""
        import torch

        latents = latents.detach().float()
        # Some schedulers hold latents as large as their noise is; less than the usual spread is left as it is.
        spread = latents.std(dim=(1, 2, 3), keepdim=True)
        latents = latents / spread.clamp(min=1.0)
        if self._matrix is not None and latents.shape[1] == self._channels:
            matrix = self._matrix.to(latents.device)
            colours = torch.einsum("nchw,cr->nhwr", latents, matrix[:-1]) + matrix[-1]
        else:
            few = latents[:, :3] if latents.shape[1] >= 3 else latents[:, :1].expand(-1, 3, -1, -1)
            low, high = few.amin(dim=(2, 3), keepdim=True), few.amax(dim=(2, 3), keepdim=True)
            colours = ((few - low) / (high - low).clamp(min=1e-6)).permute(0, 2, 3, 1)
        return (colours.nan_to_num(0.0).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).cpu().numpy()


def fitted(pipe: Any) -> Looks:
    """The looks of a pipeline's VAE; the stand-in where it cannot be fitted."""
    try:
        return _fitted(pipe)
    except Exception:
        # an unusual VAE: previews are no reason not to draw
        return Looks()


def _fitted(pipe: Any) -> Looks:
    import torch

    vae = pipe.vae
    chart = _chart()
    with torch.no_grad():
        half = vae.dtype == torch.float16  # in which some VAEs overflow
        kept = vae.dtype
        if half:
            vae.to(dtype=torch.float32)
        try:
            latents = _encoded(vae, (chart * 2.0 - 1.0).to(vae.device, vae.dtype)).float().cpu()
        finally:
            if half:
                vae.to(dtype=kept)
        channels = latents.shape[1]
        small = torch.nn.functional.adaptive_avg_pool2d(chart, latents.shape[-2:])
        rows = latents.permute(0, 2, 3, 1).reshape(-1, channels)
        rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1).double()
        colours = small.permute(0, 2, 3, 1).reshape(-1, 3).double()
        steady = 1e-4 * len(rows) * torch.eye(channels + 1, dtype=torch.float64)
        matrix = torch.linalg.solve(rows.T @ rows + steady, rows.T @ colours).float()
    return Looks(channels, matrix) if bool(torch.isfinite(matrix).all()) else Looks()


def _chart() -> Any:
    """Soft patches of many colours and brightnesses, from 0 to 1: [1, 3, side, side]. The same every time."""
    import torch

    source = torch.Generator("cpu").manual_seed(0)
    chart = torch.zeros(1, 3, CHART_SIDE, CHART_SIDE)
    for cells in (4, 8, 16):
        patches = torch.rand(1, 3, cells, cells, generator=source)
        chart += torch.nn.functional.interpolate(patches, size=(CHART_SIDE, CHART_SIDE), mode="bicubic")
    chart -= chart.amin()
    return chart / chart.amax()


def _encoded(vae: Any, pictures: Any) -> Any:
    """Latents as pipelines hold them: shifted and scaled."""
    import torch

    if vae.config.get("latents_mean") is not None:  # a VAE of videos: a picture is one frame
        found = vae.encode(pictures.unsqueeze(2)).latent_dist.mode()
        mean, spread = (
            torch.tensor(vae.config[name], device=found.device, dtype=found.dtype).view(1, -1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return ((found - mean) / spread)[:, :, 0]
    encoded = vae.encode(pictures)
    found = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    return (found - (vae.config.get("shift_factor") or 0.0)) * (vae.config.get("scaling_factor") or 1.0)


def unpacked(latents: Any, width: int, height: int) -> Any | None:
    """Latents as [pictures, channels, height, width]; None if their shape means nothing here.

    Flux and what comes from it hold them as a row of 2 x 2 patches; models of videos with frames.
    """
    if latents.ndim == 4:
        return latents
    if latents.ndim == 5:
        return latents[:, :, 0]
    if latents.ndim != 3 or latents.shape[2] % 4:
        return None
    count, length, depth = latents.shape
    patch = (width * height / length) ** 0.5
    wide, high = round(width / patch), round(height / patch)
    if wide * high != length:
        return None
    patches = latents.reshape(count, high, wide, depth // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(count, depth // 4, high * 2, wide * 2)


def as_jpeg(pixels: Any) -> bytes:
    """A small file of uint8 [height, width, 3]."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=70)
    return out.getvalue()


MILESTONES: Final = 4
"""Of a picture: at each of its quarters it is shown, however soon that is, for a stream of a few pictures waits for those."""


class Previewer:
    """Shows the pictures of one call now and then: at their quarters, else never more often than pays."""

    def __init__(self, looks: Looks, clock: Callable[[], float]) -> None:
        self._looks, self._clock = looks, clock
        self._not_before = clock()

    def show(
        self, latents: Any, width: int, height: int, indices: Sequence[int], *, step: int, steps: int
    ) -> tuple[Preview, ...]:
        """What the pictures `indices` of the call look like, in the order of `latents`, after `step` of their `steps`.

        Nothing if it is too soon.
        """
        began = self._clock()
        is_milestone = step * MILESTONES // steps > (step - 1) * MILESTONES // steps
        if began < self._not_before and not is_milestone:
            return ()
        plain = unpacked(latents[: len(indices)] if latents.ndim > 2 else latents, width, height)
        if plain is None:
            return ()
        pictures = self._looks.of(plain)
        shown = tuple(
            Preview(as_jpeg(pixels), "image/jpeg", index, step / steps)
            for index, pixels in zip(indices, pictures, strict=True)
        )
        took = self._clock() - began
        self._not_before = began + max(MIN_SECONDS, took / SHARE)
        return shown
