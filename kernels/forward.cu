// out = softmax(scale * q k^T) v and its log-sum-exp, over the blocks of keys from the diagonal backwards.
//
// A warp keeps its 16 rows of q, the sums of their output, and what softmax needs of each row: the largest score so far
// and the sum of exponentials (Milakov and Gimelshein 2018; Dao 2023). Two stages of shared memory take turns: while one
// is worked on, the next blocks of k and v are on their way to the other, so a step has a single barrier.

#include "block.h"

namespace attention {

template <class T_, int C>
struct Forward {
    using T = T_;
    using B = Blocks<T, C, BLOCK>;
    static constexpr int LANES = THREADS, SHARED = 4 * B::BYTES, AT_ONCE = C == 64 ? 3 : 2;

    SIMT static void run(Simt simt, const Params &p) {
        const Tile tile = p.tiles[simt.block_y()];
        if (tile.length == 0) return;
        const Place place(tile, false);
        const int head = simt.block_x(), kv_head = head / (p.heads / p.kv_heads);
        const T *q = static_cast<const T *>(p.q) + place.first * p.q_stride + head * C;
        const T *k = static_cast<const T *>(p.k) + place.start * p.k_stride + kv_head * C;
        const T *v = static_cast<const T *>(p.v) + place.start * p.v_stride + kv_head * C;
        const T *cosine = static_cast<const T *>(p.cosine) + place.start * (C / 2), *sine = static_cast<const T *>(p.sine) + place.start * (C / 2);
        const auto stage = [&](int block) { return simt.shared() + block % 2 * 2 * B::BYTES; };
        const auto load_keys = [&](int block) {
            const int rows = block == place.block ? place.rows : BLOCK;
            B::load(simt, stage(block), k + block * BLOCK * p.k_stride, p.k_stride, rows);
            B::load(simt, stage(block) + B::BYTES, v + block * BLOCK * p.v_stride, p.v_stride, rows);
            simt.commit();
        };

        // q comes by way of the stage that is not needed yet.
        B::load(simt, stage(place.block + 1), q, p.q_stride, place.rows);
        simt.commit();
        load_keys(place.block);
        simt.template wait<1>();
        if (p.cosine) B::rotate(simt, stage(place.block + 1), cosine + place.block * BLOCK * (C / 2), sine + place.block * BLOCK * (C / 2), place.rows);
        simt.barrier();
        typename B::Rows queries;
        B::read(simt, queries, stage(place.block + 1));

        const float scale = p.scale * LOG2_E;
        float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
        typename B::Output output;
        clear(output);

        for (int block = place.block; block >= 0; --block) {
            simt.template wait<0>();
            if (p.cosine) B::rotate(simt, stage(block), cosine + block * BLOCK * (C / 2), sine + block * BLOCK * (C / 2), block == place.block ? place.rows : BLOCK);
            simt.barrier();  // this stage has come for all, and all have done with the other
            if (block > 0) load_keys(block - 1);

            typename B::Scores scores;
            clear(scores);
            UNROLL
            for (int step = 0; step < B::STEPS; ++step) B::multiply_transposed(simt, scores, queries[step], stage(block), 0, step);
            if (block == place.block) {
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
                    UNROLL
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        scores[n][i] = simt.exp2(fmaf(scores[n][i], scale, -most * scale));
                        sum[half] += scores[n][i];
                    }
                }
                UNROLL
                for (int n = 0; n < C / 8; ++n) output[n][2 * half] *= shrink, output[n][2 * half + 1] *= shrink;
            }
            B::multiply(simt, output, scores, stage(block) + B::BYTES, 0);
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
