// The machine as kernels see it: all that is not plain arithmetic is a member of `Simt`, of which each lane has one.
//
// nvcc gets the instructions themselves, another compiler gets emulator.h, where lanes are fibers on the CPU and every
// rule below is checked. So the same kernel source is compiled for the device and run in tests without one.
//
//   ldmatrix, ldmatrix_trans   four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8
//   mma                        c (16x8, fp32) += a (16x16) b (16x8)
//   copy_async, commit, wait   16 bytes from global to shared memory, zeros if not `valid`; there once `wait<n>` has left
//                              at most n of the lane's commits open, and for other lanes after a barrier on top of that
//   warp                       thread / 32, in a way that tells the compiler that all lanes of a warp have the same
//   barrier                    of all lanes of the block
//   xor_lane                   the value of the lane whose number differs by `mask`
//   load_shared, store_shared  4, 8 or 16 bytes; load, store: 16 bytes of global memory
//
// Members that work on shared memory, and mma, xor_lane and warp, are called by all lanes of a warp together.
//
// Where a fragment's elements are, by lane = 4 * g + t (PTX ISA, "Matrix fragments for mma.m16n8k16"):
//   a[0] (g, 2t) (g, 2t+1)   a[1] (g+8, ...)   a[2] (g, 2t+8) (g, 2t+9)   a[3] (g+8, ...)
//   b[0] (2t, g) (2t+1, g)   b[1] (2t+8, g) (2t+9, g)
//   c[0] (g, 2t)   c[1] (g, 2t+1)   c[2] (g+8, 2t)   c[3] (g+8, 2t+1)
#pragma once

#include <cmath>
#include <cstdint>

struct bf16;  // names of the two types of elements; a register holds two of them, the first in its low half
struct fp16;

struct alignas(16) Words {
    uint32_t word[4];
};

#ifdef __CUDACC__

#define SIMT __device__ __forceinline__
#define INLINE __attribute__((always_inline))  // of a lambda
#define UNROLL _Pragma("unroll")
#define UNROLL_BY(n) PRAGMA(unroll n)
#define PRAGMA(text) _Pragma(#text)

struct Simt {
    SIMT int thread() const { return threadIdx.x; }
    SIMT int warp() const { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }
    SIMT int block_x() const { return blockIdx.x; }
    SIMT int block_y() const { return blockIdx.y; }

    // Address of the block's dynamic shared memory, 256-byte aligned.
    SIMT uint32_t shared() const {
        extern __shared__ __align__(256) unsigned char memory[];
        return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
    }

    SIMT void barrier() { __syncthreads(); }

    SIMT float xor_lane(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

    SIMT float exp2(float x) {
        float y;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
        return y;
    }

    SIMT void ldmatrix(uint32_t (&r)[4], uint32_t row) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row));
    }

    SIMT void ldmatrix_trans(uint32_t (&r)[4], uint32_t row) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row));
    }

    template <class T>
    SIMT void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

    SIMT void copy_async(uint32_t to, const void *from, bool valid) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
    }
    SIMT void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
    template <int OPEN>
    SIMT void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory"); }

    SIMT Words load_shared16(uint32_t at) {
        Words w;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3]) : "r"(at) : "memory");
        return w;
    }
    SIMT float2 load_shared8(uint32_t at) {
        float2 pair;
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(at) : "memory");
        return pair;
    }
    SIMT void store_shared16(uint32_t at, const Words &w) {
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(w.word[0]), "r"(w.word[1]), "r"(w.word[2]), "r"(w.word[3]) : "memory");
    }
    SIMT void store_shared4(uint32_t at, uint32_t word) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(word) : "memory"); }

    SIMT Words load16(const void *from) {
        const uint4 found = __ldg(static_cast<const uint4 *>(from));
        return {found.x, found.y, found.z, found.w};
    }
    SIMT void store16(void *to, const Words &w) { *static_cast<uint4 *>(to) = make_uint4(w.word[0], w.word[1], w.word[2], w.word[3]); }

    template <class T>
    SIMT uint32_t pack(float low, float high);
    template <class T>
    SIMT float2 unpack(uint32_t pair);
};

#define MMA(T, NAME)                                                                                                                     \
    template <>                                                                                                                          \
    SIMT void Simt::mma<T>(float(&c)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {                                               \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                                             \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                                             \
    }
MMA(bf16, "bf16")
MMA(fp16, "f16")
#undef MMA

template <>
SIMT uint32_t Simt::pack<bf16>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <>
SIMT uint32_t Simt::pack<fp16>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <>
SIMT float2 Simt::unpack<bf16>(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <>
SIMT float2 Simt::unpack<fp16>(uint32_t pair) {
    float2 found;
    asm("{ .reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }" : "=f"(found.x), "=f"(found.y) : "r"(pair));
    return found;
}

// Runs Kernel::run on x * y blocks of Kernel::LANES lanes with Kernel::SHARED bytes of shared memory each, with few enough
// registers for Kernel::AT_ONCE blocks on a multiprocessor.
template <class Kernel, class Params>
__global__ void __launch_bounds__(Kernel::LANES, Kernel::AT_ONCE) entry(const __grid_constant__ Params params) {
    Kernel::run(Simt(), params);
}

template <class Kernel, class Params>
int launch(int x, int y, const Params &params, void *stream) {
    static_assert(Kernel::SHARED <= 99 * 1024, "more shared memory than a block has on sm_86, sm_89 and sm_120");
    const cudaError_t error = cudaFuncSetAttribute(entry<Kernel, Params>, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SHARED);
    if (error == cudaSuccess) entry<Kernel, Params><<<dim3(x, y), Kernel::LANES, Kernel::SHARED, static_cast<cudaStream_t>(stream)>>>(params);
    const cudaError_t last = cudaGetLastError();  // also forgets it, or torch would find it after its own next launch
    return error != cudaSuccess ? error : last;
}

#else

#define SIMT inline
#define INLINE
#define UNROLL
#define UNROLL_BY(n)
#include "emulator.h"

#endif
