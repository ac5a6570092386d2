// Fused attention over documents that lie end to end, forward and backward: the contract, and nothing of torch in it.
//
// T tokens of all documents, H query heads, K key/value heads (H = G * K), C head width; 16-bit floats in, fp32 sums.
// A token sees the tokens of its own document up to itself. With P = softmax(scale * q k^T) over those,
//
//     out = P v        lse = ln of the sum of exp(scale * q k^T) over what a token sees
//
// Blocks of BLOCK tokens begin at a document's first token. So key block b is the only one on the diagonal of query
// block b, those before it are whole and need no mask, and no row is without a key. The work is a list of such blocks:
// a tile {start, length, block, slot} is block number `block` of the document of `length` tokens that begins at token
// `start`; `slot` is the place of the document's block 0 among all blocks, which is where lse and delta keep their rows.
// The forward and grad_q take (tile, query head) pairs, grad_k and grad_v take (tile, key head) pairs and count blocks
// from the document's end, so the longest-first order of one list serves all of them. A tile of length 0 does nothing.
// Tokens of no tile are neither read nor written: what out and gradients held there, they hold after.
//
// Sums are taken in a fixed order and without atomics: the same input gives the same bits, whatever else is in the list.
#pragma once

#include <cstdint>

namespace attention {

constexpr int BLOCK = 64;  // tokens of a block, of queries as of keys

enum Type : int32_t { BF16 = 0, FP16 = 1 };

struct Tile {
    int32_t start, length, block, slot;
};

// Pointers are 16-byte aligned. A stride is the number of elements from a token to the next, a multiple of 8; within a
// token the heads lie end to end. out, grad_out and the gradients have no gaps.
struct Params {
    const void *q, *k, *v;         // (T, H, C), (T, K, C), (T, K, C)
    void *out;                     // (T, H, C)
    float *lse;                    // (H, tiles, BLOCK); +inf in rows past a document's end
    const void *grad_out;          // (T, H, C)
    void *grad_q, *grad_k, *grad_v;  // as q, k, v, but without gaps
    float *delta;                  // (H, tiles, BLOCK): sum over C of out * grad_out; grad_q's kernel leaves it for grad_k's
    const void *cosine, *sine;     // (T, C / 2) of the angles by which q and k are turned, in their type; null: they are not
    const Tile *tiles;             // (tiles,), longest first
    int64_t q_stride, k_stride, v_stride;
    int32_t tile_count, heads, kv_heads, head_dim;
    float scale;                   // > 0
    Type type;
};

// Each returns 0 or a cudaError_t. `stream` is a cudaStream_t. What no kernel is made for is the caller's to refuse.
int forward(const Params &params, void *stream);   // q, k, v -> out, lse
int backward(const Params &params, void *stream);  // q, k, v, out, lse, grad_out -> grad_q, grad_k, grad_v, delta

}  // namespace attention
