// A small check library: prints where a check failed, what was expected and what came, and counts.
#pragma once

#include <iostream>
#include <string>

namespace check {

inline long checks = 0;
inline long failures = 0;
inline std::string context;  // the case at hand, printed with its failures

inline bool count(bool passed) {
  ++checks;
  failures += !passed;
  return passed;
}

/// False once so much has been printed that more would not help.
inline bool loud() { return failures <= 20; }

inline std::ostream& fail(const char* file, int line) {
  return std::cerr << file << ":" << line << ": " << (context.empty() ? "" : context + ": ");
}

/// The exit status: a program that checked nothing has failed, too.
inline int report() {
  std::cout << checks << " checks, " << failures << " failures\n";
  return checks > 0 && failures == 0 ? 0 : 1;
}

}  // namespace check

#define CHECK(condition)                                              \
  do {                                                                \
    if (!check::count(static_cast<bool>(condition)) && check::loud()) \
      check::fail(__FILE__, __LINE__) << "expected " #condition "\n"; \
  } while (false)

#define CHECK_EQUAL(got, expected)                                                \
  do {                                                                            \
    const auto& got_ = (got);                                                     \
    const auto& expected_ = (expected);                                           \
    if (!check::count(got_ == expected_) && check::loud())                        \
      check::fail(__FILE__, __LINE__)                                             \
          << "expected " #got " to be " << expected_ << ", got " << got_ << "\n"; \
  } while (false)

#define CHECK_THROWS(expression, type)                                                    \
  do {                                                                                    \
    bool thrown_ = false;                                                                 \
    try {                                                                                 \
      (void)(expression);                                                                 \
    } catch (const type&) {                                                               \
      thrown_ = true;                                                                     \
    }                                                                                     \
    if (!check::count(thrown_) && check::loud())                                          \
      check::fail(__FILE__, __LINE__) << "expected " #expression " to throw " #type "\n"; \
  } while (false)
