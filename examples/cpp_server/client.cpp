#include "client.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "checkpoint.hpp"
#include "protocol.hpp"
#include "reference.hpp"

namespace {

// A request with its right answer. Computed before the clock starts; the connections take turns with them.
struct Case {
  std::string layer;
  uint32_t m, n, k;
  std::vector<float> x;
  std::vector<double> expected;
};

constexpr int kCasesPerLayer = 4;

std::vector<Case> make_cases(const safetensors::MappedFile& file, const ClientOptions& options) {
  std::vector<std::string> names = quantized_layers(file);
  if (!options.layer.empty()) names = {options.layer};
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  std::vector<Case> cases;
  for (const std::string& name : names) {
    const CanonicalLayer layer(file, name);
    const cx_weight& weight = layer.weight();
    const std::vector<double> dense = dequantize_reference(weight);
    for (int i = 0; i < kCasesPerLayer; ++i) {
      Case c{
          name, static_cast<uint32_t>(options.m), static_cast<uint32_t>(weight.n), static_cast<uint32_t>(weight.k), {},
          {}};
      c.x.resize(size_t{c.m} * c.k);
      for (float& value : c.x) value = normal(random);
      c.expected = linear_reference(c.x, c.m, dense, c.n, c.k, layer.bias());
      cases.push_back(std::move(c));
    }
  }
  return cases;
}

void send_request(int fd, const Case& c) {
  std::string header;
  const auto append = [&header](const void* data, size_t bytes) {
    header.append(static_cast<const char*>(data), bytes);
  };
  const auto name_bytes = static_cast<uint32_t>(c.layer.size());
  append(&protocol::kGemmMagic, 4);
  append(&name_bytes, 4);
  append(c.layer.data(), name_bytes);
  append(&c.m, 4);
  append(&c.k, 4);
  protocol::send_all(fd, header.data(), header.size());
  protocol::send_all(fd, c.x.data(), c.x.size() * sizeof(float));
}

void receive_reply(int fd, const Case& c, std::vector<float>& y) {
  protocol::ReplyHeader reply;
  protocol::receive_rest(fd, &reply, sizeof reply);
  if (reply.status != protocol::kOk) {
    std::string message(std::min<uint32_t>(reply.m_or_message_bytes, 4096), '\0');
    protocol::receive_rest(fd, message.data(), message.size());
    throw protocol::IoError("layer '" + c.layer + "': status " + std::to_string(reply.status) + ": " + message);
  }
  if (reply.m_or_message_bytes != c.m || reply.n != c.n) {
    throw protocol::IoError("layer '" + c.layer + "': reply: expected [" + std::to_string(c.m) + ", " +
                            std::to_string(c.n) + "], got [" + std::to_string(reply.m_or_message_bytes) + ", " +
                            std::to_string(reply.n) + "]");
  }
  y.resize(c.expected.size());
  protocol::receive_rest(fd, y.data(), y.size() * sizeof(float));
}

// ||y - expected|| / ||expected||; NaN if y holds one.
double relative_error(const std::vector<float>& y, const std::vector<double>& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    difference += (y[i] - expected[i]) * (y[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return difference == 0 ? 0 : std::sqrt(difference / norm);
}

// The work of one connection; `worst` gets the largest error.
void run_connection(const std::vector<Case>& cases, const ClientOptions& options, size_t first, double& worst) {
  const protocol::UniqueFd fd = protocol::connect_to(options.socket_path);
  std::vector<float> y;
  for (int request = 0; request < options.requests; ++request) {
    const Case& c = cases[(first + static_cast<size_t>(request)) % cases.size()];
    send_request(fd.get(), c);
    receive_reply(fd.get(), c, y);
    const double error = relative_error(y, c.expected);
    if (!(error <= worst)) worst = error;  // NaN counts as the largest
    if (std::isnan(worst)) return;
  }
}

}  // namespace

bool run_client(const safetensors::MappedFile& file, const ClientOptions& options) {
  const std::vector<Case> cases = make_cases(file, options);
  const auto connections = static_cast<size_t>(options.connections);
  std::vector<double> worst(connections);
  std::vector<std::exception_ptr> failures(connections);

  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  for (size_t i = 0; i < connections; ++i) {
    threads.emplace_back([&, i] {
      try {
        run_connection(cases, options, i, worst[i]);
      } catch (...) {
        failures[i] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  for (const std::exception_ptr& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }

  double max_error = 0;
  for (const double error : worst) {
    if (!(error <= max_error)) max_error = error;
  }
  const bool right = max_error <= options.tolerance;
  std::printf("%s: %d requests of M=%d over %d connections, %.1f requests/s, max relative error %.2e (limit %.0e)\n",
              right ? "ok" : "MISMATCH", options.requests * options.connections, options.m, options.connections,
              options.requests * options.connections / elapsed.count(), max_error, options.tolerance);
  return right;
}

void request_shutdown(const std::string& socket_path) {
  const protocol::UniqueFd fd = protocol::connect_to(socket_path);
  protocol::send_all(fd.get(), &protocol::kShutdownMagic, 4);
  protocol::ReplyHeader reply;
  protocol::receive_rest(fd.get(), &reply, sizeof reply);
}
