// out = softmax(scale * q k^T) v and its log-sum-exp, over the blocks of keys from the diagonal backwards.
//
// A warp keeps its 32 rows of q, the sums of their output, and what softmax needs of each row: the largest score so far
// and the sum of exponentials (Milakov and Gimelshein 2018; Dao 2023).

#include "block.h"

namespace attention {

template <class T, int C>
struct Forward {
    static constexpr int KEYS = 32, STRIP = C == 128 ? 16 : KEYS;  // keys in shared memory, and of scores, at once: as many as registers allow
    using B = Blocks<T, C, STRIP, 2>;
    static constexpr int LANES = B::LANES, SHARED = 4 * KEYS * C * 2, AT_ONCE = 4;

    SIMT static void run(Simt simt, const Params &p) {
        const Tile &tile = p.tiles[simt.block_y()];  // read again at the end: registers do not suffice to keep all of it
        if (tile.length == 0) return;
        const Place place(tile, false);
        const int head = simt.block_x(), warp = simt.warp();
        const Keys<T, C, B, KEYS> keys(p, place, head);
        const int own = place.rows > warp * KEYS ? BLOCK / KEYS * place.block + warp : -1;  // the block of keys on the warp's diagonal: its own rows
        const bool half_empty = place.rows <= warp * KEYS + 16;

        // q comes by way of the stage that is not needed yet.
        const uint32_t spare = keys.stage(simt, keys.last() + 1);
        B::load(simt, spare, static_cast<const T *>(p.q) + place.first * p.q_stride + head * C, p.q_stride, place.rows);
        simt.commit();
        keys.load(simt, keys.last());
        B::template wait_and_rotate<1>(simt, spare, Angles{p, place.first}, place.rows);
        simt.barrier();
        typename B::Rows queries;
        B::read(simt, queries, spare);

        const float scale = p.scale * LOG2_E;
        float largest[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, sum[4] = {0.f, 0.f, 0.f, 0.f};
        typename B::Output output;
        clear(output);

        // `behind`: how many keys before the warp's first query the block begins
        const auto take = [&](uint32_t k, Pieces pieces, int behind) INLINE {
            const uint32_t v = k + KEYS * C * 2;
            UNROLL_BY(1)
            for (int first = 0; first < KEYS; first += STRIP) {
                const Pieces here = B::of_strip(pieces, first);
                if (here == 0) continue;
                typename B::Scores scores;
                clear(scores);
                UNROLL
                for (int step = 0; step < B::STEPS; ++step) B::multiply_transposed(simt, scores, queries[step], k, first, step, here);
                UNROLL
                for (int half = 0; half < 4; ++half) {  // of a part's rows: `lane_row`, and each 8 more
                    if (!B::has(here, half / 2, 0)) continue;
                    const int part = half / 2, from = half % 2 * 2;
                    if (pieces != ALL_PIECES) {
                        UNROLL
                        for (int n = 0; n < STRIP / 8; ++n) {
                            UNROLL
                            for (int i = 0; i < 2; ++i) {
                                const int key = first + 8 * n + B::lane_column(simt) + i, query = behind + B::lane_row(simt) + 8 * half;
                                if (key > query) scores[part][n][from + i] = -INFINITY;
                            }
                        }
                    }
                    float most = largest[half];
                    UNROLL
                    for (int n = 0; n < STRIP / 8; ++n) {
                        if (B::has(here, part, 8 * n)) most = fmaxf(most, fmaxf(scores[part][n][from], scores[part][n][from + 1]));
                    }
                    most = fmaxf(most, simt.xor_lane(most, 1));
                    most = fmaxf(most, simt.xor_lane(most, 2));
                    const float shrink = simt.exp2((largest[half] - most) * scale);
                    largest[half] = most;
                    sum[half] *= shrink;  // of the lane's own columns; lanes come together at the end
                    UNROLL
                    for (int n = 0; n < STRIP / 8; ++n) {
                        if (!B::has(here, part, 8 * n)) continue;
                        UNROLL
                        for (int i = from; i < from + 2; ++i) {
                            scores[part][n][i] = simt.exp2(fmaf(scores[part][n][i], scale, -most * scale));
                            sum[half] += scores[part][n][i];
                        }
                    }
                    UNROLL
                    for (int n = 0; n < C / 8; ++n) output[half / 2][n][half % 2 * 2] *= shrink, output[half / 2][n][half % 2 * 2 + 1] *= shrink;
                }
                B::multiply(simt, output, scores, v, first, here);
            }
        };
        for (int block = keys.last(); block >= 0; --block) {
            const uint32_t k = keys.next(simt, block);
            if (block > own) continue;
            // By 16 keys and 16 rows: the first keys of all rows, of the second ones' the second rows alone where it is the diagonal.
            if (block == own || half_empty) take(k, (half_empty ? 0b0101 : 0b1111) & (block == own ? 0b1011 : 0b1111), (own - block) * KEYS);
            else take(k, ALL_PIECES, 0);
        }

        const int rows = tile.length - tile.block * BLOCK;
        float *lse = p.lse + (static_cast<int64_t>(head) * p.tile_count + tile.slot + tile.block) * BLOCK;
        UNROLL
        for (int half = 0; half < 4; ++half) {
            sum[half] += simt.xor_lane(sum[half], 1);
            sum[half] += simt.xor_lane(sum[half], 2);
            const int row = B::warp_row(simt) + B::lane_row(simt) + 8 * half;
            if (B::lane_column(simt) == 0) lse[row] = row < rows ? largest[half] * p.scale + logf(sum[half]) : INFINITY;
            const float share = 1.f / sum[half];
            UNROLL
            for (int n = 0; n < C / 8; ++n) output[half / 2][n][half % 2 * 2] *= share, output[half / 2][n][half % 2 * 2 + 1] *= share;
        }
        simt.barrier();
        T *out = static_cast<T *>(p.out) + (static_cast<int64_t>(tile.start + tile.block * BLOCK) * p.heads + head) * C;
        B::store(simt, output, simt.shared(), out, static_cast<int64_t>(p.heads) * C, rows);
    }
};

int forward(const Params &params, void *stream) {
    return dispatch(params, [&](auto kind) {
        return launch<Forward<typename decltype(kind)::T, decltype(kind)::C>>(params.heads, params.tile_count, params, stream);
    });
}

}  // namespace attention
