// Gradients of out = P v, P = softmax(scale * q k^T), with P computed again from the log-sum-exp (Dao et al. 2022).
//
//     grad_v = P^T grad_out       S' = P * (grad_out v^T - delta)       grad_q = scale * S' k       grad_k = scale * S'^T q
//
// Two kernels, in each of which a block's sums stay in registers from first to last: GradQ walks over the keys of a
// block of queries, GradKV over the queries of a block of keys and over the query heads that share it. Scores are
// computed in both: seven products where five would do, and in return nothing is added up in memory, no order depends
// on timing, and there is no fp32 copy of a gradient. GradQ runs first and leaves delta for GradKV.
// In GradKV the rows are keys and the columns queries, so that P^T and S'^T are left operands as they come.

#include "block.h"

namespace attention {

template <class T, int C>
struct GradQ {
    static constexpr int PARTS = C == 64 ? 2 : 1, STRIP = C == 64 ? 16 : 32;  // of 16 rows to a warp; scores at once: as registers allow
    using B = Blocks<T, C, STRIP, PARTS>;
    static constexpr int LANES = B::LANES, SHARED = 4 * B::BYTES, AT_ONCE = C == 64 ? 4 : 2;

    SIMT static void run(Simt simt, const Params &p) {
        const Tile tile = p.tiles[simt.block_y()];
        if (tile.length == 0) return;
        const Place place(tile, false);
        const int head = simt.block_x(), warp = simt.warp();
        const int64_t stride = static_cast<int64_t>(p.heads) * C, own = place.first * stride + head * C;
        const Angles angles{p, place.first};
        const Keys<T, C, B, BLOCK> keys(p, place, head);
        const bool active = warp * B::WARP_ROWS < place.rows, whole = B::warp_row(simt) + B::WARP_ROWS - 16 < place.rows;  // any part, all parts

        // q and grad_out come by way of the stage that is not needed yet, out by way of the other.
        const uint32_t spare = keys.stage(simt, place.block + 1), busy = keys.stage(simt, place.block);
        B::load(simt, spare, static_cast<const T *>(p.q) + place.first * p.q_stride + head * C, p.q_stride, place.rows);
        B::load(simt, spare + B::BYTES, static_cast<const T *>(p.grad_out) + own, stride, place.rows);
        B::load(simt, busy, static_cast<const T *>(p.out) + own, stride, place.rows);
        simt.commit();
        B::template wait_and_rotate<0>(simt, spare, angles, place.rows);
        simt.barrier();
        typename B::Rows queries, grads;
        float delta[2 * PARTS] = {}, lse[2 * PARTS];
        if (active) {
            B::read(simt, queries, spare);
            B::read(simt, grads, spare + B::BYTES);
            UNROLL
            for (int step = 0; step < B::STEPS; ++step) {
                typename B::Step out;
                B::read(simt, out, busy, step);
                UNROLL
                for (int i = 0; i < 4 * PARTS; ++i) {
                    const float2 o = simt.unpack<T>(out[i / 4][i % 4]), g = simt.unpack<T>(grads[step][i / 4][i % 4]);
                    delta[i / 4 * 2 + i % 2] += o.x * g.x + o.y * g.y;
                }
            }
        }
        const int64_t row = (static_cast<int64_t>(head) * p.tile_count + tile.slot + place.block) * BLOCK + B::warp_row(simt) + B::lane_row(simt);
        UNROLL
        for (int half = 0; half < 2 * PARTS; ++half) {
            delta[half] += simt.xor_lane(delta[half], 1);
            delta[half] += simt.xor_lane(delta[half], 2);
            if (B::lane_column(simt) == 0) p.delta[row + 8 * half] = delta[half];
            lse[half] = p.lse[row + 8 * half] * LOG2_E;
        }
        simt.barrier();
        keys.load(simt, place.block);

        const float scale = p.scale * LOG2_E;
        typename B::Output grad_q;
        clear(grad_q);
        const auto take = [&](uint32_t k, Pieces pieces, bool diagonal) INLINE {
            const uint32_t v = k + B::BYTES;
            UNROLL_BY(1)
            for (int first = 0; first < BLOCK; first += STRIP) {
                const Pieces here = B::of_strip(pieces, first);
                if (here == 0) continue;
                typename B::Scores scores, slopes;
                clear(scores);
                clear(slopes);
                UNROLL
                for (int step = 0; step < B::STEPS; ++step) B::multiply_transposed(simt, scores, queries[step], k, first, step, here);
                UNROLL
                for (int step = 0; step < B::STEPS; ++step) B::multiply_transposed(simt, slopes, grads[step], v, first, step, here);
                UNROLL
                for (int part = 0; part < PARTS; ++part) {
                    UNROLL
                    for (int n = 0; n < STRIP / 8; ++n) {
                        if (!B::has(here, part, 8 * n)) continue;
                        UNROLL
                        for (int i = 0; i < 4; ++i) {
                            const int half = 2 * part + i / 2;  // of a part's rows: `lane_row`, and each 8 more
                            const int key = first + 8 * n + B::lane_column(simt) + i % 2, query = B::warp_row(simt) + B::lane_row(simt) + 8 * half;
                            const bool hidden = diagonal && key > query;
                            float &slope = slopes[part][n][i];
                            slope = hidden ? 0.f : simt.exp2(fmaf(scores[part][n][i], scale, -lse[half])) * (slope - delta[half]);
                        }
                    }
                }
                B::multiply(simt, grad_q, slopes, k, first, here);
            }
        };
        for (int block = place.block; block >= 0; --block) {
            const uint32_t k = keys.next(simt, block);
            if (!active) continue;
            const bool diagonal = block == place.block;
            const auto sees = [&](int row, int column) { return row * 16 < place.rows && (!diagonal || column <= row); };
            if (diagonal || !whole) take(k, B::pieces(warp, sees), diagonal);
            else take(k, ALL_PIECES, false);
        }

        multiply(grad_q, p.scale);
        B::rotate_back(simt, grad_q, angles, place.rows);
        simt.barrier();
        B::store(simt, grad_q, simt.shared(), static_cast<T *>(p.grad_q) + own, stride, place.rows);
    }
};

template <class T, int C>
struct GradKV {
    static constexpr int PARTS = C == 64 ? 2 : 1, STRIP = 32;
    using B = Blocks<T, C, STRIP, PARTS>;
    static constexpr int LSE = BLOCK * 4, STAGE = 2 * B::BYTES + 2 * LSE;  // bytes: of a block's lse, and of delta; of a stage
    static constexpr int LANES = B::LANES, SHARED = 2 * B::BYTES + 2 * STAGE, AT_ONCE = C == 64 ? 4 : 2;

    SIMT static void run(Simt simt, const Params &p) {
        const Tile tile = p.tiles[simt.block_y()];
        if (tile.length == 0) return;
        const Place place(tile, true);
        const int kv_head = simt.block_x(), warp = simt.warp(), group = p.heads / p.kv_heads;
        const int64_t stride = static_cast<int64_t>(p.heads) * C, kv_stride = static_cast<int64_t>(p.kv_heads) * C;
        const T *q = static_cast<const T *>(p.q) + place.start * p.q_stride;
        const T *grad_out = static_cast<const T *>(p.grad_out) + place.start * stride;
        const Angles angles{p, place.first};
        const bool active = warp * B::WARP_ROWS < place.rows, whole = B::warp_row(simt) + B::WARP_ROWS - 16 < place.rows;  // any part, all parts
        const uint32_t keys = simt.shared(), values = keys + B::BYTES;

        // Steps: the blocks of queries from the diagonal on, for one query head after another.
        const int blocks = place.blocks - place.block, steps = group * blocks;
        const auto query_block = [&](int step) { return place.block + step % blocks; };
        const auto query_rows = [&](int step) { return query_block(step) < place.blocks - 1 ? BLOCK : tile.length - (place.blocks - 1) * BLOCK; };
        const auto stage = [&](int step) { return values + B::BYTES + step % 2 * STAGE; };
        const auto load_queries = [&](int step) {
            const int head = kv_head * group + step / blocks, block = query_block(step), rows = query_rows(step);
            B::load(simt, stage(step), q + block * BLOCK * p.q_stride + head * C, p.q_stride, rows);
            B::load(simt, stage(step) + B::BYTES, grad_out + block * BLOCK * stride + head * C, stride, rows);
            if (simt.thread() < 32) {  // half of a warp copies lse, the other half delta
                const int64_t row = (static_cast<int64_t>(head) * p.tile_count + tile.slot + block) * BLOCK + simt.thread() % 16 * 4;
                simt.copy_async(stage(step) + 2 * B::BYTES + simt.thread() * 16, (simt.thread() < 16 ? p.lse : p.delta) + row, true);
            }
            simt.commit();
        };

        B::load(simt, keys, static_cast<const T *>(p.k) + place.first * p.k_stride + kv_head * C, p.k_stride, place.rows);
        B::load(simt, values, static_cast<const T *>(p.v) + place.first * p.v_stride + kv_head * C, p.v_stride, place.rows);
        simt.commit();
        load_queries(0);
        B::template wait_and_rotate<1>(simt, keys, angles, place.rows);

        const float scale = p.scale * LOG2_E;
        typename B::Output grad_k, grad_v;
        clear(grad_k);
        clear(grad_v);
        const auto take = [&](uint32_t queries, Pieces pieces, bool diagonal) INLINE {
            const uint32_t grads = queries + B::BYTES, lses = grads + B::BYTES, deltas = lses + LSE;
            UNROLL_BY(1)
            for (int first = 0; first < BLOCK; first += STRIP) {
                const Pieces here = B::of_strip(pieces, first);
                if (here == 0) continue;
                typename B::Scores scores, slopes;
                clear(scores);
                clear(slopes);
                UNROLL_BY(2)  // more, and registers do not suffice
                for (int k = 0; k < B::STEPS; ++k) {
                    typename B::Step rows;
                    B::read(simt, rows, keys, k);
                    B::multiply_transposed(simt, scores, rows, queries, first, k, here);
                }
                UNROLL
                for (int n = 0; n < STRIP / 8; ++n) {
                    if (!B::has_any(here, 8 * n)) continue;
                    const float2 lse = simt.load_shared8(lses + (first + 8 * n + B::lane_column(simt)) * 4);
                    UNROLL
                    for (int part = 0; part < PARTS; ++part) {
                        if (!B::has(here, part, 8 * n)) continue;
                        UNROLL
                        for (int i = 0; i < 4; ++i) {
                            const int query = first + 8 * n + B::lane_column(simt) + i % 2, key = B::warp_row(simt) + B::lane_row(simt) + 16 * part + i / 2 * 8;
                            const bool hidden = diagonal && key > query;
                            scores[part][n][i] = hidden ? 0.f : simt.exp2(fmaf(scores[part][n][i], scale, -(i % 2 ? lse.y : lse.x) * LOG2_E));
                        }
                    }
                }
                B::multiply(simt, grad_v, scores, grads, first, here);
                UNROLL_BY(2)  // more, and registers do not suffice
                for (int k = 0; k < B::STEPS; ++k) {
                    typename B::Step rows;
                    B::read(simt, rows, values, k);
                    B::multiply_transposed(simt, slopes, rows, grads, first, k, here);
                }
                UNROLL
                for (int n = 0; n < STRIP / 8; ++n) {
                    if (!B::has_any(here, 8 * n)) continue;
                    const float2 delta = simt.load_shared8(deltas + (first + 8 * n + B::lane_column(simt)) * 4);
                    UNROLL
                    for (int part = 0; part < PARTS; ++part) {
                        if (!B::has(here, part, 8 * n)) continue;
                        UNROLL
                        for (int i = 0; i < 4; ++i) slopes[part][n][i] = scores[part][n][i] * (slopes[part][n][i] - (i % 2 ? delta.y : delta.x));
                    }
                }
                B::multiply(simt, grad_k, slopes, queries, first, here);
            }
        };
        for (int step = 0; step < steps; ++step) {
            const int block = query_block(step), rows = query_rows(step);
            B::template wait_and_rotate<0>(simt, stage(step), Angles{p, place.start + block * BLOCK}, rows);
            simt.barrier();  // this stage has come for all, and all have done with the other
            if (step + 1 < steps) load_queries(step + 1);
            if (!active) continue;
            const bool diagonal = block == place.block;  // queries before the warp's keys do not see them
            const auto sees = [&](int row, int column) { return row * 16 < place.rows && column * 16 < rows && (!diagonal || row <= column); };
            if (diagonal || rows < BLOCK || !whole) take(stage(step), B::pieces(warp, sees), diagonal);
            else take(stage(step), ALL_PIECES, false);
        }

        multiply(grad_k, p.scale);
        B::rotate_back(simt, grad_k, angles, place.rows);
        simt.barrier();
        const int64_t own = place.first * kv_stride + kv_head * C;
        B::store(simt, grad_k, keys, static_cast<T *>(p.grad_k) + own, kv_stride, place.rows);
        B::store(simt, grad_v, values, static_cast<T *>(p.grad_v) + own, kv_stride, place.rows);
    }
};

int backward(const Params &params, void *stream) {
    return dispatch(params, [&](auto kind) {
        using T = typename decltype(kind)::T;
        constexpr int C = decltype(kind)::C;
        const int error = launch<GradQ<T, C>>(params.heads, params.tile_count, params, stream);
        return error ? error : launch<GradKV<T, C>>(params.kv_heads, params.tile_count, params, stream);
    });
}

}  // namespace attention
