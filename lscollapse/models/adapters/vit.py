"""ViT: pre-norm encoder blocks over the patches of a picture. An id is a pixel, 24-bit colour in reading order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lscollapse.models.adapters.adapter import UnsupportedModel
from lscollapse.models.adapters.pre_norm import Parts, PreNormAdapter


class VitAdapter(PreNormAdapter):
    """Ids (B, height * width) become the pixel values (B, 3, height, width) that the model was trained on.

    Mean and standard deviation of a channel are the config's `image_mean` and `image_std`, set from a checkpoint's
    preprocessor_config.json; without them 0.5 each, as ViT was published.
    """

    parts = Parts("layernorm_before", "attention", "layernorm_after", "mlp")
    tried = None

    def __init__(self, model: Any) -> None:
        if model.config.num_channels != 3:
            raise UnsupportedModel(f"the ViT reads pictures of {model.config.num_channels} channels: only 3 are known")
        super().__init__(model)

    @property
    def vocabulary(self) -> int:
        return 2**24

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures it reads."""
        height, width = self.model.embeddings.image_size
        return height, width

    def forward(self, ids: Tensor) -> Any:
        return self.model(self.pixel_values(ids))

    def pixel_values(self, ids: Tensor) -> Tensor:
        """(B, height * width) -> (B, 3, height, width), normalised."""
        height, width = self.size
        if ids.shape[1] != height * width:
            raise UnsupportedModel(f"{ids.shape[1]} pixels, but the model reads pictures of {height} x {width}")
        channels = torch.stack([ids // 65536, ids // 256 % 256, ids % 256], dim=1)  # (B, 3, height * width)
        mean, std = (
            torch.tensor(getattr(self.config, name, [0.5] * 3), dtype=torch.float64, device=ids.device)[:, None]
            for name in ("image_mean", "image_std")
        )
        pixels: Tensor = ((channels.double() / 255 - mean) / std).to(self.dtype)
        return torch.unflatten(pixels, -1, (height, width))  # (B, 3, height, width)
