#include "safetensors.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string_view>
#include <utility>

#include "json_cursor.hpp"

namespace safetensors {
namespace {

constexpr size_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation

struct DtypeSize {
  const char* name;
  size_t bytes;
};
constexpr DtypeSize kDtypes[] = {{"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1},
                                 {"U16", 2},  {"I16", 2}, {"F16", 2}, {"BF16", 2},    {"U32", 4},     {"I32", 4},
                                 {"F32", 4},  {"U64", 8}, {"I64", 8}, {"F64", 8},     {"C64", 8}};

// A tensor as the header describes it: where its bytes are is still to be checked.
struct Entry {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<int64_t> offsets;
};

Entry read_entry(JsonCursor& json, const std::string& name) {
  Entry entry{name, {}, {}, {}};
  bool has_dtype = false, has_shape = false, has_offsets = false;
  const auto once = [&](bool& seen, const std::string& key) {
    if (std::exchange(seen, true)) throw FileError("tensor '" + name + "': expected one '" + key + "', got two");
  };
  json.object([&](const std::string& key) {
    if (key == "dtype") {
      once(has_dtype, key);
      entry.dtype = json.string();
    } else if (key == "shape") {
      once(has_shape, key);
      json.array([&] { entry.shape.push_back(json.integer()); });
    } else if (key == "data_offsets") {
      once(has_offsets, key);
      json.array([&] { entry.offsets.push_back(json.integer()); });
    } else {
      throw FileError("tensor '" + name + "': expected dtype, shape and data_offsets, got '" + key + "'");
    }
  });
  if (!has_dtype || !has_shape || !has_offsets) {
    throw FileError("tensor '" + name + "': expected dtype, shape and data_offsets, got no " +
                    (!has_dtype   ? "dtype"
                     : !has_shape ? "shape"
                                  : "data_offsets"));
  }
  return entry;
}

// The tensor's bytes by dtype and shape.
size_t entry_bytes(const Entry& entry) {
  const size_t element = dtype_bytes(entry.dtype);
  if (element == 0) {
    throw FileError("tensor '" + entry.name + "': dtype: expected one of safetensors, got '" + entry.dtype + "'");
  }
  size_t bytes = element;
  for (const int64_t extent : entry.shape) {
    if (__builtin_mul_overflow(bytes, static_cast<size_t>(extent), &bytes)) {
      throw FileError("tensor '" + entry.name + "': shape: expected fewer than 2^64 bytes, got more");
    }
  }
  return bytes;
}

}  // namespace

size_t dtype_bytes(const std::string& dtype) {
  for (const DtypeSize& row : kDtypes) {
    if (dtype == row.name) return row.bytes;
  }
  return 0;
}

std::string describe(const Tensor& tensor) {
  std::string text = tensor.dtype + " [";
  for (size_t i = 0; i < tensor.shape.size(); ++i) text += (i ? ", " : "") + std::to_string(tensor.shape[i]);
  return text + "]";
}

Contents parse(const uint8_t* file, size_t size) {
  if (size < kLengthBytes) {
    throw FileError("expected at least " + std::to_string(kLengthBytes) + " bytes, got " + std::to_string(size));
  }
  uint64_t header_bytes = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) header_bytes |= uint64_t{file[i]} << 8 * i;
  const uint64_t limit = std::min<uint64_t>(kMaxHeaderBytes, size - kLengthBytes);
  if (header_bytes > limit) {
    throw FileError("header length: expected at most " + std::to_string(limit) + ", got " +
                    std::to_string(header_bytes) + " (a truncated file, or no safetensors file)");
  }

  Contents contents;
  std::vector<Entry> entries;
  JsonCursor json({reinterpret_cast<const char*>(file) + kLengthBytes, static_cast<size_t>(header_bytes)});
  bool has_metadata = false;
  json.object([&](const std::string& key) {
    if (key != "__metadata__") {
      entries.push_back(read_entry(json, key));
      return;
    }
    if (std::exchange(has_metadata, true)) throw FileError("header: expected one '__metadata__', got two");
    json.object([&](const std::string& name) { contents.metadata[name] = json.string(); });
  });
  json.end();

  // The tensors lie one behind the other from the first byte of the data to the last, in any order of names.
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.offsets < b.offsets; });
  const uint8_t* data = file + kLengthBytes + header_bytes;
  const size_t data_bytes = size - kLengthBytes - static_cast<size_t>(header_bytes);
  size_t begin = 0;
  for (Entry& entry : entries) {
    const size_t bytes = entry_bytes(entry);
    if (bytes > data_bytes - begin) {
      throw FileError("tensor '" + entry.name + "': expected at most " + std::to_string(data_bytes - begin) +
                      " bytes left in the file, got " + std::to_string(bytes) + " (a truncated file?)");
    }
    const std::vector<int64_t> expected = {static_cast<int64_t>(begin), static_cast<int64_t>(begin + bytes)};
    if (entry.offsets != expected) {
      std::string got;
      for (const int64_t offset : entry.offsets) got += (got.empty() ? "" : ", ") + std::to_string(offset);
      throw FileError("tensor '" + entry.name + "': data_offsets: expected [" + std::to_string(begin) + ", " +
                      std::to_string(begin + bytes) + "] by the shape and the tensors before it, got [" + got + "]");
    }
    const auto [position, inserted] = contents.tensors.try_emplace(
        entry.name, Tensor{std::move(entry.dtype), std::move(entry.shape), data + begin, bytes});
    if (!inserted) throw FileError("tensor '" + position->first + "': expected once, got twice");
    begin += bytes;
  }
  if (begin != data_bytes) {
    throw FileError("data: expected " + std::to_string(begin) + " bytes by the header, got " +
                    std::to_string(data_bytes));
  }
  return contents;
}

void MappedFile::Unmap::operator()(uint8_t* data) const { ::munmap(data, bytes); }

MappedFile::MappedFile(const std::string& path) : path_(path) {
  struct Descriptor {
    int fd;
    ~Descriptor() { ::close(fd); }
  };
  const auto fail = [&path](const char* step) { throw FileError(path + ": " + step + ": " + std::strerror(errno)); };
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.fd < 0) fail("open");
  struct stat status;
  if (::fstat(file.fd, &status) != 0) fail("fstat");
  if (!S_ISREG(status.st_mode)) throw FileError(path + ": expected a regular file");

  const auto size = static_cast<size_t>(status.st_size);
  if (size > 0) {  // mmap refuses empty files
    void* map = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.fd, 0);
    if (map == MAP_FAILED) fail("mmap");
    data_ = {static_cast<uint8_t*>(map), Unmap{size}};
  }
  try {
    contents_ = parse(data_.get(), size);
  } catch (const FileError& error) {
    throw FileError(path + ": " + error.what());
  }
}

}  // namespace safetensors
