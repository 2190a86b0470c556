"""Transformer Engine's modules on a CPU: the CUDA kernels that they call, stood in by plain torch.

Everything above the extension `transformer_engine_torch` is the real thing: modules, autograd,
communication, FusedAdam. `make te-cpu` makes the environment. Its permutation kernels are Triton's,
which Triton's own interpreter runs. What a kernel would refuse (dtypes, shapes, memory layouts),
its stand-in refuses.

Written for Transformer Engine 2.20. Legend: m rows, n columns, k what is summed over, h hidden.
"""

import re
import sys
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

type Tensors = Sequence[Tensor]


def _product(a: Tensor, trans_a: bool, b: Tensor, trans_b: bool) -> Tensor:
    """cuBLAS counts columns first: what it calls A B is b' a' here, fp32."""
    assert a.dtype == b.dtype, f"a matmul of {a.dtype} and {b.dtype} does not exist"
    assert a.is_contiguous() and b.is_contiguous()
    a, rows = a.reshape(-1, a.size(-1)).float(), b.reshape(-1, b.size(-1)).float()
    product = (rows.t() if trans_b else rows) @ (a.t() if trans_a else a)
    return product if trans_b else product.view(*b.shape[:-1], product.size(-1))


def _put(out: Tensor, product: Tensor, accumulate: bool) -> None:
    assert out.is_contiguous() and out.shape == product.shape, (out.shape, product.shape)
    if accumulate:
        product = product + out.float()
    out.copy_(product)


def generic_gemm(
    a: Tensor,
    trans_a: bool,
    b: Tensor,
    trans_b: bool,
    out: Tensor | None,
    quantizer: None,
    output_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: None = None,
    comm_type: None = None,
    extra_output: None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Any]:
    """[out, gradient of the bias, None, None]."""
    assert quantizer is None and comm_overlap is None and not gelu and alpha == 1.0
    product = _product(a, trans_a, b, trans_b)
    dtype = a.dtype if output_dtype is None else _torch_dtype(output_dtype)
    bias_grad = None
    if bias is not None and grad:
        bias_grad = b.reshape(-1, b.size(-1)).float().sum(0).to(dtype)
    elif bias is not None:
        product = product + bias.float()
    if out is None:
        out = torch.empty(product.shape, dtype=dtype, device=product.device)
    else:
        assert output_dtype is None or out.dtype == dtype, (out.dtype, dtype)
    _put(out, product, accumulate)
    return [out, bias_grad, None, None]


def te_general_grouped_gemm(
    a: Tensors,
    trans_a: bool,
    b: Tensors,
    trans_b: bool,
    out: list[Tensor],
    out_dtype: Any,
    m_splits: Sequence[int],
    bias: Tensors,
    bias_type: Any,
    single_output: bool,
    pre_gelu_out: Tensors,
    grad: bool,
    workspace: Tensors,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> Tensors:
    """One product a group into `out`; with `single_output` their rows follow each other there."""
    outs = out[0].split([len(each) for each in b]) if single_output else out
    for one_a, one_b, one_out, one_bias in zip(a, b, outs, bias, strict=True):
        assert one_out.dtype == _torch_dtype(out_dtype) and not one_bias.numel()
        total = one_out.new_zeros(one_out.shape)
        if one_a.numel() and one_b.numel():
            total = _product(one_a, trans_a, one_b, trans_b)
        _put(one_out, total, accumulate)
    return bias


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Tensor | None,
    quantizer: None,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:
    """x [m, h] -> [the norm of it, None, 1 / root mean square [m] fp32]."""
    assert x.dim() == 2 and x.is_contiguous() and quantizer is None
    scale = torch.rsqrt(x.float().square().mean(-1) + eps)
    normed = x.float() * scale[:, None] * (weight.float() + zero_centered_gamma)
    if ln_out is None:
        ln_out = torch.empty(x.shape, dtype=_torch_dtype(otype), device=x.device)
    return [ln_out.copy_(normed), None, scale]


def rmsnorm_bwd(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    weight: Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Tensor]:
    """[gradient of x [m, h], of the weight [h]]."""
    assert grad.dtype == x.dtype and grad.shape == x.shape
    normed = x.float() * scale[:, None]
    scaled = grad.float() * (weight.float() + zero_centered_gamma)
    of_x = scale[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return [of_x.to(x.dtype), (grad.float() * normed).sum(0).to(weight.dtype)]


def _turned(x: Tensor, freqs: Tensor, by: int) -> Tensor:
    """x [s, b, heads, d] turned by angles [s or more, 1, 1, d' <= d] fp32, or back by -1."""
    size = freqs.size(-1)
    assert freqs.shape[1:3] == (1, 1) and freqs.dtype == torch.float32
    assert x.dim() == 4 and len(x) <= len(freqs) and size <= x.size(-1)
    turned, rest = x[..., :size].float(), x[..., size:]
    angles = freqs[: len(x)]
    sine = angles.sin()
    first, second = turned.chunk(2, -1)
    if by > 0:
        other = torch.cat([-second, first], -1) * sine
    else:
        first, second = (turned * sine).chunk(2, -1)
        other = torch.cat([second, -first], -1)
    return torch.cat([(turned * angles.cos() + other).to(x.dtype), rest], -1)


def fused_rope_forward(
    x: Tensor,
    freqs: Tensor,
    start_positions: None,
    layout: Any,
    interleaved: bool,
    cu_seqlens: None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """Of "sbhd", without interleaving."""
    assert start_positions is None and cu_seqlens is None and not interleaved and cp_size == 1
    assert layout.name == "NVTE_SBHD"
    return _turned(x, freqs, 1)


def fused_rope_backward(
    grad: Tensor,
    freqs: Tensor,
    start_positions: None,
    layout: Any,
    interleaved: bool,
    cu_seqlens: None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """Its gradient."""
    return _turned(grad, freqs, -1)


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Sequence[Tensors],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """AdamW of lists of gradients, parameters, both moments, and main weights where there are
    some: these learn then, and the parameters are their copies.
    """
    assert mode == 1, "decoupled weight decay"
    corrections = [1 - beta**step if bias_correction else 1.0 for beta in (beta1, beta2)]
    for grad, param, mean, square, *main in zip(*tensor_lists, strict=True):
        g, weight = grad.float(), (main[0] if main else param).float()
        new_mean = beta1 * mean.float() + (1 - beta1) * g
        new_square = beta2 * square.float() + (1 - beta2) * g.square()
        scale = (new_square / corrections[1]).sqrt() + epsilon
        weight = weight - lr * (new_mean / corrections[0] / scale + weight_decay * weight)
        for held, new in ((mean, new_mean), (square, new_square), (param, weight)):
            held.copy_(new)
        if main:
            main[0].copy_(weight)


def multi_tensor_adam_param_remainder(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Sequence[Tensors],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """The same where a main weight is the parameter, in bf16, and the lower half of its bits, in
    int16, by whose sign the parameter was rounded up.
    """
    settings = (lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay)
    for grad, param, mean, square, rest in zip(*tensor_lists, strict=True):
        upper, lower = param.view(torch.int16).int(), rest.int()
        main = (((upper - (lower < 0).int()) << 16) | (lower & 0xFFFF)).view(torch.float32)
        lists = [[each] for each in (grad, main, mean, square)]
        multi_tensor_adam(chunk_size, noop_flag, lists, *settings)
        bits = main.view(torch.int32)
        rest.copy_((bits & 0xFFFF).to(torch.int16))
        param.view(torch.int16).copy_((bits >> 16) + (rest < 0).int())


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Tensors], per_tensor: bool | None
) -> tuple[Tensor, Tensor]:
    """(the norm of all [1], the norm of each)."""
    norms = torch.stack([each.float().norm() for each in tensor_lists[0]])
    return norms.norm()[None], norms if per_tensor else norms[:0]


# name -> stand-in
KERNELS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        generic_gemm,
        te_general_grouped_gemm,
        rmsnorm_fwd,
        rmsnorm_bwd,
        fused_rope_forward,
        fused_rope_backward,
        multi_tensor_adam,
        multi_tensor_adam_param_remainder,
        multi_tensor_l2norm,
    )
}
called: set[str] = set()  # of KERNELS, in this process


def _torch_dtype(te_dtype: Any) -> torch.dtype:
    names = {"kFloat32": torch.float32, "kBFloat16": torch.bfloat16, "kFloat16": torch.float16}
    return names[te_dtype.name]


def _check_signature(real: Any, ours: Callable[..., Any]) -> None:
    """The extension says what it takes in its first line: as many arguments, with the same ones
    that may be left out.
    """
    code: Any = ours.__code__
    line = real.__doc__.splitlines()[0].split(" -> ")[0]
    asked = re.findall(r"(?:\(|, )(\w+): ([^=]*?(?: = [^,)]*)?)(?=, \w+: |\)$)", line)
    assert len(asked) == code.co_argcount, line
    optional = sum(" = " in kind for _, kind in asked)
    assert optional == len(ours.__defaults__ or ()), line


def _counted(name: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        called.add(name)
        return KERNELS[name](*args, **kwargs)

    return kernel


def install(*, on_cpu: bool = True) -> None:
    """Import Transformer Engine and put KERNELS in the place of its own. TRITON_INTERPRET=1 has to
    be set before. `on_cpu`: there is no GPU, and tensors are on the CPU for all that.
    """
    import transformer_engine.pytorch  # noqa: F401

    extension: Any = sys.modules["transformer_engine_torch"]
    instead = {getattr(extension, name): name for name in KERNELS}
    for real, name in instead.items():
        _check_signature(real, KERNELS[name])
    for module in list(sys.modules.values()):
        if module.__name__.startswith(("transformer_engine", "megatron")):
            for key, value in list(vars(module).items()):  # several import them by name
                if isinstance(value, BuiltinFunctionType) and value in instead:
                    setattr(module, key, _counted(instead[value]))
    _interpret_triton()
    if on_cpu:
        _say_that_there_is_cuda()


def _interpret_triton() -> None:
    """The interpreter runs any configuration of a kernel; the fastest is found on a GPU alone."""
    from triton.runtime.autotuner import Autotuner

    tuner: Any = Autotuner
    tuner._bench = lambda self, *args, config, **meta: [0.0]


def _say_that_there_is_cuda() -> None:
    """To Transformer Engine alone, which asks before it calls a kernel."""
    cuda: Any = torch.cuda
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)

    def asks(depth: int = 2) -> bool:
        return sys._getframe(depth).f_globals["__name__"].startswith("transformer_engine")

    cuda.is_available = asks
    cuda.get_device_properties = lambda *device: properties
    cuda.get_device_capability = lambda *device: (9, 0)
    cuda.is_current_stream_capturing = lambda: False
    tensor: Any = Tensor
    tensor.is_cuda = property(lambda self: asks())
