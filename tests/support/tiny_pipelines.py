"""Diffusers pipelines of a few megabytes with random weights, written to a folder without any download.

Everything is real but small: networks of two blocks, and tokenizers that know single letters.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import tokenizers
import torch
import transformers

FAMILIES = ("sd", "sdxl", "sd3", "flux")
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"


def make(family: str, folder: Path, **change: Any) -> Path:
    """Write the pipeline of one of `FAMILIES`, `qwen`, or `inpaint` (Stable Diffusion of nine channels).

    The weights are the same every time. `change` is laid over the keyword arguments of the network that draws.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        makers = {"sd": _sd, "inpaint": _inpaint, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux, "qwen": _qwen}
        pipe = makers[family](change)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def make_lora(pipe: Any, path: Path, *, seed: int = 1, size: float = 0.5) -> Path:
    """Write a LoRA of rank 2 for the network that draws, strong enough to be seen."""
    import peft
    from safetensors.torch import save_file

    name = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    network = getattr(pipe, name)
    targets = ["to_q", "to_v"]
    network.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "making")
    source = torch.Generator("cpu").manual_seed(seed)
    state = peft.get_peft_model_state_dict(network, adapter_name="making")
    network.delete_adapters("making")
    drawn = {f"{name}.{key}": torch.randn(one.shape, generator=source) * size for key, one in sorted(state.items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(drawn, path)
    return path


def letter_tokenizer() -> Any:
    """A tokenizer of CLIP's kind without merges: each letter is a token, ended or not."""
    known = list(_byte_letters())
    tokens = [*known, *(f"{one}</w>" for one in known), _BEGIN, _END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab.write_text(json.dumps(vocabulary), encoding="utf-8")
        merges.write_text("#version: 0.2\n", encoding="utf-8")
        return transformers.CLIPTokenizer(str(vocab), str(merges), model_max_length=77)


def _byte_letters() -> list[str]:
    """One visible letter for each byte, as byte-level tokenizers have them."""
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def word_tokenizer() -> Any:
    """A tokenizer of T5's kind: letters of printable ASCII."""
    pieces = [
        ("<pad>", 0.0),
        (_T5_END, 0.0),
        ("<unk>", -9.0),
        ("▁", -2.0),
        *((chr(code), -3.0) for code in range(33, 127)),
    ]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=False))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {_T5_END}", special_tokens=[(_T5_END, 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token=_T5_END, unk_token="<unk>", model_max_length=77
    )


_T5_END = "</s>"
_T5_LENGTH = 98


def _clip(tokenizer: Any, kind: Any = None) -> Any:
    count = len(tokenizer)
    config = transformers.CLIPTextConfig(
        vocab_size=count,
        bos_token_id=count - 2,
        eos_token_id=count - 1,
        pad_token_id=count - 1,
        hidden_size=32,
        projection_dim=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    return (kind or transformers.CLIPTextModel)(config).eval()


def _t5(width: int) -> Any:
    config = transformers.T5Config(
        vocab_size=_T5_LENGTH, d_model=width, d_kv=8, d_ff=40, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1
    )
    return transformers.T5EncoderModel(config).eval()


def _vae(channels: int = 4, **more: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=[16, 32, 32, 32],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=channels,
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=64,
        **more,
    ).eval()


_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}


def _sd(change: dict[str, Any]) -> Any:
    letters = letter_tokenizer()
    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(letters),
        tokenizer=letters,
        unet=diffusers.UNet2DConditionModel(**_UNET | change).eval(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **_NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _inpaint(change: dict[str, Any]) -> Any:
    parts = _sd({"in_channels": 9} | change).components
    return diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def _sdxl(change: dict[str, Any]) -> Any:
    letters = letter_tokenizer()
    own = {
        "cross_attention_dim": 64,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    }
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(letters),
        text_encoder_2=_clip(letters, transformers.CLIPTextModelWithProjection),
        tokenizer=letters,
        tokenizer_2=letters,
        unet=diffusers.UNet2DConditionModel(**_UNET | own | change).eval(),
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **_NOISE),
        add_watermarker=False,
    )


def _sd3(change: dict[str, Any]) -> Any:
    letters = letter_tokenizer()
    own = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 24,
    }
    with_projection = transformers.CLIPTextModelWithProjection
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(**own | change).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(16, shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(letters, with_projection),
        tokenizer=letters,
        text_encoder_2=_clip(letters, with_projection),
        tokenizer_2=letters,
        text_encoder_3=_t5(64),
        tokenizer_3=word_tokenizer(),
    )


def _flux(change: dict[str, Any]) -> Any:
    letters = letter_tokenizer()
    own = {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": [4, 4, 8],
        "guidance_embeds": True,
    }
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(**own | change).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(16, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(letters),
        tokenizer=letters,
        text_encoder_2=_t5(32),
        tokenizer_2=word_tokenizer(),
    )


def _qwen(change: dict[str, Any]) -> Any:
    tokens = [*_byte_letters(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab.write_text(json.dumps({token: number for number, token in enumerate(tokens)}), encoding="utf-8")
        merges.write_text("#version: 0.2\n", encoding="utf-8")
        tokenizer = transformers.Qwen2Tokenizer(str(vocab), str(merges))
    text = {
        "vocab_size": len(tokenizer) + 8,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, vocab_size=len(tokenizer) + 8)
    own = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
    }
    return diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(**own | change).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=24,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ).eval(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
    )
