// out = softmax(scale * q k^T) v and its log-sum-exp, over the blocks of keys from the diagonal backwards.
//
// A warp keeps its 16 rows of q, the sums of their output, and what softmax needs of each row: the largest score so far
// and the sum of exponentials (Milakov and Gimelshein 2018; Dao 2023).

#include "block.h"

namespace attention {

template <class T, int C>
struct Forward {
    using B = Blocks<T, C, BLOCK>;
    static constexpr int LANES = THREADS, SHARED = 4 * B::BYTES, AT_ONCE = C == 64 ? 3 : 2;

    SIMT static void run(Simt simt, const Params &p) {
        const Tile tile = p.tiles[simt.block_y()];
        if (tile.length == 0) return;
        const Place place(tile, false);
        const int head = simt.block_x(), warp = simt.warp();
        const Keys<T, C, B> keys(p, place, head);
        const bool active = warp * WARP_ROWS < place.rows;

        // q comes by way of the stage that is not needed yet.
        const uint32_t spare = keys.stage(simt, place.block + 1);
        B::load(simt, spare, static_cast<const T *>(p.q) + place.first * p.q_stride + head * C, p.q_stride, place.rows);
        simt.commit();
        keys.load(simt, place.block);
        B::template wait_and_rotate<1>(simt, spare, Angles{p, place.first}, place.rows);
        simt.barrier();
        typename B::Rows queries;
        if (active) B::read(simt, queries, spare);

        const float scale = p.scale * LOG2_E;
        float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
        typename B::Output output;
        clear(output);

        const auto take = [&](uint32_t k, Pieces pieces, bool diagonal) INLINE {
            const uint32_t v = k + B::BYTES;
            typename B::Scores scores;
            clear(scores);
            UNROLL
            for (int step = 0; step < B::STEPS; ++step) B::multiply_transposed(simt, scores, queries[step], k, 0, step, pieces);
            if (diagonal) {
                UNROLL
                for (int n = 0; n < BLOCK / 8; ++n) {
                    UNROLL
                    for (int i = 0; i < 4; ++i)
                        if (8 * n + B::lane_column(simt) + i % 2 > B::warp_row(simt) + B::lane_row(simt) + 8 * (i / 2)) scores[n][i] = -INFINITY;
                }
            }

            UNROLL
            for (int half = 0; half < 2; ++half) {
                float most = largest[half];
                UNROLL
                for (int n = 0; n < BLOCK / 8; ++n) most = fmaxf(most, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
                most = fmaxf(most, simt.xor_lane(most, 1));
                most = fmaxf(most, simt.xor_lane(most, 2));
                const float shrink = simt.exp2((largest[half] - most) * scale);
                largest[half] = most;
                sum[half] *= shrink;  // of the lane's own columns; lanes come together at the end
                UNROLL
                for (int n = 0; n < BLOCK / 8; ++n) {
                    if (!has(pieces, 8 * n)) continue;
                    UNROLL
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        scores[n][i] = simt.exp2(fmaf(scores[n][i], scale, -most * scale));
                        sum[half] += scores[n][i];
                    }
                }
                UNROLL
                for (int n = 0; n < C / 8; ++n) output[n][2 * half] *= shrink, output[n][2 * half + 1] *= shrink;
            }
            B::multiply(simt, output, scores, v, 0, pieces);
        };
        for (int block = place.block; block >= 0; --block) {
            const uint32_t k = keys.next(simt, block);
            if (!active) continue;
            if (block == place.block) take(k, (2 << warp) - 1, true);
            else take(k, ALL_PIECES, false);
        }

        float *lse = p.lse + (static_cast<int64_t>(head) * p.tile_count + tile.slot + place.block) * BLOCK;
        UNROLL
        for (int half = 0; half < 2; ++half) {
            sum[half] += simt.xor_lane(sum[half], 1);
            sum[half] += simt.xor_lane(sum[half], 2);
            const int row = B::warp_row(simt) + B::lane_row(simt) + 8 * half;
            if (B::lane_column(simt) == 0) lse[row] = row < place.rows ? largest[half] * p.scale + logf(sum[half]) : INFINITY;
            const float share = 1.f / sum[half];
            UNROLL
            for (int n = 0; n < C / 8; ++n) output[n][2 * half] *= share, output[n][2 * half + 1] *= share;
        }
        simt.barrier();
        B::store(simt, output, simt.shared(), static_cast<T *>(p.out) + (place.first * p.heads + head) * C, static_cast<int64_t>(p.heads) * C, place.rows);
    }
};

int forward(const Params &params, void *stream) {
    return dispatch(params, [&](auto kind) {
        return launch<Forward<typename decltype(kind)::T, decltype(kind)::C>>(params.heads, params.tile_count, params, stream);
    });
}

}  // namespace attention
