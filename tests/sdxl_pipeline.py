"""A Stable Diffusion XL pipeline of a few thousand random weights, in the format that users have."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from condrl.shapes.networks import TOKENS, make_tokenizer

UNET = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2),
    layers_per_block=1,
    cross_attention_dim=40,
    attention_head_dim=(2, 4),
    norm_num_groups=4,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 * 4 + 20,
)


def text_config(tokenizer, width):
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=20,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def sdxl_pipeline(folder: Path) -> Path:
    """As diffusers saves it; its second tokenizer reads letter by letter."""
    torch.manual_seed(0)
    words = make_tokenizer(folder / "words")
    (folder / "none.txt").write_text("#version: 0.2\n")
    letters = CLIPTokenizer(str(folder / "words" / "vocab.json"), str(folder / "none.txt"), model_max_length=TOKENS)
    letters.pad_token = "!"
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.13025,
        force_upcast=True,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    StableDiffusionXLPipeline(
        vae=vae,
        unet=UNet2DConditionModel(**UNET),
        text_encoder=CLIPTextModel(text_config(words, 16)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(letters, 24)),
        tokenizer=words,
        tokenizer_2=letters,
        scheduler=scheduler,
        add_watermarker=False,
    ).save_pretrained(folder / "pipe")
    return folder / "pipe"
