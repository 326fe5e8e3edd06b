// What `sparse_tickets/fused.py` and `hooks.py` ask before each step, without Python: whether an
// optimiser's parameters, state, layers and gradients are and lie as they did.

#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <tuple>
#include <utility>
#include <vector>

namespace {

int64_t count_threads(int64_t parts, int64_t work);

namespace steps {

namespace py = pybind11;
using at::Tensor;

// Numba's own calling convention: where the result and what was raised go, then the arguments.
using Step = int (*)(double*, void**, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                     int64_t, double);
using KeepAll = int (*)(void**, void**, int64_t, int64_t);

const Tensor& unpack(PyObject* tensor) { return THPVariable_Unpack(tensor); }

// Borrows the tensors it is given, which live as long as who asks; a reference of its own would hide
// cycles from Python's collector. Other identities are compared and never looked into.
class Look {
 public:
  // Tensors that have to lie where they lie now; layers, as references to them with their weights
  // and masks; and whether the state may hold nothing else than it is told of by `expect`.
  Look(int64_t changes, const py::list& groups, const py::list& held, const py::list& layers,
       bool whole_state)
      : changes_(changes), whole_state_(whole_state) {
    for_params(groups.ptr(), [this](PyObject* param) {
      params_.push_back(param);
      return true;
    });
    for (py::handle each : held) {
      const Tensor& tensor = unpack(each.ptr());
      held_.push_back({each.ptr(), tensor.data_ptr(), tensor.numel()});
    }
    for (py::handle each : layers) {
      auto layer = each.cast<py::tuple>();
      layers_.push_back({py::object(layer[0]), layer[1].ptr(), layer[2].ptr()});
    }
  }

  // The state of a parameter.
  void expect(py::handle param, const py::list& values) {
    if (expected_of(param.ptr()) != nullptr) return;
    states_.push_back({param.ptr(), {}});
    for (py::handle value : values) states_.back().second.push_back(value.ptr());
    with_state_ += !states_.back().second.empty();
  }

  bool is_same(py::handle groups, py::handle state, int64_t changes) const {
    return changes == changes_ && has_params(groups.ptr()) && has_state(state.ptr()) &&
           has_layers() && lies();
  }

 private:
  struct Held {
    PyObject* tensor;
    void* at;
    int64_t size;
  };

  struct Layer {
    py::object reference;
    PyObject *weight, *mask;
  };

  template <typename Visit>
  static bool for_params(PyObject* groups, Visit visit) {
    static PyObject* const name = PyUnicode_InternFromString("params");
    if (!PyList_Check(groups)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups); ++i) {
      PyObject* group = PyList_GET_ITEM(groups, i);
      PyObject* params = PyDict_Check(group) ? PyDict_GetItem(group, name) : nullptr;
      if (params == nullptr || !PyList_Check(params)) return false;
      for (Py_ssize_t k = 0; k < PyList_GET_SIZE(params); ++k) {
        if (!visit(PyList_GET_ITEM(params, k))) return false;
      }
    }
    return true;
  }

  bool has_params(PyObject* groups) const {
    size_t next = 0;
    bool same = for_params(groups, [&](PyObject* param) {
      return next < params_.size() && params_[next++] == param;
    });
    return same && next == params_.size();
  }

  bool has_state(PyObject* state) const {
    if (!PyDict_Check(state)) return false;
    PyObject *param = nullptr, *values = nullptr;
    Py_ssize_t at = 0;
    size_t found = 0;
    while (PyDict_Next(state, &at, &param, &values)) {
      const std::vector<PyObject*>* expected = expected_of(param);
      if (!PyDict_Check(values)) return false;
      if (expected == nullptr) {
        if (whole_state_ && PyDict_Size(values) > 0) return false;
        continue;
      }
      found += !expected->empty();
      if (PyDict_Size(values) != Py_ssize_t(expected->size())) return false;
      PyObject *key = nullptr, *value = nullptr;
      Py_ssize_t inner = 0;
      for (size_t i = 0; PyDict_Next(values, &inner, &key, &value); ++i) {
        if ((*expected)[i] != value) return false;
      }
    }
    return found == with_state_;
  }

  const std::vector<PyObject*>* expected_of(PyObject* param) const {
    for (const auto& [known, values] : states_) {
      if (known == param) return &values;
    }
    return nullptr;
  }

  bool has_layers() const {
    static PyObject* const parameters = PyUnicode_InternFromString("_parameters");
    static PyObject* const buffers = PyUnicode_InternFromString("_buffers");
    static PyObject* const weight = PyUnicode_InternFromString("weight");
    static PyObject* const mask = PyUnicode_InternFromString("mask");
    for (const Layer& known : layers_) {
      py::object layer = known.reference();
      if (layer.is_none()) return false;
      for (auto [owner, name, tensor] :
           {std::tuple{parameters, weight, known.weight}, std::tuple{buffers, mask, known.mask}}) {
        auto dict = py::reinterpret_steal<py::object>(PyObject_GetAttr(layer.ptr(), owner));
        if (!dict) throw py::error_already_set();
        if (!PyDict_Check(dict.ptr()) || PyDict_GetItem(dict.ptr(), name) != tensor) return false;
      }
    }
    return true;
  }

  bool lies() const {
    for (const Held& each : held_) {
      const Tensor& tensor = unpack(each.tensor);
      if (tensor.numel() != each.size || !tensor.is_contiguous() || tensor.data_ptr() != each.at) {
        return false;
      }
    }
    return true;
  }

  int64_t changes_;
  bool whole_state_;
  size_t with_state_ = 0;
  std::vector<PyObject*> params_;
  std::vector<std::pair<PyObject*, std::vector<PyObject*>>> states_;
  std::vector<Held> held_;
  std::vector<Layer> layers_;
};

// A memory that was freed or never taken has no address: then nothing is as it was.
template <typename Question>
bool ask(Question question) {
  try {
    return question();
  } catch (const c10::Error&) {
    return false;
  }
}

// The step of one of `sparse_tickets.optim`.
class Fused : public Look {
 public:
  using Look::Look;

  static constexpr int kNo = 0, kNumbers = 1, kYes = 2;

  // Parameters, where the addresses of their gradients go, and those without a gradient; weights
  // and masks nobody may have written; the groups' hyper-parameters by name; then the kernel, what
  // it is called with, in how many parts threads may share its work, and whether without the GIL.
  void set_up(const py::list& params, int64_t gradients_at, int64_t stride,
              const py::list& without, const py::list& weights, const py::list& masks,
              const py::list& groups, const py::tuple& names, int64_t step,
              const std::vector<int64_t>& places, int64_t parts, int64_t work, bool alone) {
    params_ = objects_of(params);
    without_ = objects_of(without);
    gradients_ = reinterpret_cast<int64_t*>(gradients_at);
    stride_ = stride;
    weights_ = objects_of(weights);
    for (PyObject* mask : objects_of(masks)) masks_.push_back({mask, unpack(mask)._version()});
    groups_ = objects_of(groups);
    names_ = names;
    step_ = reinterpret_cast<Step>(step);
    places_ = places;
    parts_ = parts;
    work_ = work;
    alone_ = alone;
    take_versions();
  }

  // The norm of the gradients, or None where something is not as it was.
  py::object step(py::handle groups, py::handle state, int64_t changes, double limit) {
    if (look(groups, state, changes) != kYes) return py::none();
    return py::float_(run(limit));
  }

  // Whether the step may go on, or has to take up numbers first; takes up the gradients' addresses.
  int look(py::handle groups, py::handle state, int64_t changes) {
    bool same = ask([&] {
      return is_same(groups, state, changes) && is_unwritten() && take_gradients();
    });
    return !same ? kNo : has_numbers() ? kYes : kNumbers;
  }

  // The numbers that the groups hold now have been taken up.
  void took_numbers() {
    numbers_.clear();
    for (PyObject* group : groups_) {
      for (py::handle name : names_) {
        PyObject* value = PyDict_GetItem(group, name.ptr());
        // What may be written is looked at each time.
        bool fixed = value != nullptr && (PyFloat_CheckExact(value) || PyLong_CheckExact(value) ||
                                          PyBool_Check(value) || PyTuple_CheckExact(value));
        numbers_.push_back(fixed ? py::reinterpret_borrow<py::object>(value) : py::object());
      }
    }
  }

  double run(double limit) {
    double norm = 0.0;
    void* raised = nullptr;
    int status = 0;
    int64_t threads = count_threads(parts_, work_);
    auto call = [&] {
      status = step_(&norm, &raised, threads, places_[0], places_[1], places_[2], places_[3],
                     places_[4], places_[5], places_[6], limit);
    };
    if (alone_) {
      py::gil_scoped_release release;
      call();
    } else {
      call();
    }
    TORCH_CHECK(status == 0, "the step of an optimiser failed with status ", status);
    for (PyObject* param : params_) unpack(param).unsafeGetTensorImpl()->bump_version();
    take_versions();
    return norm;
  }

 private:
  static std::vector<PyObject*> objects_of(const py::list& list) {
    std::vector<PyObject*> objects;
    for (py::handle each : list) objects.push_back(each.ptr());
    return objects;
  }

  void take_versions() {
    versions_.clear();
    for (PyObject* weight : weights_) versions_.push_back(unpack(weight)._version());
  }

  bool is_unwritten() const {
    for (size_t i = 0; i < weights_.size(); ++i) {
      if (unpack(weights_[i])._version() != versions_[i]) return false;
    }
    for (const auto& [mask, version] : masks_) {
      if (unpack(mask)._version() != version) return false;
    }
    return true;
  }

  bool take_gradients() {
    for (PyObject* param : without_) {
      if (unpack(param).grad().defined()) return false;
    }
    for (size_t i = 0; i < params_.size(); ++i) {
      const Tensor& param = unpack(params_[i]);
      const Tensor& gradient = param.grad();
      if (!gradient.defined() || at::isTensorSubclassLike(gradient) ||
          gradient.layout() != at::kStrided || !gradient.is_cpu() ||
          gradient.scalar_type() != at::kFloat || gradient.is_neg() ||
          !gradient.is_contiguous() || gradient.numel() != param.numel()) {
        return false;
      }
      gradients_[i * stride_] = reinterpret_cast<int64_t>(gradient.const_data_ptr());
    }
    return true;
  }

  bool has_numbers() const {
    size_t next = 0;
    for (PyObject* group : groups_) {
      for (py::handle name : names_) {
        if (next == numbers_.size()) return false;
        const py::object& known = numbers_[next++];
        if (!known || PyDict_GetItem(group, name.ptr()) != known.ptr()) return false;
      }
    }
    return true;
  }

  std::vector<PyObject*> params_, without_, weights_, groups_;
  std::vector<uint32_t> versions_;
  std::vector<std::pair<PyObject*, uint32_t>> masks_;
  int64_t* gradients_ = nullptr;
  int64_t stride_ = 0;
  // Held, so that no identity is given to another.
  std::vector<py::object> numbers_;
  py::tuple names_;
  Step step_ = nullptr;
  std::vector<int64_t> places_;
  int64_t parts_ = 1, work_ = 0;
  bool alone_ = false;
};

// What the hook on every other optimiser does.
class Kept : public Look {
 public:
  using Look::Look;

  // Zero what is not zero off the masks, if all is as it was.
  bool run(py::handle groups, py::handle state, int64_t changes, int64_t keep_all, int64_t table,
           int64_t rows) const {
    if (!ask([&] { return is_same(groups, state, changes); })) return false;
    void *result = nullptr, *raised = nullptr;
    int status = reinterpret_cast<KeepAll>(keep_all)(&result, &raised, table, rows);
    TORCH_CHECK(status == 0, "keeping pruned weights at zero failed with status ", status);
    return true;
  }
};

void bind(py::module& module) {
  auto made = py::init<int64_t, const py::list&, const py::list&, const py::list&, bool>();
  py::class_<Look>(module, "Look").def("expect", &Look::expect);
  py::class_<Fused, Look>(module, "Fused")
      .def(made)
      .def("set_up", &Fused::set_up)
      .def("look", &Fused::look)
      .def("took_numbers", &Fused::took_numbers)
      .def("run", &Fused::run)
      .def("step", &Fused::step);
  py::class_<Kept, Look>(module, "Kept").def(made).def("run", &Kept::run);
}

}  // namespace steps
}  // namespace
