"""Small models of many architectures, with random weights: what Hugging Face's classes compute, at a size that compiles
in seconds.

Weights are drawn as each class draws its own, at the seed of the entry. Inputs are drawn too: a batch is what the
model's `forward` takes, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Batch = dict[str, Any]
VOCABULARY = 512
LENGTH = 16  # tokens
PIXELS = 64  # of a side


@dataclass(frozen=True)
class Entry:
    """One architecture: a class of transformers, its config, and how a batch of inputs is drawn."""

    name: str
    task: str
    model: str  # a class of transformers
    config: str  # another
    settings: Mapping[str, Any]
    inputs: Callable[[torch.Generator], Batch]

    def build(self) -> nn.Module:
        """In eval mode, frozen; the same weights every time.

        Frozen, because `torch.matmul` of a matrix by a batch rounds otherwise where the matrix asks for gradients, and
        compressed models do not (Mamba's dt_proj).
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = getattr(transformers, self.config)(**self.settings)
            model: nn.Module = getattr(transformers, self.model)(config)
        for module in model.modules():  # a cache is no answer
            if getattr(getattr(module, "config", None), "use_cache", False):
                module.config.use_cache = False
        return model.eval().requires_grad_(False)

    def batches(self, count: int, seed: int = 0) -> list[Batch]:
        """`count` batches, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return [self.inputs(generator) for _ in range(count)]


def text(generator: torch.Generator) -> Batch:
    """What encoders and decoders of text read."""
    ids = tokens(LENGTH, generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def short_text(generator: torch.Generator) -> Batch:
    """For models that unroll over the tokens."""
    return {"input_ids": tokens(6, generator)}


def text_to_text(generator: torch.Generator) -> Batch:
    """What an encoder reads and what its decoder has written so far."""
    return {**text(generator), "decoder_input_ids": tokens(7, generator)}


def images(generator: torch.Generator) -> Batch:
    return {"pixel_values": pixels(generator)}


def images_and_text(generator: torch.Generator) -> Batch:
    """Pairs of both, as many of one as of the other."""
    return {**text(generator), "pixel_values": pixels(generator)}


def image_prompt(generator: torch.Generator) -> Batch:
    """A prompt that holds 16 places for an image (id 511), and the images."""
    batch = images_and_text(generator)
    ids = torch.cat([torch.full((4, 16), VOCABULARY - 1), batch["input_ids"]], dim=1)
    return {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def wave(generator: torch.Generator) -> Batch:
    """Sound as samples, a tenth of a second and more."""
    return {"input_values": torch.randn(4, 2000, generator=generator)}


def spectrogram(generator: torch.Generator) -> Batch:
    """Sound as 16 mel bands, 64 frames, and the text written so far."""
    return {
        "input_features": torch.randn(4, 16, 64, generator=generator),
        "decoder_input_ids": tokens(7, generator),
    }


def bands(generator: torch.Generator) -> Batch:
    """A spectrogram alone: 64 frames of 16 mel bands."""
    return {"input_values": torch.randn(4, 64, 16, generator=generator)}


def frames(generator: torch.Generator) -> Batch:
    """Four frames of video."""
    return {"pixel_values": torch.randn(2, 4, 3, 32, 32, generator=generator)}


def tokens(length: int, generator: torch.Generator) -> Tensor:
    """Four rows of ids; none of the first ten, which configs use for padding and ends, nor the last, an image's."""
    return torch.randint(10, VOCABULARY - 1, (4, length), generator=generator)


def pixels(generator: torch.Generator) -> Tensor:
    return torch.randn(4, 3, PIXELS, PIXELS, generator=generator)


WIDE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
BODY = {**WIDE, "vocab_size": VOCABULARY}
GROUPED = {**BODY, "num_key_value_heads": 2}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADED = {**GROUPED, "head_dim": 32}
PAIR = {
    "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "vocab_size": VOCABULARY,
}  # fmt: skip
SIGHT = {**WIDE, "image_size": PIXELS, "patch_size": 16}
SOUND = {
    **WIDE, "conv_dim": [64, 64, 64], "conv_stride": [5, 4, 4], "conv_kernel": [10, 8, 4], "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 32,
}  # fmt: skip
STAGES = {"hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 1, 1]}
TWO = {"text_config": BODY, "vision_config": SIGHT}


ZOO = (
    # encoders of text
    Entry("BERT", "text encoder", "BertModel", "BertConfig", BODY, text),
    Entry("RoBERTa", "text encoder", "RobertaModel", "RobertaConfig", BODY, text),
    Entry("DistilBERT", "text encoder", "DistilBertModel", "DistilBertConfig",
          {"dim": 128, "n_layers": 2, "n_heads": 4, "hidden_dim": 256, "vocab_size": VOCABULARY}, text),
    Entry("ELECTRA", "text encoder", "ElectraModel", "ElectraConfig", {**BODY, "embedding_size": 64}, text),
    Entry("ALBERT", "text encoder", "AlbertModel", "AlbertConfig", {**BODY, "embedding_size": 64}, text),
    Entry("DeBERTa-v2", "text encoder", "DebertaV2Model", "DebertaV2Config",
          {**BODY, "relative_attention": True, "position_buckets": 32, "pos_att_type": ["p2c", "c2p"]}, text),
    Entry("MPNet", "text encoder", "MPNetModel", "MPNetConfig", BODY, text),
    Entry("ModernBERT", "text encoder", "ModernBertModel", "ModernBertConfig", {**BODY, **ENDS}, text),
    Entry("XLM-R", "masked words", "XLMRobertaForMaskedLM", "XLMRobertaConfig", BODY, text),
    Entry("CamemBERT", "sentence classes", "CamembertForSequenceClassification", "CamembertConfig", BODY, text),
    Entry("XLNet", "text encoder", "XLNetModel", "XLNetConfig",
          {"d_model": 128, "n_layer": 2, "n_head": 4, "d_inner": 256, "vocab_size": VOCABULARY}, text),
    Entry("Funnel", "text encoder", "FunnelBaseModel", "FunnelConfig",
          {"d_model": 128, "n_head": 4, "d_head": 32, "d_inner": 256, "block_sizes": [1, 1], "vocab_size": VOCABULARY},
          text),
    # decoders of text
    Entry("GPT-2", "causal words", "GPT2LMHeadModel", "GPT2Config",
          {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": VOCABULARY}, text),
    Entry("GPT-NeoX", "causal words", "GPTNeoXForCausalLM", "GPTNeoXConfig", BODY, text),
    Entry("GPT-J", "causal words", "GPTJForCausalLM", "GPTJConfig",
          {"n_embd": 128, "n_layer": 2, "n_head": 4, "rotary_dim": 16, "vocab_size": VOCABULARY}, text),
    Entry("OPT", "causal words", "OPTForCausalLM", "OPTConfig",
          {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 256,
           "word_embed_proj_dim": 128, "max_position_embeddings": 128, "vocab_size": VOCABULARY}, text),
    Entry("Llama", "causal words", "LlamaForCausalLM", "LlamaConfig", GROUPED, text),
    Entry("Mistral", "causal words", "MistralForCausalLM", "MistralConfig", GROUPED, text),
    Entry("Qwen2", "causal words", "Qwen2ForCausalLM", "Qwen2Config", GROUPED, text),
    Entry("Qwen3", "causal words", "Qwen3ForCausalLM", "Qwen3Config", HEADED, text),
    Entry("Gemma", "causal words", "GemmaForCausalLM", "GemmaConfig", HEADED, text),
    Entry("Gemma 2", "causal words", "Gemma2ForCausalLM", "Gemma2Config", HEADED, text),
    Entry("Gemma 3", "causal words", "Gemma3ForCausalLM", "Gemma3TextConfig", HEADED, text),
    Entry("Phi", "causal words", "PhiForCausalLM", "PhiConfig", BODY, text),
    Entry("Phi-3", "causal words", "Phi3ForCausalLM", "Phi3Config", {**BODY, **ENDS}, text),
    Entry("Falcon", "causal words", "FalconForCausalLM", "FalconConfig",
          {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}, text),
    Entry("BLOOM", "causal words", "BloomForCausalLM", "BloomConfig",
          {"hidden_size": 128, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}, text),
    Entry("MPT", "causal words", "MptForCausalLM", "MptConfig",
          {"d_model": 128, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "vocab_size": VOCABULARY}, text),
    Entry("StableLM", "causal words", "StableLmForCausalLM", "StableLmConfig", GROUPED, text),
    Entry("OLMo", "causal words", "OlmoForCausalLM", "OlmoConfig", {**BODY, **ENDS}, text),
    Entry("OLMo 2", "causal words", "Olmo2ForCausalLM", "Olmo2Config", {**BODY, **ENDS}, text),
    Entry("Granite", "causal words", "GraniteForCausalLM", "GraniteConfig", GROUPED, text),
    Entry("Cohere", "causal words", "CohereForCausalLM", "CohereConfig", {**GROUPED, **ENDS}, text),
    Entry("StarCoder2", "causal words", "Starcoder2ForCausalLM", "Starcoder2Config", GROUPED, text),
    Entry("SmolLM3", "causal words", "SmolLM3ForCausalLM", "SmolLM3Config", {**GROUPED, **ENDS}, text),
    Entry("GLM", "causal words", "GlmForCausalLM", "GlmConfig", {**HEADED, **ENDS}, text),
    Entry("Nemotron", "causal words", "NemotronForCausalLM", "NemotronConfig", GROUPED, text),
    # mixtures of experts
    Entry("Mixtral", "causal words, experts", "MixtralForCausalLM", "MixtralConfig",
          {**GROUPED, "num_local_experts": 4}, text),
    Entry("Qwen2-MoE", "causal words, experts", "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
          {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
           "shared_expert_intermediate_size": 256}, text),
    Entry("Qwen3-MoE", "causal words, experts", "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
          {**HEADED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}, text),
    Entry("OLMoE", "causal words, experts", "OlmoeForCausalLM", "OlmoeConfig",
          {**BODY, **ENDS, "num_experts": 4, "num_experts_per_tok": 2}, text),
    # state spaces
    Entry("Mamba", "causal words, state space", "MambaForCausalLM", "MambaConfig",
          {"hidden_size": 128, "num_hidden_layers": 2, "state_size": 8, "use_associative_scan": False,
           "vocab_size": VOCABULARY}, short_text),
    Entry("Mamba 2", "causal words, state space", "Mamba2ForCausalLM", "Mamba2Config",
          {"hidden_size": 128, "num_hidden_layers": 2, "state_size": 16, "num_heads": 8, "head_dim": 32, "n_groups": 1,
           "chunk_size": 8, "vocab_size": VOCABULARY}, short_text),
    Entry("RWKV", "causal words, state space", "RwkvForCausalLM", "RwkvConfig",
          {"hidden_size": 128, "num_hidden_layers": 2, "attention_hidden_size": 128, "intermediate_size": 256,
           "vocab_size": VOCABULARY}, short_text),
    # text to text
    Entry("T5", "text to text", "T5ForConditionalGeneration", "T5Config",
          {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY,
           "decoder_start_token_id": 0}, text_to_text),
    Entry("BART", "text to text", "BartForConditionalGeneration", "BartConfig", PAIR, text_to_text),
    Entry("mBART", "text to text", "MBartForConditionalGeneration", "MBartConfig", PAIR, text_to_text),
    Entry("Pegasus", "text to text", "PegasusForConditionalGeneration", "PegasusConfig", PAIR, text_to_text),
    Entry("Marian", "text to text", "MarianMTModel", "MarianConfig",
          {**PAIR, "pad_token_id": 0, "decoder_start_token_id": 0, "max_position_embeddings": 128}, text_to_text),
    Entry("Blenderbot", "text to text", "BlenderbotForConditionalGeneration", "BlenderbotConfig", PAIR, text_to_text),
    # images
    Entry("ViT", "image encoder", "ViTModel", "ViTConfig", SIGHT, images),
    Entry("DeiT", "image classes", "DeiTForImageClassification", "DeiTConfig", SIGHT, images),
    Entry("BEiT", "image encoder", "BeitModel", "BeitConfig", SIGHT, images),
    Entry("DINOv2", "image encoder", "Dinov2Model", "Dinov2Config", {**SIGHT, "mlp_ratio": 2}, images),
    Entry("Swin", "image encoder", "SwinModel", "SwinConfig",
          {"embed_dim": 64, "depths": [1, 1], "num_heads": [2, 4], "image_size": PIXELS, "window_size": 4}, images),
    Entry("ConvNeXT", "image encoder", "ConvNextModel", "ConvNextConfig",
          {**STAGES, "image_size": PIXELS, "layer_scale_init_value": 1.0}, images),
    Entry("ResNet", "image classes", "ResNetForImageClassification", "ResNetConfig",
          {**STAGES, "embedding_size": 32, "layer_type": "basic"}, images),
    Entry("MobileNetV2", "image classes", "MobileNetV2ForImageClassification", "MobileNetV2Config",
          {"image_size": PIXELS, "depth_multiplier": 0.35, "initializer_range": 0.2}, images),
    Entry("SegFormer", "segmentation", "SegformerForSemanticSegmentation", "SegformerConfig",
          {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4],
           "decoder_hidden_size": 128}, images),
    Entry("DETR", "detection", "DetrForObjectDetection", "DetrConfig",
          {"d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "num_queries": 20,
           "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
           "backbone_config": {"model_type": "resnet", **STAGES, "embedding_size": 32, "layer_type": "basic",
                               "out_features": ["stage4"]}}, images),
    Entry("YOLOS", "detection", "YolosForObjectDetection", "YolosConfig",
          {**SIGHT, "image_size": [PIXELS, PIXELS], "num_detection_tokens": 20}, images),
    Entry("DPT", "depth", "DPTForDepthEstimation", "DPTConfig",
          {**SIGHT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [32, 64, 64, 64],
           "fusion_hidden_size": 64, "is_hybrid": False, "readout_type": "project"}, images),
    Entry("VideoMAE", "video encoder", "VideoMAEModel", "VideoMAEConfig",
          {**WIDE, "image_size": 32, "patch_size": 8, "num_frames": 4}, frames),
    # images and text
    Entry("CLIP", "image and text", "CLIPModel", "CLIPConfig", {**TWO, "projection_dim": 64}, images_and_text),
    Entry("CLIP text", "text encoder", "CLIPTextModel", "CLIPTextConfig", BODY, text),
    Entry("CLIP vision", "image encoder", "CLIPVisionModel", "CLIPVisionConfig", SIGHT, images),
    Entry("SigLIP", "image and text", "SiglipModel", "SiglipConfig", TWO, images_and_text),
    Entry("BLIP", "image and text", "BlipForConditionalGeneration", "BlipConfig",
          {"text_config": {**BODY, "encoder_hidden_size": 128}, "vision_config": SIGHT}, images_and_text),
    Entry("ViLT", "image and text", "ViltModel", "ViltConfig", {**SIGHT, "vocab_size": VOCABULARY}, images_and_text),
    Entry("LLaVA", "image and text", "LlavaForConditionalGeneration", "LlavaConfig",
          {"text_config": {"model_type": "llama", **GROUPED},
           "vision_config": {"model_type": "clip_vision_model", **SIGHT}, "image_token_index": VOCABULARY - 1,
           "vision_feature_layer": -1}, image_prompt),
    # sound
    Entry("Whisper", "speech to text", "WhisperForConditionalGeneration", "WhisperConfig",
          {**PAIR, **ENDS, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 64,
           "decoder_start_token_id": 1}, spectrogram),
    Entry("wav2vec 2.0", "speech encoder", "Wav2Vec2Model", "Wav2Vec2Config", SOUND, wave),
    Entry("HuBERT", "speech encoder", "HubertModel", "HubertConfig", SOUND, wave),
    Entry("WavLM", "speech encoder", "WavLMModel", "WavLMConfig", SOUND, wave),
    Entry("AST", "sound classes", "ASTForAudioClassification", "ASTConfig",
          {**WIDE, "patch_size": 8, "max_length": 64, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
          bands),
)  # fmt: skip
