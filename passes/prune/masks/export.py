"""Masks and masked weights in other forms: files of masks, `torch.sparse` tensors."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS

from graphopt import files
from graphopt.errors import UnsupportedError
from graphopt.ir.masks import Mask
from graphopt.ir.module import OptimizedModule

_COMPRESSED = (torch.float16, torch.bfloat16, torch.int8)


def save_masks(module: OptimizedModule, path: str | os.PathLike[str]) -> None:
    """Write a module's masks to a safetensors file: parameter name -> bool, True where kept.

    Raises:
        UnsupportedError: Nothing is masked.
        OutputError: The file can't be written.
    """
    from safetensors.torch import save_file

    kept = {name: mask.kept for name, mask in _masks(module).items()}
    with files.replacing(path) as temporary:
        save_file(kept, temporary)


def as_matrix(weight: Tensor, axis: int) -> Tensor:
    """A weight as [outputs, inputs], the axis that is summed over last and without gaps.

    A convolution's rows hold its window's positions one after the other, as implicit matrix
    products with channels last read them.
    """
    return weight.movedim(axis, -1).flatten(1).contiguous()


def semi_structured(module: OptimizedModule) -> dict[str, SparseSemiStructuredTensor]:
    """The weights with at most two of every four along their inputs, compressed to half the size.

    Each stands for `as_matrix` of the weight; ``to_dense()`` gives that back.  On CUDA
    `torch.nn.functional.linear` multiplies by it on sparse tensor cores; on the CPU the values and
    the metadata are made, and products are not implemented in torch.

    Returns:
        Parameter name -> tensor; weights whose sizes the kernels don't take are left out.

    Raises:
        UnsupportedError: No weight is of the pattern and of float16, bfloat16 or int8.
    """
    found, reasons = {}, []
    for name, mask in _masks(module).items():
        weight = module.get_parameter(name).detach()
        reason = _unfit(weight, mask)
        if reason is None:
            assert mask.axis is not None
            try:
                found[name] = _compressed(as_matrix(weight, mask.axis))
                continue
            except RuntimeError as error:  # sizes that the kernels don't take
                reason = str(error).splitlines()[0]
        reasons.append(f"{name}: {reason}")
    if not found:
        raise UnsupportedError(
            f"no weight can be semi-structured ({'; '.join(reasons[:3])})",
            hint="sparsify{pattern=2:4} in half precision: module.half() first",
        )
    return found


def sparse_csr(module: OptimizedModule) -> dict[str, Tensor]:
    """The masked weights as compressed sparse rows, of [outputs, all else].

    Returns:
        Parameter name -> CSR tensor of the parameter's type and device.

    Raises:
        UnsupportedError: Nothing is masked.
    """
    weights = {name: module.get_parameter(name).detach() for name in _masks(module)}
    return {name: weight.flatten(1).to_sparse_csr() for name, weight in weights.items()}


def _masks(module: OptimizedModule) -> dict[str, Mask]:
    masks = module.program.masks
    if not masks:
        raise UnsupportedError("nothing of this module is masked", hint="see the pass sparsify")
    return {name: masks[name] for name, _ in module.named_parameters() if name in masks}


def _unfit(weight: Tensor, mask: Mask) -> str | None:
    """Why a weight is not 2:4, or None."""
    if weight.dtype not in _COMPRESSED:
        return f"it is {str(weight.dtype).removeprefix('torch.')}"
    if mask.axis is None or weight.shape[mask.axis] % 4:
        return "its inputs are no multiple of 4"
    grouped = as_matrix(weight, mask.axis).reshape(-1, 4)
    if bool((grouped != 0).sum(1).gt(2).any()):
        return "more than two of four weights are not zero"
    return None


def _compressed(matrix: Tensor) -> SparseSemiStructuredTensor:
    if matrix.is_cuda:
        return torch.sparse.to_sparse_semi_structured(matrix)
    # The public door refuses other devices; this is what it does on CUDA.
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    packed, meta = sparse_semi_structured_from_dense_cutlass(matrix)
    return SparseSemiStructuredTensorCUTLASS(  # type: ignore[call-overload]
        matrix.shape, packed=packed, meta=meta, packed_t=None, meta_t=None,
        compressed_swizzled_bitmask=None,
    )  # fmt: skip
