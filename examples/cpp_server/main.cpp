// Serves the quantized linear layers of a checkpoint, or checks and measures a running server. See README.md.
#include <signal.h>
#include <sys/signalfd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>

#include "checkpoint.hpp"
#include "client.hpp"
#include "cutlass_ext/cutlass_ext.hpp"
#include "safetensors.hpp"
#include "server.hpp"

namespace {

constexpr char kUsage[] =
    "cpp_server --file CKPT --socket PATH [--threads T] [--gemm-threads T] [--max-mib MIB]   serve\n"
    "cpp_server --file CKPT --client PATH [--layer NAME] [--m M] [--requests R] [--connections C]\n"
    "           [--tolerance E]                                                             check a server\n"
    "cpp_server --shutdown PATH                                                             stop a server\n"
    "cpp_server --file CKPT                                                                 list the layers\n";

class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The command line: every option takes a value.
class Arguments {
 public:
  Arguments(int argc, char** argv) {
    static constexpr std::string_view kKnown[] = {"--file",     "--socket",      "--threads",   "--gemm-threads",
                                                  "--max-mib",  "--client",      "--layer",     "--m",
                                                  "--requests", "--connections", "--tolerance", "--shutdown"};
    for (int i = 1; i < argc; i += 2) {
      const std::string option = argv[i];
      bool known = false;
      for (const std::string_view name : kKnown) known |= option == name;
      if (!known) throw UsageError("expected an option, got '" + option + "'");
      if (i + 1 == argc) throw UsageError(option + ": expected a value, got the end of the command line");
      values_[option] = argv[i + 1];
    }
  }

  bool has(const std::string& option) const { return values_.count(option) != 0; }

  std::string text(const std::string& option) const {
    const auto it = values_.find(option);
    return it == values_.end() ? "" : it->second;
  }

  int integer(const std::string& option, int fallback, int low, int high) const {
    if (!has(option)) return fallback;
    const std::string value = text(option);
    char* end = nullptr;
    errno = 0;
    const long number = std::strtol(value.c_str(), &end, 10);
    if (value.empty() || *end || errno || number < low || number > high) {
      throw UsageError(option + ": expected " + std::to_string(low) + ".." + std::to_string(high) + ", got '" + value +
                       "'");
    }
    return static_cast<int>(number);
  }

  double positive(const std::string& option, double fallback) const {
    if (!has(option)) return fallback;
    const std::string value = text(option);
    char* end = nullptr;
    const double number = std::strtod(value.c_str(), &end);
    if (value.empty() || *end || !(number > 0)) {
      throw UsageError(option + ": expected a positive number, got '" + value + "'");
    }
    return number;
  }

 private:
  std::map<std::string, std::string> values_;
};

// Packs every quantized layer; after that the file is not needed any more.
Model load_model(const std::string& path) {
  const safetensors::MappedFile file(path);
  Model model;
  for (const std::string& name : quantized_layers(file)) {
    const CanonicalLayer layer(file, name);
    model.try_emplace(name, ServedLayer{cutlass_ext::PackedWeight(layer.weight()), layer.bias()});
  }
  return model;
}

void list_layers(const std::string& path) {
  const auto formats = cutlass_ext::formats();
  for (const auto& [name, layer] : load_model(path)) {
    const cx_weight& weight = layer.weight.view();
    std::printf("%s: %s, N=%lld, K=%lld, group_size=%lld, %zu bytes packed%s\n", name.c_str(),
                formats[static_cast<size_t>(weight.format)].name, static_cast<long long>(weight.n),
                static_cast<long long>(weight.k), static_cast<long long>(weight.group_size), layer.weight.bytes(),
                layer.bias.empty() ? "" : ", bias");
  }
}

void serve(const Arguments& arguments) {
  // Signals arrive through a descriptor. Blocked before the first thread starts, so that all threads inherit it.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  sigprocmask(SIG_BLOCK, &signals, nullptr);
  const protocol::UniqueFd stop(::signalfd(-1, &signals, SFD_CLOEXEC));
  if (stop.get() < 0) protocol::throw_errno("signalfd");

  ServerOptions options;
  options.socket_path = arguments.text("--socket");
  options.workers = arguments.integer("--threads", options.workers, 1, 1024);
  options.gemm_threads = arguments.integer("--gemm-threads", options.gemm_threads, 1, 1024);
  options.max_matrix_bytes = static_cast<size_t>(arguments.integer("--max-mib", 64, 1, 4096)) << 20;
  const Model model = load_model(arguments.text("--file"));
  size_t bytes = 0;
  for (const auto& [name, layer] : model) bytes += layer.weight.bytes();

  Server server(model, options);
  std::printf("ready: %zu layers, %.1f MiB packed, %d threads, %s\n", model.size(),
              static_cast<double>(bytes) / (1 << 20), options.workers, options.socket_path.c_str());
  std::fflush(stdout);
  server.run(stop.get());
  std::printf("stopped\n");
}

bool check_server(const Arguments& arguments) {
  ClientOptions options;
  options.socket_path = arguments.text("--client");
  options.layer = arguments.text("--layer");
  options.m = arguments.integer("--m", options.m, 0, 1 << 20);
  options.requests = arguments.integer("--requests", options.requests, 1, 1 << 20);
  options.connections = arguments.integer("--connections", options.connections, 1, 256);
  options.tolerance = arguments.positive("--tolerance", options.tolerance);
  return run_client(safetensors::MappedFile(arguments.text("--file")), options);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Arguments arguments(argc, argv);
    cutlass_ext::check_version();
    if (arguments.has("--shutdown")) {
      request_shutdown(arguments.text("--shutdown"));
      return 0;
    }
    if (!arguments.has("--file")) throw UsageError("--file: expected a checkpoint, got none");
    if (arguments.has("--client")) return check_server(arguments) ? 0 : 1;
    arguments.has("--socket") ? serve(arguments) : list_layers(arguments.text("--file"));
    return 0;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "cpp_server: %s\n\n%s", error.what(), kUsage);
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cpp_server: %s\n", error.what());
    return 1;
  }
}
