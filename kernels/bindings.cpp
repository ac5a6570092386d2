// torch's side of attention.h: checks that say what is wrong, memory for results, the device and its current stream.
//
// The operators' schemas, shapes and gradients are in engine/fused_attention.py. With EMULATED, as tests compile this file
// together with the emulator, nothing of CUDA is needed, and they are for CPUs or whatever DEVICE names.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "attention.h"

#ifdef EMULATED
#ifndef DEVICE
#define DEVICE CPU
#endif
static void *current_stream(const at::Tensor &) { return nullptr; }
#else
#define DEVICE CUDA
#include <c10/cuda/CUDAStream.h>
static void *current_stream(const at::Tensor &x) { return c10::cuda::getCurrentCUDAStream(x.device().index()).stream(); }
#endif

namespace {

using at::Tensor;
using attention::BLOCK;
using attention::Params;

void check(bool holds, const char *what, const Tensor &got, const char *expected) {
    TORCH_CHECK(holds, "engine::attention: ", what, " is ", got.scalar_type(), got.sizes(), " with strides ", got.strides(), " on ", got.device(),
                ", expected ", expected);
}

bool aligned(const Tensor &x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; }

// Heads end to end within a token, tokens a multiple of 16 bytes apart, on one device and of one type.
void check_rows(const Tensor &x, const char *name, const Tensor &q) {
    check(x.dim() == 3 && x.size(0) == q.size(0) && x.size(2) == q.size(2), name, x, "(tokens, heads, head_dim), with as many tokens and head_dim as q");
    check(x.scalar_type() == q.scalar_type() && x.device() == q.device(), name, x, "q's type and device");
    check(x.size(1) > 0 && x.stride(2) == 1 && (x.stride(1) == x.size(2) || x.size(1) == 1), name, x,
          "a token's heads end to end in memory; call contiguous()");
    check(x.stride(0) % 8 == 0 && aligned(x), name, x, "tokens that begin at multiples of 16 bytes; call contiguous()");
}

void check_whole(const Tensor &x, const char *name, c10::IntArrayRef sizes, c10::ScalarType type, const Tensor &q) {
    if (x.sizes() == sizes && x.scalar_type() == type && x.device() == q.device() && x.is_contiguous() && aligned(x)) return;
    check(false, name, x, c10::str(type, sizes, ", contiguous, on ", q.device(), ", from a multiple of 16 bytes on").c_str());
}

Params inputs(const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &tiles, double scale, const std::optional<Tensor> &cosine,
              const std::optional<Tensor> &sine) {
    check(q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf, "q", q, "bfloat16 or float16");
    check(q.dim() == 3 && (q.size(2) == 64 || q.size(2) == 128), "q", q, "(tokens, heads, head_dim) with a head_dim of 64 or 128");
    check_rows(q, "q", q);
    check_rows(k, "k", q);
    check_rows(v, "v", q);
    check(q.size(1) % k.size(1) == 0 && v.size(1) == k.size(1), "k", k, "as many heads as v, and a divisor of q's");
    check_whole(tiles, "tiles", {tiles.size(0), 4}, at::kInt, q);
    TORCH_CHECK(tiles.size(0) <= 65535, "engine::attention: ", tiles.size(0), " tiles, expected at most 65535; split the batch");
    TORCH_CHECK(scale > 0, "engine::attention: scale is ", scale, ", expected more than 0");
    TORCH_CHECK(cosine.has_value() == sine.has_value(), "engine::attention: expected cosine and sine or neither");
    Params params{};
    if (cosine) {
        check_whole(*cosine, "cosine", {q.size(0), q.size(2) / 2}, q.scalar_type(), q);
        check_whole(*sine, "sine", {q.size(0), q.size(2) / 2}, q.scalar_type(), q);
        params.cosine = cosine->const_data_ptr();
        params.sine = sine->const_data_ptr();
    }
    params.q = q.const_data_ptr(), params.k = k.const_data_ptr(), params.v = v.const_data_ptr();
    params.q_stride = q.stride(0), params.k_stride = k.stride(0), params.v_stride = v.stride(0);
    params.tiles = static_cast<const attention::Tile *>(tiles.const_data_ptr());
    params.tile_count = tiles.size(0), params.heads = q.size(1), params.kv_heads = k.size(1), params.head_dim = q.size(2);
    params.scale = scale;
    params.type = q.scalar_type() == at::kHalf ? attention::FP16 : attention::BF16;
    return params;
}

void run(int (*launch)(const Params &, void *), const Params &params, const Tensor &q) {
    if (params.tile_count == 0) return;
    const c10::DeviceGuard guard(q.device());
    const int error = launch(params, current_stream(q));
    TORCH_CHECK(error == 0, "engine::attention: launch failed with CUDA error ", error, "; is the extension compiled for this GPU? See TORCH_CUDA_ARCH_LIST");
}

std::tuple<Tensor, Tensor> forward(const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &tiles, double scale, const std::optional<Tensor> &cosine,
                                   const std::optional<Tensor> &sine) {
    Params params = inputs(q, k, v, tiles, scale, cosine, sine);
    const Tensor out = at::empty(q.sizes(), q.options()), lse = at::empty({q.size(1), tiles.size(0), BLOCK}, q.options().dtype(at::kFloat));
    params.out = out.mutable_data_ptr();
    params.lse = lse.mutable_data_ptr<float>();
    run(attention::forward, params, q);
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor &grad_out, const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &out, const Tensor &lse,
                                            const Tensor &tiles, double scale, const std::optional<Tensor> &cosine, const std::optional<Tensor> &sine) {
    Params params = inputs(q, k, v, tiles, scale, cosine, sine);
    const Tensor grad = aligned(grad_out) ? grad_out : grad_out.clone();  // as a part of a larger one it may begin anywhere
    check_whole(grad, "grad_out", q.sizes(), q.scalar_type(), q);
    check_whole(out, "out", q.sizes(), q.scalar_type(), q);
    check_whole(lse, "lse", {q.size(1), tiles.size(0), BLOCK}, at::kFloat, q);
    const Tensor grad_q = at::empty(q.sizes(), q.options()), grad_k = at::empty(k.sizes(), k.options()), grad_v = at::empty(v.sizes(), v.options());
    const Tensor delta = at::empty_like(lse);
    params.out = out.data_ptr();  // read alone
    params.lse = lse.data_ptr<float>();
    params.grad_out = grad.const_data_ptr();
    params.grad_q = grad_q.mutable_data_ptr(), params.grad_k = grad_k.mutable_data_ptr(), params.grad_v = grad_v.mutable_data_ptr();
    params.delta = delta.mutable_data_ptr<float>();
    run(attention::backward, params, q);
    return {grad_q, grad_k, grad_v};
}

}  // namespace

TORCH_LIBRARY_IMPL(engine, DEVICE, operators) {
    operators.impl("attention", &forward);
    operators.impl("attention_backward", &backward);
}

#ifdef TORCH_EXTENSION_NAME  // as a module for Python, whose import is all it is for

#include <Python.h>

#define JOINED(a, b) a##b
#define INIT(name) JOINED(PyInit_, name)

PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)() {
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, "engine._C", "CUDA kernels; see kernels/README.md", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}

#endif
