// A network as one node of autograd: what `network.py` does around the kernels, without Python.
//
// The kernels are Numba's, the same that Python calls, so results are the same bits. Compiled by
// `native.py` for the torch at hand, since autograd's C++ interface differs between versions.

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "steps.h"

namespace {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

constexpr int64_t kAlignment = 64;

int64_t address_of(const Tensor& tensor) {
  return tensor.defined() ? reinterpret_cast<int64_t>(tensor.const_data_ptr()) : 0;
}

void* allocate(int64_t elements) {
  int64_t bytes = elements * static_cast<int64_t>(sizeof(float));
  return std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
}

// Memory of large results, used again once nobody holds them: see `reused_memory.py`. From fewer
// elements on than there: a freed block of 64 KB has the C library tidy up its heap, 2 us.
class Recycled {
 public:
  static Tensor empty(at::IntArrayRef shape) {
    int64_t elements = c10::multiply_integers(shape);
    if (elements < kLarge || elements > kMostElements) {
      return at::detail::empty_cpu(shape, at::kFloat);
    }
    int64_t bytes = elements * static_cast<int64_t>(sizeof(float));
    at::DataPtr data(take(elements), new Block{elements}, nullptr, at::kCPU);
    auto* block = static_cast<Block*>(data.get_context());
    block->at = data.get();
    TORCH_CHECK(data.compare_exchange_deleter(data.get_deleter(), &give_back));
    auto storage = c10::make_intrusive<at::StorageImpl>(
        at::StorageImpl::use_byte_size_t(), bytes, std::move(data), nullptr, false);
    auto tensor = at::detail::make_tensor<at::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
        caffe2::TypeMeta::Make<float>());
    tensor.unsafeGetTensorImpl()->set_sizes_contiguous(shape);
    return tensor;
  }

 private:
  static constexpr int64_t kLarge = 1 << 13, kMostElements = 1 << 24;
  static constexpr size_t kMostBuffers = 16;

  struct Block {
    int64_t elements;
    void* at = nullptr;
  };

  struct Pool {
    std::mutex lock;
    std::vector<Block> blocks;
    int64_t elements = 0;
  };

  // Never destroyed: tensors may outlive what is static.
  static Pool& pool() {
    static Pool& pool = *new Pool;
    return pool;
  }

  static void* take(int64_t elements) {
    Pool& kept = pool();
    {
      std::lock_guard<std::mutex> guard(kept.lock);
      for (auto block = kept.blocks.rbegin(); block != kept.blocks.rend(); ++block) {
        if (block->elements == elements) {
          void* at = block->at;
          kept.elements -= elements;
          kept.blocks.erase(std::next(block).base());
          return at;
        }
      }
    }
    return allocate(elements);
  }

  static void give_back(void* context) {
    std::unique_ptr<Block> block(static_cast<Block*>(context));
    Pool& kept = pool();
    std::lock_guard<std::mutex> guard(kept.lock);
    kept.blocks.push_back(*block);
    kept.elements += block->elements;
    while (kept.blocks.size() > kMostBuffers || kept.elements > kMostElements) {
      kept.elements -= kept.blocks.front().elements;
      std::free(kept.blocks.front().at);
      kept.blocks.erase(kept.blocks.begin());
    }
  }
};

// Of the calling thread, for one call at a time.
int64_t scratch(int64_t elements) {
  thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, &std::free);
  thread_local int64_t held = 0;
  if (elements > held) {
    memory.reset(allocate(elements));
    held = elements;
  }
  return reinterpret_cast<int64_t>(memory.get());
}

// Numba's own calling convention: where the result and what was raised go, then the arguments.
using Kernel = int (*)(void**, void**, int64_t, int64_t, int64_t);

// What `set_up` was given.
struct {
  Kernel act, forward, backward;
  int64_t few, long_work, worth_a_thread;
  bool* used_threads;
  py::object* differentiate;
} setup;

int64_t count_threads(int64_t parts, int64_t work) {
  if (parts <= 1 || work < 2 * setup.worth_a_thread) {
    return 1;
  }
  int64_t threads =
      std::min<int64_t>({at::get_num_threads(), parts, work / setup.worth_a_thread});
  *setup.used_threads |= threads > 1;
  return threads;
}

// A `layout.Form`, and what it takes to call the kernels with it.
struct Form {
  int64_t address, tile, parts, record, values, scratch, work, out, parameters;
  bool pays;
  // The Python object, whose memory the kernels read, and its network's layers.
  py::object form, network_layers;

  ~Form() {
    if (Py_IsInitialized()) {
      py::gil_scoped_acquire gil;
      form = network_layers = py::object();
    } else {
      form.release();
      network_layers.release();
    }
  }
};

// A call as `layout.CALL_FIRST` describes it.
class Call {
 public:
  Call(const Form& form, int64_t batch, bool saved, int64_t work)
      : form_(form), work_(work), numbers_(kFirst + 2 * form.parameters) {
    numbers_[kBatch] = batch;
    numbers_[kStep] = saved ? form.record : 0;
    numbers_[kThreads] = count_threads(form.parts, work);
  }

  int64_t& operator[](int64_t place) { return numbers_[place]; }

  // A parameter and its gradient: weight and bias of each layer, then of its norm, if it has one.
  void set(int64_t parameter, const Tensor& value, const Tensor& gradient) {
    numbers_[kFirst + 2 * parameter] = address_of(value);
    numbers_[kFirst + 2 * parameter + 1] = address_of(gradient);
  }

  void run(Kernel kernel) {
    void *result = nullptr, *raised = nullptr;
    auto at = reinterpret_cast<int64_t>(numbers_.data());
    int status = 0;
    // Worth it where another thread may do much meanwhile; a backward pass holds no GIL.
    if (work_ > setup.long_work && PyGILState_Check()) {
      py::gil_scoped_release release;
      status = kernel(&result, &raised, 0, form_.address, at);
    } else {
      status = kernel(&result, &raised, 0, form_.address, at);
    }
    TORCH_CHECK(status == 0, "a kernel of a policy failed with status ", status);
  }

  enum { kBatch, kStep, kThreads, kSaved, kScratch, kX, kY, kDx, kDy, kFirst };

 private:
  const Form& form_;
  int64_t work_;
  std::vector<int64_t> numbers_;
};

// What a backward pass needs; parameters are undefined where a layer or its norm has none.
struct Saved {
  Tensor panels, x;
  variable_list parameters, masks;
};

bool is_watched(const Tensor& dy) {
  return at::GradMode::is_enabled() || at::isTensorSubclassLike(dy) ||
         at::impl::torch_function_mode_enabled() || torch::jit::tracer::isTracing() ||
         dy._fw_grad(0).defined() || !dy.is_cpu() || dy.scalar_type() != at::kFloat;
}

// By torch's own operations, which autograd, a mode or a transform sees.
variable_list differentiate(const Form& form, const Tensor& dy, const Saved& saved,
                            const std::vector<bool>& needed) {
  py::gil_scoped_acquire gil;
  py::list parameters, wanted;
  wanted.append(py::bool_(needed[0]));
  size_t edge = 1;
  for (const Tensor& parameter : saved.parameters) {
    parameters.append(parameter.defined() ? py::cast(parameter) : py::none());
    wanted.append(py::bool_(parameter.defined() && needed[edge++]));
  }
  py::list found = (*setup.differentiate)(form.network_layers, py::cast(saved.masks),
                                          py::cast(saved.x), parameters, wanted, py::cast(dy));
  auto tensor_of = [](py::handle value) { return value.is_none() ? Tensor() : value.cast<Tensor>(); };
  variable_list gradients{tensor_of(found[0])};
  for (size_t i = 0; i < saved.parameters.size(); ++i) {
    if (saved.parameters[i].defined()) {
      gradients.push_back(tensor_of(found[i + 1]));
    }
  }
  return gradients;
}

// The gradient of x, then of each parameter there is; undefined where none is needed.
variable_list backward(const Form& form, const Tensor& given, const Saved& saved,
                       const std::vector<bool>& needed) {
  if (is_watched(given)) {
    return differentiate(form, given, saved, needed);
  }
  Tensor dy = given.resolve_neg().contiguous();
  int64_t batch = saved.x.size(0);
  Call call(form, batch, true, 2 * form.work * batch);
  variable_list gradients{needed[0] ? Recycled::empty(saved.x.sizes()) : Tensor()};
  for (size_t i = 0; i < saved.parameters.size(); ++i) {
    const Tensor& parameter = saved.parameters[i];
    if (parameter.defined()) {
      bool need = needed[gradients.size()];
      gradients.push_back(need ? Recycled::empty(parameter.sizes()) : Tensor());
      call.set(i, parameter, gradients.back());
    }
  }
  call[Call::kSaved] = address_of(saved.panels);
  call[Call::kScratch] = scratch(form.scratch);
  call[Call::kDx] = address_of(gradients[0]);
  call[Call::kDy] = address_of(dy);
  call.run(setup.backward);
  return gradients;
}

struct NetworkBackward : Node {
  std::shared_ptr<Form> form;
  SavedVariable panels, x;
  std::vector<SavedVariable> parameters, masks;
  std::vector<bool> has;

  std::string name() const override { return "NetworkBackward"; }

  variable_list apply(variable_list&& gradients) override {
    std::lock_guard<std::mutex> guard(mutex_);
    if (!gradients[0].defined()) {
      return variable_list(num_outputs());
    }
    return backward(*form, gradients[0], unpack(), needed());
  }

  void release_variables() override {
    std::lock_guard<std::mutex> guard(mutex_);
    panels.reset_data();
    x.reset_data();
    for (auto& each : parameters) each.reset_data();
    for (auto& each : masks) each.reset_data();
  }

  // For compiled autograd, which calls the same as a whole.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(reinterpret_cast<uint64_t>(form.get()));
    args.collect(panels, false);
    args.collect(x, false);
    args.collect(parameters, false);
    args.collect(masks, false);
    args.collect(has);
  }

  variable_list apply_with_saved(const variable_list& inputs,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    swap.before(panels);
    swap.before(x);
    swap.before(parameters);
    swap.before(masks);
    Saved saved = unpack();
    variable_list tensors{saved.panels, saved.x};
    for (const Tensor& parameter : saved.parameters) {
      if (parameter.defined()) tensors.push_back(parameter);
    }
    tensors.insert(tensors.end(), saved.masks.begin(), saved.masks.end());
    std::vector<at::IValue> arguments{at::IValue(tensors)};
    std::vector<at::TypePtr> schema{arguments[0].type()};
    auto call = [form = form, has = has, needed = needed()](
                    const variable_list& inputs, const std::vector<at::IValue>& arguments) {
      auto tensors = arguments[0].toTensorVector();
      Saved saved{tensors[0], tensors[1], {}, {}};
      size_t next = 2;
      for (bool there : has) {
        saved.parameters.push_back(there ? tensors[next++] : Tensor());
      }
      saved.masks.assign(tensors.begin() + next, tensors.end());
      return backward(*form, inputs[0], saved, needed);
    };
    auto metadata = torch::dynamo::autograd::IValuePacker<
        std::vector<std::optional<torch::autograd::InputMetadata>>>::
        pack(torch::dynamo::autograd::get_input_metadata(next_edges()));
    const auto& interface = torch::dynamo::autograd::getPyCompilerInterface();
    auto bound =
        interface->bind_function(swap.get_py_compiler(), name(), call, schema, true, false);
    auto gradients = interface->call_function(
        swap.get_py_compiler(), "apply_functional", bound, inputs, arguments, metadata);
    swap.after(panels);
    swap.after(x);
    swap.after(parameters);
    swap.after(masks);
    return gradients;
  }

 private:
  Saved unpack() const {
    Saved saved{panels.unpack(), x.unpack(), {}, {}};
    for (const auto& each : parameters) saved.parameters.push_back(each.unpack());
    for (const auto& each : masks) saved.masks.push_back(each.unpack());
    return saved;
  }

  std::vector<bool> needed() const {
    std::vector<bool> found;
    for (size_t edge = 0; edge < num_outputs(); ++edge) {
      found.push_back(task_should_compute_output(edge));
    }
    return found;
  }
};

Tensor infer(const Form& form, const Tensor& x, const variable_list& parameters) {
  int64_t batch = x.size(0);
  Tensor y = at::detail::empty_cpu({batch, form.out}, at::kFloat);
  Call call(form, batch, false, form.work * batch);
  for (size_t i = 0; i < parameters.size(); ++i) call.set(i, parameters[i], Tensor());
  int64_t at = scratch(form.scratch + form.values + form.parts * form.record);
  call[Call::kScratch] = at;
  call[Call::kSaved] = at + form.scratch * static_cast<int64_t>(sizeof(float));
  call[Call::kX] = address_of(x);
  call[Call::kY] = address_of(y);
  call.run(batch <= setup.few ? setup.act : setup.forward);
  return y;
}

// Newer versions of torch count a node's owners in the node, older ones beside it.
template <class Kind>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Kind>) {
    return c10::make_intrusive<Kind>();
  } else {
    // torch's own deleter, which does not recurse into the nodes before it.
    return std::shared_ptr<Kind>(new Kind, [](Kind* node) { deleteNode(node); });
  }
}

Tensor train(const std::shared_ptr<Form>& form, const Tensor& x, const variable_list& parameters,
             const variable_list& masks) {
  int64_t batch = x.size(0);
  Tensor y = at::detail::empty_cpu({batch, form->out}, at::kFloat);
  int64_t tiles = (batch + form->tile - 1) / form->tile;
  Tensor panels = Recycled::empty({form->values + tiles * form->record});
  Call call(*form, batch, true, form->work * batch);
  for (size_t i = 0; i < parameters.size(); ++i) call.set(i, parameters[i], Tensor());
  call[Call::kSaved] = address_of(panels);
  call[Call::kScratch] = scratch(form->scratch);
  call[Call::kX] = address_of(x);
  call[Call::kY] = address_of(y);
  call.run(setup.forward);

  auto node = make_node<NetworkBackward>();
  node->form = form;
  node->panels = SavedVariable(panels, false);
  node->x = SavedVariable(x, false);
  node->add_next_edge(torch::autograd::impl::gradient_edge(x));
  for (const Tensor& parameter : parameters) {
    node->has.push_back(parameter.defined());
    node->parameters.emplace_back(parameter, false);
    if (parameter.defined()) {
      node->add_next_edge(torch::autograd::impl::gradient_edge(parameter));
    }
  }
  // Autograd then raises if one is changed before the backward pass.
  for (const Tensor& mask : masks) node->masks.emplace_back(mask, false);
  torch::autograd::set_history(y, node);
  return y;
}

bool is_plain(const Tensor& tensor, int64_t size) {
  return tensor.scalar_type() == at::kFloat && tensor.is_cpu() && tensor.is_contiguous() &&
         !tensor.is_neg() && tensor.numel() == size;
}

// Layers with the masks they had when they were made ready, and norms, which are layers of one input
// here; borrows what its owner holds. Its calls give None where anything is not as it was, or needs
// a closer look.
class Network {
 public:
  // Of each layer the mask's address then (0 without one), that of a copy, and whether it prunes.
  struct Layer {
    int64_t out, inp, mask_at, snapshot_at;
    bool pruned;
  };

  Network(const py::list& layers, py::function form_of) : form_of_(std::move(form_of)) {
    for (py::handle each : layers) {
      auto layer = each.cast<py::tuple>();
      layers_.push_back({layer[0].cast<int64_t>(), layer[1].cast<int64_t>(),
                         layer[2].cast<int64_t>(), layer[3].cast<int64_t>(),
                         layer[4].cast<bool>()});
    }
  }

  // One layer on these tensors: ``[B, I] -> [B, O]``.
  py::object layer(py::handle x, py::handle weight, py::handle bias, py::handle mask) {
    for (py::handle each : {x, weight, mask}) {
      if (!THPVariable_CheckExact(each.ptr())) return py::none();
    }
    if (!(bias.is_none() || THPVariable_CheckExact(bias.ptr())) ||
        at::impl::torch_function_mode_enabled() || c10::impl::dispatch_mode_enabled() ||
        at::autocast::is_autocast_enabled(at::kCPU)) {
      return py::none();
    }
    variable_list parameters, masks;
    if (!take(layers_[0], weight.ptr(), bias.ptr(), mask.ptr(), parameters, masks)) {
      return py::none();
    }
    return call(THPVariable_Unpack(x.ptr()), parameters, masks);
  }

 protected:
  // Add a layer's tensors; false where they are not as they were.
  static bool take(const Layer& layer, PyObject* weight, PyObject* bias, PyObject* mask,
                   variable_list& parameters, variable_list& masks) {
    for (auto [object, size] : {std::pair{weight, layer.out * layer.inp}, {bias, layer.out}}) {
      parameters.push_back(object == Py_None ? Tensor() : THPVariable_Unpack(object));
      if (parameters.back().defined() && !is_plain(parameters.back(), size)) {
        return false;
      }
    }
    if (mask == Py_None) {
      return true;
    }
    const Tensor& kept = THPVariable_Unpack(mask);
    if (layer.pruned) {
      masks.push_back(kept);
    }
    return kept.is_cpu() && kept.scalar_type() == at::kBool && kept.is_contiguous() &&
           kept.numel() == layer.out * layer.inp &&
           std::memcmp(kept.const_data_ptr(), reinterpret_cast<void*>(layer.snapshot_at),
                       layer.out * layer.inp) == 0;
  }

  py::object call(const Tensor& x, const variable_list& parameters, const variable_list& masks) {
    if (x.dim() != 2 || x.size(1) != layers_[0].inp || !is_plain(x, x.numel())) {
      return py::none();
    }
    bool trained = at::GradMode::is_enabled() &&
                   (x.requires_grad() ||
                    std::any_of(parameters.begin(), parameters.end(), [](const Tensor& each) {
                      return each.defined() && each.requires_grad();
                    }));
    const auto& form = form_for(trained || x.size(0) > setup.few ? x.size(0) : 1);
    if (!form->pays) {
      return py::none();
    }
    return py::cast(trained ? train(form, x, parameters, masks) : infer(*form, x, parameters));
  }

  std::vector<Layer> layers_;

 private:
  const std::shared_ptr<Form>& form_for(int64_t batch) {
    auto found = forms_.find(batch);
    if (found == forms_.end()) {
      if (forms_.size() >= kForms) {
        forms_.clear();
      }
      py::object form = form_of_(batch);
      auto number = [&form](const char* name) { return form.attr(name).cast<int64_t>(); };
      auto made = std::make_shared<Form>(
          Form{number("address"), number("tile"), number("parts"), number("record"),
               number("values"), number("scratch"), number("work"), number("out"),
               number("parameters"), number("pays") != 0, form, form.attr("layers")});
      found = forms_.emplace(batch, std::move(made)).first;
    }
    return found->second;
  }

  // How many sizes of batches a network keeps its forms for.
  static constexpr size_t kForms = 64;

  std::unordered_map<int64_t, std::shared_ptr<Form>> forms_;
  py::function form_of_;
};

// Whether something has to see every module or operation, or a module is not what it was. Borrows
// what it is given, as the network of the same modules does.
class Watch {
 public:
  // Modules; dictionaries of hooks, empty while nobody listens; the dictionary of
  // `torch.autograd.forward_ad`; and the variable that holds the chosen backend.
  Watch(const py::list& modules, const py::list& hooks, py::handle forward_ad, py::handle chosen)
      : forward_ad_(forward_ad.ptr()), chosen_(chosen.ptr()) {
    for (py::handle each : modules) {
      PyObject* own = PyObject_GenericGetDict(each.ptr(), nullptr);
      if (own == nullptr) throw py::error_already_set();
      Py_DECREF(own);
      modules_.push_back({each.ptr(), Py_TYPE(each.ptr()), own});
    }
    for (py::handle each : hooks) hooks_.push_back(each.ptr());
  }

  bool lets_pass() const {
    static PyObject* const forward = PyUnicode_InternFromString("forward");
    static PyObject* const level = PyUnicode_InternFromString("_current_level");
    for (PyObject* hooks : hooks_) {
      if (PyDict_Size(hooks) != 0) return false;
    }
    for (const Module& each : modules_) {
      if (Py_TYPE(each.module) != each.type || PyDict_Contains(each.own, forward) != 0) {
        return false;
      }
    }
    PyObject* dual = PyDict_GetItem(forward_ad_, level);
    if (dual == nullptr || PyLong_AsLong(dual) >= 0) return false;
    PyObject* backend = nullptr;
    if (PyContextVar_Get(chosen_, nullptr, &backend) < 0) throw py::error_already_set();
    Py_XDECREF(backend);
    return backend == Py_None && !torch::jit::tracer::isTracing() &&
           !c10::impl::tls_is_dispatch_key_included(
               c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
           !c10::impl::dispatch_mode_enabled() &&
           at::impl::PythonTorchFunctionTLS::stack_len() == 0 && !casts();
  }

 private:
  struct Module {
    PyObject* module;
    PyTypeObject* type;
    PyObject* own;
  };

  static bool casts() {
    const auto& devices = at::autocast::_AUTOCAST_SUPPORTED_DEVICES;
    return std::any_of(devices.begin(), devices.end(), at::autocast::is_autocast_enabled);
  }

  std::vector<Module> modules_;
  std::vector<PyObject*> hooks_;
  PyObject *forward_ad_, *chosen_;
};

// A network that looks up its tensors in the modules' dictionaries, where they must be those it
// was made ready for.
class Run : public Network {
 public:
  Run(const py::list& layers, py::function form_of, const py::list& places, const Watch& watch)
      : Network(layers, std::move(form_of)), watch_(watch) {
    for (py::handle each : places) {
      auto place = each.cast<py::tuple>();
      places_.push_back(
          {place[0].ptr(), place[1].ptr(), place[2].ptr(), place[3].ptr(), place[4].ptr()});
    }
  }

  // ``[B, I] -> [B, O]``.
  py::object operator()(py::handle input) {
    if (Py_TYPE(input.ptr()) != reinterpret_cast<PyTypeObject*>(THPVariableClass) ||
        !watch_.lets_pass()) {
      return py::none();
    }
    const Tensor& x = THPVariable_Unpack(input.ptr());
    variable_list parameters, masks;
    parameters.reserve(2 * layers_.size());
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Place& at = places_[i];
      bool same = PyDict_GetItem(at.parameters, names().weight) == at.weight &&
                  PyDict_GetItem(at.parameters, names().bias) == at.bias;
      if (at.mask != Py_None) {
        same = same && PyDict_GetItem(at.buffers, names().mask) == at.mask &&
               address_of(THPVariable_Unpack(at.mask)) == layers_[i].mask_at;
      }
      if (!same || !take(layers_[i], at.weight, at.bias, at.mask, parameters, masks)) {
        return py::none();
      }
    }
    return call(x, parameters, masks);
  }

 private:
  struct Place {
    PyObject *parameters, *buffers, *weight, *bias, *mask;
  };

  struct Names {
    PyObject* weight = PyUnicode_InternFromString("weight");
    PyObject* bias = PyUnicode_InternFromString("bias");
    PyObject* mask = PyUnicode_InternFromString("mask");
  };

  static const Names& names() {
    static const Names names;
    return names;
  }

  Watch watch_;
  std::vector<Place> places_;
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  steps::bind(module);
  module.def("set_up", [](int64_t act, int64_t forward, int64_t backward, int64_t few,
                          int64_t long_work, int64_t worth_a_thread, int64_t used_threads,
                          py::object differentiate) {
    setup = {reinterpret_cast<Kernel>(act), reinterpret_cast<Kernel>(forward),
             reinterpret_cast<Kernel>(backward), few, long_work, worth_a_thread,
             reinterpret_cast<bool*>(used_threads), new py::object(std::move(differentiate))};
  });
  py::class_<Network>(module, "Network")
      .def(py::init<const py::list&, py::function>())
      .def("layer", &Network::layer);
  py::class_<Watch>(module, "Watch")
      .def(py::init<const py::list&, const py::list&, py::handle, py::handle>());
  py::class_<Run, Network>(module, "Run")
      .def(py::init<const py::list&, py::function, const py::list&, const Watch&>())
      .def("__call__", &Run::operator());
}
