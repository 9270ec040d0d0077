#include "cutlass_ext/table.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>

namespace cutlass_ext {
namespace {

#include "tables.gen.inc"  // kInstanceNames, kTables

// All tables that are in use at one time, never changed once published.
struct TableSet {
  uint64_t generation = 0;
  std::vector<DeviceTable> tables;
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

const TableEntry* search(const TableSet& set, std::string_view device_name, const TableQuery& query) {
  for (const DeviceTable& table : set.tables) {
    if (table.device == device_name) return nearest_entry(table, query);
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

const TableEntry* find_entry(std::string_view device_name, const TableQuery& query) {
  return search(tables_in_use(), device_name, query);
}

const TableEntry* find_entry(int device_index, const char* device_name, const TableQuery& query) {
  thread_local CacheSet cache[kCacheSets];
  const TableSet& tables_now = tables_in_use();
  if (tables_now.tables.empty()) return nullptr;
  CacheSet& set = cache[cache_index(device_index, query)];
  for (const CacheSlot& slot : set.slots) {
    if (slot.n == query.n && slot.k == query.k && slot.generation == tables_now.generation &&
        slot.group_size == query.group_size && slot.encoding == query.encoding && slot.dtype == query.dtype &&
        slot.device_index == device_index) {
      return slot.entry;
    }
  }
  const TableEntry* entry = search(tables_now, device_name, query);
  set.slots[set.oldest] = {tables_now.generation, device_index, query.encoding, query.dtype,
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
