// Defining the operators, so that the library serves programs without Python. The texts are those
// of fused/backends/schemas.py; setup.py writes the source that calls this.
#pragma once

#include <initializer_list>
#include <stdexcept>

#include <torch/csrc/stable/library.h>

namespace fused {

// Where they are defined already, by another copy of the library or by Python, they stay: torch's
// exception would end a process that is loading a library.
inline void define(torch::stable::detail::StableLibrary& library,
                   std::initializer_list<const char*> schemas) {
  for (const char* schema : schemas) {
    try {
      library.def(schema);
    } catch (const std::runtime_error&) {
    }
  }
}

}  // namespace fused
