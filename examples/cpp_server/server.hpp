// Serves y = x @ W^T + b for packed layers over a Unix domain socket.
//
// One thread waits for connections and for requests on idle ones; a fixed pool of workers receives, computes and
// answers one request at a time. A connection is idle, queued, or with one worker, so a silent client holds no worker.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "cutlass_ext/cutlass_ext.hpp"
#include "protocol.hpp"

struct ServedLayer {
  cutlass_ext::PackedWeight weight;
  std::vector<float> bias;  // empty: none
};
using Model = std::map<std::string, ServedLayer>;

struct ServerOptions {
  std::string socket_path;
  int workers = 4;
  int gemm_threads = 1;                        // CPU threads of one GEMM; workers run side by side
  size_t max_matrix_bytes = size_t{64} << 20;  // of the x or y of a request
};

class Server {
 public:
  // Listens, so that clients may connect; they are served by run().
  Server(const Model& model, const ServerOptions& options);
  ~Server();

  // Serves until `stop_fd` is readable or a client asks for shutdown. Requests that have begun are answered.
  void run(int stop_fd);

 private:
  struct Scratch {  // of a worker; grows to the largest request
    std::vector<float> x, y;
    cutlass_ext::Workspace workspace;
  };

  void wait_for_requests(int stop_fd);
  void accept_connection();
  void enqueue(protocol::UniqueFd connection);
  void take_returned();
  void work();
  bool serve_one(int fd, Scratch& scratch);
  bool serve_gemm(int fd, Scratch& scratch);
  bool reject(int fd, protocol::Status status, const std::string& message, bool keep);
  void wake();

  const Model& model_;
  const ServerOptions options_;
  protocol::UniqueFd listener_;
  protocol::UniqueFd wake_;  // eventfd: a worker returned or closed a connection, or took a shutdown request

  std::atomic<bool> stopping_{false};
  std::atomic<int> connections_{0};
  std::vector<protocol::UniqueFd> idle_;  // of the waiting thread

  std::mutex mutex_;  // guards what follows
  std::condition_variable queue_changed_;
  std::deque<protocol::UniqueFd> queue_;
  std::vector<protocol::UniqueFd> returned_;
  std::set<int> active_;  // connections that a worker reads or writes
};
