// A GPU that is not there, for tests: torch's CUDA device with this machine's memory, on which the CPU's kernels compute.
//
// Tensors are of device cuda for all that torch's front knows: dispatch, autograd, autocast, device guards. Underneath, an operation gets
// tensors of the CPU over the same memory. What a real one would refuse is refused: tensors of the CPU and of the GPU in one operation
// (but for numbers and indices), and what has no deterministic way where torch is told to keep to such. Memory is counted as torch's own
// allocator would count it, in blocks of 512 bytes, and so is how often a thread would have waited for the GPU.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::IValue;

constexpr c10::DeviceIndex GPUS = 4;
thread_local c10::DeviceIndex current = 0;  // a thread begins on the first, as with CUDA

Device device_of(c10::DeviceIndex index) { return Device(DeviceType::CUDA, index); }

// ---- Memory ------------------------------------------------------------------------------------------------------------

std::atomic<int64_t> held{0}, most{0};
constexpr size_t HEADER = 64;

struct Memory final : c10::Allocator {
    static void release(void *base) {
        held -= *static_cast<int64_t *>(base);
        c10::free_cpu(base);
    }
    c10::DataPtr allocate(size_t bytes) override {
        if (bytes == 0) return {nullptr, nullptr, &release_nothing, device_of(current)};
        void *base = c10::alloc_cpu(bytes + HEADER);
        const int64_t size = (bytes + 511) / 512 * 512;
        *static_cast<int64_t *>(base) = size;
        const int64_t now = held += size;
        for (int64_t before = most; now > before && !most.compare_exchange_weak(before, now);) {}
        return {static_cast<char *>(base) + HEADER, base, &release, device_of(current)};
    }
    static void release_nothing(void *) {}
    c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
    void copy_data(void *to, const void *from, size_t count) const override { default_copy_data(to, from, count); }
};
Memory memory;

// Memory of the machine from which, and to which, a copy goes on while its caller does.
struct Pinned final : c10::Allocator {
    static inline std::mutex lock;
    static inline std::map<const char *, size_t> blocks;

    static void release(void *base) {
        {
            const std::lock_guard<std::mutex> held(lock);
            blocks.erase(static_cast<char *>(base));
        }
        c10::free_cpu(base);
    }
    static bool has(const void *at) {
        const std::lock_guard<std::mutex> held(lock);
        auto after = blocks.upper_bound(static_cast<const char *>(at));
        return after != blocks.begin() && static_cast<const char *>(at) < (--after)->first + after->second;
    }
    c10::DataPtr allocate(size_t bytes) override {
        void *base = c10::alloc_cpu(std::max<size_t>(bytes, 1));
        const std::lock_guard<std::mutex> held(lock);
        blocks[static_cast<char *>(base)] = std::max<size_t>(bytes, 1);
        return {base, base, &release, Device(DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void *to, const void *from, size_t count) const override { default_copy_data(to, from, count); }
};
Pinned pinned;

std::atomic<int64_t> waits{0};  // how often a thread would have waited for the GPU

// Random numbers are those of a generator of the CPU.
struct Random final : c10::GeneratorImpl {
    at::Generator beneath;

    Random(Device device, at::Generator beneath) : GeneratorImpl(device, c10::DispatchKeySet(c10::DispatchKey::CUDA)), beneath(std::move(beneath)) {}
    void set_current_seed(uint64_t seed) override { beneath.set_current_seed(seed); }
    void set_offset(uint64_t offset) override { beneath.set_offset(offset); }
    uint64_t get_offset() const override { return beneath.get_offset(); }
    uint64_t current_seed() const override { return beneath.current_seed(); }
    uint64_t seed() override { return beneath.unsafeGetGeneratorImpl()->seed(); }
    void set_state(const c10::TensorImpl &state) override { beneath.unsafeGetGeneratorImpl()->set_state(state); }
    c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return beneath.unsafeGetGeneratorImpl()->get_state(); }
    GeneratorImpl *clone_impl() const override { return new Random(device(), beneath.clone()); }
};

// ---- Devices, streams and events: a device has one stream, and all work is done when it is asked for ----------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
    DeviceType type() const override { return DeviceType::CUDA; }
    Device exchangeDevice(Device device) const override {
        const Device before = getDevice();
        setDevice(device);
        return before;
    }
    Device getDevice() const override { return device_of(current); }
    void setDevice(Device device) const override { current = device.index(); }
    void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
    c10::Stream getStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
    c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
    c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getStream(device); }
    c10::Stream getNewStream(Device device, int) const override { return getStream(device); }
    c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
    c10::DeviceIndex deviceCount() const noexcept override { return GPUS; }
    void record(void **, const c10::Stream &, const c10::DeviceIndex, const c10::EventFlag) const override {}
    void block(void *, const c10::Stream &) const override {}
    bool queryEvent(void *) const override { return true; }
    bool queryStream(const c10::Stream &) const override { return true; }
    void synchronizeStream(const c10::Stream &) const override {}
    void synchronizeEvent(void *) const override {}
    void synchronizeDevice(const c10::DeviceIndex) const override {}
    void recordDataPtrOnStream(const c10::DataPtr &, const c10::Stream &) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

namespace c10d {  // whose registry it is

// What DistributedDataParallel logs by.
struct SimulatedTimer final : Timer {
    explicit SimulatedTimer(Device) {}
    std::optional<int64_t> measureDifference(Event, Event) override { return std::nullopt; }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, SimulatedTimer)

}  // namespace c10d

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
    explicit CUDAHooks(CUDAHooksArgs) {}
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return ::GPUS; }
    c10::DeviceIndex current_device() const override { return ::current; }
    c10::DeviceIndex getCurrentDevice() const override { return ::current; }
    int getNumGPUs() const override { return ::GPUS; }
    c10::Allocator *getCUDADeviceAllocator() const override { return &::memory; }
    c10::Allocator *getPinnedMemoryAllocator() const override { return &::pinned; }
    bool isPinnedPtr(const void *at) const override { return ::Pinned::has(at); }
    c10::Device getDeviceFromPtr(void *) const override { return ::device_of(::current); }
    const at::Generator &getDefaultGenerator(c10::DeviceIndex) const override { return at::globalContext().defaultGenerator(c10::Device(c10::DeviceType::CPU)); }
    Generator getNewGenerator(c10::DeviceIndex index) const override {
        return make_generator<::Random>(::device_of(index < 0 ? ::current : index), at::detail::createCPUGenerator());
    }
    void deviceSynchronize(c10::DeviceIndex) const override {}
};
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

namespace {

// ---- Operations --------------------------------------------------------------------------------------------------------

Tensor empty_strided(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
    const c10::OptionalDeviceGuard guard(device && device->has_index() ? device : std::nullopt);
    return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), &memory,
                                             c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

Tensor empty(c10::SymIntArrayRef sizes, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>, std::optional<Device> device, std::optional<bool>,
             std::optional<c10::MemoryFormat> format) {
    const c10::OptionalDeviceGuard guard(device && device->has_index() ? device : std::nullopt);
    return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

// A tensor of the CPU over the same memory.
Tensor beneath(const Tensor &x) {
    if (!x.defined() || !x.is_cuda()) return x;
    const auto options = at::TensorOptions().dtype(x.dtype());
    if (!x.has_storage() || x.numel() == 0) return at::empty_strided(x.sizes(), x.strides(), options);
    return at::from_blob(const_cast<void *>(x.const_data_ptr()), x.sizes(), x.strides(), [](void *) {}, options, Device(DeviceType::CPU));
}

Tensor &copy_(Tensor &self, const Tensor &source, bool non_blocking) {
    const Tensor &host = self.is_cuda() ? source : self;
    if (!host.is_cuda() && !(non_blocking && Pinned::has(host.const_data_ptr()))) ++waits;
    beneath(self).copy_(beneath(source));
    return self;
}

Tensor view(const Tensor &self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

// Which torch has for GPUs alone.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor &grad, const Tensor &x, at::IntArrayRef shape, const Tensor &inverse, const std::optional<Tensor> &weight,
                                             std::array<bool, 2> wanted) {
    TORCH_CHECK(weight && grad.dtype() == x.dtype() && weight->dtype() == x.dtype() && inverse.dtype() == at::kFloat && shape.size() == 1 &&
                inverse.numel() * shape[0] == x.numel() && weight->numel() == shape[0], "_fused_rms_norm_backward: types or shapes");
    const Tensor normed = x.to(at::kFloat) * inverse, wide = grad.to(at::kFloat), along = wide * weight->to(at::kFloat);
    return {((along - normed * (along * normed).mean(-1, true)) * inverse).to(x.scalar_type()),
            wanted[1] ? (wide * normed).flatten(0, -2).sum(0).to(x.scalar_type()) : Tensor()};
}

// Operations of which some arguments may be the CPU's where others are the GPU's.
const std::set<std::string> MIXED = {"aten::index.Tensor", "aten::index.Tensor_out", "aten::index_put_", "aten::_index_put_impl_", "aten::_local_scalar_dense"};

// Those for which torch's documentation of use_deterministic_algorithms says that on CUDA they have no way to it: always, or of floats.
const std::set<std::string> NEVER = {"aten::put_", "aten::histc", "aten::kthvalue", "aten::median.dim", "aten::scatter_reduce.two"};
const std::set<std::string> NOT_OF_FLOATS = {"aten::cumsum", "aten::cumsum_", "aten::cumsum.out", "aten::bincount"};  // which has floats where it has weights

// Those whose result's size, or whose result, the caller has to know.
const std::set<std::string> WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::bincount", "aten::masked_select"};

void compute(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
    const auto &schema = op.schema();
    const std::string name = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
    const size_t count = schema.arguments().size(), first = stack->size() - count;
    std::unordered_map<const c10::TensorImpl *, Tensor> originals;  // of what the operation gets in their place
    std::optional<Device> on_gpu;
    bool floats = false;
    std::string on_cpu;
    const auto lower = [&](const Tensor &x) {
        if (!x.defined()) return x;
        if (x.is_cuda()) {
            TORCH_CHECK(!on_gpu || *on_gpu == x.device(), name, ": tensors of ", *on_gpu, " and of ", x.device(), " in one operation");
            on_gpu = x.device();
            floats |= x.is_floating_point();
            const Tensor lowered = beneath(x);
            originals.emplace(lowered.unsafeGetTensorImpl(), x);
            return lowered;
        }
        if (x.dim() > 0 && MIXED.count(name)) ++waits;
        if (x.dim() > 0) on_cpu = c10::str(x.scalar_type(), x.sizes());
        return x;
    };
    for (size_t i = 0; i < count; ++i) {
        IValue &value = (*stack)[first + i];
        if (value.isTensor()) value = lower(value.toTensor());
        else if (value.isTensorList()) {
            c10::List<Tensor> lowered;
            for (const Tensor &x : value.toTensorVector()) lowered.push_back(lower(x));
            value = lowered;
        } else if (value.isOptionalTensorList()) {
            c10::List<std::optional<Tensor>> lowered;
            for (const auto &x : value.toOptionalTensorVector()) {
                if (x && x->is_cuda() && x->scalar_type() == at::kBool) ++waits;  // it becomes the numbers of what is true
                lowered.push_back(x ? std::optional<Tensor>(lower(*x)) : x);
            }
            value = lowered;
        } else if (value.isGenerator()) {
            if (auto *random = dynamic_cast<Random *>(value.toGenerator().unsafeGetGeneratorImpl())) value = random->beneath;
        } else if (value.isDevice() && value.toDevice().is_cuda()) {
            on_gpu = value.toDevice().has_index() ? value.toDevice() : device_of(current);
            value = Device(DeviceType::CPU);
        }
    }
    TORCH_CHECK(on_cpu.empty() || !on_gpu || MIXED.count(name), name, ": tensors of ", *on_gpu, " and of the CPU (", on_cpu, ") in one operation");
    if (NEVER.count(name) || (floats && NOT_OF_FLOATS.count(name))) at::globalContext().alertNotDeterministic(name);
    for (const auto &returned : schema.returns())
        TORCH_CHECK(!returned.alias_info() || returned.alias_info()->isWrite(), name, " gives a view: it needs code of its own in tests/simulated/gpu.cpp");
    if (WAITING.count(name)) ++waits;
    op.callBoxed(stack);
    const size_t results = schema.returns().size();
    const auto raise = [&](const Tensor &x) {
        if (!x.defined() || x.is_cuda()) return x;
        if (const auto known = originals.find(x.unsafeGetTensorImpl()); known != originals.end()) {
            if (x.sizes() != known->second.sizes()) {  // an empty one that the operation was to give its size
                known->second.resize_(x.sizes());
                beneath(known->second).copy_(x);
            }
            return known->second;
        }
        const Tensor raised = at::empty_strided(x.sizes(), x.strides(), x.options().device(on_gpu ? *on_gpu : device_of(current)));
        if (x.numel()) beneath(raised).copy_(x);
        return raised;
    };
    for (size_t i = 0; i < results; ++i) {
        IValue &value = (*stack)[stack->size() - results + i];
        if (value.isTensor()) value = raise(value.toTensor());
        else if (value.isTensorList()) {
            c10::List<Tensor> raised;
            for (const Tensor &x : value.toTensorVector()) raised.push_back(raise(x));
            value = raised;
        }
    }
}

TORCH_LIBRARY(simulated, m) {
    m.def("beneath(Tensor x) -> Tensor", &beneath);
    m.def("waits() -> int", []() -> int64_t { return waits; });
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
    m.impl("empty.memory_format", &empty);
    m.impl("empty_strided", &empty_strided);
    m.impl("copy_", &copy_);
    m.impl("as_strided", &at::native::as_strided_tensorimpl);
    m.impl("view", &view);
    m.impl("_reshape_alias", &at::native::_reshape_alias);
    m.impl("unfold", &at::native::unfold);
    m.impl("resize_", &at::native::resize_);
    m.impl("_fused_rms_norm_backward", &rms_norm_backward);
    m.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&compute>());  // which has a kernel, where by default it is composed of others
    m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
}

struct Ready {
    Ready() { c10::SetAllocator(DeviceType::CUDA, &memory); }
} ready;

}  // namespace

extern "C" int current_device() { return current; }
extern "C" void set_device(int index) { current = index; }
extern "C" int64_t held_bytes() { return held; }
extern "C" int64_t most_bytes() { return most; }
extern "C" void forget_most() { most = held.load(); }
