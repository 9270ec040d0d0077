// A cursor over the part of JSON that a safetensors header consists of: objects, arrays, strings and non-negative
// integers. Whatever is read must be there; anything else throws FileError with the byte at which it happened.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "safetensors.hpp"

namespace safetensors {

class JsonCursor {
 public:
  explicit JsonCursor(std::string_view text) : text_(text) {}

  // Calls member(key) for each member of an object; it has to read the member's value.
  template <typename Member>
  void object(Member member) {
    expect('{');
    if (accept('}')) return;
    do {
      const std::string key = string();
      expect(':');
      member(key);
    } while (accept(','));
    expect('}');
  }

  // Calls element() for each element of an array; it has to read the element.
  template <typename Element>
  void array(Element element) {
    expect('[');
    if (accept(']')) return;
    do {
      element();
    } while (accept(','));
    expect(']');
  }

  std::string string();
  int64_t integer();
  void end();  // nothing but white space is left

  [[noreturn]] void fail(const std::string& expected) const;

 private:
  void skip_space();
  bool accept(char c);
  void expect(char c);
  uint32_t hex4();
  void append_escape(std::string& out);

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace safetensors
