"""Do the attention kernels agree on the device, in scores and gradients of the loss, whoever may attend to whom?"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from CoDALanguageModel import CoDALanguageModel, UserError
from CoDALanguageModel.attention_coda import block_causal, block_numbers, places
from CoDALanguageModel.conversion import cast_weights
from CoDALanguageModel.diffusion import IGNORE_INDEX
from CoDALanguageModel.noise import Blocks, CleanRows, draw_rows, noise_blocks

from .section import Section, Skipped

PRECISIONS = ("bf16 autocast", "bf16", "fp32")
"""Training's, decoding's, and the one in which kernels can be told apart from errors."""

BLOCK = 32


def kernels(section: Section) -> None:
    """Errors of each kernel against `eager` in float32, as ||x - reference|| / ||reference||."""
    section.measure_rates()
    rows, length = (2, 64) if section.is_tiny else (2, 512)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096, "mask_token_id": 4095}
    shape |= {"pad_token_id": 4094, "bos_token_id": 4093, "eos_token_id": 4093, "num_token_ids": 4093}
    model = section.model(torch.float32, **shape).train()
    inputs = {name: moved(batch, section.device) for name, batch in batches(model, rows, length).items()}
    references: dict[tuple[str, bool], Any] = {}
    # Every rule, type and pass of flex attention is a graph of one function: past torch's limit of 8 it would be run
    # without being compiled, and that would be compared.
    with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
        compare(section, model, inputs, references)


def compare(
    section: Section,
    model: CoDALanguageModel,
    inputs: dict[str, dict[str, Any]],
    references: dict[tuple[str, bool], Any],
) -> None:
    """Each kernel, precision and rule."""
    # What compiles comes last: there is always time for the others.
    for kernel in ("eager", "sdpa", "flash_attention_2", "flex_attention"):
        for precision in section.some(PRECISIONS):
            for visible in section.some(list(inputs)):
                batch = inputs[visible]
                with section.measurement(kernel=kernel, precision=precision, visible=visible) as facts:
                    if kernel == "flash_attention_2" and not is_flash_attn_2_available():
                        raise Skipped("the package flash-attn is not installed")
                    if kernel == "flash_attention_2" and precision == "fp32":
                        raise Skipped("half precision only")
                    if kernel == "flex_attention" and not section.on_gpu:
                        raise Skipped("it has no backward pass on a CPU")
                    section.require(12 if kernel == "flex_attention" else 2)
                    rounded = precision == "bf16"
                    key = visible, rounded
                    if key not in references:
                        references[key] = scores_and_gradients(reference_of(model, rounded), batch, "eager", False)
                    ours = copy.deepcopy(model)
                    if rounded:
                        cast_weights(ours, torch.bfloat16)
                        ours.to(section.device)
                    try:
                        found = scores_and_gradients(ours, batch, kernel, precision == "bf16 autocast")
                    except UserError as error:  # a kernel that says that it cannot evaluate the rule
                        raise Skipped(str(error)) from error
                    for name, x, reference in zip(found._fields, found, references[key], strict=True):
                        facts[f"{name}_error"] = float((x - reference).norm() / reference.norm())


class Found(tuple):
    """Scores of real positions, the loss, and its gradient by all weights; float32 vectors."""

    _fields = ("logits", "loss", "gradient")


def batches(model: CoDALanguageModel, rows: int, length: int) -> dict[str, dict[str, Any]]:
    """Arguments of the model's forward pass, by who may attend to whom."""
    config, rng = model.config, torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.num_token_ids, (rows, length), generator=rng)
    masked = torch.rand(rows, length, generator=rng) < 0.5
    place = torch.arange(length)
    segments = (1 + place // (length // 4)).expand(rows, -1).clone()
    segments[:, -length // 8 :] = 0
    padding = torch.stack([place >= length // 4, place < length - length // 3]).long()[:rows]
    plain = {"input_ids": ids.masked_fill(masked, config.mask_token_id)}
    plain["labels"] = ids.masked_fill(~masked, IGNORE_INDEX)
    rule = block_causal(segments, block_numbers(places(segments), BLOCK), torch.ones_like(masked))
    drawn = draw_rows(0, range(rows), [length] * rows, length)
    tokens = {"mask_token_id": config.mask_token_id, "pad_token_id": config.pad_token_id}
    doubled = noise_blocks(CleanRows(ids, segments), torch.full((rows,), 0.5), drawn, Blocks(BLOCK), **tokens)
    return {
        "packed": {**plain, "segment_ids": segments},
        "block-causal": {**plain, "visibility": rule},
        "noisy and clean": {
            "input_ids": doubled.input_ids,
            "position_ids": doubled.position_ids,
            "visibility": doubled.visibility,
            "labels": doubled.labels,
            "loss_weights": doubled.weights / ids.numel(),
            "doubled": True,
        },
        "full": plain,
        "padded": {**plain, "attention_mask": padding},
    }


def moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The same on the device."""

    def move(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(device)
        return type(x)(*(move(y) for y in x)) if isinstance(x, tuple) else x

    return {name: move(x) for name, x in batch.items()}


def reference_of(model: CoDALanguageModel, rounded: bool) -> CoDALanguageModel:
    """The model in float32, its weights rounded to bfloat16 where those compared with it are."""
    reference = copy.deepcopy(model)
    if rounded:
        with torch.no_grad():
            for weight in reference.parameters():
                weight.copy_(weight.bfloat16())
    return reference


def scores_and_gradients(model: CoDALanguageModel, batch: dict[str, Any], kernel: str, autocast: bool) -> Found:
    """Run forward and backward pass."""
    model.set_attn_implementation(kernel)
    device = batch["input_ids"].device
    without_loss = {name: x for name, x in batch.items() if name not in ("labels", "loss_weights")}
    segments = batch.get("segment_ids", batch.get("attention_mask"))
    if "visibility" in batch:
        segments = batch["visibility"].segment
    real = torch.ones_like(batch["input_ids"]) if segments is None else segments
    # A context for each: weights that autocast has cast without a gradient are kept to its end.
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        logits = model(**without_loss).logits[real != 0]
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        loss = model(**batch).loss
    loss.backward()
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
    return Found((logits.float().flatten(), loss.detach().float(), gradient.float()))
