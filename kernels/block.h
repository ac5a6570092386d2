// What the kernels are made of: blocks of 64 rows in shared memory, and products in which a warp owns 16 rows.
//
// A block's rows lie one after another as chunks of 16 bytes, and chunk c of row r is where chunk c ^ (r % 8) would be.
// The eight rows that ldmatrix takes at a time thus lie in different banks, in rows of 64 as of 128 elements.
#pragma once

#include "attention.h"
#include "simt.h"

namespace attention {

constexpr int WARP_ROWS = 16;
constexpr float LOG2_E = 1.4426950408889634f;

using Fragment = uint32_t[4];  // a 16x16 piece of a left operand, or two 16x8 pieces of a right one
using Sums = float[4];         // a 16x8 piece of a product

// Which of a block's columns, in pieces of 16 and a bit for each, have something in them for a warp: it leaves out what lies wholly
// over the diagonal or past a document's end. The same for all its lanes, so that what they do together can be left out.
// The kernels' steps are compiled twice: with ALL_PIECES, a constant, neither guards nor masks are left of them.
using Pieces = int;
constexpr Pieces ALL_PIECES = -1;  // which stays what it is where a strip's are shifted to the front

SIMT bool has(Pieces pieces, int column) { return pieces >> column / 16 & 1; }

// The angles by which q and k are turned, where they are, from a token on.
struct Angles {
    const Params &p;
    int64_t token;
};

// The blocks of one kernel: C elements to a row, of type T. Scores are taken of STRIP rows of a block at a time, which
// is all 64 where registers allow.
template <class T, int C, int STRIP>
struct Blocks {
    static constexpr int CHUNKS = C / 8, STEPS = C / 16, BYTES = BLOCK * C * 2;

    using Rows = Fragment[STEPS];    // a warp's 16 rows of a block, as a left operand
    using Scores = Sums[STRIP / 8];  // 16 rows x STRIP columns
    using Output = Sums[C / 8];      // 16 rows x C columns

    SIMT static uint32_t address(uint32_t block, int row, int chunk) { return block + row * C * 2 + ((chunk ^ (row & 7)) * 16); }

    // The rows and chunks that a lane copies, and turns: pairs of chunks whose elements are C / 2 apart. The lanes of odd
    // rows take the second chunk first, so that where four lanes make a row, eight of them are in different banks.
    static constexpr int PAIRS = BLOCK * CHUNKS / 2 / THREADS;
    template <class Body>
    SIMT static void each_pair(const Simt &simt, Body body) {
        UNROLL
        for (int i = 0; i < PAIRS; ++i) {
            const int row = i * (THREADS / (CHUNKS / 2)) + simt.thread() / (CHUNKS / 2), first = simt.thread() % (CHUNKS / 2), odd = row & 1;
            body(i, row, first ^ odd * (CHUNKS / 2), first ^ (1 - odd) * (CHUNKS / 2));
        }
    }

    // Begins to copy a block whose first element is at `from`; rows from `rows` on become zeros.
    SIMT static void load(Simt &simt, uint32_t block, const T *from, int64_t stride, int rows) {
        each_pair(simt, [&](int, int row, int one, int other) {
            const T *at = from + row * stride * (row < rows);
            simt.copy_async(address(block, row, one), at + one * 8, row < rows);
            simt.copy_async(address(block, row, other), at + other * 8, row < rows);
        });
    }

    // Waits until at most OPEN commits are, and turns the pairs (x[i], x[i + C / 2]) of each row of a block that came with the others by
    // the row's angles, which come meanwhile. A lane turns what it has copied itself.
    template <int OPEN>
    SIMT static void wait_and_rotate(Simt &simt, uint32_t block, const Angles &angles, int rows) {
        if (!angles.p.cosine) {
            simt.template wait<OPEN>();
            return;
        }
        const T *cosine = static_cast<const T *>(angles.p.cosine) + angles.token * (C / 2);
        const T *sine = static_cast<const T *>(angles.p.sine) + angles.token * (C / 2);
        Words cosines[PAIRS], sines[PAIRS];
        each_pair(simt, [&](int i, int row, int one, int other) {
            const int64_t at = (row < rows ? row : 0) * (C / 2) + (one < other ? one : other) * 8;
            cosines[i] = simt.load16(cosine + at), sines[i] = simt.load16(sine + at);
        });
        simt.template wait<OPEN>();
        each_pair(simt, [&](int i, int row, int one, int other) {
            const Words ones = simt.load_shared16(address(block, row, one)), others = simt.load_shared16(address(block, row, other));
            const uint32_t sign = one < other ? 0 : 0x80008000;  // of two sines: where the pair's second is `one`, it is turned the other way
            Words turned_ones, turned_others;
            UNROLL
            for (int j = 0; j < 4; ++j) {
                const float2 c = simt.unpack<T>(cosines[i].word[j]), s = simt.unpack<T>(sines[i].word[j] ^ sign);
                const float2 x = simt.unpack<T>(ones.word[j]), y = simt.unpack<T>(others.word[j]);
                turned_ones.word[j] = simt.pack<T>(x.x * c.x - y.x * s.x, x.y * c.y - y.y * s.y);
                turned_others.word[j] = simt.pack<T>(y.x * c.x + x.x * s.x, y.y * c.y + x.y * s.y);
            }
            simt.store_shared16(address(block, row, one), turned_ones);
            simt.store_shared16(address(block, row, other), turned_others);
        });
    }

    // A lane's address for ldmatrix: of the piece of a left operand with this first row, a multiple of 8, and chunk, which
    // is even; transposed, of two pieces of a right operand whose rows the block's are.
    SIMT static uint32_t left(const Simt &simt, uint32_t block, int row, int chunk) {
        const int lane = simt.thread() % 32;
        return block + (row + lane % 16) * C * 2 + (chunk ^ lane / 16 ^ lane % 8) * 16;
    }

    // Likewise, of two pieces of a right operand, eight columns each, whose columns are the block's rows.
    SIMT static uint32_t right(const Simt &simt, uint32_t block, int row, int chunk) {
        const int lane = simt.thread() % 32;
        return block + (row + lane / 16 * 8 + lane % 8) * C * 2 + (chunk ^ lane / 8 % 2 ^ lane % 8) * 16;
    }

    SIMT static void read(Simt &simt, Rows &rows, uint32_t block) {
        UNROLL
        for (int k = 0; k < STEPS; ++k) simt.ldmatrix(rows[k], left(simt, block, warp_row(simt), 2 * k));
    }

    // Those of a block's pieces that are of a strip, counted from its first column.
    SIMT static Pieces of_strip(Pieces pieces, int strip) { return pieces >> strip / 16 & ((1 << STRIP / 16) - 1); }

    // One step of rows x transpose of a strip's pieces: scores += rows[:, 16k : 16k + 16] block[strip : strip + STRIP, 16k : 16k + 16]^T.
    SIMT static void multiply_transposed(Simt &simt, Scores &scores, const Fragment &rows, uint32_t block, int strip, int k, Pieces pieces) {
        UNROLL
        for (int n = 0; n < STRIP / 8; n += 2) {
            if (!has(pieces, 8 * n)) continue;
            Fragment columns;
            simt.ldmatrix(columns, right(simt, block, strip + 8 * n, 2 * k));
            simt.mma<T>(scores[n], rows, columns[0], columns[1]);
            simt.mma<T>(scores[n + 1], rows, columns[2], columns[3]);
        }
    }

    // output += weights block[strip : strip + STRIP], of pieces. Sums of one product already are where the left operand of the next has them.
    SIMT static void multiply(Simt &simt, Output &output, const Scores &weights, uint32_t block, int strip, Pieces pieces) {
        UNROLL
        for (int k = 0; k < STRIP / 16; ++k) {
            if (!has(pieces, 16 * k)) continue;
            const Sums &near = weights[2 * k], &far = weights[2 * k + 1];
            const Fragment rows = {simt.pack<T>(near[0], near[1]), simt.pack<T>(near[2], near[3]), simt.pack<T>(far[0], far[1]), simt.pack<T>(far[2], far[3])};
            UNROLL
            for (int n = 0; n < C / 8; n += 2) {
                Fragment columns;
                simt.ldmatrix_trans(columns, left(simt, block, strip + 16 * k, n));
                simt.mma<T>(output[n], rows, columns[0], columns[1]);
                simt.mma<T>(output[n + 1], rows, columns[2], columns[3]);
            }
        }
    }

    // Turns sums back: what the transpose of that rotation makes of them.
    SIMT static void rotate_back(Simt &simt, Output &output, const Angles &angles, int rows) {
        if (!angles.p.cosine) return;
        const T *cosine = static_cast<const T *>(angles.p.cosine) + angles.token * (C / 2);
        const T *sine = static_cast<const T *>(angles.p.sine) + angles.token * (C / 2);
        UNROLL
        for (int n = 0; n < C / 16; ++n) {
            UNROLL
            for (int half = 0; half < 2; ++half) {
                const int row = warp_row(simt) + lane_row(simt) + 8 * half, column = 8 * n + lane_column(simt);
                const int64_t at = (row < rows ? row : 0) * (C / 2) + column;
                const float2 c = simt.unpack<T>(*reinterpret_cast<const uint32_t *>(cosine + at));
                const float2 s = simt.unpack<T>(*reinterpret_cast<const uint32_t *>(sine + at));
                float *first = &output[n][2 * half], *second = &output[n + C / 16][2 * half];
                const float x = first[0], y = first[1];
                first[0] = x * c.x + second[0] * s.x, second[0] = second[0] * c.x - x * s.x;
                first[1] = y * c.y + second[1] * s.y, second[1] = second[1] * c.y - y * s.y;
            }
        }
    }

    // Writes the first `rows` rows of sums to `to`, by way of a block that nobody reads any more.
    SIMT static void store(Simt &simt, const Output &output, uint32_t block, T *to, int64_t stride, int rows) {
        UNROLL
        for (int n = 0; n < C / 8; ++n) {
            UNROLL
            for (int half = 0; half < 2; ++half)
                simt.store_shared4(address(block, warp_row(simt) + lane_row(simt) + 8 * half, n) + 2 * lane_column(simt),
                                   simt.pack<T>(output[n][2 * half], output[n][2 * half + 1]));
        }
        simt.barrier();
        UNROLL
        for (int i = 0; i < BLOCK * CHUNKS / THREADS; ++i) {
            const int row = (i * THREADS + simt.thread()) / CHUNKS, chunk = simt.thread() % CHUNKS;
            const Words words = simt.load_shared16(address(block, row, chunk));
            if (row < rows) simt.store16(to + row * stride + chunk * 8, words);
        }
    }

    // Where a lane's sums are: rows `lane_row` and 8 more of the 16 that its warp owns, from `lane_column` on of each eight.
    SIMT static int warp_row(const Simt &simt) { return simt.thread() / 32 * WARP_ROWS; }
    SIMT static int lane_row(const Simt &simt) { return simt.thread() % 32 / 4; }
    SIMT static int lane_column(const Simt &simt) { return 2 * (simt.thread() % 4); }
};

template <int N>
SIMT void clear(Sums (&sums)[N]) {
    UNROLL
    for (int n = 0; n < N; ++n) {
        UNROLL
        for (int i = 0; i < 4; ++i) sums[n][i] = 0.f;
    }
}

// A tile's place in the packed rows.
struct Place {
    int block, blocks, rows;  // which of the document's blocks, of how many, and how many of its rows are tokens
    int64_t start, first;     // token at which the document begins, and the block

    // From the document's first block on, or, `backwards`, from its last.
    SIMT Place(const Tile &tile, bool backwards) {
        blocks = (tile.length + BLOCK - 1) / BLOCK;
        block = backwards ? blocks - 1 - tile.block : tile.block;
        start = tile.start;
        first = start + block * BLOCK;
        rows = tile.length - block * BLOCK < BLOCK ? tile.length - block * BLOCK : BLOCK;
    }
};

// What a block of queries sees: the blocks of k and v from the diagonal on backwards. Two stages of shared memory take turns:
// while one is worked on, the next blocks are on their way to the other, so that a step has a single barrier.
template <class T, int C, class B>
struct Keys {
    const Params &p;
    const Place &place;
    const T *k, *v;

    SIMT Keys(const Params &p, const Place &place, int head) : p(p), place(place) {
        const int kv_head = head / (p.heads / p.kv_heads);
        k = static_cast<const T *>(p.k) + place.start * p.k_stride + kv_head * C;
        v = static_cast<const T *>(p.v) + place.start * p.v_stride + kv_head * C;
    }

    // Where a block of k is, and after it that of v. That of `place.block + 1`, which nobody sees, is free to begin with.
    SIMT uint32_t stage(const Simt &simt, int block) const { return simt.shared() + block % 2 * 2 * B::BYTES; }

    SIMT int rows(int block) const { return block == place.block ? place.rows : BLOCK; }

    SIMT void load(Simt &simt, int block) const {
        B::load(simt, stage(simt, block), k + block * BLOCK * p.k_stride, p.k_stride, rows(block));
        B::load(simt, stage(simt, block) + B::BYTES, v + block * BLOCK * p.v_stride, p.v_stride, rows(block));
        simt.commit();
    }

    // Waits for a block that has been loaded, and begins with the one before it.
    SIMT uint32_t next(Simt &simt, int block) const {
        B::template wait_and_rotate<0>(simt, stage(simt, block), Angles{p, place.start + block * BLOCK}, rows(block));
        simt.barrier();  // this stage has come for all, and all have done with the other
        if (block > 0) load(simt, block - 1);
        return stage(simt, block);
    }
};

// What kernels are made for among types and head widths. Others are the caller's to refuse.
template <class Type, int WIDTH>
struct Kind {
    using T = Type;
    static constexpr int C = WIDTH;
};

template <class Body>
int dispatch(const Params &params, Body body) {
    if (params.type == BF16) return params.head_dim == 64 ? body(Kind<bf16, 64>()) : body(Kind<bf16, 128>());
    return params.head_dim == 64 ? body(Kind<fp16, 64>()) : body(Kind<fp16, 128>());
}

}  // namespace attention

// In memory an element is two bytes, whose meaning is in `pack` and `unpack` alone.
struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};
