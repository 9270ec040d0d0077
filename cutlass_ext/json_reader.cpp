#include "cutlass_ext/json_reader.hpp"

#include <charconv>
#include <cstdio>
#include <limits>

namespace cutlass_ext {

void JsonReader::fail(const std::string& message) {
  if (ok()) error_ = "line " + std::to_string(line_) + ": " + message;
}

void JsonReader::expected(const std::string& what) {
  std::string got = "the end";
  if (at_ < text_.size()) {
    const auto byte = static_cast<unsigned char>(text_[at_]);
    char buffer[16];
    std::snprintf(buffer, sizeof buffer, byte >= 0x20 && byte < 0x7F ? "'%c'" : "byte 0x%02x", byte);
    got = buffer;
  }
  fail("expected " + what + ", got " + got);
}

void JsonReader::skip_space() {
  for (; at_ < text_.size(); ++at_) {
    const char c = text_[at_];
    if (c == '\n') {
      ++line_;
    } else if (c != ' ' && c != '\r' && c != '\t') {
      break;
    }
  }
}

bool JsonReader::accept(char c) { return accept(std::string_view(&c, 1)); }

bool JsonReader::accept(std::string_view word) {
  if (!ok()) return false;
  skip_space();
  if (text_.substr(at_, word.size()) != word) return false;
  at_ += word.size();
  return true;
}

void JsonReader::expect(char c) {
  if (ok() && !accept(c)) expected(std::string("'") + c + "'");
}

void JsonReader::end() {
  skip_space();
  if (ok() && at_ != text_.size()) expected("the end");
}

// Escapes are kept as they stand: names have none, and other strings are skipped.
std::string JsonReader::string() {
  expect('"');
  if (!ok()) return {};
  const size_t first = at_;
  for (; at_ < text_.size() && text_[at_] != '"'; ++at_) {
    if (static_cast<unsigned char>(text_[at_]) < 0x20) break;
    if (text_[at_] == '\\' && at_ + 1 < text_.size()) ++at_;
  }
  const std::string value(text_.substr(first, at_ - first));
  expect('"');
  return value;
}

int64_t JsonReader::integer() {
  if (!ok()) return 0;
  skip_space();
  const auto is_digit = [this] { return at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; };
  if (!is_digit()) expected("an integer that is not negative");
  int64_t value = 0;
  for (; ok() && is_digit(); ++at_) {
    const int64_t digit = text_[at_] - '0';
    if (value > (std::numeric_limits<int64_t>::max() - digit) / 10) {
      fail("expected an integer below 2^63");
    } else {
      value = 10 * value + digit;
    }
  }
  if (ok() && at_ < text_.size() && (text_[at_] == '.' || text_[at_] == 'e' || text_[at_] == 'E')) {
    expected("an integer");
  }
  return value;
}

bool JsonReader::null() { return accept("null"); }

std::string_view JsonReader::number_text() {
  const size_t first = at_;
  while (at_ < text_.size() && std::string_view("+-.eE0123456789").find(text_[at_]) != std::string_view::npos) ++at_;
  return text_.substr(first, at_ - first);
}

double JsonReader::number() {
  if (!ok()) return 0;
  skip_space();
  const std::string_view text = number_text();
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) expected("a number");
  return value;
}

void JsonReader::skip() {
  if (!ok()) return;
  skip_space();
  const char c = at_ < text_.size() ? text_[at_] : '\0';
  if (c == '{' || c == '[') {
    if (++depth_ > kMaxDepth) return fail("expected less than 64 levels");
    if (c == '{') {
      object([this](const std::string&) { skip(); });
    } else {
      array([this] { skip(); });
    }
    --depth_;
  } else if (c == '"') {
    string();
  } else if (!accept("null") && !accept("true") && !accept("false")) {
    if (number_text().empty()) expected("a value");
  }
}

}  // namespace cutlass_ext
