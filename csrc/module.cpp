// bcmf_ext._C, which tells what was built. It knows nothing of torch: the kernels are a library of their own.

#include <pybind11/pybind11.h>

#include "about.h"

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "What the compiled kernels of bcmf_ext tell of themselves; torch loads them from the library beside this.";
  m.def("bcmf_build_info", &bcmf_build_info, "JSON: compiler, cuda_archs (empty without CUDA), cpu_capability.");
  m.def("bcmf_contract", &bcmf_contract, "JSON: what bcmf_ext/ops.py and the kernels have to agree on.");
  m.def("bcmf_release_kept_memory", &bcmf_release_kept_memory,
        "Gives the system the memory that the CPU kernels keep from step to step (large gradients and statistics).");
}
