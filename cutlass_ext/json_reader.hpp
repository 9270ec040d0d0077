// A reader of JSON text for files of a known form: whatever is asked for must come next. The first failure is kept,
// with its line, and every later call fails too, so that a caller may look once, at the end of a loop.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace cutlass_ext {

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  bool ok() const { return error_.empty(); }
  const std::string& error() const { return error_; }  // "line 3: expected ..., got ..."; empty: none
  int line() const { return line_; }
  void fail(const std::string& message);  // at the current line

  // Calls member(name) for each member of an object; it has to read the value.
  template <class Member>
  void object(Member member) {
    expect('{');
    if (accept('}')) return;
    do {
      const std::string name = string();
      expect(':');
      if (ok()) member(name);
    } while (ok() && accept(','));
    expect('}');
  }

  // Calls element() for each element of an array; it has to read the element.
  template <class Element>
  void array(Element element) {
    expect('[');
    if (accept(']')) return;
    do {
      if (ok()) element();
    } while (ok() && accept(','));
    expect(']');
  }

  std::string string();
  int64_t integer();  // not negative
  double number();
  bool null();  // whether null comes next; reads it if so
  void skip();  // any value
  void end();   // nothing but white space is left

 private:
  void skip_space();
  bool accept(char c);
  bool accept(std::string_view word);
  void expect(char c);
  void expected(const std::string& what);
  std::string_view number_text();  // and reads it

  static constexpr int kMaxDepth = 64;  // of what is skipped

  std::string_view text_;
  size_t at_ = 0;
  int line_ = 1;
  int depth_ = 0;
  std::string error_;
};

}  // namespace cutlass_ext
