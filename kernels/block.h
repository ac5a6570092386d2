// What the kernels are made of: blocks of rows in shared memory, and products in which a warp owns 16 or 32 rows.
//
// A block's rows lie one after another as chunks of 16 bytes, and chunk c of row r is where chunk c ^ (r % 8) would be.
// The eight rows that ldmatrix takes at a time thus lie in different banks, in rows of 64 as of 128 elements.
#pragma once

#include "attention.h"
#include "simt.h"

namespace attention {

constexpr float LOG2_E = 1.4426950408889634f;

using Fragment = uint32_t[4];  // a 16x16 piece of a left operand, or two 16x8 pieces of a right one
using Sums = float[4];         // a 16x8 piece of a product

// Which pieces of 16 x 16 scores have something in them for a warp, a bit for each: it leaves out what lies wholly over the diagonal
// or past a document's end. The same for all its lanes, so that what they do together can be left out.
// The kernels' steps are compiled twice: with ALL_PIECES, a constant, neither guards nor masks are left of them.
using Pieces = int;
constexpr Pieces ALL_PIECES = -1;  // which stays what it is where a strip's are shifted to the front

// The angles by which q and k are turned, where they are, from a token on.
struct Angles {
    const Params &p;
    int token;
};

// The blocks of one kernel: C elements to a row, of type T. A warp owns PARTS times 16 rows of BLOCK, and each piece of the other
// operand that it reads is multiplied by all of them. Scores are taken of STRIP columns at a time, as registers allow.
template <class T, int C, int STRIP, int PARTS>
struct Blocks {
    static constexpr int WARP_ROWS = 16 * PARTS, LANES = BLOCK / WARP_ROWS * 32;
    static constexpr int CHUNKS = C / 8, STEPS = C / 16, BYTES = BLOCK * C * 2;

    using Step = Fragment[PARTS];           // a warp's rows x 16 columns, as a left operand
    using Rows = Step[STEPS];               // a warp's rows x C columns, likewise
    using Scores = Sums[PARTS][STRIP / 8];  // a warp's rows x STRIP columns
    using Output = Sums[PARTS][C / 8];      // a warp's rows x C columns

    // Those of a block's pieces of which `sees` is true, given their numbers: of the 16 rows, and of the 16 columns.
    template <class Sees>
    SIMT static Pieces pieces(int warp, Sees sees) {
        Pieces found = 0;
        UNROLL
        for (int i = 0; i < BLOCK / 16 * PARTS; ++i) found |= sees(warp * PARTS + i % PARTS, i / PARTS) << i;
        return found;
    }

    // Those that are of a strip, counted from its first column.
    SIMT static Pieces of_strip(Pieces pieces, int strip) { return pieces >> strip / 16 * PARTS & ((1 << STRIP / 16 * PARTS) - 1); }

    // Whether the piece of a part's rows and a column is among a strip's, and whether any part's is.
    SIMT static bool has(Pieces pieces, int part, int column) { return pieces >> (column / 16 * PARTS + part) & 1; }
    SIMT static bool has_any(Pieces pieces, int column) { return pieces >> column / 16 * PARTS & ((1 << PARTS) - 1); }

    SIMT static uint32_t address(uint32_t block, int row, int chunk) { return block + row * C * 2 + ((chunk ^ (row & 7)) * 16); }

    // The rows and chunks that a lane copies, and turns: pairs of chunks whose elements are C / 2 apart. The lanes of odd
    // rows take the second chunk first, so that where four lanes make a row, eight of them are in different banks.
    // Of a block of ROWS rows PAIRS for each lane, COUNT of them from `begin` on.
    template <int ROWS>
    static constexpr int PAIRS = ROWS * CHUNKS / 2 / LANES;
    template <int COUNT, class Body>
    SIMT static void each_pair(const Simt &simt, int begin, Body body) {
        UNROLL
        for (int i = 0; i < COUNT; ++i) {
            const int row = (begin + i) * (LANES / (CHUNKS / 2)) + simt.thread() / (CHUNKS / 2), first = simt.thread() % (CHUNKS / 2), odd = row & 1;
            body(i, row, first ^ odd * (CHUNKS / 2), first ^ (1 - odd) * (CHUNKS / 2));
        }
    }

    // Begins to copy a block whose first element is at `from`; rows from `rows` on become zeros.
    template <int ROWS = BLOCK>
    SIMT static void load(Simt &simt, uint32_t block, const T *from, int64_t stride, int rows) {
        each_pair<PAIRS<ROWS>>(simt, 0, [&](int, int row, int one, int other) {
            const T *at = from + (row < rows ? row : 0) * stride;
            simt.copy_async(address(block, row, one), at + one * 8, row < rows);
            simt.copy_async(address(block, row, other), at + other * 8, row < rows);
        });
    }

    // Waits until at most OPEN commits are, and turns the pairs (x[i], x[i + C / 2]) of each row of a block that came with the others by
    // the row's angles, those of the first AHEAD pairs meanwhile. A lane turns what it has copied itself.
    static constexpr int AHEAD = PARTS == 1 ? C / 32 : 2;  // more, and registers do not suffice
    template <int OPEN, int ROWS = BLOCK>
    SIMT static void wait_and_rotate(Simt &simt, uint32_t block, const Angles &angles, int rows) {
        if (!angles.p.cosine) {
            simt.template wait<OPEN>();
            return;
        }
        const T *cosine = static_cast<const T *>(angles.p.cosine) + static_cast<int64_t>(angles.token) * (C / 2);
        const T *sine = static_cast<const T *>(angles.p.sine) + static_cast<int64_t>(angles.token) * (C / 2);
        Words cosines[AHEAD], sines[AHEAD];
        UNROLL_BY(1)
        for (int begin = 0; begin < PAIRS<ROWS>; begin += AHEAD) {
            each_pair<AHEAD>(simt, begin, [&](int i, int row, int one, int other) {
                const int64_t at = (row < rows ? row : 0) * (C / 2) + (one < other ? one : other) * 8;
                cosines[i] = simt.load16(cosine + at), sines[i] = simt.load16(sine + at);
            });
            simt.template wait<OPEN>();
            each_pair<AHEAD>(simt, begin, [&](int i, int row, int one, int other) {
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
    }

    // A lane's address for ldmatrix: of the piece of a left operand with this first row, a multiple of 8, and chunk, which
    // is even; transposed, of two pieces of a right operand whose rows the block's are. Chunks change bits of it that a
    // block's first address, a multiple of 256, leaves free: no lane keeps a number for each.
    SIMT static uint32_t left(const Simt &simt, uint32_t block, int row, int chunk) {
        const int lane = simt.thread() % 32;
        return ((block + lane % 16 * C * 2 + (lane / 16 ^ lane % 8) * 16) ^ chunk * 16) + row * C * 2;
    }

    // Likewise, of two pieces of a right operand, eight columns each, whose columns are the block's rows.
    SIMT static uint32_t right(const Simt &simt, uint32_t block, int row, int chunk) {
        const int lane = simt.thread() % 32;
        return ((block + (lane / 16 * 8 + lane % 8) * C * 2 + (lane / 8 % 2 ^ lane % 8) * 16) ^ chunk * 16) + row * C * 2;
    }

    SIMT static void read(Simt &simt, Step &rows, uint32_t block, int k) {
        UNROLL
        for (int part = 0; part < PARTS; ++part) simt.ldmatrix(rows[part], left(simt, block, warp_row(simt) + 16 * part, 2 * k));
    }

    SIMT static void read(Simt &simt, Rows &rows, uint32_t block) {
        UNROLL
        for (int k = 0; k < STEPS; ++k) read(simt, rows[k], block, k);
    }

    // One step of rows x transpose of a strip's pieces: scores += rows[:, 16k : 16k + 16] block[strip : strip + STRIP, 16k : 16k + 16]^T.
    SIMT static void multiply_transposed(Simt &simt, Scores &scores, const Step &rows, uint32_t block, int strip, int k, Pieces pieces) {
        UNROLL
        for (int n = 0; n < STRIP / 8; n += 2) {
            if (!has_any(pieces, 8 * n)) continue;
            Fragment columns;
            simt.ldmatrix(columns, right(simt, block, strip + 8 * n, 2 * k));
            UNROLL
            for (int part = 0; part < PARTS; ++part) {
                if (!has(pieces, part, 8 * n)) continue;
                simt.mma<T>(scores[part][n], rows[part], columns[0], columns[1]);
                simt.mma<T>(scores[part][n + 1], rows[part], columns[2], columns[3]);
            }
        }
    }

    // output += weights block[strip : strip + STRIP], of pieces. Sums of one product already are where the left operand of the next has them.
    SIMT static void multiply(Simt &simt, Output &output, const Scores &weights, uint32_t block, int strip, Pieces pieces) {
        UNROLL
        for (int k = 0; k < STRIP / 16; ++k) {
            if (!has_any(pieces, 16 * k)) continue;
            Step rows;
            UNROLL
            for (int part = 0; part < PARTS; ++part) {
                UNROLL
                for (int i = 0; i < 4; ++i) rows[part][i] = simt.pack<T>(weights[part][2 * k + i / 2][i % 2 * 2], weights[part][2 * k + i / 2][i % 2 * 2 + 1]);
            }
            UNROLL
            for (int n = 0; n < C / 8; n += 2) {
                Fragment columns;
                simt.ldmatrix_trans(columns, left(simt, block, strip + 16 * k, n));
                UNROLL
                for (int part = 0; part < PARTS; ++part) {
                    if (!has(pieces, part, 16 * k)) continue;
                    simt.mma<T>(output[part][n], rows[part], columns[0], columns[1]);
                    simt.mma<T>(output[part][n + 1], rows[part], columns[2], columns[3]);
                }
            }
        }
    }

    // Turns sums back: what the transpose of that rotation makes of them.
    SIMT static void rotate_back(Simt &simt, Output &output, const Angles &angles, int rows) {
        if (!angles.p.cosine) return;
        const T *cosine = static_cast<const T *>(angles.p.cosine) + static_cast<int64_t>(angles.token) * (C / 2);
        const T *sine = static_cast<const T *>(angles.p.sine) + static_cast<int64_t>(angles.token) * (C / 2);
        UNROLL
        for (int n = 0; n < C / 16; ++n) {
            UNROLL
            for (int half = 0; half < 2 * PARTS; ++half) {
                const int row = warp_row(simt) + lane_row(simt) + 8 * half, column = 8 * n + lane_column(simt);
                const int64_t at = (row < rows ? row : 0) * (C / 2) + column;
                const float2 c = simt.unpack<T>(*reinterpret_cast<const uint32_t *>(cosine + at));
                const float2 s = simt.unpack<T>(*reinterpret_cast<const uint32_t *>(sine + at));
                float *first = &output[half / 2][n][half % 2 * 2], *second = &output[half / 2][n + C / 16][half % 2 * 2];
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
            for (int half = 0; half < 2 * PARTS; ++half)
                simt.store_shared4(address(block, warp_row(simt) + lane_row(simt) + 8 * half, n) + 2 * lane_column(simt),
                                   simt.pack<T>(output[half / 2][n][half % 2 * 2], output[half / 2][n][half % 2 * 2 + 1]));
        }
        simt.barrier();
        UNROLL
        for (int i = 0; i < BLOCK * CHUNKS / LANES; ++i) {
            const int row = (i * LANES + simt.thread()) / CHUNKS, chunk = simt.thread() % CHUNKS;
            const Words words = simt.load_shared16(address(block, row, chunk));
            if (row < rows) simt.store16(to + row * stride + chunk * 8, words);
        }
    }

    // Where a lane's sums are: rows `lane_row` and each 8 more of those that its warp owns, from `lane_column` on of each eight.
    SIMT static int warp_row(const Simt &simt) { return simt.thread() / 32 * WARP_ROWS; }
    SIMT static int lane_row(const Simt &simt) { return simt.thread() % 32 / 4; }
    SIMT static int lane_column(const Simt &simt) { return 2 * (simt.thread() % 4); }
};

template <int PARTS, int N>
SIMT void clear(Sums (&sums)[PARTS][N]) {
    UNROLL
    for (int n = 0; n < PARTS * N; ++n) {
        UNROLL
        for (int i = 0; i < 4; ++i) sums[n / N][n % N][i] = 0.f;
    }
}

template <int PARTS, int N>
SIMT void multiply(Sums (&sums)[PARTS][N], float factor) {
    UNROLL
    for (int n = 0; n < PARTS * N; ++n) {
        UNROLL
        for (int i = 0; i < 4; ++i) sums[n / N][n % N][i] *= factor;
    }
}

// A tile's place in the packed rows.
struct Place {
    int block, blocks, rows;  // which of the document's blocks, of how many, and how many of its rows are tokens
    int start, first;         // token at which the document begins, and the block

    // From the document's first block on, or, `backwards`, from its last.
    SIMT Place(const Tile &tile, bool backwards) {
        blocks = (tile.length + BLOCK - 1) / BLOCK;
        block = backwards ? blocks - 1 - tile.block : tile.block;
        start = tile.start;
        first = start + block * BLOCK;
        rows = tile.length - block * BLOCK < BLOCK ? tile.length - block * BLOCK : BLOCK;
    }
};

// What a block of queries sees: the blocks of ROWS rows of k and v from the diagonal on backwards. Two stages of shared memory take
// turns: while one is worked on, the next blocks are on their way to the other, so that a step has a single barrier.
template <class T, int C, class B, int ROWS>
struct Keys {
    static constexpr int BYTES = ROWS * C * 2;

    const Params &p;
    const Place &place;
    const T *k, *v;

    SIMT Keys(const Params &p, const Place &place, int head) : p(p), place(place) {
        const int kv_head = head / (p.heads / p.kv_heads);
        k = static_cast<const T *>(p.k) + place.start * p.k_stride + kv_head * C;
        v = static_cast<const T *>(p.v) + place.start * p.v_stride + kv_head * C;
    }

    SIMT int last() const { return (place.block * BLOCK + place.rows - 1) / ROWS; }
    SIMT int rows(int block) const { return block == last() ? (place.rows - 1) % ROWS + 1 : ROWS; }

    // Where a block of k is, and after it that of v. That of `last() + 1`, which nobody sees, is free to begin with.
    SIMT uint32_t stage(const Simt &simt, int block) const { return simt.shared() + block % 2 * 2 * BYTES; }

    SIMT void load(Simt &simt, int block) const {
        B::template load<ROWS>(simt, stage(simt, block), k + block * ROWS * p.k_stride, p.k_stride, rows(block));
        B::template load<ROWS>(simt, stage(simt, block) + BYTES, v + block * ROWS * p.v_stride, p.v_stride, rows(block));
        simt.commit();
    }

    // Waits for a block that has been loaded, and begins with the one before it.
    SIMT uint32_t next(Simt &simt, int block) const {
        B::template wait_and_rotate<0, ROWS>(simt, stage(simt, block), Angles{p, place.start + block * ROWS}, rows(block));
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
