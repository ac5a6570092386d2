// The kernels as a library for CPUs, for tests and for whoever wants to step through them: see emulator.h.

#include "forward.cu"

#include "backward.cu"

using emulator::Report;

// Each runs a launch with lanes and blocks in an order drawn from `seed`, and tells what it did.
extern "C" Report emulate_forward(const attention::Params *params, uint64_t seed) {
    emulator::report = {};
    emulator::seed = 2 * seed + 1;
    attention::forward(*params, nullptr);
    return emulator::report;
}

extern "C" Report emulate_backward(const attention::Params *params, uint64_t seed) {
    emulator::report = {};
    emulator::seed = 2 * seed + 1;
    attention::backward(*params, nullptr);
    return emulator::report;
}
