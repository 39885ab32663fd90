"""The U-Net of Stable Diffusion, a small one with random weights: its prediction and a short run of DDIM in simulated formats.

python examples/int_fp_qsim/stable_diffusion.py         needs diffusers and transformers; less than half a minute
"""

import torch
from common import FORMATS, arguments, package, simulated, table
from torch import Tensor, nn

from quant_ops.report.error import sqnr


def main() -> None:
    args = arguments(__doc__, width=32, size=16, steps=4, images=1)
    diffusers = package("diffusers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=args.size,
        block_out_channels=(args.width, 2 * args.width),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(args.steps)
    noise = torch.randn(args.images, unet.config.in_channels, args.size, args.size)
    prompt = torch.randn(args.images, 7, 32)

    @torch.no_grad()
    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        """The first prediction, and the image at the end of the run."""
        latents, first = noise, None
        for timestep in scheduler.timesteps:
            prediction = model(latents, timestep, encoder_hidden_states=prompt).sample
            first = prediction if first is None else first
            latents = scheduler.step(prediction, timestep, latents).prev_sample
        return first, latents

    expected = run(unet)
    rows = {name: [sqnr(*pair) for pair in zip(expected, run(simulated(unet, name)), strict=True)] for name in FORMATS}
    table(["prediction, dB", "image, dB"], rows)


if __name__ == "__main__":
    main()
