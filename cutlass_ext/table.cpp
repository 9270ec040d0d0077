#include "cutlass_ext/table.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

namespace cutlass_ext {
namespace {

#include "tables.gen.inc"  // kInstanceNames, kTables

// Entries that cost models predicted, kept as long as the tables they come from.
class Predictions {
 public:
  const TableEntry* get(const DeviceTable& table, const CostModel& model, int64_t processors, const TableQuery& query);

 private:
  using Key = std::tuple<const DeviceTable*, uint32_t, DType, int64_t, int64_t, int64_t, int64_t>;
  std::mutex mutex_;
  std::map<Key, TableEntry> entries_;
};

// All tables that are in use at one time, never changed once published.
struct TableSet {
  uint64_t generation = 0;
  std::vector<DeviceTable> tables;
  mutable Predictions predictions;
};

// Tables of the build name instances of the build, as the generator has checked; the tests read each of them.
std::vector<DeviceTable> built_in_tables() {
  std::vector<DeviceTable> tables;
  for (const char* text : kTables) {
    DeviceTable table;
    if (text != nullptr && read_table(text, &table).empty()) tables.push_back(std::move(table));
  }
  return tables;
}

struct Tables {
  std::mutex writer;
  std::vector<std::unique_ptr<const TableSet>> all;  // the last one is in use
  std::atomic<const TableSet*> current;

  Tables() {
    auto first = std::make_unique<TableSet>();
    first->generation = 1;
    first->tables = built_in_tables();
    publish(std::move(first));
  }

  void publish(std::unique_ptr<const TableSet> set) {
    all.push_back(std::move(set));
    current.store(all.back().get(), std::memory_order_release);
  }
};

Tables& tables() {
  static Tables instance;
  return instance;
}

double squared_log_ratio(double a, double b) {
  const double distance = std::log(a / b);
  return distance * distance;
}

double waves(int64_t n, int64_t processors) { return std::ceil(std::ceil(n / 64.0) / processors); }

double group_distance(int64_t entry_group, const TableQuery& query) {
  const int64_t entry_size = entry_group == 0 ? query.k : entry_group;
  return std::fabs(std::log(static_cast<double>(entry_size) / std::min(query.group_size, query.k)));
}

double shape_distance(const DeviceTable& table, const TableEntry& entry, const TableQuery& query) {
  const double distance = squared_log_ratio(entry.n, query.n) + squared_log_ratio(entry.k, query.k);
  if (table.processors == 0) return distance;
  return distance + squared_log_ratio(waves(entry.n, table.processors), waves(query.n, table.processors));
}

// The smaller group size of two as near; a group per row counts as K.
bool nearer_group(int64_t a, int64_t b, const TableQuery& query) {
  const double to_a = group_distance(a, query), to_b = group_distance(b, query);
  const auto size = [&](int64_t group) { return group == 0 ? query.k : group; };
  return to_a < to_b || (to_a == to_b && size(a) < size(b));
}

// What a thread found last: sets of slots by hash. An entry of an old generation is not valid.
struct CacheSlot {
  uint64_t generation = 0;
  int device_index = 0;
  uint32_t encoding = 0;
  DType dtype = DType::kFp32;
  int64_t group_size = 0, n = 0, k = 0;
  const TableEntry* entry = nullptr;
};
constexpr size_t kCacheSets = 64, kCacheWays = 4;

struct CacheSet {
  CacheSlot slots[kCacheWays];
  size_t oldest = 0;
};

size_t cache_index(int device_index, const TableQuery& q) {
  uint64_t h = static_cast<uint64_t>(q.n) * 0x9E3779B97F4A7C15ull ^ static_cast<uint64_t>(q.k) * 0xC2B2AE3D27D4EB4Full;
  h ^= static_cast<uint64_t>(q.group_size) * 0x165667B19E3779F9ull;
  h += (uint64_t{q.encoding} << 4 | static_cast<uint64_t>(q.dtype)) * 0xD6E8FEB86659FD93ull;
  h += static_cast<uint64_t>(device_index) * 0xA0761D6478BD642Full;
  return h >> 32 & (kCacheSets - 1);
}

// The entry of the nearest group size and shape, or nullptr.
const TableEntry* nearest_entry(const DeviceTable& table, const TableQuery& query) {
  const TableEntry* best = nullptr;
  double best_distance = std::numeric_limits<double>::infinity();
  for (const TableEntry& entry : table.entries) {
    if (entry.encoding != query.encoding || entry.dtype != query.dtype) continue;
    if (best != nullptr && nearer_group(best->group_size, entry.group_size, query)) continue;
    const double distance = shape_distance(table, entry, query);
    const bool nearer = best == nullptr || nearer_group(entry.group_size, best->group_size, query);
    if (!nearer && distance >= best_distance) continue;
    best = &entry;
    best_distance = distance;
  }
  return best;
}

const CostModel* model_of(const DeviceTable& table, const TableQuery& query) {
  const TableEncoding encoding = TableEncoding::of(query.encoding);
  if (encoding.bits != 4 || encoding.flat || query.dtype == DType::kFp32) return nullptr;
  const auto& model = encoding.kind == Encoding::kCodebook ? table.codebooks : table.integers;
  return model ? &*model : nullptr;
}

// What a cost model makes of M from 1 to beyond 16384, in buckets as measurements give them.
std::vector<TableBucket> predict_buckets(const CostModel& model, int64_t processors, const TableQuery& query) {
  constexpr int64_t kTokens[] = {1,   4,   8,   16,  24,   32,   48,   64,   96,   128,  192,
                                 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384};
  // Tables from half of the H200's 41 weights, scored on the other half (10 splits, 2026-11-21): 4% made 96.9% of the
  // choices good ones and 1.1% slower than dequantizing, 6% 96.5% and 0.4%, 7% 96.0% and 0.3%.
  constexpr double kMargin = 1.06;
  const bool codebook = TableEncoding::of(query.encoding).kind == Encoding::kCodebook;
  const std::string variant =
      std::string(codebook ? "_codebook4" : "_int4") + (query.dtype == DType::kFp16 ? "_fp16" : "_bf16");
  const int stream = find_table_instance("cuda_stream" + variant), wgmma = find_table_instance("cuda_wgmma" + variant);
  const int dense = find_table_instance("cuda_dequant");
  std::vector<TableBucket> buckets;
  for (const int64_t m : kTokens) {
    const auto ns = [&](ModelFamily family) {
      return predict(family, model.coefficients[static_cast<int>(family)], {query.n, query.k, m, processors});
    };
    const double of_stream = ns(ModelFamily::kStream), of_wgmma = ns(ModelFamily::kWgmma);
    const int gemm = of_wgmma < of_stream ? wgmma : stream;
    const bool dequantize = ns(ModelFamily::kDense) < kMargin * std::min(of_stream, of_wgmma);
    const TableBucket bucket{m, dequantize ? dense : gemm, gemm};
    if (!buckets.empty() && buckets.back().instance == bucket.instance && buckets.back().gemm == bucket.gemm) {
      buckets.back().last = m;
    } else {
      buckets.push_back(bucket);
    }
  }
  buckets.back().last = std::numeric_limits<int64_t>::max();
  return buckets;
}

const TableEntry* Predictions::get(const DeviceTable& table, const CostModel& model, int64_t processors,
                                   const TableQuery& query) {
  const Key key{&table, query.encoding, query.dtype, query.group_size, query.n, query.k, processors};
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto [place, is_new] = entries_.try_emplace(key);
  if (is_new) {
    const int64_t group_size = query.group_size >= query.k ? 0 : query.group_size;
    place->second = {
        query.encoding, query.dtype, group_size, query.n, query.k, predict_buckets(model, processors, query), true};
  }
  return &place->second;
}

const TableEntry* search(const TableSet& set, const NamedDevice& device, const TableQuery& query) {
  for (const DeviceTable& table : set.tables) {
    if (table.device != device.name) continue;
    const TableEntry* nearest = nearest_entry(table, query);
    const CostModel* model = table.processors == 0 ? nullptr : model_of(table, query);
    if (model == nullptr || (nearest != nullptr && nearest->n == query.n && nearest->k == query.k)) return nearest;
    return set.predictions.get(table, *model, table.processors, query);
  }
  if (device.processors == 0) return nullptr;
  for (const DeviceTable& table : set.tables) {
    if (const CostModel* model = model_of(table, query)) {
      return set.predictions.get(table, *model, device.processors, query);
    }
  }
  return nullptr;
}

const TableSet& tables_in_use() { return *tables().current.load(std::memory_order_acquire); }

}  // namespace

int table_instance_count() { return static_cast<int>(sizeof(kInstanceNames) / sizeof(kInstanceNames[0])); }

const char* table_instance_name(int index) { return kInstanceNames[index]; }

int find_table_instance(std::string_view name) {
  for (int i = 0; i < table_instance_count(); ++i) {
    if (name == kInstanceNames[i]) return i;
  }
  return -1;
}

bool parse_encoding(std::string_view text, TableEncoding* encoding) {
  constexpr std::string_view kKinds[] = {"int", "uint", "codebook"};  // in the order of Encoding
  constexpr std::string_view kNested = "-nested", kFlat = "-flat";
  for (int kind = 0; kind < 3; ++kind) {
    const std::string_view name = kKinds[kind];
    if (text.substr(0, name.size()) != name || text.size() == name.size()) continue;
    const char digit = text[name.size()];
    std::string_view rest = text.substr(name.size() + 1);
    const auto take = [&rest](std::string_view suffix) {
      const bool there = rest.substr(0, suffix.size()) == suffix;
      if (there) rest.remove_prefix(suffix.size());
      return there;
    };
    const bool nested = take(kNested), flat = take(kFlat);
    if (digit < '2' || digit > '8' || !rest.empty()) continue;
    *encoding = {static_cast<Encoding>(kind), digit - '0', nested, flat};
    return true;
  }
  return false;
}

bool parse_dtype(std::string_view text, DType* dtype) {
  constexpr std::string_view kNames[] = {"fp32", "fp16", "bf16"};  // in the order of DType
  for (int i = 0; i < 3; ++i) {
    if (text != kNames[i]) continue;
    *dtype = static_cast<DType>(i);
    return true;
  }
  return false;
}

const TableBucket& TableEntry::at(int64_t m) const {
  size_t i = 0;
  while (m > buckets[i].last) ++i;
  return buckets[i];
}

const TableEntry* search_entry(const NamedDevice& device, const TableQuery& query) {
  return search(tables_in_use(), device, query);
}

const TableEntry* find_entry(const NamedDevice& device, const TableQuery& query) {
  thread_local CacheSet cache[kCacheSets];
  const TableSet& tables_now = tables_in_use();
  if (tables_now.tables.empty()) return nullptr;
  CacheSet& set = cache[cache_index(device.index, query)];
  for (const CacheSlot& slot : set.slots) {
    if (slot.n == query.n && slot.k == query.k && slot.generation == tables_now.generation &&
        slot.group_size == query.group_size && slot.encoding == query.encoding && slot.dtype == query.dtype &&
        slot.device_index == device.index) {
      return slot.entry;
    }
  }
  const TableEntry* entry = search(tables_now, device, query);
  set.slots[set.oldest] = {tables_now.generation, device.index, query.encoding, query.dtype,
                           query.group_size,      query.n,      query.k,        entry};
  set.oldest = (set.oldest + 1) % kCacheWays;
  return entry;
}

std::string use_table(const std::string* text) {
  DeviceTable table;
  if (text != nullptr) {
    std::string error = read_table(*text, &table);
    if (!error.empty()) return error;
  }
  Tables& t = tables();
  const std::lock_guard<std::mutex> lock(t.writer);
  const TableSet& now = *t.all.back();
  auto next = std::make_unique<TableSet>();
  next->generation = now.generation + 1;
  next->tables = text == nullptr ? t.all.front()->tables : now.tables;
  if (text != nullptr) {
    const auto same = [&](const DeviceTable& other) { return other.device == table.device; };
    const auto place = std::find_if(next->tables.begin(), next->tables.end(), same);
    if (place == next->tables.end()) {
      next->tables.push_back(std::move(table));
    } else {
      *place = std::move(table);
    }
  }
  t.publish(std::move(next));
  return {};
}

}  // namespace cutlass_ext
