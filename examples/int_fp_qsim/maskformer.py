"""MaskFormer on a Swin transformer, a small one with random weights: masks and classes in simulated formats.

python examples/int_fp_qsim/maskformer.py       needs transformers; a few seconds
"""

import torch
from common import arguments, compare, package
from torch import Tensor, nn


def main() -> None:
    args = arguments(__doc__, width=16, queries=10, size=64, images=2)
    transformers = package("transformers")
    transformers.logging.set_verbosity_error()  # of a backbone that it takes for unusual
    backbone = transformers.MaskFormerSwinConfig(
        image_size=args.size,
        embed_dim=args.width,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    decoder = transformers.DetrConfig(
        d_model=32,
        num_queries=args.queries,
        decoder_layers=2,
        decoder_ffn_dim=64,
        decoder_attention_heads=4,
        encoder_layers=1,
        encoder_ffn_dim=64,
        encoder_attention_heads=4,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
    )
    config = transformers.MaskFormerConfig(
        backbone_config=backbone, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, num_labels=8
    )
    model = transformers.MaskFormerForInstanceSegmentation(config)
    images = torch.randn(args.images, 3, args.size, args.size)

    def run(model: nn.Module) -> dict[str, Tensor]:
        outputs = model(pixel_values=images)
        return {"masks": outputs.masks_queries_logits, "classes": outputs.class_queries_logits}

    compare(model, run, lambda outputs: outputs["masks"] > 0, "pixels")


if __name__ == "__main__":
    main()
