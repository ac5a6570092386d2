// `Simt` on the CPU, stricter than a device. Included by simt.h; not for nvcc.
//
// A block's lanes are fibers. A lane runs until it calls something that a warp does together, and leaves its operands
// there; once all lanes of the warp have come to the same call it is computed for all of them, and they go on. Which warp
// goes next, and in which order its lanes do, is drawn from a seed. On top of what a device does,
//
//   * shared memory is full of NaNs when a block begins, and so is what a copy is on its way to;
//   * a copy's data is there after its own lane's `wait` and not before;
//   * each word of shared memory knows who wrote and who read it since the last barrier: a lane that reads what another
//     wrote, or writes what another read or wrote, without a barrier between, is a race, whether or not it did harm;
//   * lanes of a warp that come to different calls, a barrier that some warps never reach, addresses that are not
//     aligned or outside, and copies never waited for, are errors;
//   * shared memory's banks are watched: `conflicts` counts the passes that an access takes beyond its first.
//
// What it cannot see: whether the text of the device's instructions is right, and time.
#pragma once

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include <ucontext.h>

struct float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace emulator {

constexpr int WARP = 32;
constexpr uint32_t POISON = 0x7fff7fff;  // a NaN as fp32, and twice one as bf16 or fp16

// What launches did, all told but for shared_bytes, which is the most that a block had: mma and ldmatrix by warp, passes of shared
// memory (128 bytes each, copies among them), barriers by block, bytes and exp2 by lane.
struct Report {
    int64_t errors, conflicts, blocks, shared_bytes, mma, ldmatrix, passes, barriers, exp2, copied_bytes, loaded_bytes, stored_bytes;
    char first_error[256];
};
inline Report report;
inline uint64_t seed = 0;

inline void fail(const char *what, int64_t where) {
    if (!report.errors++) std::snprintf(report.first_error, sizeof report.first_error, "%s (%lld)", what, static_cast<long long>(where));
}

inline uint32_t draw() {  // xorshift64*, Vigna 2016
    seed ^= seed >> 12, seed ^= seed << 25, seed ^= seed >> 27;
    return static_cast<uint32_t>((seed * 0x2545f4914f6cdd1dull) >> 32);
}

struct Lane;
using Together = void (*)(Lane *warp);  // computes a call for all lanes of a warp

struct Copy {
    uint32_t to;
    const void *from;
    bool valid;
};

struct Lane {
    int thread, block_x, block_y;
    jmp_buf here;
    Together call;   // what the lane waits for; null when it has ended
    void *operands;  // on the lane's own stack
    std::vector<std::vector<Copy>> copies;  // by commit; the last is still open
};

// Who touched a word of shared memory, and after how many barriers. Epochs begin at 1, so 0 is never.
struct Word {
    uint32_t written = 0, read = 0;
    int16_t writer = 0, reader = 0;
    bool pending = false;
};
constexpr int SEVERAL = -1;

struct Block {
    std::vector<uint32_t> memory;
    std::vector<Word> words;
    uint32_t epoch;
    jmp_buf scheduler;
    std::vector<Lane> lanes;
};
inline Block block;

inline bool inside(uint32_t at, uint32_t bytes) {
    if (at % bytes == 0 && at + bytes <= block.memory.size() * 4) return true;
    fail("shared memory: address outside or not aligned", at);
    return false;
}

inline void reads(int thread, uint32_t at, uint32_t bytes) {
    for (uint32_t i = at / 4; i < (at + bytes) / 4; ++i) {
        Word &word = block.words[i];
        if (word.pending) fail("shared memory read before the copy to it was waited for", at);
        else if (!word.written) fail("shared memory read that nobody has written", at);
        else if (word.written == block.epoch && word.writer != thread) fail("race: read without a barrier after another lane's write", at);
        word.reader = word.read == block.epoch && word.reader != thread ? SEVERAL : thread;
        word.read = block.epoch;
    }
}

inline void writes(int thread, uint32_t at, uint32_t bytes, bool begins_copy) {
    for (uint32_t i = at / 4; i < (at + bytes) / 4; ++i) {
        Word &word = block.words[i];
        if (word.pending) fail("shared memory written before the copy to it was waited for", at);
        if (word.written == block.epoch && word.writer != thread) fail("race: write without a barrier after another lane's write", at);
        if (word.read == block.epoch && word.reader != thread) fail("race: write without a barrier after another lane's read", at);
        word.written = block.epoch;
        word.writer = thread;
        word.pending = begins_copy;
    }
}

// Passes that shared memory takes for one access by some lanes: it has 32 banks of 4 bytes, and serves equal words at once.
inline void banks(const uint32_t *at, int lanes, uint32_t bytes) {
    const int together = 128 / bytes;  // lanes that are served in one pass at best
    for (int first = 0; first < lanes; first += together) {
        uint32_t rows[32][32];
        int count[32] = {}, most = 1;
        for (int i = first; i < first + together && i < lanes; ++i)
            for (uint32_t word = at[i] / 4; word < (at[i] + bytes) / 4; ++word) {
                const int bank = word % 32;
                bool seen = false;
                for (int j = 0; j < count[bank]; ++j) seen |= rows[bank][j] == word;
                if (!seen) rows[bank][count[bank]++] = word;
                most = count[bank] > most ? count[bank] : most;
            }
        report.passes += most;
        report.conflicts += most - 1;
    }
}

inline void yield(Lane &lane, Together call, void *operands) {
    lane.call = call;
    lane.operands = operands;
    if (!_setjmp(lane.here)) _longjmp(block.scheduler, 1);
}

inline void at_barrier(Lane *) {}  // computed by the block, not by the warp

inline float widen(uint32_t bits, bf16 *) {
    bits <<= 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float widen(uint32_t bits, fp16 *) {
    const uint16_t half = bits;
    _Float16 value;
    std::memcpy(&value, &half, 2);
    return value;
}
inline uint32_t narrow(float value, bf16 *) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
}
inline uint32_t narrow(float value, fp16 *) {
    const _Float16 half = value;
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

struct Mma {
    float (*c)[4];
    const uint32_t (*a)[4];
    uint32_t b[2];
};

template <class T>
void mma(Lane *warp) {
    float a[16][16], b[16][8], c[16][8];
    const auto both = [](uint32_t pair, float &first, float &second) {
        first = widen(pair & 0xffff, static_cast<T *>(nullptr));
        second = widen(pair >> 16, static_cast<T *>(nullptr));
    };
    for (int lane = 0; lane < WARP; ++lane) {
        const Mma &mine = *static_cast<Mma *>(warp[lane].operands);
        const int g = lane / 4, t = 2 * (lane % 4);
        for (int i = 0; i < 4; ++i) {
            float *pair = &a[g + 8 * (i % 2)][t + 8 * (i / 2)];
            both((*mine.a)[i], pair[0], pair[1]);
            c[g + 8 * (i / 2)][t + i % 2] = (*mine.c)[i];
        }
        for (int i = 0; i < 2; ++i) both(mine.b[i], b[t + 8 * i][g], b[t + 8 * i + 1][g]);
    }
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k)
            for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < WARP; ++lane)
        for (int i = 0; i < 4; ++i) (*static_cast<Mma *>(warp[lane].operands)->c)[i] = c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    ++report.mma;
}

struct Access {
    uint32_t at;
    uint32_t *words;  // of the lane
    Copy copy;
};

template <int BYTES>
void watch(Lane *warp) {
    uint32_t at[WARP];
    for (int lane = 0; lane < WARP; ++lane) at[lane] = static_cast<Access *>(warp[lane].operands)->at;
    banks(at, WARP, BYTES);
}

template <bool TRANS>
void ldmatrix(Lane *warp) {
    uint16_t matrix[4][8][8];
    watch<16>(warp);
    for (int lane = 0; lane < WARP; ++lane) {
        const uint32_t at = static_cast<Access *>(warp[lane].operands)->at;
        if (!inside(at, 16)) return;
        reads(SEVERAL, at, 16);
        std::memcpy(matrix[lane / 8][lane % 8], &block.memory[at / 4], 16);
    }
    for (int lane = 0; lane < WARP; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int g = lane / 4, t = 2 * (lane % 4);
            const uint32_t low = TRANS ? matrix[i][t][g] : matrix[i][g][t], high = TRANS ? matrix[i][t + 1][g] : matrix[i][g][t + 1];
            static_cast<Access *>(warp[lane].operands)->words[i] = low | high << 16;
        }
    ++report.ldmatrix;
}

template <int BYTES, bool STORE>
void shared_words(Lane *warp) {
    watch<BYTES>(warp);
    for (int lane = 0; lane < WARP; ++lane) {
        const Access &mine = *static_cast<Access *>(warp[lane].operands);
        if (!inside(mine.at, BYTES)) return;
        uint32_t *memory = &block.memory[mine.at / 4];
        if (STORE) writes(warp[lane].thread, mine.at, BYTES, false);
        else reads(warp[lane].thread, mine.at, BYTES);
        std::memcpy(STORE ? memory : mine.words, STORE ? mine.words : memory, BYTES);
    }
}

inline void copy_async(Lane *warp) {
    watch<16>(warp);
    for (int lane = 0; lane < WARP; ++lane) {
        const Copy &copy = static_cast<Access *>(warp[lane].operands)->copy;
        if (!inside(copy.to, 16)) return;
        if (copy.valid && reinterpret_cast<uintptr_t>(copy.from) % 16) fail("global memory: address of a copy not aligned", warp[lane].thread);
        writes(warp[lane].thread, copy.to, 16, true);
        for (int i = 0; i < 4; ++i) block.memory[copy.to / 4 + i] = POISON;
        warp[lane].copies.back().push_back(copy);
        report.copied_bytes += copy.valid ? 16 : 0;
    }
}

struct Exchange {
    float value, found;
    int mask;
};

inline void xor_lane(Lane *warp) {
    for (int lane = 0; lane < WARP; ++lane) {
        Exchange &mine = *static_cast<Exchange *>(warp[lane].operands);
        mine.found = static_cast<Exchange *>(warp[lane ^ mine.mask].operands)->value;
    }
}

}  // namespace emulator

class Simt {
    emulator::Lane &lane;

    void shared_access(emulator::Together call, uint32_t at, uint32_t *words) {
        emulator::Access access{at, words, {}};
        emulator::yield(lane, call, &access);
    }

public:
    explicit Simt(emulator::Lane &lane) : lane(lane) {}

    int thread() const { return lane.thread; }
    int warp() const { return lane.thread / emulator::WARP; }
    int block_x() const { return lane.block_x; }
    int block_y() const { return lane.block_y; }
    uint32_t shared() const { return 0; }

    void barrier() { emulator::yield(lane, emulator::at_barrier, nullptr); }

    float xor_lane(float value, int mask) {
        emulator::Exchange exchange{value, 0, mask};
        emulator::yield(lane, emulator::xor_lane, &exchange);
        return exchange.found;
    }

    float exp2(float x) {
        ++emulator::report.exp2;
        return std::exp2(x);
    }

    void ldmatrix(uint32_t (&r)[4], uint32_t row) { shared_access(emulator::ldmatrix<false>, row, r); }
    void ldmatrix_trans(uint32_t (&r)[4], uint32_t row) { shared_access(emulator::ldmatrix<true>, row, r); }

    template <class T>
    void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        emulator::Mma operands{&c, &a, {b0, b1}};
        emulator::yield(lane, emulator::mma<T>, &operands);
    }

    void copy_async(uint32_t to, const void *from, bool valid) {
        emulator::Access access{to, nullptr, {to, from, valid}};
        emulator::yield(lane, emulator::copy_async, &access);
    }
    void commit() { lane.copies.emplace_back(); }
    template <int OPEN>
    void wait() {
        while (lane.copies.size() > OPEN + 1) {
            for (const emulator::Copy &copy : lane.copies.front()) {
                uint32_t *to = &emulator::block.memory[copy.to / 4];
                if (copy.valid) std::memcpy(to, copy.from, 16);
                else std::memset(to, 0, 16);
                for (int i = 0; i < 4; ++i) {
                    emulator::Word &word = emulator::block.words[copy.to / 4 + i];
                    word.pending = false;
                    word.written = emulator::block.epoch;
                }
            }
            lane.copies.erase(lane.copies.begin());
        }
    }

    Words load_shared16(uint32_t at) {
        Words words{};
        shared_access(emulator::shared_words<16, false>, at, words.word);
        return words;
    }
    float2 load_shared8(uint32_t at) {
        float2 pair{};
        shared_access(emulator::shared_words<8, false>, at, reinterpret_cast<uint32_t *>(&pair));
        return pair;
    }
    void store_shared16(uint32_t at, Words words) { shared_access(emulator::shared_words<16, true>, at, words.word); }
    void store_shared4(uint32_t at, uint32_t word) { shared_access(emulator::shared_words<4, true>, at, &word); }

    Words load16(const void *from) {
        Words words{};
        if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("global memory: address of a load not aligned", lane.thread);
        std::memcpy(&words, from, 16);
        emulator::report.loaded_bytes += 16;
        return words;
    }
    void store16(void *to, const Words &words) {
        if (reinterpret_cast<uintptr_t>(to) % 16) emulator::fail("global memory: address of a store not aligned", lane.thread);
        std::memcpy(to, &words, 16);
        emulator::report.stored_bytes += 16;
    }

    template <class T>
    uint32_t pack(float low, float high) {
        return emulator::narrow(low, static_cast<T *>(nullptr)) | emulator::narrow(high, static_cast<T *>(nullptr)) << 16;
    }
    template <class T>
    float2 unpack(uint32_t pair) {
        return {emulator::widen(pair & 0xffff, static_cast<T *>(nullptr)), emulator::widen(pair >> 16, static_cast<T *>(nullptr))};
    }
};

namespace emulator {

constexpr size_t STACK = 1 << 16;
inline void (*body)(Simt);

inline void first_call(int number) {
    Lane &lane = block.lanes[number];
    if (!_setjmp(lane.here)) _longjmp(block.scheduler, 1);  // only now is the stack the lane's
    body(Simt(lane));
    if (lane.copies.size() > 1 || !lane.copies.back().empty()) fail("a copy was never waited for", number);
    lane.call = nullptr;
    _longjmp(block.scheduler, 1);
}

inline void start(Lane &lane, char *stack) {
    static ucontext_t fiber, from;
    getcontext(&fiber);
    fiber.uc_stack.ss_sp = stack;
    fiber.uc_stack.ss_size = STACK;
    fiber.uc_link = nullptr;
    makecontext(&fiber, reinterpret_cast<void (*)()>(first_call), 1, lane.thread);
    if (!_setjmp(block.scheduler)) swapcontext(&from, &fiber);
}

inline void resume(Lane &lane) {
    if (!_setjmp(block.scheduler)) _longjmp(lane.here, 1);
}

// Lets a warp's lanes run to their next call and computes it. False if they are not all at the same one.
inline bool step(Lane *warp) {
    const uint32_t order = draw();
    for (int i = 0; i < WARP; ++i) resume(warp[(i * (order % WARP | 1) + order / WARP) % WARP]);
    for (int i = 1; i < WARP; ++i)
        if (warp[i].call != warp[0].call) return fail("lanes of a warp came to different calls", warp[i].thread), false;
    if (warp[0].call) warp[0].call(warp);
    return true;
}

inline void run_block(int warps) {
    std::vector<int> running;
    for (int warp = 0; warp < warps; ++warp) running.push_back(warp);
    int waiting = 0, ended = 0;
    while (ended < warps) {
        if (running.empty()) {
            if (ended) return fail("a barrier that some warps never reach", waiting);
            for (int warp = 0; warp < warps; ++warp) running.push_back(warp);
            waiting = 0;
            ++block.epoch;
            ++report.barriers;
        }
        const size_t drawn = draw() % running.size();
        Lane *warp = &block.lanes[running[drawn] * WARP];
        if (!step(warp)) return;
        if (warp->call && warp->call != at_barrier) continue;
        (warp->call ? waiting : ended)++;
        running.erase(running.begin() + drawn);
    }
}

}  // namespace emulator

// Runs Kernel::run on x * y blocks, in an order drawn from the seed.
template <class Kernel, class Params>
int launch(int x, int y, const Params &params, void *) {
    using namespace emulator;
    static const Params *current;
    static std::vector<char> stacks(Kernel::LANES * STACK);
    current = &params;
    report.shared_bytes = std::max<int64_t>(report.shared_bytes, Kernel::SHARED);
    body = [](Simt simt) { Kernel::run(simt, *current); };
    std::vector<int> order(x * y);
    for (int i = 0; i < x * y; ++i) {
        const int j = draw() % (i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    for (const int number : order) {
        block.memory.assign(Kernel::SHARED / 4, POISON);
        block.words.assign(Kernel::SHARED / 4, Word());
        block.epoch = 1;
        block.lanes.assign(Kernel::LANES, Lane());
        for (int thread = 0; thread < Kernel::LANES; ++thread) {
            Lane &lane = block.lanes[thread];
            lane.thread = thread;
            lane.block_x = number % x;
            lane.block_y = number / x;
            lane.copies.resize(1);
            start(lane, &stacks[thread * STACK]);
        }
        run_block(Kernel::LANES / WARP);
        ++report.blocks;
    }
    return 0;
}
