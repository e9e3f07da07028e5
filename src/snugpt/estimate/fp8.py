"""Linear maps in FP8: the twin of `model/fp8.py`, and where they can't be had.

Nothing that is kept for backward gets smaller: x stays in the compute dtype, which the operation
before it keeps in any case where it is a norm without weights, attention or squared ReLU. Copies in
FP8 take the place of the weights' casts, half their size, and those of inputs and gradients are
added while a product is taken.
"""

from __future__ import annotations

from snugpt.estimate.operations import FP32, Buffer, Net, Operation, Weight
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape

FIRST_FP8 = (8, 9)  # CUDA capability of Ada Lovelace
FP8_BYTES = 1
MULTIPLE = 16  # of every side of a product (torch/_meta_registrations.py, `_check_scaled_mm_sizes`)
# Kernels started for a linear map, forward and backward, beyond those of a plain one: scales are 5
# each, and their inverses, casts and products one each; counted in `model/fp8.py`.
MORE_KERNELS_PER_MATRIX = 23


def why_not_fp8(shape: ModelShape, recipe: TrainingRecipe, runtime: Runtime) -> str | None:
    """Return why a recipe can't multiply in FP8 on a device, or None."""
    if runtime.device != "cuda":
        return "there are no FP8 products without CUDA"
    if runtime.capability is None or runtime.capability < FIRST_FP8:
        return "the card has no FP8, CUDA capability 8.9 and up have"
    if recipe.compile == "on":
        return "a compiled layer was not derived with it"
    if recipe.compute_dtype == "fp16":
        return "its scales go beyond what fp16 holds"
    sides = {
        "seq_len": recipe.seq_len, "width": shape.model_dim, "mlp": shape.mlp_dim,
        "kv_heads x head size": shape.kv_dim,
    }  # fmt: skip
    for name, side in sides.items():
        if side % MULTIPLE:
            return f"the sides of its products are multiples of {MULTIPLE}, and {name} is {side}"
    return None


def more_kernels_per_layer(shape: ModelShape) -> int:
    """Kernels that a layer starts beyond those of its plain linear maps, forward and backward."""
    return MORE_KERNELS_PER_MATRIX * (7 if shape.style == "llama" else 6)


def linear(net: Net, x: Buffer, weight: Weight, name: str, text: str) -> Operation:
    """`fp8.Fp8Linear`: keeps x and two scales; casts to FP8 for each product."""
    out = net.per_token(name, weight.rows, text)
    scale_x, scale_weight, scale_grad = (_number(net) for _ in range(3))
    grad_x, grad_weight = net.gradient_of(x), net.weight_gradient(weight)
    I, O = (("inputs", weight.columns), ("outputs", weight.rows))  # noqa: E741
    low_x, low_weight = _low(net, *I), _low_weight(net, weight)
    turned_grad, turned_x = _low(net, *O), _low(net, *I)
    low_grad, turned_weight = _low(net, *O), _low_weight(net, weight)
    return Operation(
        name="linear",
        reads=(x,),
        result=out,
        forward=(
            scale_x, scale_weight,
            low_x, *_scaled(net, I[1]),
            low_weight, *_scaled_weight(net, weight),
            *_product(net, out, _wide(net, *I), _wide_weight(net, weight), net.width_bytes),
            low_x, low_weight,
        ),
        keeps=(x, scale_x, scale_weight),
        backward=(
            scale_grad,
            turned_grad, *_scaled(net, O[1]),
            turned_x, *_scaled(net, I[1]),
            *_product(net, grad_weight, _wide(net, *O), _wide(net, *I), net.weight_bytes),
            turned_grad, turned_x,
            low_grad, *_scaled(net, O[1]),
            turned_weight, *_scaled_weight(net, weight),
            *_product(net, grad_x, _wide(net, *O), _wide_weight(net, weight), net.width_bytes),
            scale_grad, low_grad, turned_weight,
        ),
        gradients=((x, grad_x),),
        weight_gradients=((weight, grad_weight),),
        gives_views=True,
    )  # fmt: skip


def _number(net: Net) -> Buffer:
    return net.fixed("FP8 scales", "activations", FP32, "4")


def _low(net: Net, text: str, channels: int) -> Buffer:
    return net.per_token("FP8 copies", channels, text, element_bytes=FP8_BYTES)


def _low_weight(net: Net, weight: Weight) -> Buffer:
    return net.fixed("FP8 copies", "activations", weight.elements * FP8_BYTES, "O·I·1")


def _wide(net: Net, text: str, channels: int) -> Buffer:
    return net.per_token("FP8 as fp32", channels, text, element_bytes=FP32)


def _wide_weight(net: Net, weight: Weight) -> Buffer:
    return net.fixed("FP8 as fp32", "activations", weight.elements * FP32, "O·I·4")


def _scaled(net: Net, channels: int) -> tuple[Buffer, ...]:
    """Outside CUDA: what is scaled and not yet cast, made and gone."""
    scaled = net.per_token("FP8 scaling", channels, "channels")
    return () if net.cuda else (scaled, scaled)


def _scaled_weight(net: Net, weight: Weight) -> tuple[Buffer, ...]:
    size = net.weight_bytes
    scaled = net.fixed("FP8 scaling", "activations", weight.elements * size, f"O·I·{size}")
    return () if net.cuda else (scaled, scaled)


def _product(
    net: Net, result: Buffer, a: Buffer, b: Buffer, element_bytes: int
) -> tuple[Buffer, ...]:
    """`fp8.product`: outside CUDA both sides in fp32, and the result before it is cast."""
    back_a, back_b = _number(net), _number(net)
    if net.cuda:
        return (back_a, back_b, result, back_a, back_b)
    if element_bytes == FP32:
        return (back_a, back_b, a, b, result, a, b, back_a, back_b)
    times = FP32 // element_bytes
    exact = Buffer(
        "FP8 as fp32", "activations", result.fixed_bytes * times, result.sequence_bytes * times,
        result.formula,
    )  # fmt: skip
    return (back_a, back_b, a, b, exact, a, b, result, back_a, back_b, exact)
