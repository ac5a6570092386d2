// Every member of Simt once, on given operands. What it finds on a GPU is what the emulator must find: tests/test_kernels_machine.py.
//
//     nvcc -std=c++17 -arch=native -shared -Xcompiler -fPIC -o probe.so probe.cu       for the device
//     g++ -std=c++17 -O2 -shared -fPIC -x c++ -o probe.so probe.cu                     for the emulator

#include "simt.h"

constexpr int WORDS = 32, FLOATS = 16;  // that a lane finds

struct ProbeParams {
    const uint32_t *words;  // (lanes, 4): pairs of 16-bit elements, finite
    const float *floats;    // (lanes, 4)
    uint32_t *found;        // (lanes, WORDS)
    float *numbers;         // (lanes, FLOATS)
};

// Two warps, so that barriers and neighbours are more than a warp's.
template <class T, int WARPS>
struct Probe {
    static constexpr int LANES = 32 * WARPS, SHARED = 2 * LANES * 16, AT_ONCE = 1;

    SIMT static void run(Simt simt, const ProbeParams &p) {
        const int lane = simt.thread(), other = LANES - 1 - lane;
        const uint32_t own = simt.shared() + lane * 16, others = simt.shared() + other * 16, second = LANES * 16;
        const float *floats = p.floats + lane * 4;
        uint32_t *found = p.found + lane * WORDS, fragment[4];
        float *numbers = p.numbers + lane * FLOATS;
        const Words words = simt.load16(p.words + lane * 4);

        // Words 0: the lane's own copy, of which some are zeros, after all but the last; 4: what another lane's last one brought.
        simt.copy_async(own, p.words + other * 4, lane % 5 != 0);
        simt.commit();
        simt.copy_async(own + second, p.words + lane * 4, true);
        simt.commit();
        simt.template wait<1>();
        simt.store16(found, simt.load_shared16(own));
        simt.template wait<0>();
        simt.barrier();
        simt.store16(found + 4, simt.load_shared16(others + second));

        // Words 8: a shared store of one word among four; numbers 0: half of the four, of two lanes' floats of 1.
        simt.barrier();
        simt.store_shared16(own, words);
        simt.store_shared4(own + second, 0x3f800000);
        simt.store_shared4(own + second + 4, 0xbf800000);
        simt.store_shared4(own + second + 8, words.word[3]);
        simt.barrier();
        const Words mixed = simt.load_shared16(others + second);
        found[8] = mixed.word[0], found[9] = mixed.word[1], found[10] = mixed.word[2];
        const float2 pair = simt.load_shared8(others + second);
        numbers[0] = pair.x, numbers[1] = pair.y;

        // Words 12 and 16: fragments of what the lanes stored.
        simt.ldmatrix(fragment, own);
        for (int i = 0; i < 4; ++i) found[12 + i] = fragment[i];
        simt.ldmatrix_trans(fragment, own);
        for (int i = 0; i < 4; ++i) found[16 + i] = fragment[i];

        // Numbers 2: exchanges; 7: what is unpacked. Words 20: what is packed, in range, out of it, halfway between two of bf16's, of fp16's.
        for (int i = 0; i < 5; ++i) numbers[2 + i] = simt.xor_lane(floats[0], 1 << i);
        const float2 parts = simt.template unpack<T>(words.word[0]);
        numbers[7] = parts.x, numbers[8] = parts.y;
        found[20] = simt.template pack<T>(floats[2], floats[3]);
        found[21] = simt.template pack<T>(70000.f, -1e-9f);
        found[22] = simt.template pack<T>(1.00390625f, 1.01171875f);
        found[23] = simt.template pack<T>(1.00048828125f, 1.00146484375f);
        found[24] = simt.block_x() + simt.block_y();
        found[25] = simt.warp();

        // Numbers 9: powers of two; 11: a product of words, and sums of the lane's floats.
        numbers[9] = simt.exp2(floats[1]), numbers[10] = simt.exp2(-INFINITY);
        float sums[4] = {floats[0], floats[1], floats[2], floats[3]};
        simt.template mma<T>(sums, words.word, words.word[1], words.word[2]);
        for (int i = 0; i < 4; ++i) numbers[11 + i] = sums[i];
    }
};

extern "C" int probe(const ProbeParams *params, int fp16_words) {
    return fp16_words ? launch<Probe<fp16, 2>>(1, 1, *params, nullptr) : launch<Probe<bf16, 2>>(1, 1, *params, nullptr);
}

#ifndef __CUDACC__
extern "C" const emulator::Report *probe_report() { return &emulator::report; }
#endif
