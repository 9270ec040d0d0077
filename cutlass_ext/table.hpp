// Dispatch tables: which instance was measured to be the fastest, by device, weight and M.
//
// Lookup, in the table of the device's name:
//   1. An entry of the encoding, dtype, N and K. Of their group sizes the nearest in log space counts (the smaller of
//      two as near).
//   2. Else what the table's cost model predicts (cost_model.hpp), where it has one of the encoding's kind: of the
//      instances for 4 bits the fastest, but dequantizing for a dense GEMM unless that is 6% slower: predictions are
//      off by 5 to 10%, and to gain nothing is better than to be slower than what everybody can do.
//   3. Else the nearest entry of the encoding, dtype and nearest group size: the one with the least
//        (ln N' / N)^2 + (ln K' / K)^2 + (ln waves' / waves)^2,  waves = ceil(ceil(N / 64) / SMs)
//      (the first in the file of several as near; no waves where the table does not say how many SMs there are).
// A GPU without a table of its own gets 2. from the first table that has a model, for its number of SMs.
// Tests: tests/test_table_lookup.py, tests/test_cost_model.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cutlass_ext/cost_model.hpp"
#include "cutlass_ext/device_name.hpp"
#include "kernels/format.hpp"

namespace cutlass_ext {

// Names of all instances of kernels/instances.py, in the order of the manifest, which in a build without CUDA is a
// prefix of them. Tables may name any.
int table_instance_count();
const char* table_instance_name(int index);
int find_table_instance(std::string_view name);  // -1: there is none of that name

// Kind and bits of the codes, whether absmax is nested, whether groups cross the ends of rows: "int4", "uint4",
// "codebook4-nested-flat".
struct TableEncoding {
  Encoding kind;
  int bits;
  bool nested;
  bool flat;
  uint32_t id() const {
    return static_cast<uint32_t>(kind) << 8 | static_cast<uint32_t>(bits) << 2 | (nested ? 2u : 0u) | (flat ? 1u : 0u);
  }
  static TableEncoding of(uint32_t id) {
    return {static_cast<Encoding>(id >> 8), static_cast<int>(id >> 2 & 63), (id & 2) != 0, (id & 1) != 0};
  }
};
bool parse_encoding(std::string_view text, TableEncoding* encoding);
bool parse_dtype(std::string_view text, DType* dtype);

struct TableQuery {
  uint32_t encoding;  // TableEncoding::id
  DType dtype;
  int64_t group_size;  // K or more: one group per row
  int64_t n, k, m;
};

struct TableBucket {
  int64_t last;  // M up to it; INT64_MAX in the last bucket
  int instance;
  int gemm;  // for callers without a dense GEMM; -1: the dispatch's rule
};

struct TableEntry {
  uint32_t encoding;
  DType dtype;
  int64_t group_size;  // 0: K
  int64_t n, k;
  std::vector<TableBucket> buckets;
  bool predicted = false;  // by a cost model

  const TableBucket& at(int64_t m) const;
};

struct CostModel {
  double coefficients[kModelFamilies][kMostModelCoefficients];
};

struct DeviceTable {
  std::string device;
  int64_t processors = 0;  // 0: unknown
  std::vector<TableEntry> entries;
  std::optional<CostModel> integers, codebooks;
};

// What the tables that are in use say by the rule above, or nullptr. Takes time in proportion to the entries. A device
// that is not of this process has the index kNoDevice.
constexpr int kNoDevice = -2;
const TableEntry* search_entry(const NamedDevice& device, const TableQuery& query);

// The same through a cache of the calling thread, for every call of a GEMM.
const TableEntry* find_entry(const NamedDevice& device, const TableQuery& query);

// Replaces the table of its device, or without `text` goes back to what the library was built with. Returns "", or what
// is wrong with the text and where; then nothing has changed. Tables that were replaced stay in memory, since
// other threads may be reading them.
std::string use_table(const std::string* text);

// Reads a table's JSON. Returns "", or what is wrong and where. Implemented in table_reader.cpp.
std::string read_table(std::string_view text, DeviceTable* table);

}  // namespace cutlass_ext
