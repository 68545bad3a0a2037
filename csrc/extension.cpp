// The Python module, whose import registers the kernels of all files.
#include <Python.h>

#include "common.h"

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  static std::vector<torch::Library> libraries;
  try {
    for (const auto& [key, add] : maskrcnn_benchmark::all_kernels()) {
      libraries.emplace_back(torch::Library::IMPL, "maskrcnn_benchmark", key, __FILE__, __LINE__);
      add(libraries.back());
    }
  } catch (const c10::Error& error) {
    libraries.clear(); // which takes back what was registered
    PyErr_SetString(PyExc_ImportError, error.what_without_backtrace());
    return nullptr;
  }
  return PyModule_Create(&module);
}
