// torch's operators on emulated devices: those of a CPU, over the same memory, given to the stream as a kernel would be.
#include <ATen/ATen.h>
#include <ATen/NativeFunctions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

#include "runtime.h"

namespace {

using at::IValue;
using at::Tensor;
using c10::DispatchKey;
using Values = std::vector<IValue>;

// A value with all its tensors replaced.
template <typename Function>
IValue map_tensors(const IValue& value, Function function) {
  auto mapped = [&](const Tensor& tensor) { return tensor.defined() ? Tensor(function(tensor)) : tensor; };
  if (value.isTensor()) return mapped(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(mapped(tensor));
    return list;
  }
  if (value.isList() && value.toList().elementType()->isSubtypeOf(*c10::OptionalType::ofTensor())) {
    c10::List<std::optional<Tensor>> list;
    for (const IValue& item : value.toListRef())
      list.push_back(item.isTensor() ? std::optional<Tensor>(mapped(item.toTensor())) : std::nullopt);
    return list;
  }
  return value;
}

template <typename Function>
void each_tensor(const IValue& value, Function function) {
  map_tensors(value, [&](const Tensor& tensor) {
    function(tensor);
    return tensor;
  });
}

// The same memory as a tensor of a CPU, which does not keep it: a kernel knows an address and no more.
Tensor on_cpu(const Tensor& tensor) {
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

size_t bytes_of(const Tensor& tensor) {
  return at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.element_size());
}

// What a call would cost: what it is given is read, what it changes or makes is written, each once.
Cost cost_of(const c10::FunctionSchema& schema, const Values& given, const Values& results) {
  Cost cost;
  auto add = [&](const Tensor& tensor) { cost.bytes += tensor.is_cuda() && tensor.numel() ? bytes_of(tensor) : 0; };
  for (size_t i = 0; i < given.size(); ++i) {
    const auto* info = schema.arguments()[i].alias_info();
    each_tensor(given[i], add);
    if (info && info->isWrite()) each_tensor(given[i], add);
  }
  for (size_t r = 0; r < results.size(); ++r)
    if (!schema.returns()[r].alias_info()) each_tensor(results[r], add);
  auto tensor = [&](size_t i) { return given[i].toTensor(); };
  const std::string& name = schema.name();
  if (name == "aten::convolution")
    cost.flops = 2 * results[0].toTensor().numel() * (tensor(1).numel() / tensor(1).size(0));
  if (name == "aten::convolution_backward")  // the gradients of input and weight, where they are asked for
    for (size_t r = 0; r < 2; ++r)
      if (results[r].toTensor().defined()) cost.flops += 2 * tensor(0).numel() * (tensor(2).numel() / tensor(2).size(0));
  if (name == "aten::mm" || name == "aten::addmm") {
    const size_t first = name == "aten::addmm";
    cost.flops = 2 * tensor(first).numel() * tensor(first + 1).size(1);
  }
  return cost;
}

// Executes an operator on CPU tensors, below autograd.
Values execute(const c10::OperatorHandle& op, const Values& arguments) {
  // in half precision CPUs have no arithmetic, and make it up a hundred times slower
  static const std::set<std::string> heavy{"aten::convolution", "aten::convolution_backward", "aten::mm", "aten::addmm"};
  bool half = false;
  if (heavy.count(op.schema().name()))
    for (const auto& value : arguments) each_tensor(value, [&](const Tensor& t) { half |= t.scalar_type() == at::kHalf; });
  const at::AutoDispatchBelowADInplaceOrView below;
  torch::jit::Stack stack;
  for (const auto& value : arguments)
    stack.push_back(half ? map_tensors(value, [](const Tensor& t) { return t.to(at::kFloat); }) : value);
  op.callBoxed(&stack);
  Values results;
  for (const auto& value : stack)
    results.push_back(half ? map_tensors(value, [](const Tensor& t) { return t.to(at::kHalf); }) : value);
  return results;
}

// Whether the host has to know values before it can give more work: a real device is waited for here.
bool waits(const std::string& name, const Values& arguments) {
  static const std::set<std::string> always{"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal",
                                            "aten::bincount", "aten::repeat_interleave"};
  bool waits = always.count(name) > 0;
  if (name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_")
    each_tensor(arguments[1], [&](const Tensor& index) {
      waits |= index.is_cpu() || index.scalar_type() == at::kBool || index.scalar_type() == at::kByte;
    });
  return waits;
}

// Operators without a CUDA kernel of their own: they choose a library, and none has one for a CPU's memory.
const std::set<std::string>& choosing() {
  static const std::set<std::string> names{"aten::convolution", "aten::convolution_backward"};
  return names;
}

// Results of a convolution shaped as they would be, from those of the first row alone, which are soon computed.
Values of_one_row(const c10::OperatorHandle& op, Values arguments) {
  const bool backward = op.schema().name() == "aten::convolution_backward";
  const int64_t rows = arguments[0].toTensor().size(0);
  for (int i = 0; i <= backward; ++i) arguments[i] = arguments[i].toTensor().narrow(0, 0, 1);
  Values results = execute(op, arguments);
  Tensor first = results[0].toTensor();  // the output, or the gradient of the input, which may not have been asked for
  if (!first.defined()) return results;
  auto sizes = first.sizes().vec();
  sizes[0] = rows;
  results[0] = at::empty_strided(sizes, first.strides(), first.options());
  return results;
}

// Sizes, strides and types of an operator's results depend on no values: they are found with zeros, once.
const Values& results_like(const c10::OperatorHandle& op, const Values& given, const std::vector<size_t>& grown) {
  static auto* known = new std::unordered_map<std::string, Values>;
  static auto* lock = new std::mutex;
  std::ostringstream key;
  key << op.operator_name();
  for (const auto& value : given) {
    bool any = false;
    each_tensor(value, [&](const Tensor& t) {
      any = true;
      key << '|' << t.sizes() << t.strides() << t.scalar_type() << t.device();
      if (t.is_cpu()) key << t.unsafeGetTensorImpl()->is_wrapped_number();
    });
    if (!any) key << '|' << value;
  }
  {
    const std::lock_guard<std::mutex> guard(*lock);
    if (const auto found = known->find(key.str()); found != known->end()) return found->second;
  }
  Values zeros;
  for (const auto& value : given)
    zeros.push_back(value.isDevice() ? IValue(c10::Device(at::kCPU)) : map_tensors(value, [](const Tensor& t) {
      if (t.is_cpu()) return t;
      const auto made = at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kCPU));
      if (t.numel()) std::memset(made.data_ptr(), 0, bytes_of(made));
      return made;
    }));
  Values results = emulated_idle() && choosing().count(op.schema().name()) ? of_one_row(op, zeros) : execute(op, zeros);
  for (size_t i : grown) results.push_back(zeros[i]);
  const std::lock_guard<std::mutex> guard(*lock);
  return known->emplace(key.str(), std::move(results)).first->second;
}

// One call of an operator, as torch makes it in place of the CUDA kernel.
struct Call {
  const c10::OperatorHandle& op;
  const std::string& name;
  const Values given;
  const c10::Device device;
  const std::vector<std::optional<size_t>> back;  // of each result: the argument that it is, or none for one of its own
  const std::vector<size_t> grown;  // arguments of out= without elements, which get their sizes from the operator

  Call(const c10::OperatorHandle& op, Values arguments)
      : op(op), name(op.schema().name()), given(std::move(arguments)), device(device_of(given)),
        back(given_back(op.schema())), grown(without_elements(op.schema(), given)) {}

  static c10::Device device_of(const Values& given) {
    c10::Device device(at::kCUDA, c10::cuda::current_device());
    for (const auto& value : given) {
      if (value.isDevice() && value.toDevice().has_index()) device = value.toDevice();
      each_tensor(value, [&](const Tensor& tensor) {
        if (tensor.is_cuda()) device = tensor.device();
      });
    }
    return device;
  }

  static std::vector<std::optional<size_t>> given_back(const c10::FunctionSchema& schema) {
    std::vector<std::optional<size_t>> back;
    for (const auto& result : schema.returns()) {
      back.emplace_back();
      for (size_t i = 0; i < schema.arguments().size(); ++i) {
        const auto *of_result = result.alias_info(), *of_argument = schema.arguments()[i].alias_info();
        if (of_result && of_argument && of_result->beforeSets() == of_argument->beforeSets()) back.back() = i;
      }
    }
    return back;
  }

  static std::vector<size_t> without_elements(const c10::FunctionSchema& schema, const Values& given) {
    std::vector<size_t> grown;
    for (size_t i = 0; i < given.size(); ++i) {
      const auto* info = schema.arguments()[i].alias_info();
      if (!info || !info->isWrite() || !given[i].isTensor()) continue;
      if (given[i].toTensor().defined() && !given[i].toTensor().numel()) grown.push_back(i);
    }
    return grown;
  }

  // The arguments as a CPU's operator takes them: the same memory, and numbers as they are now.
  Values arguments() const {
    Values ours;
    for (const auto& value : given)
      ours.push_back(value.isDevice() ? IValue(c10::Device(at::kCPU)) : map_tensors(value, [](const Tensor& tensor) {
        if (tensor.is_cuda()) return on_cpu(tensor);
        Tensor number = tensor.clone();  // a kernel's argument, fixed when it is launched
        number.unsafeGetTensorImpl()->set_wrapped_number(tensor.unsafeGetTensorImpl()->is_wrapped_number());
        return number;
      }));
    return ours;
  }

  // The results: arguments given back, and new tensors shaped like those of `like`, each of which `made` is told of.
  template <typename Function>
  Values results(const Values& like, Function made) const {
    Values results;
    for (size_t r = 0; r < back.size(); ++r)
      results.push_back(back[r] ? given[*back[r]] : map_tensors(like[r], [&](const Tensor& shape) {
        Tensor own = at::empty_strided(shape.sizes(), shape.strides(), shape.options().device(device));
        made(r, own, shape);
        return own;
      }));
    return results;
  }

  // For operators that have to be waited for: the host executes them once all earlier work is done.
  Values at_once(c10::cuda::CUDAStream stream) const {  // arguments may be indices of a CPU
    c10::cuda::stream_synchronize(stream.stream());
    return results(execute(op, arguments()), [](size_t, const Tensor& own, const Tensor& result) {
      if (result.numel()) std::memcpy(own.data_ptr(), result.data_ptr(), bytes_of(result));
    });
  }

  // For all others: the device executes them when it gets to them, and copies what is new to where it is expected.
  Values enqueue(c10::cuda::CUDAStream stream) const {
    for (const auto& value : given)
      each_tensor(value, [&](const Tensor& tensor) {
        TORCH_CHECK(tensor.is_cuda() || tensor.dim() == 0, "Expected all tensors to be on the same device: ", name,
                    " got one of a CPU beside others of CUDA");
      });
    const bool shaped = !grown.empty() || std::count(back.begin(), back.end(), std::nullopt);
    const Values like = shaped ? results_like(op, given, grown) : Values(back.size());
    for (size_t g = 0; g < grown.size(); ++g)
      given[grown[g]].toTensor().resize_(like[back.size() + g].toTensor().sizes());
    std::vector<std::vector<std::pair<void*, size_t>>> expected(back.size());
    Values promised = results(like, [&](size_t r, const Tensor& own, const Tensor&) {
      expected[r].emplace_back(own.data_ptr(), own.numel() ? bytes_of(own) : 0);
    });
    C10_CUDA_CHECK(emulated_enqueue(stream.stream(), name.c_str(), [op = op, ours = arguments(), expected] {
      const Values results = execute(op, ours);
      for (size_t r = 0; r < expected.size(); ++r) {
        auto place = expected[r].begin();
        if (!expected[r].empty())
          each_tensor(results[r], [&](const Tensor& result) {
            const auto [to, bytes] = *place++;
            if (bytes) std::memcpy(to, result.data_ptr(), bytes);
          });
      }
    }, cost_of(op.schema(), given, promised)));
    return promised;
  }
};

void emulate(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto first = stack->end() - static_cast<ptrdiff_t>(op.schema().arguments().size());
  const Call call(op, Values(first, stack->end()));
  stack->erase(first, stack->end());
  const c10::cuda::CUDAGuard guard(call.device);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  for (auto& result : waits(call.name, call.given) ? call.at_once(stream) : call.enqueue(stream))
    stack->push_back(std::move(result));
}

// aten::copy_: within a device as any operator, between host and device by torch's own use of the runtime.
Tensor& copy(Tensor& self, const Tensor& source, bool non_blocking) {
  if (!self.numel() || self.is_same(source)) return self;
  if (!self.is_cuda() || !source.is_cuda()) return at::native::copy_(self, source, non_blocking);
  const c10::cuda::CUDAGuard guard(self.device());
  const Tensor to = on_cpu(self), from = on_cpu(source.expand_as(self));
  C10_CUDA_CHECK(emulated_enqueue(c10::cuda::getCurrentCUDAStream().stream(), "aten::copy_", [to, from] {
    const at::AutoDispatchBelowADInplaceOrView below;
    Tensor(to).copy_(from);
  }, {bytes_of(self) + bytes_of(source), 0}));
  return self;
}

// Views and allocations, which are the same here, and what the runtime does.
bool stays(const std::string& name) {
  static const std::set<std::string> names{
      "aten::_has_storage", "aten::_local_scalar_dense", "aten::_pin_memory",      "aten::_reshape_alias",
      "aten::_to_copy",     "aten::alias",               "aten::as_strided",       "aten::copy_",
      "aten::empty",        "aten::empty_strided",       "aten::is_pinned",        "aten::is_set_to",
      "aten::record_stream", "aten::resize_",            "aten::set_",             "aten::unfold",
      "aten::view",         "aten::view_as_complex",     "aten::view_as_real"};
  return names.count(name) > 0;
}

bool has_tensors(const std::vector<c10::Argument>& arguments) {
  for (const auto& argument : arguments)
    if (argument.type()->str().find("Tensor") != std::string::npos) return true;
  return false;
}

torch::Library& library(const std::string& space) {
  static auto* made = new std::map<std::string, std::unique_ptr<torch::Library>>;
  auto& found = (*made)[space];
  if (!found) found = std::make_unique<torch::Library>(torch::Library::IMPL, space, DispatchKey::CUDA, __FILE__, __LINE__);
  return *found;
}

}  // namespace

// Takes the place of the CUDA kernels of torch's operators, and of all of one other namespace, once those are defined.
extern "C" void emulate_operators(const char* ours) {
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    if (!op || !name.getNamespace()) continue;
    const std::string space(*name.getNamespace()), rest = name.name.substr(space.size() + 2);
    const bool torchs = space == "aten" && (choosing().count(name.name) || op->hasKernelForDispatchKey(DispatchKey::CUDA));
    if (!torchs && space != ours) continue;
    if (stays(name.name) || !(has_tensors(op->schema().arguments()) || has_tensors(op->schema().returns()))) continue;
    const std::string overload = name.overload_name.empty() ? rest : rest + "." + name.overload_name;
    library(space).impl(overload.c_str(), torch::CppFunction::makeFromBoxedFunction<&emulate>());
  }
  library("aten").impl("copy_", &copy);
  at::globalContext().setUserEnabledCuDNN(false);
}
