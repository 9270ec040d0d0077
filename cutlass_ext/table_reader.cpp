// The JSON of a table, as pyquant/tables/schema.py describes it.
#include <limits>

#include "cutlass_ext/json_reader.hpp"
#include "cutlass_ext/table.hpp"

namespace cutlass_ext {
namespace {

constexpr int64_t kSchemaVersion = 1;
constexpr int64_t kNoEnd = std::numeric_limits<int64_t>::max();

std::string quoted(const std::string& text) { return "'" + text + "'"; }

int64_t read_positive(JsonReader& json, const char* name) {
  const int64_t value = json.integer();
  if (json.ok() && value < 1) json.fail(std::string(name) + ": expected at least 1, got " + std::to_string(value));
  return value;
}

int read_instance(JsonReader& json) {
  const std::string name = json.string();
  const int index = find_table_instance(name);
  if (json.ok() && index < 0) json.fail("instance: there is none called " + quoted(name));
  return index;
}

// An instance's device and family stand in its name.
bool dequantizes(int instance) {
  const std::string name = table_instance_name(instance);
  return name.find("_dequant") != std::string::npos;
}

TableBucket read_bucket(JsonReader& json, int64_t first) {
  TableBucket bucket{0, -1, -1};
  int64_t begin = 0;
  json.object([&](const std::string& name) {
    if (name == "m") {
      int count = 0;
      json.array([&] {
        if (++count == 1) {
          begin = read_positive(json, "m");
        } else {
          bucket.last = json.null() ? kNoEnd : json.integer();
        }
      });
      if (json.ok() && count != 2) json.fail("m: expected [first, last], got " + std::to_string(count) + " values");
    } else if (name == "instance") {
      bucket.instance = read_instance(json);
    } else if (name == "gemm") {
      bucket.gemm = read_instance(json);
    } else {
      json.fail("expected m, instance or gemm, got " + quoted(name));
    }
  });
  if (!json.ok()) return bucket;
  if (begin != first) {
    json.fail(std::string("m: ") + (begin > first ? "gap" : "overlap") + ": expected a bucket to start at " +
              std::to_string(first) + ", got " + std::to_string(begin));
  } else if (bucket.last < begin) {
    json.fail("m: expected an end of at least " + std::to_string(begin) + ", got " + std::to_string(bucket.last));
  } else if (bucket.instance < 0) {
    json.fail("a bucket lacks instance");
  } else if (bucket.gemm >= 0 && dequantizes(bucket.gemm)) {
    json.fail(std::string("gemm: expected a GEMM, got ") + table_instance_name(bucket.gemm));
  } else if (bucket.gemm < 0 && !dequantizes(bucket.instance)) {
    bucket.gemm = bucket.instance;
  }
  return bucket;
}

void read_buckets(JsonReader& json, TableEntry* entry) {
  int64_t first = 1;
  json.array([&] {
    if (first == kNoEnd) return json.fail("m: the bucket before has no end");
    const TableBucket bucket = read_bucket(json, first);
    first = bucket.last == kNoEnd ? kNoEnd : bucket.last + 1;
    entry->buckets.push_back(bucket);
  });
  if (json.ok() && first != kNoEnd) {
    json.fail("m: gap: expected null as the last bucket's end, got " + std::to_string(first - 1));
  }
}

TableEntry read_entry(JsonReader& json) {
  TableEntry entry{};
  TableEncoding encoding{};
  unsigned seen = 0;
  json.object([&](const std::string& name) {
    if (name == "encoding") {
      const std::string text = json.string();
      if (json.ok() && !parse_encoding(text, &encoding)) {
        json.fail("encoding: expected such as int4 or codebook4-nested, got " + quoted(text));
      }
      entry.encoding = encoding.id();
      seen |= 1;
    } else if (name == "dtype") {
      const std::string text = json.string();
      if (json.ok() && !parse_dtype(text, &entry.dtype)) {
        json.fail("dtype: expected fp32, fp16 or bf16, got " + quoted(text));
      }
      seen |= 2;
    } else if (name == "group_size") {
      entry.group_size = json.integer();
      seen |= 4;
    } else if (name == "n") {
      entry.n = read_positive(json, "n");
      seen |= 8;
    } else if (name == "k") {
      entry.k = read_positive(json, "k");
      seen |= 16;
    } else if (name == "buckets") {
      read_buckets(json, &entry);
      seen |= 32;
    } else {
      json.fail("expected encoding, dtype, group_size, n, k or buckets, got " + quoted(name));
    }
  });
  if (json.ok() && seen != 63) json.fail("an entry lacks one of encoding, dtype, group_size, n, k and buckets");
  return entry;
}

// `count` coefficients into `to`.
void read_coefficients(JsonReader& json, const char* family, int count, double* to) {
  int read = 0;
  json.array([&] {
    const double value = json.number();
    if (json.ok() && !(value > 0)) json.fail(std::string(family) + ": expected positive coefficients");
    if (read < count) to[read] = value;
    ++read;
  });
  if (json.ok() && read != count) {
    json.fail(std::string(family) + ": expected " + std::to_string(count) + " coefficients, got " +
              std::to_string(read));
  }
}

void read_model(JsonReader& json, DeviceTable* table) {
  constexpr const char* kFamilies[kModelFamilies] = {"stream", "wgmma", "dense"};  // in the order of ModelFamily
  CostModel model{};
  std::string encoding;
  unsigned seen = 0;
  json.object([&](const std::string& name) {
    if (name == "encoding") {
      encoding = json.string();
      if (json.ok() && encoding != "int4" && encoding != "codebook4") {
        json.fail("encoding: expected int4 or codebook4, got " + quoted(encoding));
      }
      return;
    }
    for (int f = 0; f < kModelFamilies; ++f) {
      if (name != kFamilies[f]) continue;
      seen |= 1u << f;
      return read_coefficients(json, kFamilies[f], kModelCoefficients[f], model.coefficients[f]);
    }
    json.fail("expected encoding, stream, wgmma or dense, got " + quoted(name));
  });
  if (json.ok() && (seen != 7 || encoding.empty())) json.fail("a model lacks one of encoding, stream, wgmma and dense");
  auto& place = encoding == "int4" ? table->integers : table->codebooks;
  if (json.ok() && place) json.fail("a model of " + encoding + " came before");
  place = model;
}

bool same_key(const TableEntry& a, const TableEntry& b) {
  return a.encoding == b.encoding && a.dtype == b.dtype && a.group_size == b.group_size && a.n == b.n && a.k == b.k;
}

void read_entries(JsonReader& json, DeviceTable* table) {
  json.array([&] {
    TableEntry entry = read_entry(json);
    if (!json.ok()) return;
    for (const TableEntry& other : table->entries) {
      if (same_key(entry, other)) return json.fail("an entry of this encoding, dtype, group_size, n and k came before");
    }
    table->entries.push_back(std::move(entry));
  });
}

}  // namespace

std::string read_table(std::string_view text, DeviceTable* table) {
  JsonReader json(text);
  bool has_schema = false;
  json.object([&](const std::string& name) {
    if (name == "schema") {
      const int64_t version = json.integer();
      if (json.ok() && version != kSchemaVersion) {
        json.fail("schema: expected " + std::to_string(kSchemaVersion) + ", got " + std::to_string(version));
      }
      has_schema = true;
    } else if (name == "device") {
      table->device = json.string();
    } else if (name == "processors") {
      if (!json.null()) table->processors = read_positive(json, "processors");
    } else if (name == "provenance") {
      json.skip();
    } else if (name == "models") {
      json.array([&] { read_model(json, table); });
    } else if (name == "entries") {
      read_entries(json, table);
    } else {
      json.fail("expected schema, device, processors, provenance, models or entries, got " + quoted(name));
    }
  });
  json.end();
  if (json.ok() && !has_schema) json.fail("the table lacks schema");
  if (json.ok() && table->device.empty()) json.fail("the table lacks device");
  if (json.ok() && table->entries.empty()) json.fail("the table lacks entries");
  return json.error();
}

}  // namespace cutlass_ext
