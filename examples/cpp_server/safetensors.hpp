// Reader of safetensors files: 8 bytes little-endian header length, a JSON header that names tensors, their bytes.
// The whole header is checked before anything is handed out; a bad file throws FileError and nothing else happens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace safetensors {

class FileError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Tensor {
  std::string dtype;           // as the file spells it: "F32", "U8", ...
  std::vector<int64_t> shape;  // empty: a scalar
  const uint8_t* data;         // in the mapped file, without any alignment
  size_t bytes;                // product of the shape times the dtype's size
};

struct Contents {
  std::map<std::string, Tensor> tensors;
  std::map<std::string, std::string> metadata;
};

// Bytes of an element, or 0 for a dtype that safetensors does not know.
size_t dtype_bytes(const std::string& dtype);

// "F32 [2, 3]", for messages.
std::string describe(const Tensor& tensor);

// The contents of a file's `size` bytes at `file`; the tensors point into them.
Contents parse(const uint8_t* file, size_t size);

// A file mapped read-only. Somebody who shortens the file while it is mapped kills the reader (SIGBUS), so callers keep
// it mapped only as long as they read it.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);

  const Contents& contents() const { return contents_; }
  const std::string& path() const { return path_; }

 private:
  struct Unmap {
    size_t bytes;
    void operator()(uint8_t* data) const;
  };

  std::string path_;
  std::unique_ptr<uint8_t, Unmap> data_;
  Contents contents_;
};

}  // namespace safetensors
