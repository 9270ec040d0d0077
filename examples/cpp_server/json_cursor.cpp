#include "json_cursor.hpp"

#include <cstdio>
#include <limits>

namespace safetensors {
namespace {

void append_utf8(std::string& out, uint32_t code_point) {
  const auto put = [&out](uint32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xC0 | code_point >> 6);
    put(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    put(0xE0 | code_point >> 12);
    put(0x80 | (code_point >> 6 & 0x3F));
    put(0x80 | (code_point & 0x3F));
  } else {
    put(0xF0 | code_point >> 18);
    put(0x80 | (code_point >> 12 & 0x3F));
    put(0x80 | (code_point >> 6 & 0x3F));
    put(0x80 | (code_point & 0x3F));
  }
}

// Bytes of the valid UTF-8 sequence that `text` starts with, or 0.
size_t utf8_length(std::string_view text) {
  const auto byte = [text](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const unsigned lead = byte(0);
  if (lead < 0x80) return 1;
  const size_t length = lead >= 0xC2 && lead <= 0xDF ? 2 : lead >= 0xE0 && lead <= 0xEF ? 3 : lead >= 0xF0 ? 4 : 0;
  // The second byte also rules out overlong forms, surrogates and numbers above 0x10FFFF.
  const unsigned low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const unsigned high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  if (length == 0 || lead > 0xF4 || byte(1) < low || byte(1) > high) return 0;
  for (size_t i = 2; i < length; ++i) {
    if (byte(i) < 0x80 || byte(i) > 0xBF) return 0;
  }
  return length;
}

}  // namespace

void JsonCursor::fail(const std::string& expected) const {
  std::string got = "the end";
  if (at_ < text_.size()) {
    const auto byte = static_cast<unsigned char>(text_[at_]);
    char buffer[16];
    std::snprintf(buffer, sizeof buffer, byte >= 0x20 && byte < 0x7F ? "'%c'" : "byte 0x%02x", byte);
    got = buffer;
  }
  throw FileError("header byte " + std::to_string(at_) + ": expected " + expected + ", got " + got);
}

void JsonCursor::skip_space() {
  while (at_ < text_.size()) {
    const char c = text_[at_];
    if (c != ' ' && c != '\n' && c != '\r' && c != '\t') break;
    ++at_;
  }
}

bool JsonCursor::accept(char c) {
  skip_space();
  if (at_ == text_.size() || text_[at_] != c) return false;
  ++at_;
  return true;
}

void JsonCursor::expect(char c) {
  if (!accept(c)) fail(std::string("'") + c + "'");
}

void JsonCursor::end() {
  skip_space();
  if (at_ != text_.size()) fail("the end");
}

uint32_t JsonCursor::hex4() {
  uint32_t value = 0;
  for (int digit = 0; digit < 4; ++digit, ++at_) {
    const char c = at_ < text_.size() ? text_[at_] : '\0';
    uint32_t nibble;
    if (c >= '0' && c <= '9') {
      nibble = static_cast<uint32_t>(c - '0');
    } else if (c >= 'a' && c <= 'f') {
      nibble = static_cast<uint32_t>(c - 'a' + 10);
    } else if (c >= 'A' && c <= 'F') {
      nibble = static_cast<uint32_t>(c - 'A' + 10);
    } else {
      fail("a hexadecimal digit");
    }
    value = value << 4 | nibble;
  }
  return value;
}

void JsonCursor::append_escape(std::string& out) {
  static constexpr std::string_view kEscapes = "\"\\/bfnrt", kValues = "\"\\/\b\f\n\r\t";
  if (at_ == text_.size()) fail("an escape");
  if (const size_t i = kEscapes.find(text_[at_]); i != std::string_view::npos) {
    out.push_back(kValues[i]);
    ++at_;
    return;
  }
  if (text_[at_] != 'u') fail("an escape");
  ++at_;
  uint32_t code_point = hex4();
  if (code_point >= 0xD800 && code_point < 0xDC00) {  // the first half of a surrogate pair
    if (text_.substr(at_, 2) != "\\u") fail("the second half of a surrogate pair");
    at_ += 2;
    const uint32_t low = hex4();
    if (low < 0xDC00 || low > 0xDFFF) fail("the second half of a surrogate pair before");
    code_point = 0x10000 + ((code_point - 0xD800) << 10) + (low - 0xDC00);
  } else if (code_point >= 0xDC00 && code_point <= 0xDFFF) {
    fail("no lone second half of a surrogate pair before");
  }
  append_utf8(out, code_point);
}

std::string JsonCursor::string() {
  expect('"');
  std::string out;
  while (true) {
    if (at_ == text_.size() || static_cast<unsigned char>(text_[at_]) < 0x20) fail("'\"'");
    const size_t length = utf8_length(text_.substr(at_));
    if (length == 0) fail("UTF-8");
    const std::string_view character = text_.substr(at_, length);
    at_ += length;
    if (character == "\"") return out;
    if (character == "\\") {
      append_escape(out);
    } else {
      out += character;
    }
  }
}

int64_t JsonCursor::integer() {
  skip_space();
  const auto is_digit = [this] { return at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; };
  if (!is_digit()) fail("a non-negative integer");
  const bool leading_zero = text_[at_] == '0';
  int64_t value = 0;
  for (int digits = 0; is_digit(); ++digits, ++at_) {
    if (digits == 1 && leading_zero) fail("no digit after a leading 0");
    const int64_t digit = text_[at_] - '0';
    if (value > (std::numeric_limits<int64_t>::max() - digit) / 10) fail("an integer below 2^63");
    value = 10 * value + digit;
  }
  return value;
}

}  // namespace safetensors
