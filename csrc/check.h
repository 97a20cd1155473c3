// Errors of the operators: what was expected, without the source's path.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace fused {

template <class... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace fused

#define FUSED_CHECK(condition, ...) \
  if (!(condition)) [[unlikely]]    \
  throw std::runtime_error(::fused::join("fused: ", __VA_ARGS__))
