// The lookup in dispatch tables: while another thread replaces them, and how long it takes.
#include "cutlass_ext/table.hpp"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

using namespace cutlass_ext;

namespace {

constexpr NamedDevice kDevice{0, "D", 0};

void expect(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  std::exit(1);
}

// 40 shapes of one encoding; `first` runs up to M = 16, `then` above.
std::string table_text(const std::string& first, const std::string& then) {
  std::string entries;
  for (int i = 1; i <= 40; ++i) {
    entries += std::string(i == 1 ? "" : ",") + R"({"encoding":"int4","dtype":"bf16","group_size":128,"n":)" +
               std::to_string(512 * i) + R"(,"k":4096,"buckets":[{"m":[1,16],"instance":")" + first +
               R"("},{"m":[17,null],"instance":")" + then + R"("}]})";
  }
  return R"({"schema":1,"device":"D","processors":132,"provenance":{"a":[1,-2.5e3,null,{"b":true}]},"entries":[)" +
         entries + "]}";
}

TableQuery query(int64_t n, int64_t m) {
  TableEncoding encoding;
  expect(parse_encoding("int4", &encoding), "int4 is an encoding");
  return {encoding.id(), DType::kBf16, 128, n, 4096, m};
}

std::string instance(int64_t n, int64_t m) {
  const TableEntry* entry = find_entry(kDevice, query(n, m));
  return entry == nullptr ? "" : table_instance_name(entry->at(m).instance);
}

void readers_see_one_table_or_the_other() {
  const std::string a = table_text("cpu_stream_portable", "cpu_tile_portable");
  const std::string b = table_text("cpu_tile_portable", "cpu_stream_portable");
  expect(use_table(&a).empty(), "a table is read");
  std::atomic<bool> stop{false};
  std::atomic<int64_t> wrong{0}, looked{0};
  std::vector<std::thread> readers;
  for (int t = 0; t < 3; ++t) {
    readers.emplace_back([&, t] {
      for (int64_t i = t; !stop; ++i) {
        const TableEntry* entry = find_entry(kDevice, query(512 * (1 + i % 40), 1));
        // One entry is of one table: its two buckets are never equal.
        if (entry == nullptr || entry->at(1).instance == entry->at(17).instance) ++wrong;
        ++looked;
      }
    });
  }
  for (int i = 0; i < 200; ++i) expect(use_table(i % 2 == 0 ? &b : &a).empty(), "a table is replaced");
  while (looked < 1000) std::this_thread::yield();
  stop = true;
  for (std::thread& reader : readers) reader.join();
  expect(wrong == 0, "a reader sees an entry of one table");
  expect(instance(512, 1) == "cpu_stream_portable", "the last table is in use");
  const std::string broken = a.substr(0, a.size() / 2);
  expect(use_table(&broken).find("line 1") == 0, "half a table is an error with its line");
  expect(instance(512, 1) == "cpu_stream_portable", "the old table stays");
}

// What AddressSanitizer is for: no text may lead the reader astray.
void damaged_text_is_an_error_or_a_table() {
  const std::string good = R"({"schema":1,"device":"D","processors":null,"provenance":{"a":[1,"b\"c"]},"entries":[)"
                           R"({"encoding":"int4-nested-flat","dtype":"fp16","group_size":0,"n":64,"k":64,"buckets":)"
                           R"([{"m":[1,null],"instance":"cpu_dequant_portable","gemm":"cpu_tile_portable"}]}]})";
  DeviceTable whole;
  expect(read_table(good, &whole).empty(), "the text is a table");
  for (size_t length = 0; length < good.size(); ++length) {
    DeviceTable table;
    expect(!read_table(good.substr(0, length), &table).empty(), "a part of a table is an error");
  }
  int errors = 0;
  for (size_t at = 0; at < good.size(); ++at) {
    for (const char byte : {'\0', '"', '\\', '[', ']', '{', '}', ',', ':', '9', 'n', '\xff'}) {
      std::string text = good;
      text[at] = byte;
      DeviceTable table;
      if (!read_table(text, &table).empty()) ++errors;
    }
  }
  expect(errors > 1000, "most damage is noticed");
}

void lookup_time() {
  constexpr int kLookups = 4'000'000;
  int64_t sum = 0;
  TableQuery q = query(512, 1);
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kLookups; ++i) {
    q.n = 512 * (1 + i % 60);  // a third of the shapes is not in the table
    q.m = 1 + i % 300;
    sum += find_entry(kDevice, q)->at(q.m).instance;
  }
  const double ns = std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
  expect(sum > 0, "instances were found");
  std::printf("lookup: %.1f ns\n", ns / kLookups);
}

}  // namespace

int main() {
  expect(instance(512, 1).empty(), "no table for a device that the library does not know");
  readers_see_one_table_or_the_other();
  damaged_text_is_an_error_or_a_table();
  lookup_time();
  expect(use_table(nullptr).empty() && instance(512, 1).empty(), "back to the tables of the build");
  std::printf("table_test: passed\n");
  return 0;
}
