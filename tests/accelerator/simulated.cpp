// An accelerator that is not there: memory of its own, kept apart from the CPU's, computed with by the CPU.
//
// It is torch's "PrivateUse1" device. What a machine without a GPU cannot show otherwise shows here:
// - a tensor on the wrong device is an error, for kernels refuse to mix the device's tensors with the CPU's;
// - the device's memory is measured in its allocator, and may be limited, so that it runs out;
// - copies to and from pinned memory are late: they happen when their stream is waited for, so that pinned memory which
//   is read or changed too early holds wrong numbers;
// - memory used on one stream and then on another, without the second waiting for the first, is an error.

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

// Of the Python that loads this library.
extern "C" int PyGILState_Check();
extern "C" void* PyEval_SaveThread();
extern "C" void PyEval_RestoreThread(void*);

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;
using c10::StreamId;

constexpr DeviceType kType = DeviceType::PrivateUse1;
const Device kDevice(kType, 0);
std::recursive_mutex mutex;

// Waits for the mutex without Python's lock: whoever holds the mutex may need that lock, to count a tensor's users.
struct Locked {
  explicit Locked(std::recursive_mutex&) {
    if (mutex.try_lock()) return;
    void* thread = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
    mutex.lock();
    if (thread) PyEval_RestoreThread(thread);
  }
  ~Locked() { mutex.unlock(); }
};

// ---- memory ---------------------------------------------------------------------------------------------------------

int64_t allocated = 0, peak = 0, limit = std::numeric_limits<int64_t>::max();
std::map<void*, size_t> device_blocks, pinned_blocks;

struct Use {
  StreamId stream;
  int64_t when;
};
std::map<void*, Use> last_use;  // by the address of the storage

bool pinned(const void* address) {
  Locked locked(mutex);
  auto after = pinned_blocks.upper_bound(const_cast<void*>(address));
  if (after == pinned_blocks.begin()) return false;
  auto block = std::prev(after);
  return static_cast<const char*>(address) < static_cast<char*>(block->first) + block->second;
}

void* from_system(size_t bytes) {
  void* address = nullptr;
  TORCH_CHECK(posix_memalign(&address, 64, std::max<size_t>(bytes, 64)) == 0, "The computer is out of memory.");
  return address;
}

void free_device(void* address) {
  Locked locked(mutex);
  allocated -= static_cast<int64_t>(device_blocks[address]);
  device_blocks.erase(address);
  last_use.erase(address);
  std::free(address);
}

void free_pinned(void* address) {
  Locked locked(mutex);
  pinned_blocks.erase(address);
  std::free(address);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    Locked locked(mutex);
    if (bytes == 0) return {nullptr, nullptr, &free_device, kDevice};
    TORCH_CHECK_WITH(
        OutOfMemoryError, allocated + static_cast<int64_t>(bytes) <= limit, "The simulated accelerator is out of memory: ",
        bytes, " bytes were asked for, ", allocated, " of ", limit, " are taken.");
    void* address = from_system(bytes);
    device_blocks[address] = bytes;
    allocated += static_cast<int64_t>(bytes);
    peak = std::max(peak, allocated);
    return {address, address, &free_device, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_device; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
} device_allocator;

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    Locked locked(mutex);
    void* address = from_system(bytes);
    pinned_blocks[address] = bytes;
    return {address, address, &free_pinned, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
} pinned_allocator;

REGISTER_ALLOCATOR(kType, &device_allocator);

// ---- streams --------------------------------------------------------------------------------------------------------

struct Queue {
  int64_t queued = 0, done = 0;             // numbers of jobs
  std::deque<std::function<void()>> jobs;   // those that are not done
  std::map<StreamId, int64_t> waited;       // up to which use of each other stream this one has waited for it
};
std::map<StreamId, Queue> queues;
int64_t uses = 0;
StreamId newest_stream = 0;
thread_local StreamId current_stream = 0;

struct Mark {  // an event: how far a stream had been filled
  StreamId stream;
  int64_t queued, uses;
};

void drain(StreamId stream, int64_t until) {
  Queue& queue = queues[stream];
  while (queue.done < until && !queue.jobs.empty()) {
    auto job = std::move(queue.jobs.front());
    queue.jobs.pop_front();
    ++queue.done;
    job();
  }
}

void drain_all(StreamId stream) { drain(stream, std::numeric_limits<int64_t>::max()); }

void enqueue(StreamId stream, std::function<void()> job) {
  Queue& queue = queues[stream];
  ++queue.queued;
  queue.jobs.push_back(std::move(job));
}

// A stream waits for another: what the other has been given is done before what this one is given next.
void wait(StreamId waiting, const Mark& mark) {
  if (waiting == mark.stream) return;
  enqueue(waiting, [mark] { drain(mark.stream, mark.queued); });
  auto& waited = queues[waiting].waited;
  waited[mark.stream] = std::max(waited[mark.stream], mark.uses);
  for (auto& [stream, when] : queues[mark.stream].waited) waited[stream] = std::max(waited[stream], when);
}

Mark mark_of(StreamId stream) { return {stream, queues[stream].queued, uses}; }

// The storage is used on a stream now: an error if another used it last and has not been waited for.
void use(const Tensor& tensor, StreamId stream) {
  if (!tensor.defined() || tensor.device().type() != kType || !tensor.has_storage()) return;
  void* address = tensor.storage().mutable_data();
  if (address == nullptr) return;
  auto [last, fresh] = last_use.try_emplace(address, Use{stream, 0});
  if (!fresh && last->second.stream != stream) {
    TORCH_CHECK(
        queues[stream].waited[last->second.stream] >= last->second.when, "Stream ", stream,
        " uses memory that stream ", last->second.stream, " may still be using: it has not waited for it.");
  }
  last->second = {stream, ++uses};
}

struct GuardImpl final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return kType; }
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream getStream(Device) const override { return Stream(Stream::UNSAFE, kDevice, current_stream); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::UNSAFE, kDevice, 0); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  Stream getNewStream(Device, int) const override {
    Locked locked(mutex);
    return Stream(Stream::UNSAFE, kDevice, ++newest_stream);
  }
  Stream exchangeStream(Stream stream) const override {
    return Stream(Stream::UNSAFE, kDevice, std::exchange(current_stream, stream.id()));
  }
  void record(void** event, const Stream& stream, const DeviceIndex, const c10::EventFlag) const override {
    Locked locked(mutex);
    delete static_cast<Mark*>(*event);
    *event = new Mark(mark_of(stream.id()));
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Mark*>(event); }
  void block(void* event, const Stream& stream) const override {
    Locked locked(mutex);
    if (event != nullptr) wait(stream.id(), *static_cast<Mark*>(event));
  }
  bool queryEvent(void* event) const override {
    Locked locked(mutex);
    const Mark* mark = static_cast<Mark*>(event);
    return mark == nullptr || queues[mark->stream].done >= mark->queued;
  }
  void synchronizeEvent(void* event) const override {
    Locked locked(mutex);
    if (event != nullptr) drain(static_cast<Mark*>(event)->stream, static_cast<Mark*>(event)->queued);
  }
  bool queryStream(const Stream& stream) const override {
    Locked locked(mutex);
    return queues[stream.id()].jobs.empty();
  }
  void synchronizeStream(const Stream& stream) const override {
    Locked locked(mutex);
    drain_all(stream.id());
  }
  void synchronizeDevice(const DeviceIndex) const override {
    Locked locked(mutex);
    for (StreamId stream = 0; stream <= newest_stream; ++stream) drain_all(stream);
  }
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, GuardImpl);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator().clone(); }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* address) const override { return pinned(address); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto fresh = device_allocator.allocate(bytes);
    if (storage.data() != nullptr) std::memcpy(fresh.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(fresh));
    storage.set_nbytes(bytes);
  }
};

[[maybe_unused]] const bool hooked = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

// ---- kernels --------------------------------------------------------------------------------------------------------

// A kernel begins on the current stream: what that has been given before is done.
void start(const std::vector<Tensor>& tensors) {
  for (const Tensor& tensor : tensors) {
    if (!tensor.defined()) continue;
    TORCH_CHECK(
        tensor.device() == kDevice || tensor.dim() == 0,
        "Expected all tensors to be on the same device: one is on the simulated accelerator and one on ", tensor.device());
    use(tensor, current_stream);
  }
  drain_all(current_stream);
}

// The same bytes, as a tensor of the CPU.
Tensor on_cpu(const Tensor& tensor) {
  if (tensor.device().type() == DeviceType::CPU) return tensor;
  void* address = tensor.numel() == 0 ? nullptr : tensor.mutable_data_ptr();
  Tensor same = at::from_blob(
      address, tensor.sizes(), tensor.strides(), [tensor](void*) {}, tensor.options().device(DeviceType::CPU));
  if (tensor.is_conj()) same = at::_conj(same);
  return tensor.is_neg() ? at::_neg_view(same) : same;
}

// The same tensor, unknown to Python: the last to hold one that Python knows needs Python's lock to let go of it, which a
// thread that waits for `mutex` may be holding.
Tensor bare(const Tensor& tensor) {
  return Tensor(tensor.unsafeGetTensorImpl()->shallow_copy_and_detach(c10::VariableVersion(0), false));
}

void copy_now(const Tensor& from, const Tensor& to) { on_cpu(to).copy_(on_cpu(from)); }

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  Locked locked(mutex);
  const StreamId stream = current_stream;
  use(from, stream);
  use(to, stream);
  const bool out = to.device().type() == DeviceType::CPU, in = from.device().type() == DeviceType::CPU;
  const bool late = non_blocking && ((out && pinned(to.const_data_ptr())) || (in && pinned(from.const_data_ptr())));
  if (!late) {
    drain_all(stream);
    copy_now(from, to);
  } else if (in) {
    enqueue(stream, [from = bare(from), to = bare(to)] { copy_now(from, to); });
  } else {
    drain_all(stream);
    Tensor taken = on_cpu(from).clone();  // what the stream does to it later comes after the copy
    enqueue(stream, [taken, to = bare(to)] { copy_now(taken, to); });
  }
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());  // of a view of that size it would change the strides
  return copy_from(from, to, false);
}

Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

const Tensor& resize(const Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  Tensor& tensor = const_cast<Tensor&>(self);
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->generic_set_sizes_contiguous(size);
  const size_t bytes = (impl->storage_offset() + impl->numel()) * impl->itemsize();
  if (tensor.storage().nbytes() < bytes) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(tensor.storage(), bytes);
  return self;
}

Tensor& set_storage(
    Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  const int64_t count = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(source), 0, {count}, {1});
}

at::Scalar local_scalar_dense(const Tensor& self) {
  Locked locked(mutex);
  start({self});
  return on_cpu(self).item();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias, double dropout,
    bool causal, bool, std::optional<double> scale) {
  Locked locked(mutex);
  start({query, key, value, bias.value_or(Tensor())});
  std::optional<Tensor> mask;
  if (bias.has_value() && bias->defined()) mask = on_cpu(*bias);
  auto [out, logsumexp] = at::_scaled_dot_product_flash_attention_for_cpu(
      on_cpu(query), on_cpu(key), on_cpu(value), dropout, causal, mask, scale);
  Tensor none = at::empty({0}, query.options());
  return {out.to(kDevice), logsumexp.to(kDevice), none, none, query.size(2), key.size(2), none, none, none};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& gradient, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias,
    std::array<bool, 4>, const Tensor& out, const Tensor& logsumexp, const Tensor&, const Tensor&, c10::SymInt,
    c10::SymInt, double dropout, bool causal, const Tensor&, const Tensor&, std::optional<double> scale) {
  Locked locked(mutex);
  start({gradient, query, key, value, bias, out, logsumexp});
  std::optional<Tensor> mask;
  if (bias.defined()) mask = on_cpu(bias);
  auto [q, k, v] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      on_cpu(gradient), on_cpu(query), on_cpu(key), on_cpu(value), on_cpu(out), on_cpu(logsumexp), dropout, causal, mask,
      scale);
  return {q.to(kDevice), k.to(kDevice), v.to(kDevice), Tensor()};
}

int64_t attention_choice(
    const Tensor& query, const Tensor&, const Tensor& value, const std::optional<Tensor>& mask, double dropout, bool causal,
    std::optional<double>, bool) {
  const bool fused = query.dim() == 4 && query.size(3) == value.size(3) && dropout == 0.0 && !(causal && mask.has_value());
  return static_cast<int64_t>(fused ? sdp::SDPBackend::overrideable : sdp::SDPBackend::math);
}

Tensor convolution(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups) {
  Locked locked(mutex);
  start({input, weight, bias.value_or(Tensor())});
  std::optional<Tensor> bias_on_cpu;
  if (bias.has_value() && bias->defined()) bias_on_cpu = on_cpu(*bias);
  return at::convolution_symint(
             on_cpu(input), on_cpu(weight), bias_on_cpu, stride, padding, dilation, transposed, output_padding, groups)
      .to(kDevice);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> wanted) {
  Locked locked(mutex);
  start({gradient, input, weight});
  const c10::SymInt channels = transposed ? weight.sym_size(1) * groups : weight.sym_size(0);
  auto [to_input, to_weight, to_bias] = at::convolution_backward_symint(
      on_cpu(gradient), on_cpu(input), on_cpu(weight), c10::SymIntArrayRef(&channels, 1), stride, padding, dilation,
      transposed, output_padding, groups, wanted);
  auto back = [](const Tensor& tensor) { return tensor.defined() ? tensor.to(kDevice) : tensor; };
  return {back(to_input), back(to_weight), back(to_bias)};
}

// All other operators are the CPU's, on copies. A tensor of the CPU among the device's must be a single number.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Locked locked(mutex);
  const bool indexing = op.schema().name().rfind("aten::index", 0) == 0;
  std::vector<Tensor> tensors;
  auto add = [&](const Tensor& tensor) {
    // Numbers of rows may lie on the CPU, as for a GPU.
    if (!(indexing && tensor.defined() && tensor.scalar_type() == at::kLong)) tensors.push_back(tensor);
  };
  for (const auto& value : torch::jit::last(stack, op.schema().arguments().size())) {
    if (value.isTensor()) add(value.toTensor());
    if (value.isTensorList())
      for (const Tensor& tensor : value.toTensorVector()) add(tensor);
    if (value.isOptionalTensorList())
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) add(tensor.value_or(Tensor()));
  }
  start(tensors);
  at::native::cpu_fallback(op, stack);
}

void record_stream(Tensor&, Stream) {}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("_scaled_dot_product_fused_attention_overrideable", &attention);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", &attention_backward);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  // Torch would put it together of many steps, for which it has one kernel on the CPU and on GPUs.
  m.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("record_stream", &record_stream);
}

// Copies take conjugates and negatives as they are; torch's way for other operators would copy for ever.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

#define LOW(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOW)
  AT_FORALL_FP32(FULL)
}

// ---- what the Python module asks ------------------------------------------------------------------------------------

int64_t memory_allocated() { return allocated; }
int64_t max_memory_allocated() { return peak; }
int64_t memory_limit() { return limit; }
void reset_peak() { peak = allocated; }
void set_limit(int64_t bytes) { limit = bytes; }

TORCH_LIBRARY(simulated_accelerator, m) {
  m.def("memory_allocated", &memory_allocated);
  m.def("max_memory_allocated", &max_memory_allocated);
  m.def("memory_limit", &memory_limit);
  m.def("reset_peak", &reset_peak);
  m.def("set_limit", &set_limit);
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention_choice)
}
